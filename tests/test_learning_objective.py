"""learning/objective.py: derivatives against finite differences, the minimum against scipy, and hostile votes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from p2l_engine.feedback import Outcome, feedback_model
from p2l_engine.learning import likelihood
from p2l_engine.learning.objective import Objective, minimise
from p2l_engine.votes import Votes

NAMES = ["bt", "bt-tie", "rk", "rk-reparam", "grk", "ols", "poisson"]
P, M, R = 7, 4, 3


def problem(name, seed=0, n=40):
    """Models 1 and 3 are free; half of the values of ols and poisson are of single models."""
    rng, feedback = np.random.default_rng(seed), feedback_model(name)
    prompt, a = rng.integers(0, P, n), rng.integers(0, M, n)
    b = (a + rng.integers(1, M, n)) % M
    if feedback.of_values:
        outcome = rng.poisson(2, n).astype(float)
        b[::2] = -1
    else:
        outcome = rng.integers(0, 2 if name == "bt" else 4, n)
    votes = Votes.make([(str(i),) for i in range(P)], "abcd", prompt, a, b, outcome, 3 * rng.random(n))
    eta = rng.normal(size=P) + (5 if name == "rk" else 0)
    factors = {1: rng.normal(size=(R, R)), 3: np.tril(rng.normal(size=(R, R)))}
    return Objective(feedback, votes, eta, rng.normal(size=(P, M)), rng.normal(size=(P, R)), factors)


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_are_those_of_the_value(name):
    objective, rng = problem(name), np.random.default_rng(1)
    u, x = rng.normal(size=(2, 2, R)) / 2
    local = objective.at(u)
    assert local.value == pytest.approx(objective.value(u), rel=1e-12)
    steps = 1e-5 * np.eye(2 * R).reshape(-1, 2, R)
    slopes = [(objective.value(u + e) - objective.value(u - e)) / 2e-5 for e in steps]
    np.testing.assert_allclose(local.gradient.ravel(), slopes, rtol=1e-5, atol=1e-6)
    bend = (objective.at(u + 1e-6 * x).gradient - objective.at(u - 1e-6 * x).gradient) / 2e-6
    np.testing.assert_allclose(objective.hessian_times(local.exact, x), bend, rtol=1e-4, atol=1e-5)
    whole = objective.hessian(local.exact)
    np.testing.assert_allclose(whole @ x.ravel(), objective.hessian_times(local.exact, x).ravel(), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(whole.reshape(2, R, 2, R)[[0, 1], :, [0, 1], :], objective.blocks(local.exact), atol=1e-10)
    assert np.linalg.eigvalsh(objective.hessian(local.definite)).min() > 0


@pytest.mark.parametrize("name", NAMES)
def test_the_minimum_is_the_one_that_scipy_finds(name):
    objective = problem(name)
    found = minimise(objective)
    by_scipy = minimize(
        lambda z: objective.value(z.reshape(2, R)),
        np.zeros(2 * R),
        jac=lambda z: objective.at(z.reshape(2, R)).gradient.ravel(),
        method="BFGS",
        options={"gtol": 1e-9},
    )
    np.testing.assert_allclose(found.u.ravel(), by_scipy.x, atol=1e-6)
    assert found.local.value <= by_scipy.fun + 1e-9
    assert found.distance <= 1e-9 * (1 + np.linalg.norm(found.u))


def hostile(name, outcomes, weight, against=0):
    """Votes of the free model 1 against a known one, on one prompt."""
    feedback, n = feedback_model(name), len(outcomes)
    votes = Votes.make(
        [("p",)], "ab", np.zeros(n, int), np.ones(n, int), np.full(n, against), np.array(outcomes), np.array(weight, float)
    )
    return Objective(
        feedback, votes, np.array([5.0 if name == "rk" else 0.0]), np.zeros((1, 2)), np.ones((1, 1)), {1: np.eye(1)}
    )


@settings(max_examples=15)
@given(
    st.sampled_from(["bt-tie", "rk", "rk-reparam", "grk"]),
    st.lists(st.sampled_from([0, 1, 2, 3]), min_size=1, max_size=6),
    st.sampled_from([0.0, 1e-9, 1.0, 1e3, 1e9]),
    st.sampled_from([0.0, 1.0, 1e9]),
)
@example("rk-reparam", [0], 1e9, 0.0)  # log P(A) = -2e-8, times 1e9: the value's rounding is larger than a step's gain
def test_hostile_votes_have_a_minimum_whose_gradient_is_zero(name, outcomes, weight, other):
    objective = hostile(name, outcomes, [weight, *[other] * (len(outcomes) - 1)])
    found = minimise(objective)
    assert np.isfinite(found.u).all()
    assert found.distance <= 1e-9 * (1 + np.linalg.norm(found.u))
    # No point nearby, or far away, is lower.
    for shift in (-10.0, -1.0, -0.01, 0.01, 1.0, 10.0):
        assert objective.value(found.u + shift) >= found.local.value - 2 * found.local.noise


far = st.sampled_from([-300.0, -30.0, 0.0, 5.0, 50.0, 300.0])


@pytest.mark.slow
@settings(max_examples=30)
@given(
    st.sampled_from(["bt-tie", "rk", "rk-reparam", "grk"]),
    st.lists(st.tuples(st.sampled_from([0, 1, 2, 3]), st.sampled_from([0.0, 1e-3, 1.0, 12345.0, 1e9])), min_size=1, max_size=6),
    st.tuples(far, far),
    st.sampled_from([-5.0, 0.0, 5.0, 20.0, 100.0]),
)
@example("grk", [(1, 12345.0)], (5.0, 5.0), 20.0)  # the first step ends at -772, where exp overflows
def test_hostile_votes_far_from_the_prior_have_a_minimum(name, votes, means, eta):
    objective = hostile(name, [of for of, _ in votes], [weight for _, weight in votes])
    objective.base = np.array([means])
    if objective.eta is not None:
        objective.eta = np.full(len(objective.eta), eta)
    found = minimise(objective)
    assert found.distance <= 1e-9 * (1 + np.linalg.norm(found.u))
    for shift in (-0.01, 0.01):
        assert objective.value(found.u + shift) >= found.local.value - 2 * found.local.noise


@pytest.mark.parametrize("weight", [1.0, 1e3, 1e9])
def test_a_model_that_only_won_stops_where_the_prior_holds_it(weight):
    import mpmath

    found = minimise(hostile("bt", [Outcome.A], [weight])).u[0, 0]
    with mpmath.workdps(40):
        # u = weight / (1 + exp(u)), in logarithms
        excess = lambda u: mpmath.log(u) + mpmath.log1p(mpmath.exp(u)) - mpmath.log(weight)  # noqa: E731
        exact = mpmath.findroot(excess, (mpmath.mpf("1e-3"), mpmath.mpf(30)), solver="anderson")
    assert found == pytest.approx(float(exact), rel=1e-9)


def counted(values, weight, mean=0.0):
    """Counts of the free model 1 alone, on one prompt."""
    n = len(values)
    votes = Votes.make(
        [("p",)], "ab", np.zeros(n, int), np.ones(n, int), np.full(n, -1), np.array(values, float), np.full(n, weight)
    )
    base = np.array([[0.0, mean]])
    return Objective(feedback_model("poisson"), votes, None, base, np.ones((1, 1)), {1: np.eye(1)})


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.sampled_from([0, 1, 5, 1e6, 1e15]), min_size=1, max_size=3),
    st.sampled_from([1e-9, 1.0, 1e9]),
    st.sampled_from([-300.0, -5.0, 0.0, 5.0, 100.0]),
)
@example([1e6], 1e9, 0.0)  # the gradient's rounding promises more than the tolerance
@example([1e15], 1.0, 0.0)  # the first step is 5e14 too long
@example([0], 1e9, 100.0)
def test_counts_end_where_mpmath_does(values, weight, mean):
    import mpmath

    found = minimise(counted(values, weight, mean))
    with mpmath.workdps(60):
        slope = lambda u: u + mpmath.mpf(weight) * (len(values) * mpmath.exp(mean + u) - sum(map(int, values)))  # noqa: E731
        low, high = mpmath.mpf(-1e25), mpmath.mpf(1000)
        for _ in range(200):
            exact = (low + high) / 2
            low, high = (exact, high) if slope(exact) < 0 else (low, exact)
    assert found.u[0, 0] == pytest.approx(float(exact), rel=1e-8, abs=1e-8)


@pytest.mark.parametrize("problem", [counted([0], 1.0, 800.0), counted([1e300], 1e9)])
def test_what_is_beyond_float64_is_refused(problem):
    with np.errstate(all="raise"), pytest.raises(ArithmeticError, match="beyond float64"):
        minimise(problem)


@pytest.mark.parametrize(
    ("name", "outcome", "weight", "message"),
    [
        ("grk", [1.5], [1.0], "outcome: expected votes for grk"),
        ("ols", [1], [1.0], "outcome: expected values for ols"),
        ("grk", [4], [1.0], "outcome: expected 0, 1, 2, 3, got"),
        ("grk", [-1], [1.0], "outcome: expected 0, 1, 2, 3, got"),
        ("bt", [0], [-1.0], "weight: expected finite numbers of at least 0, got -1"),
        ("bt", [0], [np.nan], "weight: expected finite"),
        ("bt", [0], [np.inf], "weight: expected finite"),
        ("ols", [np.nan], [1.0], "outcome: expected finite values"),
        ("poisson", [-1.0], [1.0], "outcome: expected counts"),
        ("poisson", [0.5], [1.0], "outcome: expected counts"),
    ],
)
def test_outcomes_and_weights_that_are_none_are_refused(name, outcome, weight, message):
    with pytest.raises(ValueError, match=message):
        hostile(name, outcome, weight)


@pytest.mark.parametrize("name", NAMES)
def test_both_computations_of_second_derivatives_agree(name, rng):
    feedback = feedback_model(name)
    linear = rng.normal(size=(3, 50))
    linear[2] += 5 if name == "rk" else 0
    outcome = rng.poisson(2, 50).astype(float) if feedback.of_values else rng.integers(0, 2 if name == "bt" else 4, 50)
    near = likelihood.information(feedback, linear, outcome)
    first, second = likelihood.curvature(feedback, linear, outcome)
    np.testing.assert_allclose(near.losses, likelihood.losses(feedback, linear, outcome), rtol=1e-12)
    np.testing.assert_allclose(near.first, first.T, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(near.first, likelihood.gradient(feedback, linear, outcome)[1].T, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(near.exact, np.moveaxis(second, 2, 0), rtol=1e-9, atol=1e-13)
    assert np.linalg.eigvalsh(near.definite).min() > -1e-12


@pytest.mark.parametrize("prompts", [0, 3])
def test_nothing_to_learn_is_at_its_minimum(prompts):
    none = Votes.make([(str(i),) for i in range(prompts)], "ab", *[np.zeros(0, int)] * 4)
    found = minimise(Objective(feedback_model("bt"), none, None, np.zeros((prompts, 2)), np.ones((prompts, 5)), {}))
    assert found.u.shape == (0, 5)


def test_votes_without_weight_change_nothing():
    assert minimise(hostile("bt", [0, 0, 1], [0, 0, 0])).u[0, 0] == 0.0
    assert minimise(hostile("bt", [0, 1], [1.0, 0.0])).u[0, 0] == minimise(hostile("bt", [0], [1.0])).u[0, 0]


def test_votes_that_contradict_leave_the_model_where_it_was():
    assert minimise(hostile("bt", [0, 1], [5.0, 5.0])).u[0, 0] == pytest.approx(0.0, abs=1e-12)


def test_weights_that_leave_no_room_for_the_prior_are_refused():
    with pytest.raises(ValueError, match=r"weight: expected at most 1e\+09 for a vote, got 1e\+100; divide all weights"):
        hostile("bt", [0], [1e100])


def test_a_tie_needs_a_feedback_model_that_has_ties():
    with pytest.raises(ValueError, match="knows no ties"):
        hostile("bt", [2], [1.0])

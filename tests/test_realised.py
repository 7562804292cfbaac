"""What policies cost after the draw: the variance against exact rationals, the bound against exact tails and draws."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2l_engine import routing
from p2l_engine.routing import Policies, Problem, Resource, Share, solve


def exact_variance(costs, probabilities):
    p = [Fraction(float(x)) for x in probabilities]
    c = [Fraction(float(x)) for x in costs]
    total = sum(p)  # 1 up to rounding
    mean = sum(a * b for a, b in zip(p, c, strict=True)) / total
    return sum(a * (b - mean) ** 2 for a, b in zip(p, c, strict=True)) / total


def exact_tail(policies, bound):
    """The probability that the sum of independent draws exceeds the bound."""
    tail = Fraction(0)
    prompts = [
        [(Fraction(float(c)), Fraction(float(p))) for c, p in zip(costs, ps, strict=True) if p > 0]
        for costs, ps in zip(policies.mixed_costs, policies.probabilities, strict=True)
    ]
    for outcome in itertools.product(*prompts):
        if sum(cost for cost, _ in outcome) > Fraction(bound):
            weight = Fraction(1)
            for _, p in outcome:
                weight *= p
            tail += weight
    return tail


def mixed(costs, probabilities):
    """Policies that mix all models of one set of costs [N, W]."""
    costs, probabilities = np.asarray(costs, float), np.asarray(probabilities, float)
    indices = np.tile(np.arange(costs.shape[1], dtype=np.int32), (len(costs), 1))
    return Policies(indices, probabilities, np.zeros(len(costs)), (costs * probabilities).sum(1), mixed_costs=costs)


def problems(rng):
    v, costs = rng.random((40, 5)), np.array([0.1, 0.2, 0.5, 1.0, 4.0])
    own = costs * rng.uniform(0.5, 2, size=(40, 5))
    for amounts in (costs, own):
        yield routing.solve_budget(v, amounts, 0.9), amounts
        yield routing.solve_budget(v, amounts, 0.9, solver="highs"), amounts
        yield routing.solve_batch_budget(v, amounts, 0.4), amounts
        yield routing.solve_batch_budget(v, amounts, 0.9, max_share=[0.3, 1, 1, 1, 0.2]), amounts
        yield routing.solve_batch_budget(v, amounts, 0.4, solver="highs"), amounts
        yield solve(Problem(v, amounts, 1.2, resources=[Resource("s", rng.random(5), 0.6)], shares=[Share(4, 0.1)])), amounts
        yield solve(Problem(v, amounts, resources=[Resource("s", costs, 0.6)])), amounts
        yield solve(Problem(v, amounts, resources=[Resource("s", costs, 0.6, "batch")])), amounts
    yield solve(Problem(v, resources=[Resource("s", costs, 0.6)])), np.zeros(5)


def test_every_solver_gives_the_variance_of_its_costs(rng):
    seen = set()
    for policies, costs in problems(rng):
        seen.add(policies.solver)
        full = np.broadcast_to(costs, (40, 5))
        drawn = np.take_along_axis(full, policies.indices.astype(int), axis=1)
        exact = [float(exact_variance(*row)) for row in zip(drawn, policies.probabilities, strict=True)]
        assert policies.variance.shape == policies.cost.shape
        np.testing.assert_allclose(policies.variance, exact, rtol=1e-9, atol=1e-15)
        one = policies.probabilities.max(axis=1) == 1
        assert (policies.variance[one] == 0).all()
        some = policies.of([3, 3, 0])
        np.testing.assert_array_equal(some.variance, policies.variance[[3, 3, 0]])
    assert seen == {"frontier", "dual", "highs"}


def test_a_fair_coin_by_hand():
    p = routing.solve_budget([[0.1, 0.9]], [1.0, 3.0], 2.0)
    assert p.probabilities.tolist() == [[0.5, 0.5]]
    assert p.variance.tolist() == [1.0]
    assert p.cost_bound(0.6) == pytest.approx(2 + np.sqrt(0.4 / 0.6))  # Cantelli
    assert p.cost_bound(1e-9) == pytest.approx(3.0)  # never beyond the dearer model
    many = p.of(np.zeros(10_000, int))
    assert many.cost_bound(0.01) == pytest.approx(20_000 + np.sqrt(np.log(100) / 2 * 10_000 * 4), rel=1e-9)  # Hoeffding
    assert many.cost_bound(0.01, draws=np.zeros(10_000, int)) == pytest.approx(30_000)  # all of them draw alike
    assert many.cost_bound(0.01, draws=np.arange(10_000)) == many.cost_bound(0.01)
    rare = mixed(np.tile([0.0, 1.0], (10_000, 1)), np.tile([0.999, 0.001], (10_000, 1)))
    beyond = np.sqrt(2 * 10_000 * 0.000999 * np.log(100)) + 0.999 * np.log(100) / 3
    assert rare.cost_bound(0.01) == pytest.approx(10 + beyond)  # Bernstein


def test_tensors_keep_their_kind():
    import torch

    p = routing.solve_budget(torch.tensor([[0.1, 0.9]]), [1.0, 3.0], 2.0)
    assert isinstance(p.variance, torch.Tensor)
    assert p.variance.tolist() == [1.0]
    assert p.cost_bound(0.6) == routing.solve_budget([[0.1, 0.9]], [1.0, 3.0], 2.0).cost_bound(0.6)


def test_nearly_equal_costs_lose_no_digits():
    costs, p = [1e6, 1e6 + 2**-10, 1e6], [0.25, 0.5, 0.25]
    assert mixed([costs], [p]).variance.tolist() == [float(exact_variance(costs, p))]


def test_costs_that_change_later_change_nothing():
    costs = np.array([1.0, 3.0])
    p = routing.solve_budget(np.array([[0.1, 0.9]]), costs, 2.0)
    costs[:] = 100.0
    assert p.variance.tolist() == [1.0]


amounts = st.one_of(st.just(0.0), st.floats(1e-9, 1e6), st.sampled_from([0.1, 1.0, 1.0, 1e5]))
rows = st.lists(amounts, min_size=3, max_size=3).flatmap(
    lambda costs: st.tuples(
        st.just(costs), st.lists(st.integers(0, 7), min_size=3, max_size=3).filter(any).map(lambda w: [x / sum(w) for x in w])
    )
)


@pytest.mark.slow
@given(st.lists(rows, min_size=1, max_size=6), st.floats(1e-12, 1 - 1e-12))
def test_the_exact_probability_of_more_is_at_most_delta(prompts, delta):
    policies = mixed(*zip(*prompts, strict=True))
    bound = policies.cost_bound(delta)
    assert exact_tail(policies, bound) <= Fraction(delta) * (1 + Fraction(1, 10**9))
    assert bound <= policies.mixed_costs.max(axis=1).sum() * (1 + 1e-11)
    exact = [float(exact_variance(costs, p)) for costs, p in prompts]
    widest = np.ptp(policies.mixed_costs, axis=1).max()
    np.testing.assert_allclose(policies.variance, exact, rtol=1e-9, atol=1e-14 * widest**2)


@pytest.mark.parametrize("delta", [0.3, 0.05, 0.01])
def test_draws_stay_within_the_bound(rng, delta):
    p = routing.solve_budget(rng.random((300, 8)), np.exp(rng.normal(size=8)), 1.0)
    second = rng.random((4000, 300)) < p.probabilities[:, 1]
    totals = np.where(second, p.mixed_costs[:, 1], p.mixed_costs[:, 0]).sum(1)
    bound = p.cost_bound(delta)
    assert (totals > bound).mean() <= delta + 3 * np.sqrt(delta / 4000)
    assert bound < p.mixed_costs.max(axis=1).sum()
    assert totals.var() == pytest.approx(p.variance.sum(), rel=0.1)
    # Prompts in threes that share their draw.
    shared = np.repeat(rng.random((4000, 100)), 3, axis=1) < p.probabilities[:, 1]
    totals = np.where(shared, p.mixed_costs[:, 1], p.mixed_costs[:, 0]).sum(1)
    assert (totals > p.cost_bound(delta, np.repeat(np.arange(100), 3))).mean() <= delta + 3 * np.sqrt(delta / 4000)


def test_bad_arguments_are_named():
    p = routing.solve_budget([[0.1, 0.9]], [1.0, 3.0], 2.0)
    for delta in (0, 1, -0.1, 1.1, float("nan"), True):
        with pytest.raises(ValueError, match="delta: expected a probability between 0 and 1"):
            p.cost_bound(delta)
    for draws in ([0, 1], [0.5], [[0]]):
        with pytest.raises(ValueError, match="draws: expected whole numbers \\[1\\]"):
            p.cost_bound(0.1, np.array(draws))
    with pytest.raises(ValueError, match="mixed_costs: expected the costs"):
        _ = Policies(p.indices, p.probabilities, p.value, p.cost).variance
    assert routing.solve_budget(np.zeros((0, 2)), [1.0, 2.0], 3.0).cost_bound(0.1) == 0.0

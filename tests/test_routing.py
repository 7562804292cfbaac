"""Win rates, budgets and scores against reference implementations, HiGHS and scipy, on odd shapes and hostile values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from p2l_engine import InfeasibleBudget, routing
from p2l_engine.native import routing as native
from tests.support import reference

settings.register_profile("routing", deadline=None, max_examples=150)
settings.load_profile("routing")


@st.composite
def problems(draw):
    """theta [N, M], q ([M] or [N, M]), costs ([M] or [N, M]) and budget [N], with ties, one-hot q and wide spans."""
    n, m = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    span = draw(st.sampled_from([0.0, 1.0, 5.0, 50.0, 400.0]))
    theta = rng.normal(size=(n, m)) * span
    if draw(st.booleans()):
        theta = np.round(theta)  # equal values
    shape = (m,) if draw(st.booleans()) else (n, m)
    if draw(st.booleans()):
        q = np.zeros(shape)
        q[..., draw(st.integers(0, m - 1))] = 1.0
    else:
        q = rng.dirichlet(np.full(m, draw(st.sampled_from([0.05, 1.0, 50.0]))), size=shape[:-1])
    cost_shape = (m,) if draw(st.booleans()) else (n, m)
    costs = rng.exponential(size=cost_shape) * 10.0 ** draw(st.sampled_from([-6, 0, 6]))
    if draw(st.booleans()):
        costs = np.round(costs)  # equal costs, free models
    low, high = np.broadcast_to(costs, (n, m)).min(1), np.broadcast_to(costs, (n, m)).max(1)
    budget = low + (high - low) * rng.choice([0.0, 0.3, 0.7, 1.0, 1.5], size=n)
    return theta, q, costs, budget


@pytest.mark.slow
@given(problems())
def test_win_rates_match_the_reference(problem):
    theta, q, *_ = problem
    v = routing.win_rates(theta, q)
    np.testing.assert_allclose(v, reference.win_rates(theta, q), rtol=1e-12, atol=1e-300)
    assert (v >= 0).all()
    assert (v <= 1 + 1e-12).all()


@pytest.mark.slow
@given(problems())
def test_budget_matches_the_reference_and_highs(problem):
    theta, q, costs, budget = problem
    v = reference.win_rates(theta, q)
    full = np.broadcast_to(costs, v.shape)
    p = routing.solve_budget(v, costs, budget)
    expected = reference.solve_budget(v, costs, budget)
    np.testing.assert_allclose(p.value, expected[2], rtol=1e-12, atol=1e-15)
    highs = routing.solve_budget(v, costs, budget, solver="highs")
    # HiGHS's own tolerances are absolute at 1e-7: only the budget that it met can be compared with.
    assert (highs.value <= p.value + 1e-6).all()
    np.testing.assert_allclose(p.value, highs.value, atol=1e-6)
    assert p.indices.shape == (len(v), 2)
    np.testing.assert_allclose(p.probabilities.sum(1), 1, atol=1e-15)
    assert (p.probabilities >= 0).all()
    # A budget one rounding short of a model's cost buys that model whole.
    assert (p.cost <= budget * (1 + 4e-16)).all()
    spent = (p.probabilities * np.take_along_axis(full, p.indices, 1)).sum(1)
    np.testing.assert_allclose(p.cost, spent, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(p.value, (p.probabilities * np.take_along_axis(v, p.indices, 1)).sum(1), rtol=1e-12)
    unused = p.probabilities[:, 1] == 0
    assert (p.indices[unused, 0] == p.indices[unused, 1]).all()


@pytest.mark.slow
@given(problems())
def test_score_matches_the_reference(problem):
    theta, q, costs, budget = problem
    rate = routing.solve_budget(routing.win_rates(theta, q), costs, budget).value
    assume(((rate > 0) & (rate < 1)).all())
    score = routing.bt_score(theta, q, rate)
    # Where G is flat the root is as loose as the rate's last bit: compare the rates there, the roots elsewhere.
    assert np.isfinite(score).all()
    reached = (np.broadcast_to(q, theta.shape) * reference.sigmoid(score[:, None] - theta)).sum(1)
    np.testing.assert_allclose(reached, rate, rtol=1e-11, atol=1e-300)
    steep = (rate > 1e-6) & (rate < 1 - 1e-6) & (np.ptp(theta, axis=1) < 20)
    np.testing.assert_allclose(score[steep], reference.bt_score(theta, q, rate)[steep], rtol=1e-9, atol=1e-9)


def test_score_matches_brentq_at_130_models(rng):
    theta, q = rng.normal(size=(200, 130)), rng.dirichlet(np.ones(130))
    rate = rng.uniform(0.05, 0.95, size=200)
    score = routing.bt_score(theta, q, rate)
    for row, r, s in zip(theta, rate, score, strict=True):
        expected = brentq(lambda x, row=row, r=r: q @ reference.sigmoid(x - row) - r, -50, 50, xtol=1e-13)
        assert s == pytest.approx(expected, abs=1e-9)


def test_score_of_a_single_model_policy_is_its_coefficient(rng):
    theta = rng.normal(size=(50, 9)) * 3
    q = np.full(9, 1 / 9)
    best = theta.argmax(1)
    rate = routing.win_rates(theta, q)[np.arange(50), best]
    np.testing.assert_allclose(routing.bt_score(theta, q, rate), theta.max(1), atol=1e-10)


def test_score_at_the_ends_and_with_one_hot_opponents():
    theta = np.array([[1.0, 2.0, -3.0]])
    one_hot = np.array([0.0, 1.0, 0.0])
    assert routing.bt_score(theta, one_hot, np.array([0.0]))[0] == -np.inf
    assert routing.bt_score(theta, one_hot, np.array([1.0]))[0] == np.inf
    assert routing.bt_score(theta, one_hot, np.array([0.75]))[0] == pytest.approx(2 + np.log(3), abs=1e-15)
    for rate in (5e-324, 1e-300, 1e-12, 1 - 1e-12, np.nextafter(1, 0)):
        uniform = np.full(3, 1 / 3)
        score = routing.bt_score(theta, uniform, np.array([rate]))[0]
        assert np.isfinite(score)
        assert routing.bt_score(theta, uniform, np.array([min(rate * 1.5, 1.0)]))[0] >= score


def test_hull_breaks_ties_by_cost_then_index():
    v = np.array([[0.5, 0.5, 0.5], [0.2, 0.7, 0.7]])
    p = routing.solve_budget(v, np.array([2.0, 1.0, 1.0]))
    assert p.indices.tolist() == [[1, 1], [1, 1]]
    assert p.cost.tolist() == [1.0, 1.0]


def test_mixes_at_the_budget():
    p = routing.solve_budget(np.array([[0.2, 0.8]]), np.array([1.0, 3.0]), 1.5)
    assert p.indices.tolist() == [[0, 1]]
    np.testing.assert_allclose(p.probabilities, [[0.75, 0.25]])
    assert p.cost[0] == 1.5
    assert p.value[0] == pytest.approx(0.35)


def test_batch_budget_is_feasible_and_dominates(rng):
    v, costs = rng.uniform(size=(60, 5)), rng.exponential(size=5)
    budget = float(costs.min() + 0.4 * np.ptp(costs))
    p = routing.solve_batch_budget(v, costs, budget)
    assert p.cost.mean() <= budget * (1 + 1e-6)
    assert p.value.mean() >= routing.solve_budget(v, costs, budget).value.mean() - 1e-9
    assert (np.count_nonzero(p.probabilities, axis=1) > 1).sum() <= 1
    capped = routing.solve_batch_budget(v, costs, None, max_share=np.full(5, 0.25))
    shares = np.zeros(5)
    np.add.at(shares, capped.indices.ravel(), capped.probabilities.ravel())
    assert shares.max() <= 0.25 * 60 * (1 + 1e-6)


@pytest.mark.slow
@given(st.integers(0, 2**32 - 1), st.sampled_from([1.0, 1e4, 1e8, 1e12]), st.sampled_from([1e-9, 1.0, 1e6]))
@settings(max_examples=100)
def test_batch_budget_holds_however_far_costs_span(seed, span, unit):
    rng = np.random.default_rng(seed)
    v, costs = rng.uniform(size=(12, 4)), unit * span ** rng.uniform(size=4)
    budget = float(np.sort(costs)[:2].mean())
    p = routing.solve_batch_budget(v, costs, budget)
    assert p.cost.mean() <= budget * (1 + 1e-6)
    each = routing.solve_budget(v, costs, budget)
    assert p.value.mean() >= each.value.mean() - 1e-6
    one = routing.solve_budget(v, costs, budget, solver="highs")
    assert (one.cost <= budget * (1 + 1e-6)).all()
    np.testing.assert_allclose(one.value, each.value, atol=1e-6)


def test_batch_budget_with_shares_in_small_units():
    v, costs = np.array([[0.9, 0.1], [0.1, 0.9]]), np.array([[2.0, 1.0], [1.0, 2.0]]) * 1e-8
    p = routing.solve_batch_budget(v, costs, 1.2e-8, np.array([0.6, 0.6]))
    assert p.cost.mean() <= 1.2e-8 * (1 + 1e-6)


def test_the_callers_budget_is_left_alone():
    budget = np.array([np.nextafter(1, 0), 2.0])
    budget.flags.writeable = False
    assert routing.solve_budget(np.ones((2, 2)), np.array([1.0, 2.0]), budget).cost.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("batch", [False, True])
def test_infeasible_budget_names_the_smallest_feasible_one(batch):
    v, costs = np.full((3, 2), 0.5), np.array([[1.0, 2.0], [4.0, 3.0], [5.0, 6.0]])
    solve = routing.solve_batch_budget if batch else routing.solve_budget
    with pytest.raises(InfeasibleBudget) as caught:
        solve(v, costs, 0.5)
    assert caught.value.smallest == (3.0 if batch else 1.0)
    if batch:
        assert solve(v, costs, caught.value.smallest).cost.mean() == pytest.approx(3.0)
    else:
        assert caught.value.index == 0
        assert "(and 2 more prompts)" in str(caught.value)


def test_torch_tensors_give_tensors():
    theta = torch.randn(7, 5)
    v = routing.win_rates(theta, torch.full((5,), 0.2))
    assert isinstance(v, torch.Tensor)
    p = routing.solve_budget(v, torch.arange(5.0), 2.0)
    assert isinstance(p.probabilities, torch.Tensor)
    assert isinstance(routing.bt_score(theta, torch.full((5,), 0.2), p.value), torch.Tensor)


def test_empty_batch():
    theta, q = np.zeros((0, 4)), np.full(4, 0.25)
    v = routing.win_rates(theta, q)
    assert v.shape == (0, 4)
    assert routing.solve_budget(v, np.ones(4), 1.0).indices.shape == (0, 2)
    assert routing.solve_batch_budget(v, np.ones(4), 1.0).indices.shape == (0, 2)
    assert routing.bt_score(theta, q, np.zeros(0)).shape == (0,)


@pytest.mark.parametrize("threads", [1, 2])
def test_every_thread_count_gives_the_same(threads, monkeypatch):
    rng = np.random.default_rng(3)
    theta, q, costs = rng.normal(size=(101, 34)), rng.dirichlet(np.ones(34)), rng.exponential(size=34)
    expected = native.win_rates(theta, q)
    monkeypatch.setattr(native, "threads", lambda n: threads)
    v = native.win_rates(theta, q)
    np.testing.assert_array_equal(v, expected)
    for row in (0, 50, 100):
        one = routing.solve_budget(v[row : row + 1], costs, 0.7)
        all_ = routing.solve_budget(v, costs, 0.7)
        assert one.value[0] == all_.value[row]


GOOD = {"theta": np.zeros((2, 3)), "q": np.full(3, 1 / 3), "costs": np.ones(3), "budget": 1.0}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("theta", [[0, np.nan, 0], [0, 0, 0]], r"theta\[0, 1\]: expected a finite number, got nan"),
        ("theta", [[0, 0, np.inf], [0, 0, 0]], r"theta\[0, 2\]"),
        ("theta", np.zeros(3), r"theta: expected shape \[N, M\]"),
        ("theta", np.zeros((2, 0)), r"theta: expected shape \[N, M\] with M >= 1"),
        ("theta", [["a"]], "theta: expected an array of real numbers"),
        ("q", [0.5, 0.4, 0.3], "q: expected weights that sum to 1, got a sum of 1.2"),
        ("q", [1.5, -0.5, 0], r"q\[1\]: expected a weight >= 0"),
        ("q", [np.nan, 0.5, 0.5], r"q\[0\]"),
        ("q", [0.5, 0.5], r"q: expected shape \[3\] or \[2, 3\], got \[2\]"),
        ("costs", [1, -1, 1], r"costs\[1\]: expected a cost >= 0"),
        ("costs", [1, np.inf, 1], r"costs\[1\]: expected a finite number"),
        ("costs", np.ones((3, 3)), "costs: expected shape"),
        ("budget", "1.0", "budget: expected a number, got '1.0'"),
        ("budget", True, "budget: expected a number, got True"),
        ("costs", ["1", "2", "3"], "costs: expected an array of real numbers"),
        ("theta", np.ones((2, 3)) * 1j, "theta: expected an array of real numbers"),
        ("budget", np.nan, "budget: expected a number, or None"),
        ("budget", -np.inf, "budget: expected a number, or None"),
        ("budget", [1.0, 2.0, 3.0], r"budget: expected a number or shape \[2\]"),
    ],
)
def test_bad_input_is_named(name, value, message):
    a = {**GOOD, name: value}
    with pytest.raises((ValueError, TypeError), match=message):
        routing.solve_budget(routing.win_rates(a["theta"], a["q"]), a["costs"], a["budget"])


def test_bad_rates_and_solvers_are_named():
    with pytest.raises(ValueError, match=r"rate: expected win rates in \[0, 1\]"):
        routing.bt_score(GOOD["theta"], GOOD["q"], [0.5, 1.5])
    with pytest.raises(ValueError, match="solver: expected 'frontier' or 'highs', got 'simplex'"):
        routing.solve_budget(np.zeros((1, 2)), np.ones(2), 1.0, solver="simplex")
    with pytest.raises(ValueError, match="max_share of model 0 = 0.3 and .* cannot hold together"):
        routing.solve_batch_budget(np.zeros((1, 3)), np.ones(3), None, max_share=np.full(3, 0.3))

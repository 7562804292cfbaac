"""Routing problems at the edges, against exact rationals: bounds of 0 and 1, tight, infinite and negative ones, amounts many
orders of magnitude apart, equal prompts, masks."""

from __future__ import annotations

import math
from fractions import Fraction
from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from p2l_engine import routing
from p2l_engine.routing import (
    Infeasible,
    InfeasibleBudget,
    LazyWinRates,
    Policies,
    Problem,
    Resource,
    Share,
    SolverError,
    conflicts,
    dual,
    farkas,
    highs,
    rounding,
    solve,
    surplus,
)
from p2l_engine.routing.problem import Row
from p2l_engine.routing.surplus import NoPolicy
from p2l_engine.routing.values import ArrayValues
from tests.support import exact, reference
from tests.support.cases import slow_but

V3 = np.array([[0.5, 0.9, 0.3], [0.6, 0.7, 0.3], [0.4, 0.8, 0.3]])
SEEDS = st.integers(0, 2**32 - 1)


def amounts(rng, n, m):
    """Amounts [M] or [N, M]: usual ones, small integers, twenty-four orders of magnitude, or equal but for 1e-9; some are 0."""
    shape = (n, m) if rng.random() < 0.3 else (m,)
    kind = rng.integers(5)
    if kind == 0:
        a = rng.exponential(size=shape)
    elif kind == 1:
        a = rng.integers(0, 3, shape).astype(float)
    elif kind == 2:
        a = 10.0 ** rng.uniform(-12, 12, shape)
    elif kind == 3:
        a = 10.0 ** rng.integers(-6, 7, shape)
    else:
        a = 1 + rng.random(shape) * 1e-9
    return a * (rng.random(shape) < 0.6) if rng.random() < 0.3 else a


def bound(rng, a, allowed, batch):
    """A bound: 0, the least or the most use, just above the least, in between, or anything from 1e-12 to 1e12."""
    shown = np.where(allowed, a, np.nan)
    least, most = np.nanmin(shown, axis=1), np.nanmax(shown, axis=1)
    if batch:
        least, most = least.mean(), most.mean()
    chosen = (
        least,
        0 * least,
        least + (most - least) * 10.0 ** rng.uniform(-12, 0),
        (least + most) / 2,
        0 * least + 10.0 ** rng.uniform(-12, 12),
        least + (most - least) * rng.random(),
        most,
        np.minimum(most, least * (1 + rng.random())),
    )[rng.integers(8)]
    if batch:
        return float(chosen)
    chosen = np.array(chosen)
    if rng.random() < 0.4:
        chosen[rng.random(len(chosen)) < 0.4] = np.inf
    return float(chosen.max()) if rng.random() < 0.3 else chosen


def hostile(seed, n, m, batch_only=False) -> Problem:
    """A problem at the edges, feasible or not."""
    rng = np.random.default_rng(seed)
    v = rng.random((n, m)) if rng.random() < 0.5 else rng.integers(0, 3, (n, m)) / 2
    if rng.random() < 0.3:
        v = np.repeat(v[: max(1, n // 7)], 8, axis=0)[:n]
        n = len(v)
    allowed = np.ones((n, m), bool)
    if rng.random() < 0.4:
        allowed = rng.random((n, m)) < 0.6
        allowed[np.arange(n), rng.integers(0, m, n)] = True

    def row():
        a, batch = amounts(rng, n, m), batch_only or rng.random() < 0.6
        return a, bound(rng, a, allowed, batch), "batch" if batch else "prompt"

    costs, budget, scope = row()
    if rng.random() < 0.2:
        budget = None
    resources = [Resource(f"resource {i}", *row()) for i in range(rng.integers(0, 3))]
    shares = []
    for group in np.array_split(rng.permutation(m), rng.integers(1, m + 1))[: rng.integers(0, 4)]:
        most = float(rng.choice([0, 1, rng.random(), 0.5, 1]))
        shares.append(Share(group, most, float(rng.choice([0, 0, 0, most, most * rng.random()]))))
    return Problem(v, costs, budget, scope, resources, shares, None if allowed.all() else allowed)


def check(problem: Problem, policies: Policies) -> None:
    """Rows hold: the budget to rounding, of the cost and of its sum; the others to 1e-9."""
    p, indices = policies.probabilities, policies.indices
    assert (p >= 0).all()
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-15)
    assert (indices[p == 0] == np.broadcast_to(indices[:, :1], p.shape)[p == 0]).all()
    if problem.mask is not None:
        assert np.take_along_axis(problem.mask, indices, 1)[p > 0].all()
    for row in (*problem.prompt_rows, *problem.batch_rows):
        use = routing.problem.expected(row.amounts, indices, p)
        use = rounding.mean(use) if row in problem.batch_rows else use
        assert np.all(use <= row.bound + 1e-9 * np.abs(row.bound)), row.name
        if row.name == "budget":
            cost = policies.cost if np.ndim(use) else rounding.mean(policies.cost)
            assert np.all(cost <= np.nextafter(row.bound, np.inf))
            assert np.all(use <= row.bound * (1 + 4e-16) + 5e-324)


def answers(problem: Problem) -> list[Policies | Infeasible]:
    found: list[Policies | Infeasible] = []
    for solver in ("auto", "highs"):
        try:
            found.append(solve(problem, solver))
        except Infeasible as error:
            found.append(error)
    return found


def test_the_oracle_is_linprog(rng):
    for _ in range(30):
        n, m = rng.integers(1, 6), rng.integers(1, 8)
        a, b, c = rng.integers(-3, 4, (m, n)), rng.integers(-2, 6, m), rng.integers(-3, 4, n)
        box = np.vstack([a, np.eye(n, dtype=int)])
        ends = np.append(b, np.full(n, 9))
        expected = linprog(-c, box, ends)
        ours = exact.maximum(
            *([Fraction(int(x)) for x in c], [[Fraction(int(x)) for x in r] for r in box], [*map(Fraction, ends)])
        )
        assert (ours is None) == (expected.status == 2)
        if ours is not None:
            assert float(ours) == pytest.approx(-expected.fun)


@pytest.mark.slow
@settings(max_examples=150)
@given(SEEDS, st.integers(1, 5), st.integers(1, 5))
def test_small_problems_equal_exact_rationals(seed, n, m):
    problem = hostile(seed, n, m)
    best = exact.optimum(problem)
    for answer in answers(problem):
        if isinstance(answer, Infeasible):  # within rounding of it, either answer is right
            assert best is None or exact.optimum(problem, -1e-12) is None
            continue
        check(problem, answer)
        if best is None:
            assert exact.optimum(problem, 1e-9) is not None
            continue
        assert answer.value.mean() == pytest.approx(best, abs=2e-9)
        assert answer.gap <= 1e-9
        assert all(0 <= price < np.inf for price in answer.prices.values())


@pytest.mark.slow
@settings(max_examples=8)
@given(SEEDS, st.integers(200, 2000), st.integers(2, 7))
def test_thousands_of_prompts_are_optimal_by_weak_duality(seed, n, m):
    """The dual prices prove it, whatever solver found them: no policies are worth more than
    mean max_m (v - prices . amounts) + prices . bounds."""
    problem = hostile(seed, n, m, batch_only=True)
    for answer in answers(problem):
        if isinstance(answer, Infeasible):
            continue
        check(problem, answer)
        v = problem.values.take(slice(None)).astype(np.longdouble)
        total = np.longdouble(0)
        for row in problem.batch_rows:
            v = v - answer.prices[row.name] * (row.amounts - np.longdouble(row.bound))
            total += answer.prices[row.name] * abs(row.bound)
        if problem.mask is not None:
            v[~problem.mask] = -np.inf
        assert float(v.max(1).mean()) <= answer.value.mean() + 1e-8 + 1e-15 * float(total)


@pytest.mark.slow
@settings(max_examples=15)
@given(SEEDS, st.integers(50, 600), st.integers(3, 8))
@example(1, 2156, 6)
@example(49, 648, 5)
def test_rows_of_both_scopes_nine_orders_apart_are_decided(seed, n, m):
    """HiGHS ends with an optimum, or with Infeasible where the prompts use more than the batch may, whatever they do."""
    rng = np.random.default_rng(seed)

    def drawn():
        return 10.0 ** rng.uniform(-4.5, 4.5, (n, m) if rng.random() < 0.5 else m)

    own, shared = drawn(), drawn()
    every = [np.broadcast_to(a, (n, m)) for a in (own, shared)]
    bounds = np.exp(rng.uniform(np.log(every[0].min(1)), np.log(every[0].max(1))))
    bound = float(np.exp(rng.uniform(np.log(every[1].min(1).mean()), np.log(every[1].max(1).mean()))))
    least = -solve(Problem(-every[1], own, bounds)).value.mean()
    problem = Problem(rng.random((n, m)), own, bounds, resources=[Resource("seconds", shared, bound, "batch")])
    if least > bound:
        with pytest.raises(Infeasible):
            solve(problem)
        return
    policies = solve(problem)
    check(problem, policies)
    # By weak duality at the row's price: every prompt at its best for itself.
    price = policies.prices["seconds"]
    most = solve(Problem(problem.value - price * every[1], own, bounds)).value.mean() + price * bound
    assert policies.value.mean() <= most + 1e-9
    assert policies.value.mean() >= most - 1e-7


@pytest.mark.parametrize("solver", ["dual", "highs"])
def test_a_share_of_zero_bars_a_model(solver):
    p = routing.solve_batch_budget(V3.tolist(), [0.1, 1, 0.2], 0.5, max_share=[0.5, 0, 1], solver=solver)
    assert p.value.mean() == pytest.approx(13 / 30, abs=1e-15)
    assert p.solver == solver
    assert not (p.indices[p.probabilities > 0] == 1).any()
    # One more unit of model 1's share replaces model 2, or model 0, by it where that is worth most: 0.9 - 0.3.
    assert p.prices["max_share of model 1"] >= 0.5 - 1e-12


@pytest.mark.parametrize("solver", ["auto", "highs"])
def test_a_budget_of_zero_leaves_the_free_models(solver, rng):
    v = rng.random((3000, 4))
    p = solve(Problem(v, [0, 0, 1, 2], 0, "batch", shares=[Share(0, 0.5)]), solver)
    gain = np.sort(v[:, 0] - v[:, 1])[::-1]
    assert p.value.mean() == pytest.approx(v[:, 1].mean() + gain[:1500].clip(0).sum() / 3000, rel=1e-12)
    assert (p.cost == 0).all()


@pytest.mark.slow
@settings(max_examples=60)
@given(SEEDS, st.integers(1, 40), st.integers(2, 6), st.sampled_from([0.0, 1.0]))
def test_prices_at_the_edge_are_slopes(seed, n, m, share):
    """Where a bound leaves nothing, its price is still what more of it adds at most."""
    rng = np.random.default_rng(seed)
    v, costs = rng.random((n, m)), rng.integers(0, 3, m).astype(float)

    def best(budget, share):
        shares = [Share(0, at_most=share)] if share < 1 else []
        return solve(Problem(v, costs, budget, "batch", shares=[*shares, Share(m - 1, 0.7)]))

    try:
        p = best(float(costs.min()), share)
    except Infeasible:
        return
    for more in (0.01, 0.1, 1.0):
        gain = best(float(costs.min()) + more, share).value.mean() - p.value.mean()
        assert gain <= p.prices["budget"] * more + 1e-9
        if share == 0:
            gain = best(float(costs.min()), share + more).value.mean() - p.value.mean()
            assert gain <= p.prices["max_share of model 0"] * more + 1e-9


class TestBoundsOfPrompts:
    """A bound for each prompt, beside other rows of the prompts."""

    v = np.array([[0.5, 0.9], [0.6, 0.7]])

    def test_a_prompt_whose_rows_conflict_is_named(self):
        problem = Problem(self.v, [1, 2], np.array([1, 3]), resources=[Resource("s", [2, 1], 1)])
        with pytest.raises(InfeasibleBudget, match="budget 1 is infeasible for prompt 0 beside s <= 1") as e:
            solve(problem)
        assert (e.value.index, e.value.smallest) == (0, 2.0)

    @pytest.mark.parametrize(
        ("budget", "index"), [([np.inf, -1], 1), ([-1, np.inf], 0), ([2, -1e-300], 1), ([-np.finfo(float).max, 2], 0)]
    )
    @pytest.mark.parametrize("solver", ["auto", "highs"])
    @pytest.mark.parametrize("beside", [True, False])
    def test_a_negative_bound_is_infeasible_for_that_prompt(self, budget, index, solver, beside):
        rows = [Resource("s", [2, 1], 3)] if beside else []
        for shares in ([], [Share(0, 0.9)]):
            with pytest.raises(InfeasibleBudget) as e:
                solve(Problem(self.v, [0, 2], np.array(budget, float), resources=rows, shares=shares), solver)
            assert (e.value.index, e.value.budget, e.value.smallest) == (index, budget[index], 0.0)

    def test_an_infinite_bound_leaves_the_other_prompts_bounded(self):
        p = solve(Problem(self.v, [1, 2], np.array([np.inf, 1.25]), resources=[Resource("s", [2, 1], 3)]))
        np.testing.assert_allclose(p.cost, [2, 1.25], rtol=1e-15)

    @pytest.mark.slow
    @settings(max_examples=100)
    @given(SEEDS, st.integers(1, 12), st.integers(1, 5))
    def test_the_first_infeasible_prompt_is_named(self, seed, n, m):
        rng = np.random.default_rng(seed)
        costs = rng.integers(0, 4, m).astype(float)
        budget = rng.choice([np.inf, -1.0, -1e-9, 0.0, 1.0, 2.5, 4.0], n)
        problem = Problem(rng.random((n, m)), costs, budget, resources=[Resource("s", rng.random(m), 1.0)])
        short = np.flatnonzero(budget < costs.min())
        if len(short):
            with pytest.raises(InfeasibleBudget) as e:
                solve(problem)
            assert e.value.index == short[0]
            assert e.value.budget == budget[short[0]]
            return
        best = exact.optimum(problem)
        assert best is not None
        p = solve(problem)
        check(problem, p)
        assert p.value.mean() == pytest.approx(best, abs=1e-9)


@pytest.mark.slow
@settings(max_examples=60)
@given(SEEDS, st.integers(1, 30), st.integers(2, 6), st.sampled_from([1.0, 1e-9, 1e9]), st.booleans())
def test_the_smallest_budget_that_an_error_names_is_the_smallest(seed, n, m, unit, batch):
    rng = np.random.default_rng(seed)
    costs = unit * rng.exponential(size=(n, m) if rng.random() < 0.5 else m)
    seconds = Resource("seconds", rng.random(m), 0.5 * rng.random() + 0.3, "batch" if batch else "prompt")
    shares = [Share([0, 1], at_least=0.7 * rng.random()), Share(m - 1, at_most=rng.random())] if batch else []

    def best(budget):
        return solve(Problem(rng.random((n, m)), costs, budget, "batch" if batch else "prompt", [seconds], shares))

    try:
        best(0.0)
    except InfeasibleBudget as error:
        smallest = error.smallest
        if not batch:
            smallest = np.full(n, np.inf)
            smallest[error.index] = error.smallest
        p = best(smallest)
        assert np.all((rounding.mean(p.cost) if batch else p.cost) <= np.nextafter(smallest, np.inf))
        with pytest.raises(InfeasibleBudget):
            best(smallest * (1 - 1e-8))
    except Infeasible:
        return


@pytest.mark.slow
@settings(max_examples=30)
@given(SEEDS, st.integers(2, 90), st.integers(2, 6), st.booleans())
def test_conflicts_of_both_scopes_are_explained_by_few_lps(seed, n, m, shared):
    """What all prompts share conflicts as it does for one of them; of whom prompts conflict alone, the first is named."""
    rng = np.random.default_rng(seed)
    bounds = np.full(n, rng.random()) if shared else rng.random(n)
    amounts = rng.random((3, m))

    def problem(some):
        resources = [Resource("b", amounts[1], 0.6), Resource("c", amounts[2], bound, "batch")]
        return Problem(np.zeros((len(some), m)), amounts[0], bounds[some], "prompt", resources, [Share(0, at_least=0.4)])

    bound, sizes, real = float(rng.random()), [], highs.solve_block

    def counted(v, *rest, **named):
        sizes.append(len(v))
        return real(v, *rest, **named)

    def error(some):
        try:
            solve(problem(some))
        except Infeasible as found:
            return found
        return None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(highs, "solve_block", counted)
        found = error(np.arange(n))
    if found is None:
        return
    if found.index is not None:
        beside = [Resource("b", amounts[1], 0.6)]
        alone = [exact.optimum(Problem(np.zeros((1, m)), amounts[0], b, resources=beside)) for b in bounds]
        # A prompt that one of its rows alone rules out comes before those whose rows conflict.
        assert alone[found.index] is None
        assert found.index == alone.index(None) or len(found.rows) == 1
    elif shared:
        one = error(np.arange(1))
        assert one is not None
        assert (one.rows, one.row) == (found.rows, found.row)
        assert found.nearest == pytest.approx(one.nearest, rel=1e-9)
        assert sizes.count(n) <= 1 + (n <= highs.BLOCK)
        assert sum(sizes) <= 2 * n + 10


@pytest.mark.parametrize("n", [84, 1000])
@pytest.mark.parametrize("beside", [{}, {"shares": [Share(1, 0.5)]}, {"resources": [Resource("s", [1.0, 2.0, 3.0], 2.0)]}])
@pytest.mark.parametrize("solver", ["auto", "highs"])
def test_the_mean_of_the_cheapest_as_numpy_rounds_it_is_feasible(n, beside, solver):
    """It may be several roundings short of their exact mean: for costs of all prompts as for costs of each."""
    for least in (0.2, 0.1, 1 / 3):
        costs = np.array([least, 2.7, 1.9])
        bound = float(np.full(n, least).mean())
        for own in (costs, np.tile(costs, (n, 1))):
            p = solve(Problem(np.tile([0.1, 0.9, 0.5], (n, 1)), own, bound, "batch", **beside), solver)
            assert (p.indices[:, 0] == 0).all()


def test_frontiers_of_costs_at_the_ends_of_double_precision():
    """Sums that would be infinite are refused, as under a budget; a mean that rounds to 0 changes nothing at budget 0."""
    for costs in ([0, 1e308], [[0, 1.7e308]] * 2):
        with pytest.raises(ValueError, match="costs: expected amounts of at most 1e\\+290"):
            routing.frontier([[0.5, 0.9], [0.6, 0.7]], costs)
    v = [[1.0, 0.5], [0.2, 0.7]]
    assert routing.frontier(v, [5e-324, 0]).at(0) == solve(Problem(v, [5e-324, 0], 0, "batch")).value.mean() == 0.6
    assert routing.frontier(v, [1e290, 0]).at(1e290) == 0.85


@settings(max_examples=40)
@given(SEEDS, st.integers(1, 4), st.integers(1, 5))
def test_weights_or_a_mixture_prove_what_exact_rationals_say(seed, n, m):
    problem = hostile(seed, n, m)
    n = len(problem.values.take(slice(None)))
    try:
        known = farkas.feasible(surplus.reduce(problem.prompt_rows, problem.batch_rows, problem.mask, n, m), n)
    except NoPolicy:
        assert exact.optimum(problem, -1e-12) is None
        return
    if known is not None:
        assert known == (exact.optimum(problem, 1e-9 if known else -1e-9) is not None)


@settings(max_examples=60)
@given(SEEDS, st.integers(1, 12), st.integers(1, 5))
@pytest.mark.slow
def test_the_nearest_bound_is_the_lps(seed, n, m):
    """Over amounts that differ by twelve orders, and of rows of zeros and ones; the least use of a row beside the others."""
    rng = np.random.default_rng(seed)

    def amounts():
        if rng.random() < 0.3:
            return (rng.random((n, m)) < 0.5).astype(float)
        return rng.exponential(size=(n, m)) * 10.0 ** rng.integers(-6, 7) + rng.integers(0, 2)

    each = [Row("each", a, a.min(1) + rng.random() * np.ptp(a, 1)) for a in [amounts()] if rng.random() < 0.7]
    batch = [Row(f"row {k}", a, a.min(1).mean() + rng.random() * np.ptp(a)) for k, a in enumerate(amounts() for _ in range(3))]
    target = Row("target", amounts(), 0.0)
    least = conflicts._of_block(batch, each, None, n, m)
    for some in (batch[:1], batch[:2], batch):
        with mock.patch.object(farkas, "least", return_value=None):
            expected = least([*each, *some], target)
        found = least([*each, *some], target)
        assert found == (None if expected is None else pytest.approx(expected, rel=1e-9, abs=1e-12 * target.amounts.max()))


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("scale", [1.5, 0.5])
def test_conflicts_of_amounts_of_each_prompt_are_explained_by_one_lp_at_most(scale, several, rng, monkeypatch):
    """As long as a solution takes. Where prompts have several rows: one LP of the whole batch, for the nearest bound, or none
    where no bound alone mends it. Where they have one: none."""
    n = 600 if several else 300
    costs, seconds, tokens, carbon = rng.exponential(size=(4, n, 5)) + 0.1
    both = (costs + seconds).argmin(1)[:, None]
    bounds = [scale * float(np.take_along_axis(a, both, 1).mean()) for a in (costs, seconds)]
    resources = [Resource("seconds", seconds, bounds[1], "batch"), Resource("tokens", tokens, tokens.min(1) + 0.01)]
    if several:
        at = np.take_along_axis(carbon, tokens.argmin(1)[:, None], 1)[:, 0]
        resources.append(Resource("carbon", carbon, at + 0.01))
    problem = Problem(rng.random((n, 5)), costs, bounds[0], "batch", resources)
    sizes, real = [], highs.solve_block

    def counted(v, *rest, **named):
        sizes.append(len(v))
        return real(v, *rest, **named)

    monkeypatch.setattr(highs, "solve_block", counted)
    with pytest.raises(Infeasible) as e:
        solve(problem)
    assert sizes.count(n) == (several and e.value.nearest is not None)


def test_errors_show_every_digit_of_the_bounds_that_they_compare():
    v, budget = V3[:1], 1.0000000000000002
    with pytest.raises(InfeasibleBudget, match=r"budget 1\.0000000000000002 is infeasible.*costs 1\.000000000000001;"):
        routing.solve_budget(v, [1.000000000000001] * 3, budget)
    with pytest.raises(Infeasible, match=r"seconds <= 1\.0000000000000002 .* 'seconds' is 1\.000000000000001$"):
        solve(Problem(v, resources=[Resource("seconds", [1.000000000000001] * 3, budget)]))
    with pytest.raises(ValueError, match=r"at_least <= at_most, got 0\.30000000000000004 > 0\.3$"):
        Problem(v, shares=[Share(0, 0.3, 0.1 + 0.2)])


@pytest.mark.slow
@settings(max_examples=60)
@given(
    SEEDS, st.integers(2, 6), st.sampled_from([1, 1e-160, 1e-200, 1e-300, 1e200, 1e300]), st.sampled_from([1, 1e-160, 1e200])
)
@example(0, 3, 1e-300, 1e-160)
def test_hulls_of_amounts_and_values_of_any_size(seed, m, unit, size):
    """Products of their differences over- and underflow in double precision."""
    rng = np.random.default_rng(seed)
    v, costs = size * rng.random((2, m)), unit * rng.integers(0, 9, m)
    budget = float(costs.min() + (unit if rng.random() < 0.5 else 2 * unit))
    problem = Problem(v, costs, np.full(2, budget))
    assert solve(problem).value.mean() == pytest.approx(exact.optimum(problem), rel=1e-9, abs=0)


def test_subnormal_costs_keep_their_hull():
    p = routing.solve_budget([[0.9479343365723717, 0.07433303507802758, 0.9698367140781307]], [1.5e-323, 0.0, 2e-323], 5e-324)
    assert p.value[0] == pytest.approx(0.07433303507802758 * 2 / 3 + 0.9479343365723717 / 3, rel=1e-12)


class TestRounding:
    """A cost exceeds its budget by one rounding at most; so does a budget fall short of the least cost."""

    @pytest.mark.slow
    @settings(max_examples=300)
    @given(SEEDS, st.integers(1, 6), st.integers(1, 9), st.sampled_from([1, 1e-12, 1e12]))
    def test_one_budget_for_each_prompt(self, seed, n, m, unit):
        rng = np.random.default_rng(seed)
        v, costs = rng.random((n, m)), unit * rng.choice([rng.random((n, m)), 10.0 ** rng.uniform(-9, 9, (n, m))])
        least = costs.min(1)
        budget = least + (costs.max(1) - least) * rng.random(n) ** 4
        p = routing.solve_budget(v, costs, budget)
        _, _, value, _ = reference.solve_budget(v, costs, budget)
        np.testing.assert_allclose(p.value, value, rtol=1e-12)
        for i in range(n):
            used = sum(
                Fraction(float(a)) * Fraction(float(b)) for a, b in zip(p.probabilities[i], costs[i, p.indices[i]], strict=True)
            )
            assert used <= Fraction(float(np.nextafter(budget[i], np.inf)))
        assert (p.cost <= np.nextafter(budget, np.inf)).all()
        assert ((p.probabilities * np.take_along_axis(costs, p.indices, 1)).sum(1) <= np.nextafter(budget, np.inf)).all()
        assert (routing.solve_budget(v, costs, np.nextafter(least, 0)).cost == least).all()
        with pytest.raises(InfeasibleBudget) as e:
            routing.solve_budget(v, costs, np.nextafter(np.nextafter(least, 0), 0))
        assert e.value.smallest == least[0]

    @pytest.mark.slow
    @settings(max_examples=100)
    @given(SEEDS, st.integers(1, 3000), st.integers(1, 5), st.floats(0, 1))
    @example(0, 3000, 3, 0.0)
    def test_one_budget_over_the_batch(self, seed, n, m, loose):
        rng = np.random.default_rng(seed)
        v, costs = (
            rng.random((n, m)),
            rng.choice([rng.random((n, m)), 10.0 ** rng.uniform(-9, 9, (n, m)), np.full((n, m), 0.1)]),
        )
        least = costs.min(1).mean()
        for budget in (least, float(Fraction(math.fsum(costs.min(1))) / n), least + loose**4 * (costs.max(1).mean() - least)):
            p = routing.solve_batch_budget(v, costs, budget)
            exactly = sum(map(Fraction, p.cost)) / n
            assert p.cost.mean() <= np.nextafter(budget, np.inf) or p.cost.mean() == least
            assert exactly <= Fraction(float(np.nextafter(budget, np.inf))) or (p.cost == costs.min(1)).all()
            assert (np.count_nonzero(p.probabilities, axis=1) > 1).sum() <= 1
            curve = routing.frontier(v, costs)  # which may be steep at the least budget
            worst = curve.at(budget * (1 - 1e-13)) if budget * (1 - 1e-13) > curve.cost[0] else curve.value[0]
            assert worst - 1e-9 <= p.value.mean() <= curve.at(budget * (1 + 1e-13)) + 1e-9
        with pytest.raises(InfeasibleBudget) as e:
            routing.solve_batch_budget(v, costs, least * (1 - 1e-14))
        assert routing.solve_batch_budget(v, costs, e.value.smallest).cost.mean() == pytest.approx(least, rel=1e-14)

    def test_policies_are_lowered_by_roundings_alone(self, rng):
        n, m = 200, 6
        costs, usable = rng.exponential(size=(n, m)), np.ones((1, m), bool)
        indices = np.argsort(rng.random((n, m)), axis=1)[:, :3].astype(np.int32)
        probabilities = rng.dirichlet(np.ones(3), n)
        before = routing.problem.expected(costs, indices, probabilities)
        bounds = before * (1 - rng.choice([0, 1e-15, 1e-10], n))
        bounds = np.maximum(bounds, costs.min(1))
        changed = probabilities.copy()
        rounding.within_each(models := indices.copy(), changed, costs, bounds, usable)
        assert (routing.problem.expected(costs, models, changed) <= np.nextafter(bounds, np.inf)).all()
        np.testing.assert_allclose(routing.problem.expected(costs, models, changed), before, rtol=1e-9)
        np.testing.assert_allclose(changed.sum(1), 1, atol=1e-15)
        changed = probabilities.copy()
        rounding.within_mean(models := indices.copy(), changed, costs, float(before.mean() * (1 - 1e-13)), usable)
        assert (changed != probabilities).any(axis=1).sum() <= 1 or (models != indices).any(axis=1).sum() <= 1
        assert routing.problem.expected(costs, models, changed).mean() <= np.nextafter(before.mean() * (1 - 1e-13), np.inf)


def test_the_curve_starts_at_the_smallest_budget(rng):
    for n in (1, 2, 7, 1000):
        v, costs = rng.random((n, 3)), np.array([0.1, 0.2, 0.3])
        for curve, smallest in ((routing.frontier(v, costs), 0.1), (routing.frontier(v, np.tile(costs, (n, 1))), 0.1)):
            best = routing.solve_batch_budget(v, costs, smallest).value.mean()
            assert curve.at(smallest) == pytest.approx(best, rel=1e-15)
            assert curve.at([curve.cost[0], 0.05])[0] == pytest.approx(best, rel=1e-15)
            assert np.isnan(curve.at([curve.cost[0], 0.05])[1])


def test_lists_of_lists_are_arrays():
    v, costs, q = V3.tolist(), [0.1, 1.0, 0.2], [1 / 3] * 3
    same = [
        (routing.win_rates(v, q), routing.win_rates(V3, np.array(q))),
        (routing.bt_score(v, q, [0.5, 0.5, 0.5]), routing.bt_score(V3, np.array(q), np.full(3, 0.5))),
        (routing.frontier(v, costs).value, routing.frontier(V3, np.array(costs)).value),
    ]
    for solver in ("frontier", "highs"):
        of_lists = routing.solve_budget(v, costs, [0.5, 0.5, 0.6], solver=solver)
        same.append((of_lists.value, routing.solve_budget(V3, np.array(costs), np.array([0.5, 0.5, 0.6]), solver=solver).value))
    for solver in ("dual", "highs"):
        of_lists = routing.solve_batch_budget(v, costs, 0.5, [0.9] * 3, [0.1, 0, 0], solver)
        same.append(
            (
                of_lists.value,
                routing.solve_batch_budget(V3, np.array(costs), 0.5, np.full(3, 0.9), np.array([0.1, 0, 0]), solver).value,
            )
        )
    for of_lists, of_arrays in same:
        np.testing.assert_array_equal(of_lists, of_arrays)
    for ragged in ([[0.1], [0.2, 0.3]], [[0.1, "x"]], 0.5, "text"):
        with pytest.raises((TypeError, ValueError), match="^v: expected"):
            routing.solve_batch_budget(ragged, [1.0, 2.0], 1.0)
        with pytest.raises((TypeError, ValueError), match="^v: expected"):
            routing.solve_budget(ragged, [1.0, 2.0], 1.0)


class TestSiftingThatDoesNotConverge:
    """The answer is HiGHS's then, at no more LPs than a solution takes."""

    def problem(self, rng, n=3000):
        v, costs = rng.random((n, 5)), rng.exponential(size=5)
        shares = [Share(int(costs.argmin()), 0.2), Share([1, 2], at_least=0.1)]
        return Problem(v, costs, float(costs.mean()), "batch", shares=shares)  # which equal shares keep to

    @pytest.mark.slow
    def test_highs_answers_and_why_says_so(self, rng, monkeypatch):
        problem = self.problem(rng)
        expected = solve(problem)
        assert expected.solver == "dual"
        sift = dual.solve
        monkeypatch.setattr(dual, "VALUE_ROUNDING", 0.0)
        monkeypatch.setattr(dual, "solve", lambda *given: sift(*given, gap=-1.0))
        answer = solve(problem)
        assert answer.solver == "highs"
        assert "sifting did not converge (the gap stayed at" in answer.why
        assert answer.why.endswith("HiGHS on the whole LP")
        assert answer.value.mean() == pytest.approx(expected.value.mean(), abs=1e-9)

    @pytest.mark.parametrize("n", slow_but((1, 50), [1, 50, 3000, 6000]))
    def test_it_ends_after_one_lp_of_the_whole_batch(self, rng, monkeypatch, n):
        problem, sizes, real = self.problem(rng, n), [], highs.solve_block

        def counted(v, *rest, **named):
            sizes.append(len(v))
            return real(v, *rest, **named)

        monkeypatch.setattr(highs, "solve_block", counted)
        monkeypatch.setattr(dual, "VALUE_ROUNDING", 0.0)
        with pytest.raises(SolverError, match="the gap stayed at"):
            dual.solve(problem.values, problem.batch_rows, gap=-1.0)
        assert sizes.count(n) == 1
        assert sum(sizes) <= 3 * n + 10 * dual.OPEN

    @pytest.mark.slow
    def test_a_batch_that_is_too_large_for_highs_is_refused(self, rng, monkeypatch):
        sizes, real = [], highs.solve_block

        def counted(v, *rest, **named):
            sizes.append(len(v))
            return real(v, *rest, **named)

        monkeypatch.setattr(highs, "solve_block", counted)
        monkeypatch.setattr(dual, "VALUE_ROUNDING", 0.0)
        monkeypatch.setattr(dual, "LARGEST", 5 * 4000)
        sift = dual.solve
        monkeypatch.setattr(dual, "solve", lambda *given: sift(*given, gap=-1.0))
        with pytest.raises(
            SolverError, match="6,000 prompts are too many for HiGHS on the whole LP: loosen a bound"
        ) as refused:
            solve(self.problem(rng, 6000))
        assert refused.value.gap < 1e-6
        assert max(sizes) <= 4000
        assert solve(self.problem(rng, 3000)).solver == "highs"

    def test_a_time_limit_is_no_reason_for_highs(self, rng):
        with pytest.raises(SolverError, match="time limit"):
            solve(self.problem(rng), time_limit=0.0)

    def test_iterators_are_refused(self):
        lazy = LazyWinRates(iter([np.zeros((3, 2))]), np.full(2, 0.5))
        with pytest.raises(ValueError, match="takes several passes"):
            solve(Problem(lazy, [1.0, 2.0], 1.5, "batch", shares=[Share(0, 0.5)]))
        assert isinstance(ArrayValues([[0.5]]).shape, tuple)


@pytest.mark.parametrize("kind", ["random", "tight", "few kinds", "own costs", "infeasible"])
def test_dual_prices_of_a_sample_change_no_optimum(kind, rng, monkeypatch):
    """A large batch begins with those of a sample, which may be far from its own."""
    n, m = 1200, 4
    v = rng.random((6, m))[rng.integers(6, size=n)] if kind == "few kinds" else rng.random((n, m))
    v[: n // 2] += 0.3 * np.arange(m)  # the halves differ
    costs = rng.random((n, m)) + np.arange(m) if kind == "own costs" else np.arange(1.0, m + 1)
    budget = {"tight": 1.001, "own costs": 1.2}.get(kind, 2.0)
    shares = [Share(0, 0.4 if kind != "tight" else 1.0), Share(1, 0.3, at_least=0.05 if kind != "tight" else 0.0)]
    shares += [Share((2, 3), 0.1)] if kind == "infeasible" else []
    problem = Problem(v, costs, budget, "batch", shares=shares)
    whole = None if kind == "infeasible" else solve(problem)
    monkeypatch.setattr(dual, "SAMPLE", 64 * m)
    monkeypatch.setattr(dual, "OPEN", 100)
    if whole is None:
        with pytest.raises(Infeasible):
            solve(problem)
        return
    found = solve(problem)
    assert found.solver == whole.solver
    assert found.value.mean() == pytest.approx(whole.value.mean(), abs=3e-9)
    assert found.cost.mean() <= np.nextafter(budget, np.inf)

"""Routing problems of every shape: against HiGHS on the full LP, the reference implementations, and brute force."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from p2l_engine import routing
from p2l_engine.native import routing as native
from p2l_engine.routing import (
    Infeasible,
    InfeasibleBudget,
    LazyWinRates,
    Problem,
    Resource,
    Share,
    SolverError,
    batch,
    near,
    scratch,
    solve,
)
from p2l_engine.routing.batch import Batch, equal_prompts
from p2l_engine.routing.values import ArrayValues
from tests.support import reference
from tests.support.cases import slow_but


class OnDisk(ArrayValues):
    """Values in chunks of a given size, what is noted of each prompt on disk."""

    def __init__(self, v, chunk, folder):
        super().__init__(v)
        self.chunk, self.scratch = chunk, scratch.Scratch(folder)

    def chunks(self):
        return (self.take(slice(start, start + self.chunk)) for start in range(0, len(self.v), self.chunk))


def random_problem(seed: int, n: int, m: int, batch_only: bool = False) -> Problem:
    """A feasible problem of a random shape: its bounds leave room for one random policy."""
    rng = np.random.default_rng(seed)
    v = rng.random((n, m)) if rng.random() < 0.7 else rng.integers(0, 3, (n, m)) / 2  # also many ties
    allowed = rng.random((n, m)) < 0.7
    allowed[np.arange(n), rng.integers(0, m, n)] = True
    if rng.random() < 0.5:
        allowed[:] = True
    p = rng.dirichlet(np.full(m, 0.3), n) * allowed + 1e-12 * allowed
    p /= p.sum(1, keepdims=True)

    def amounts():
        shape = (n, m) if rng.random() < 0.3 else (m,)
        return rng.exponential(size=shape) if rng.random() < 0.7 else rng.integers(0, 3, shape).astype(float)

    def bound(a, scope):
        use = (p * a).sum(1)
        return use.mean() * rng.uniform(1.0, 1.3) + 1e-9 if scope == "batch" else use * rng.uniform(1.0, 1.3) + 1e-9

    def scope():
        return "batch" if batch_only or rng.random() < 0.5 else "prompt"

    costs, budget, budget_scope = amounts(), None, scope()
    if rng.random() < 0.8:
        budget = bound(costs, budget_scope)
    resources = []
    for i in range(rng.integers(0, 3)):
        a, where = amounts(), scope()
        resources.append(Resource(f"resource {i}", a, bound(a, where), where))
    shares = []
    for group in np.array_split(rng.permutation(m), rng.integers(1, m + 1))[: rng.integers(0, 4)]:
        share = p[:, group].sum(1).mean()
        shares.append(
            Share(
                group,
                at_most=min(1.0, share * rng.uniform(1, 1.5) + 1e-9),
                at_least=share * rng.uniform(0, 1) * (rng.random() < 0.5),
            )
        )
    return Problem(v, costs, budget, budget_scope, resources, shares, None if allowed.all() else allowed)


def uses(problem: Problem, policies) -> list[tuple[str, float]]:
    """By how much each row is exceeded, relative to its bound."""
    who = np.arange(len(policies.indices))[:, None]
    out = []
    for row, mean in [(r, False) for r in problem.prompt_rows] + [(r, True) for r in problem.batch_rows]:
        a = row.amounts[policies.indices] if row.amounts.ndim == 1 else row.amounts[who, policies.indices]
        use = (policies.probabilities * a).sum(1)
        excess = (use.mean() if mean else use) - row.bound
        out.append((row.name, float(np.max(excess / np.maximum(np.abs(row.bound), 1e-3)))))
    return out


def check(problem: Problem, policies) -> None:
    n = len(policies.indices)
    assert (policies.probabilities >= 0).all()
    np.testing.assert_allclose(policies.probabilities.sum(1), 1, atol=1e-12)
    if problem.mask is not None:
        used = policies.probabilities > 0
        assert np.take_along_axis(problem.mask, policies.indices, 1)[used].all()
    for name, excess in uses(problem, policies):
        assert excess <= 1e-9, name
    mixed = (policies.probabilities > 0).sum(1)
    assert mixed.max(initial=0) <= 1 + len(problem.prompt_rows) + len(problem.batch_rows)
    if not problem.prompt_rows:
        assert (mixed > 1).sum() <= len(problem.batch_rows) + 1
    v = problem.values.take(slice(None))
    np.testing.assert_allclose(
        policies.value, (policies.probabilities * v[np.arange(n)[:, None], policies.indices]).sum(1), atol=1e-12
    )


@pytest.mark.slow
@settings(deadline=None, max_examples=120)
@given(st.integers(0, 10**9), st.integers(1, 40), st.integers(1, 8))
def test_every_shape_equals_highs_on_the_full_lp(seed, n, m):
    problem = random_problem(seed, n, m)
    best, ours = solve(problem, "highs"), solve(problem)
    check(problem, ours)
    assert ours.value.mean() == pytest.approx(best.value.mean(), rel=1e-9, abs=1e-12)
    assert ours.gap <= 1e-9


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**9), st.booleans())
@pytest.mark.slow
def test_two_thousand_prompts_equal_highs(seed, batch_only):
    problem = random_problem(seed, 2000, 12, batch_only)
    best, ours = solve(problem, "highs"), solve(problem)
    check(problem, ours)
    assert ours.value.mean() == pytest.approx(best.value.mean(), rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("seed", slow_but([31], [4, 13, 31]))
def test_prompts_that_are_indifferent_at_the_same_prices_are_split(seed):
    """Values of 0, 1/2 and 1 alone: nearly all prompts have several best models at any prices."""
    problem = random_problem(seed, 4000, 12, batch_only=True)
    assert len(np.unique(problem.values.take(slice(None)))) == 3
    best, ours = solve(problem, "highs"), solve(problem)
    check(problem, ours)
    assert ours.solver == "dual"
    assert ours.value.mean() == pytest.approx(best.value.mean(), rel=1e-9)


def test_the_smallest_feasible_budget_is_feasible(rng):
    n = 4000
    v, costs, allowed = rng.random((n, 8)), rng.exponential(size=(n, 8)), rng.random((n, 8)) < 0.6
    allowed[np.arange(n), rng.integers(0, 8, n)] = True
    smallest = float(np.where(allowed, costs, np.inf).min(1).mean())
    for shares in ([], [Share(1, at_most=0.9)]):
        p = solve(Problem(v, costs, smallest, "batch", shares=shares, allowed=allowed))
        assert p.cost.mean() == pytest.approx(smallest, rel=1e-9)
        with pytest.raises(InfeasibleBudget) as e:
            solve(Problem(v, costs, smallest * 0.999, "batch", shares=shares, allowed=allowed))
        assert e.value.smallest == pytest.approx(smallest, rel=1e-8)


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(st.integers(0, 10**9), st.integers(1, 30), st.integers(1, 9), st.floats(0, 1.2))
@example(7, 7, 4, 1.0)
def test_one_batch_budget_matches_the_reference(seed, n, m, tightness):
    rng = np.random.default_rng(seed)
    v = rng.random((n, m)) if seed % 3 else rng.integers(0, 4, (n, m)) / 3
    costs = rng.exponential(size=(n, m) if seed % 2 else m) if seed % 5 else 10.0 ** rng.uniform(-8, 4, m)
    full = np.broadcast_to(costs, v.shape)
    low, high = full.min(1).mean(), full[np.arange(n), v.argmax(1)].mean()
    budget = low + tightness * max(high - low, 0.0)
    p = routing.solve_batch_budget(v, costs, budget)
    _, _, value, cost, _ = reference.solve_batch_budget(v, costs, budget)
    # Where the budget ends just between two steps, both slopes are prices, and rounding picks one.
    more, less = (reference.solve_batch_budget(v, costs, budget * (1 + nudge))[-1] for nudge in (1e-9, -1e-9))
    assert p.solver == "dual"
    assert p.value.mean() == pytest.approx(value.mean(), rel=1e-12)
    assert p.cost.mean() <= budget * (1 + 1e-12)
    assert p.cost.mean() == pytest.approx(cost.mean(), rel=1e-9)
    assert ((p.probabilities > 0).sum(1) > 1).sum() <= 1
    assert more * (1 - 1e-9) <= p.prices["budget"] <= less * (1 + 1e-9)


def test_best_models_match_the_reference(rng):
    for n, m in [(1, 1), (5, 3), (40, 17), (1000, 130)]:
        v, penalty = rng.normal(size=(n, m)), rng.normal(size=m)
        allowed = rng.random((n, m)) < 0.5
        allowed[:, 0] = True
        for mask in (allowed, np.ones((n, m), bool)):
            for noise in (0.0, 0.3):
                ours = native.best_models(v, penalty, None if mask.all() else mask, 7, noise)
                numbers = native.noise_of(np.arange(7, 7 + n), m)
                expected = reference.best_models(v, penalty, mask, noise * numbers)
                np.testing.assert_array_equal(ours[0], expected[0])
                for a, b in zip(ours[1:], expected[1:], strict=True):
                    np.testing.assert_allclose(a, b)
    assert -1 <= numbers.min() < -0.99
    assert -0.01 < numbers.max() < 0
    assert numbers.mean() == pytest.approx(-0.5, abs=0.01)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**9), st.integers(1, 20), st.integers(1, 12), st.integers(0, 3))
def test_undominated_models_match_the_reference(seed, n, m, k):
    rng = np.random.default_rng(seed)
    v, usable = rng.integers(0, 4, (n, m)) / 4, rng.random((n, m)) < 0.8
    amounts = [rng.integers(0, 3, (n, m) if rng.random() < 0.5 else m).astype(float) for _ in range(k)]
    np.testing.assert_array_equal(native.undominated(v, amounts, usable), reference.undominated(v, amounts, usable))


@pytest.mark.slow
def test_the_price_is_what_one_more_dollar_is_worth(rng):
    """The optimum is concave in its bounds, and a dual price is one of its slopes there: where the optimum has a kink, neither
    the one to the left nor the one to the right."""
    v, costs = rng.random((4000, 9)), rng.exponential(size=9) + 0.5
    costs[1] = 0.1  # without a cap: all the budgets below are feasible, and the first one binds
    budget, share, name = float(costs.min() + 0.3), 0.05, "max_share of models 0, 3"

    def best(budget, share):
        return solve(Problem(v, costs, budget, "batch", shares=[Share([0, 3], at_most=share)]))

    p = best(budget, share)
    assert p.solver == "dual"
    assert p.prices["budget"] > 0
    for more_budget, more_share in [(1e-2, 0), (-1e-2, 0), (0, 1e-2), (0, -1e-2), (1e-3, -1e-3), (0.2, 0.1), (-0.2, 0.9)]:
        gain = best(budget + more_budget, share + more_share).value.mean() - p.value.mean()
        assert gain <= p.prices["budget"] * more_budget + p.prices[name] * more_share + p.gap + 1e-12


def test_equal_prompts_are_solved_as_one(rng):
    v = np.repeat(rng.random((3, 6)), 40_000, axis=0)
    first = int(v[0].argmax())
    second = max(set(range(6)) - {first}, key=lambda model: v[-1, model])
    shares = [Share(first, at_most=0.13), Share(second, at_most=0.07)]
    problem = Problem(v, np.arange(1.0, 7.0), 3.3, "batch", shares=shares)
    ours = solve(problem)
    check(problem, ours)
    few = Problem(v[::1000], np.arange(1.0, 7.0), 3.3, "batch", shares=shares)
    assert ours.value.mean() == pytest.approx(solve(few, "highs").value.mean(), rel=1e-9)
    one_row = routing.solve_batch_budget(np.repeat(v[:1], 100_000, axis=0), np.arange(1.0, 7.0), 3.3)
    assert one_row.cost.mean() <= 3.3 * (1 + 1e-12)
    assert ((one_row.probabilities > 0).sum(1) > 1).sum() <= 1


@pytest.mark.slow
def test_costs_over_twelve_orders_of_magnitude(rng):
    v, costs = np.sort(rng.random((3000, 13)), axis=1), 10.0 ** np.arange(-6, 7)
    for budget in (1e-6, 3e-5, 0.7, 1e3, 1e7):
        p = routing.solve_batch_budget(v, costs, budget)
        assert p.cost.mean() <= budget * (1 + 1e-12)
        expected = reference.solve_batch_budget(v, costs, budget)
        assert p.value.mean() == pytest.approx(expected[2].mean(), rel=1e-12)
        shares = np.where(np.arange(13) == 12, 0.5, 1.0)
        capped = routing.solve_batch_budget(v, costs, budget, max_share=shares)
        assert capped.cost.mean() <= budget * (1 + 1e-9)
        assert capped.value.mean() <= p.value.mean() + 1e-9


def test_small_batches(rng):
    for solver in ("dual", "highs"):
        empty = routing.solve_batch_budget(np.zeros((0, 3)), np.ones(3), 2.0, solver=solver)
        assert empty.indices.shape == (0, 2)
        one = routing.solve_batch_budget(np.array([[0.2, 0.8]]), np.array([1.0, 3.0]), 2.0, solver=solver)
        assert one.value[0] == pytest.approx(0.5)
        alone = routing.solve_batch_budget(rng.random((5, 1)), np.ones(1), 2.0, max_share=[1.0], solver=solver)
        assert (alone.probabilities[:, 0] == 1).all()
    p = solve(Problem(np.zeros((0, 3)), np.ones(3), None, shares=[Share(0, 0.5), Share(1, 0.2)]))
    assert len(p.value) == 0


def test_the_batch_budget_dominates_the_per_prompt_lp(rng):
    for seed in range(20):
        v, costs = rng.random((200, 7)), rng.exponential(size=7)
        each = routing.solve_budget(v, costs, costs.min() + 0.05 * seed)
        batch = routing.solve_batch_budget(v, costs, float(each.cost.mean()))
        assert batch.value.mean() >= each.value.mean() - 1e-12


class TestSeveralPasses:
    """Chunks of coefficients in, policies out."""

    @pytest.mark.slow
    def test_lazy_win_rates_equal_the_arrays(self, rng, tmp_path):
        theta, q, costs = rng.normal(size=(40_000, 9)).astype(np.float32), np.full(9, 1 / 9), rng.exponential(size=9)
        np.save(tmp_path / "theta.npy", theta)
        memmap = np.load(tmp_path / "theta.npy", mmap_mode="r")
        v, budget = routing.win_rates(theta, q), float(costs.min() + 0.2)
        whole = routing.solve_batch_budget(v, costs, budget)
        for lazy in (LazyWinRates(memmap, q), LazyWinRates((theta[i : i + 777] for i in range(0, 40_000, 777)), q)):
            streamed = routing.solve_batch_budget(lazy, costs, budget)
            np.testing.assert_array_equal(streamed.indices, whole.indices)
            np.testing.assert_allclose(streamed.value, whole.value, rtol=1e-13)
        each = solve(Problem(LazyWinRates((t for t in (theta[:5], theta[5:40_000])), q), costs, budget))
        np.testing.assert_allclose(each.value, routing.solve_budget(v, costs, budget).value, rtol=1e-13)
        rest = {"costs": costs, "budget": float(np.median(costs)), "budget_scope": "batch"}
        rest["shares"] = [Share(j, at_most=0.12) for j in range(3)]
        several, arrays = solve(Problem(LazyWinRates(memmap, q), **rest)), solve(Problem(v, **rest))
        assert several.solver == "dual"
        assert several.value.mean() == pytest.approx(arrays.value.mean(), rel=1e-9)

    @settings(max_examples=12)
    @example(seed=3, n=1, chunk=1)
    @example(seed=8, n=33, chunk=2)
    @given(st.integers(0, 2**31), st.integers(1, 60), st.sampled_from([1, 2, 7, 100]))
    def test_policies_do_not_depend_on_where_the_arrays_are(self, seed, n, chunk):
        problem = random_problem(seed, n, 1 + seed % 5, batch_only=True)
        if seed % 3 == 0:  # groups of equal prompts
            problem = replace(problem, value=np.repeat(problem.value[:1], n, axis=0), resources=(), budget=None, allowed=None)
        with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
            for module, name, value in (
                (scratch, "PART", 3),
                (near, "PART", 3),
                (scratch, "SMALL", 0),
                (batch, "IN_MEMORY", 1),
            ):
                patch.setattr(module, name, value)
            in_memory, on_disk = solve(problem), solve(replace(problem, value=OnDisk(problem.value, chunk, Path(folder))))
            assert not list(Path(folder).iterdir())
        for name in ("indices", "probabilities", "value", "cost", "mixed_costs"):
            np.testing.assert_array_equal(getattr(in_memory, name), getattr(on_disk, name))
        assert (in_memory.prices, in_memory.gap) == (on_disk.prices, on_disk.gap)

    def test_a_full_disk_is_an_error(self, monkeypatch, tmp_path):
        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match="No space left"):
            scratch.Scratch(tmp_path).empty(1 << 20, np.float64)

    def test_where_the_system_cannot_reserve_a_file_it_is_written(self, monkeypatch, tmp_path):
        monkeypatch.delattr(os, "posix_fallocate")  # as on macOS
        made = scratch.Scratch(tmp_path).empty((300_000, 2), np.float64)
        made[:] = np.arange(600_000).reshape(made.shape)
        assert (made.ravel() == np.arange(600_000)).all()

    def test_an_iterator_is_read_once(self, rng):
        theta, q = rng.normal(size=(30, 3)), np.full(3, 1 / 3)
        lazy = LazyWinRates(iter([theta]), q)
        routing.solve_batch_budget(lazy, np.ones(3), 2.0)
        with pytest.raises(ValueError, match="its iterator has been read to the end"):
            routing.solve_batch_budget(lazy, np.ones(3), 2.0)
        with pytest.raises(ValueError, match="takes several passes over the prompts; got an iterator"):
            solve(Problem(LazyWinRates(iter([theta]), q), np.ones(3), 2.0, "batch", shares=[Share(0, 0.5)]))
        with pytest.raises(ValueError, match=r"theta: expected chunks \[n, 3\], got \[30, 2\]"):
            routing.solve_batch_budget(LazyWinRates(iter([theta[:, :2]]), q), np.ones(3), 2.0)
        bad = theta.copy()
        bad[1, 1] = np.nan
        with pytest.raises(ValueError, match=r"theta\[31, 1\]: expected a finite number, got nan"):
            routing.solve_batch_budget(LazyWinRates(iter([theta, bad]), q), np.ones(3), 2.0)
        with pytest.raises(ValueError, match=r"costs: expected shape \[3\], got \[30, 3\]"):
            Problem(LazyWinRates(iter([theta]), q), np.ones((30, 3)), 2.0, "batch")


class TestConflictingRows:
    """Infeasible combinations name their rows and the nearest bound."""

    v = np.random.default_rng(0).random((50, 3))
    costs = np.array([0.05, 1.0, 5.0])

    def test_budget_against_a_least_share(self):
        for solver in ("auto", "highs"):
            with pytest.raises(
                InfeasibleBudget, match=r"budget 0.1 is infeasible over the batch beside min_share of model 2 = 0.3"
            ) as e:
                solve(Problem(self.v, self.costs, 0.1, "batch", shares=[Share(2, at_least=0.3)]), solver)
            assert e.value.smallest == pytest.approx(0.3 * 5 + 0.7 * 0.05, rel=1e-9)
            assert solve(Problem(self.v, self.costs, e.value.smallest * (1 + 1e-9), "batch", shares=[Share(2, at_least=0.3)]))

    def test_the_same_with_amounts_of_their_own(self):
        costs = np.tile(self.costs, (50, 1)) * np.linspace(1, 2, 50)[:, None]
        problem = Problem(self.v, costs, 0.1, "batch", shares=[Share(2, at_least=0.3), Share(1, at_most=0.9)])
        with pytest.raises(InfeasibleBudget, match="beside min_share of model 2 = 0.3:") as e:
            solve(problem)
        best = solve(Problem(-costs / 10, costs, None, shares=problem.shares), "highs").cost.mean()
        assert e.value.smallest == pytest.approx(best, rel=1e-8)

    def test_shares_that_cannot_sum(self):
        with pytest.raises(
            Infeasible, match="max_share of model 0 = 0.2 and max_share of models 1, 2 = 0.3 cannot hold together"
        ) as e:
            solve(Problem(self.v, self.costs, shares=[Share(0, 0.2), Share([1, 2], 0.3)]))
        assert e.value.nearest == pytest.approx(0.7)
        with pytest.raises(Infeasible, match="min_share of model 0 = 0.7 and min_share of model 1 = 0.7") as e:
            solve(Problem(self.v, self.costs, shares=[Share(0, at_least=0.7), Share(1, at_least=0.7)]))
        assert e.value.nearest == pytest.approx(0.3)

    def test_a_mask_against_a_share(self):
        allowed = np.ones((50, 3), bool)
        allowed[:30, 1:] = False
        with pytest.raises(Infeasible, match="max_share of model 0 = 0.5 cannot hold") as e:
            solve(Problem(self.v, self.costs, shares=[Share(0, at_most=0.5), Share(1, at_most=0.9)], allowed=allowed))
        assert e.value.nearest == pytest.approx(0.6)

    def test_rows_of_one_prompt(self):
        latency = Resource("seconds", np.array([9.0, 2.0, 1.0]), 1.5)
        with pytest.raises(InfeasibleBudget, match=r"budget 0.5 is infeasible for prompt 0 beside seconds <= 1.5") as e:
            solve(Problem(self.v, self.costs, 0.5, resources=[latency]))
        assert e.value.index == 0
        assert e.value.smallest == pytest.approx(3.0)  # half of each of the two fast models
        one = Problem(self.v, self.costs, resources=[Resource("seconds", np.array([9.0, 2.0, 1.0]), 0.5)])
        with pytest.raises(Infeasible, match="seconds <= 0.5 cannot hold; .* is 1.0"):
            solve(one)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": [[np.nan, 0, 0]]}, r"v\[0, 0\]: expected a finite number, got nan"),
        ({"costs": [1, np.nan, 1]}, r"costs\[1\]: expected a finite number"),
        ({"costs": [1, -1, 1]}, r"costs\[1\]: expected an amount >= 0"),
        ({"costs": None}, "costs: expected the models' costs where there is a budget"),
        ({"budget": np.nan}, "budget: expected a number"),
        ({"budget": True}, "budget: expected a number, got True"),
        ({"budget_scope": "day"}, "budget_scope: expected 'prompt' or 'batch', got 'day'"),
        ({"budget": [1.0, 2.0], "budget_scope": "batch"}, "budget: expected one number in scope 'batch'"),
        ({"shares": [Share(0, 1.5)]}, r"shares\[0\].at_most: expected a share in \[0, 1\], got 1.5"),
        ({"shares": [Share(0, np.nan)]}, r"shares\[0\].at_most: expected a share"),
        ({"shares": [Share(0, 0.2, 0.3)]}, r"shares\[0\]: expected at_least <= at_most"),
        ({"shares": [Share(3, 0.2)]}, r"shares\[0\].models: expected columns in 0..2, got 3"),
        ({"shares": [Share(0, 0.2), Share(0, 0.3)]}, "shares: expected one Share for each group"),
        ({"resources": [Resource("s", [1, 2, np.inf], 1.0)]}, r"s\[2\]: expected a finite number"),
        ({"resources": [Resource("s", [1, 2], 1.0)]}, r"s: expected shape \[3\] or \[1, 3\], got \[2\]"),
        ({"resources": [Resource("budget", [1, 2, 3], 1.0)]}, r"resources\[0\].name: expected a name of its own"),
        ({"resources": [Resource("s", [1, 2, 3], np.nan)]}, "s: expected a number"),
        ({"allowed": [[False, False, False]]}, r"allowed\[0\]: expected at least one allowed model"),
        ({"allowed": [[1, 0, 0]]}, "allowed: expected bools, got int64"),
        ({"allowed": [[True, False]]}, r"allowed: expected shape \[1, 3\], got \[1, 2\]"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {"value": [[0.1, 0.2, 0.3]], "costs": [1, 2, 3], "budget": 2.0}
    with pytest.raises((ValueError, TypeError), match=message):
        solve(Problem(**(good | change)))


def test_values_of_any_size_and_rows_that_leave_nothing(rng):
    v, costs = rng.random((50, 4)), np.ones(4)
    shares = [Share(0, 0.5), Share(1, 0.5)]
    plain = solve(Problem(v, costs, 1.0, "batch", shares=shares))
    for size in (1e-200, 1e200):
        scaled = solve(Problem(v * size, costs, 1.0, "batch", shares=shares))
        assert scaled.value.mean() == pytest.approx(plain.value.mean() * size, rel=1e-9)
    with pytest.raises(Infeasible, match="max_share of model 0 = 0 and"):
        solve(Problem(v, costs, shares=[Share(j, 0.0) for j in range(4)]))
    with pytest.raises(Infeasible, match="s <= -1 cannot hold; .* is 1.0"):
        solve(Problem(v, costs, resources=[Resource("s", costs, -1.0, "batch")]))
    with pytest.raises(TypeError, match="problem: expected a Problem, got str"):
        solve("x")
    with pytest.raises(TypeError, match="theta: expected an array, a memmap or an iterator of chunks, got int"):
        LazyWinRates(5, np.ones(1))


@pytest.mark.slow
def test_a_solver_must_fit_and_limits_raise(rng):
    v, costs = rng.random((3000, 30)), rng.exponential(size=30)
    several = Problem(v, costs, float(np.quantile(costs, 0.2)), "batch", shares=[Share(int(costs.argmin()), 0.2)])
    with pytest.raises(ValueError, match="solver: 'frontier' cannot take this problem"):
        solve(several, "frontier")
    with pytest.raises(ValueError, match="solver: expected 'auto', 'frontier', 'dual' or 'highs', got 'simplex'"):
        solve(several, "simplex")
    with pytest.raises(SolverError, match="HiGHS stopped with status 'Time limit reached'") as e:
        solve(several, "highs", time_limit=0.01)
    assert e.value.gap is None or e.value.gap >= 0
    with pytest.raises(SolverError, match="time limit"):
        solve(several, time_limit=0.0)
    found = solve(several)
    assert found.solver == "dual"
    assert "sifting" in found.why


def test_the_gap_is_proven_by_weak_duality(rng):
    problem = next(p for p in (random_problem(s, 3000, 9, batch_only=True) for s in range(9)) if len(p.batch_rows) > 2)
    p = solve(problem)
    prices = np.array([p.prices[row.name] for row in problem.batch_rows])
    bounds = np.array([row.bound for row in problem.batch_rows])
    v = problem.values.take(slice(None)).copy()
    for row, price in zip(problem.batch_rows, prices, strict=True):
        v -= price * row.amounts
    if problem.mask is not None:
        v[~problem.mask] = -np.inf
    assert v.max(1).mean() + prices @ bounds - p.value.mean() == pytest.approx(p.gap, abs=1e-9)


def test_a_group_is_spread_over_whole_prompts(rng):
    values = ArrayValues(np.repeat(rng.random((4, 3)), [5, 1, 7, 3], axis=0))
    groups = equal_prompts(Batch.of_all(values, (), None))
    policies = np.array([[0.3, 0.5, 0.2], [1, 0, 0], [0.5, 0.5, 0], [0.4, 0.3, 0.3]])
    indices, probabilities = groups.spread(np.array([[0, 1, 2]] * 4), policies)
    dense, sums = np.zeros((16, 3)), np.zeros((4, 3))
    np.add.at(dense, (np.arange(16)[:, None], indices), probabilities)
    np.testing.assert_allclose(dense.sum(1), 1)
    np.add.at(sums, groups.group, dense)
    np.testing.assert_allclose(sums, policies * groups.sizes[:, None])
    for group, mixed in enumerate((policies > 0).sum(1)):
        assert ((dense[groups.group == group] > 0).sum(1) > 1).sum() <= mixed - 1


@pytest.mark.parametrize("solver", ["dual", "highs"])
@pytest.mark.parametrize(("unit", "budget"), [(1e290, 0.3), (1e290, 1e18), (1e290, 0.0), (1e-300, 0.3)])
def test_batch_budgets_of_any_unit(solver, unit, budget, rng):
    v, costs = rng.random((200, 4)), rng.random((200, 4))
    costs[:, 0] = 0
    given = routing.solve_batch_budget(v, costs * unit, budget * unit, solver=solver)
    assert given.value.mean() == pytest.approx(
        routing.solve_batch_budget(v, costs, budget, solver=solver).value.mean(), abs=1e-9
    )
    assert given.cost.mean() <= budget * unit * (1 + 1e-12)


def test_amounts_whose_sums_overflow_are_refused(rng):
    costs = rng.random((500, 5)) * 1e307
    with pytest.raises(ValueError, match=r"budget: expected amounts of at most 1e\+290 in scope 'batch'"):
        routing.solve_batch_budget(rng.random((500, 5)), costs, 3e306)
    routing.solve_budget(rng.random((500, 5)), costs, 1e307)  # a budget for each prompt sums nothing

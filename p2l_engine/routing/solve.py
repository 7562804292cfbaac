"""Chooses the cheapest exact solver for a routing problem."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from p2l_engine.arguments import finite_number
from p2l_engine.native import routing as native
from p2l_engine.routing import conflicts, dual, farkas, highs, rounding, scratch, surplus
from p2l_engine.routing.arrays import Float64
from p2l_engine.routing.hulls import Hulls
from p2l_engine.routing.policies import Policies
from p2l_engine.routing.problem import Problem, Row, expected, of_models, of_prompts
from p2l_engine.routing.program import SolverError, TimeLimit
from p2l_engine.routing.surplus import NoPolicy

Solver = Literal["auto", "frontier", "dual", "highs"]

TOLERANCE = 1e-9  # relative: how far an LP's policies may exceed a row other than the budget


def solve(problem: Problem, solver: Solver = "auto", time_limit: float | None = None) -> Policies:
    """The optimal policies. At most R + 1 models for a prompt of R rows; at most K mixed prompts beyond that for K batch rows.

    ``auto`` chooses the cheapest exact solver and reports it (``solver``, ``why``):

    - ``frontier``: at most one row for each prompt; the upper concave hull, in C (paper, (6));
    - ``dual``: only rows over the batch. One row: the steps along all prompts' hulls by falling slope until it is used up,
      exact; several: sifting on the dual prices, to a proven ``gap`` of 1e-9. Where rounding keeps the gap open, the answer is
      that of ``highs``, and ``why`` says so, or beyond 16 million prompts times models, SolverError;
    - ``highs``: several rows for each prompt, or rows of both scopes; HiGHS. It takes every other problem too.

    A policy's cost exceeds its budget by one rounding at most, whatever the solver (``rounding``); an LP's policies keep other
    rows to 1e-9 of their bound, usually to rounding.

    time_limit: seconds, for ``dual`` with several rows and ``highs``. Raises SolverError beyond it, with the gap reached;
    Infeasible (InfeasibleBudget where the budget is one of the conflicting rows), with an irreducible infeasible subset of the
    rows and the nearest feasible bound; ValueError for a solver that cannot take the problem.
    """
    if not isinstance(problem, Problem):
        raise TypeError(f"problem: expected a Problem, got {type(problem).__name__}")
    if time_limit is not None:
        time_limit = finite_number("time_limit", time_limit, "seconds >= 0, or None", lambda seconds: seconds >= 0)
    prompt, batch = problem.prompt_rows, problem.batch_rows
    best, why = _choose(len(prompt), len(batch))
    if solver not in ("auto", "frontier", "dual", "highs"):
        raise ValueError(f"solver: expected 'auto', 'frontier', 'dual' or 'highs', got {solver!r}")
    if solver == "auto":
        solver = best
    elif solver != "highs" and solver != best:
        raise ValueError(f"solver: {solver!r} cannot take this problem ({why}); use 'auto', {best!r} or 'highs'")
    elif solver == "highs" and best != "highs":
        why = "chosen by the caller"
    if problem.values.shape[0] == 0:
        return _none(solver, why)
    if solver != "frontier":  # which checks its row chunk by chunk
        _check_each(problem)
    if solver == "frontier":
        return _frontier(problem, why)
    if solver == "dual" and len(batch) == 1:
        return _hulls(problem, why)
    if solver == "dual":
        return _dual(problem, why, time_limit)
    return _highs(problem, why, time_limit)


def _choose(prompt: int, batch: int) -> tuple[Solver, str]:
    if batch == 0:
        if prompt <= 1:
            return "frontier", "at most one row for each prompt: the upper hull is exact"
        return "highs", f"{prompt} rows for each prompt: independent LPs"
    if prompt:
        return "highs", f"rows of both scopes ({prompt} for each prompt, {batch} over the batch): one LP"
    if batch == 1:
        return "dual", "one row over the batch: a knapsack of hull steps, exact in one pass"
    return "dual", f"{batch} rows over the batch: sifting on their dual prices, to a proven gap"


def _frontier(problem: Problem, why: str) -> Policies:
    values, parts, start = problem.values, [], 0
    row = problem.prompt_rows[0] if problem.prompt_rows else Row("budget", problem.amounts, np.inf)
    for v in values.chunks():
        some = slice(start, start + len(v))
        mask = None if problem.mask is None else problem.mask[some]
        own = row.of(some)
        indices, probabilities, value, cost = solve_chunk(own, v, mask, start)
        costs = own.amounts if row.name == "budget" else Row("cost", problem.amounts, np.inf).of(some).amounts
        mixed = of_models(costs, indices)
        if row.name != "budget":
            cost = np.asarray((probabilities * mixed).sum(axis=1))
        parts.append((indices, probabilities, value, cost, mixed))
        start += len(v)
    if not parts:
        return _none("frontier", why)
    indices, probabilities, value, cost, mixed = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Policies(indices, probabilities, value, cost, "frontier", why, mixed_costs=mixed)


def _none(solver: str, why: str) -> Policies:
    """The policies of no prompts."""
    return Policies(
        np.zeros((0, 2), np.int32), np.zeros((0, 2)), np.zeros(0), np.zeros(0), solver, why, mixed_costs=np.zeros((0, 2))
    )


def solve_chunk(row: Row, v: Float64, mask: Any, start: int) -> tuple[npt.NDArray[np.int32], Float64, Float64, Float64]:
    """One row for each prompt of v [n, M], the first being prompt ``start``: indices, probabilities, value, amounts used."""
    limits = np.ascontiguousarray(np.broadcast_to(np.asarray(row.bound, np.float64), (len(v),)))
    short = _short(row, limits, mask)
    if short is not None:
        i, nearest, count = short
        raise conflicts.infeasible([row], row, float(limits[i]), nearest, start + i, count)
    indices, probabilities, value, cost, _ = native.solve_budget(v, row.amounts, limits, rounding.highest(limits), mask)
    return indices, probabilities, value, cost


def _short(row: Row, limits: Float64, mask: Any) -> tuple[int, float, int] | None:
    """The first prompt whose bound is below its least amount by more than a rounding, that amount, and how many there are."""
    amounts = row.amounts
    least = amounts.min(axis=-1) if mask is None else np.where(mask, amounts, np.inf).min(axis=1)
    if not (limits < least).any():
        return None
    bad = rounding.highest(limits) < least
    i = int(np.argmax(bad))
    return (i, float(np.broadcast_to(least, limits.shape)[i]), int(bad.sum())) if bad[i] else None


def _check_each(problem: Problem) -> None:
    """Raises Infeasible for a prompt that one of its rows alone rules out: a more precise error than the LP's."""
    n = problem.values.shape[0]
    if n is None:
        return
    for row in problem.prompt_rows:
        bounds = np.broadcast_to(np.asarray(row.bound, np.float64), (n,))
        short = _short(row, bounds, problem.mask)
        if short is not None:
            i, nearest, count = short
            raise conflicts.of_prompt(problem, row, float(bounds[i]), nearest, i, count)


def _hulls(problem: Problem, why: str) -> Policies:
    row = problem.batch_rows[0]
    hulls = Hulls.of(problem.values, row.amounts, problem.mask)
    smallest = hulls.smallest
    if smallest > rounding.highest(row.bound):
        raise conflicts.infeasible([row], row, row.bound, smallest)
    indices, probabilities, value, cost, price = hulls.within(row.bound)
    del hulls  # as large as the policies, of which there is more to compute
    if row.name != "budget":
        cost = _expected(problem, problem.amounts, indices, probabilities)
    mixed = _mixed_costs(problem, indices)
    return Policies(indices, probabilities, value, cost, "dual", why, {row.name: price}, mixed_costs=mixed)


def _dual(problem: Problem, why: str, time_limit: float | None) -> Policies:
    rows, begun = problem.batch_rows, time.monotonic()
    conflicts.check_shared(problem)
    try:
        found = dual.solve(problem.values, rows, problem.mask, time_limit)
    except NoPolicy:
        raise conflicts.over_batch(problem) from None
    except TimeLimit:
        raise
    except SolverError as error:
        n, m = problem.values.shape
        if n is not None and n * m > dual.LARGEST:
            too_many = f"{n:,} prompts are too many for HiGHS on the whole LP: loosen a bound a little, or route fewer at once"
            raise SolverError(f"{error}; {too_many}", error.gap) from error
        left = None if time_limit is None else time_limit - (time.monotonic() - begun)
        return _highs(problem, f"{why}; sifting did not converge ({error}): HiGHS on the whole LP", left)
    return _measured(problem, found.indices, found.probabilities, "dual", why, _prices(rows, found.prices), found.gap)


def _highs(problem: Problem, why: str, time_limit: float | None) -> Policies:
    prompt, batch = problem.prompt_rows, problem.batch_rows
    v = problem.values.take(slice(None))
    prices = {}
    try:
        if batch:
            reduced = surplus.reduce(prompt, batch, problem.mask, *v.shape)
            kept = reduced.binding()
            over = [reduced.over[k] for k in kept]
            few = highs.BLOCK if len(prompt) < 2 else 8 * highs.BLOCK  # prompts whose LP takes no longer than its proof
            if len(v) > few and farkas.feasible(reduced, len(v)) is False:
                raise NoPolicy
            solved = highs.solve_block(v, reduced.usable, reduced.each, over, time_limit=time_limit)
            indices, probabilities = highs.narrow(solved.x)
            of_rows = np.zeros(len(batch))
            of_rows[list(kept)] = solved.prices
            prices = _prices(batch, surplus.complete(reduced, of_rows, problem.values, problem.mask))
        else:
            indices, probabilities = highs.solve_prompts(v, prompt, problem.mask, time_limit=time_limit)
    except NoPolicy as none:
        found = None if none.prompts is None else conflicts.of_prompts(problem, none.prompts)
        raise found or conflicts.over_batch(problem) from None
    return _measured(problem, indices, probabilities, "highs", why, prices, 0.0)


def _measured(
    problem: Problem,
    indices: npt.NDArray[np.int32],
    probabilities: Float64,
    solver: str,
    why: str,
    prices: Mapping[str, float],
    gap: float,
) -> Policies:
    usable = np.ones((1, problem.values.shape[1]), bool) if problem.mask is None else problem.mask
    for row in problem.prompt_rows:
        if row.name == "budget":
            rounding.within_each(indices, probabilities, row.amounts, row.bound, usable)
    for row in problem.batch_rows:
        if row.name == "budget":
            rounding.within_mean(indices, probabilities, row.amounts, row.bound, usable, problem.values.scratch)
    _check_rows(problem, indices, probabilities)
    value, start = problem.values.scratch.empty(len(indices), np.float64), 0
    for v in problem.values.chunks():
        some = slice(start, start + len(v))
        value[some] = expected(v, indices[some], probabilities[some])
        start += len(v)
    cost = _expected(problem, problem.amounts, indices, probabilities)
    return Policies(indices, probabilities, value, cost, solver, why, prices, gap, _mixed_costs(problem, indices))


def _mixed_costs(problem: Problem, indices: npt.NDArray[np.int32]) -> Float64:
    """The costs of the models in indices, [N, W]."""
    mixed = problem.values.scratch.empty(indices.shape, np.float64)
    for some in scratch.parts(len(indices)):
        mixed[some] = of_models(of_prompts(problem.amounts, some), indices[some])
    return mixed


def _expected(problem: Problem, amounts: Any, indices: npt.NDArray[np.int32], probabilities: Float64) -> Float64:
    """``expected``, part by part."""
    used = problem.values.scratch.empty(len(indices), np.float64)
    for some in scratch.parts(len(indices)):
        used[some] = expected(of_prompts(amounts, some), indices[some], probabilities[some])
    return used


def _check_rows(problem: Problem, indices: npt.NDArray[np.int32], probabilities: Float64) -> None:
    """Raises SolverError where an LP's tolerances let a row be exceeded by more than rounding."""
    for row in (*problem.prompt_rows, *problem.batch_rows):
        use = _expected(problem, row.amounts, indices, probabilities)
        over = np.atleast_1d((use if row in problem.prompt_rows else use.mean()) - row.bound)
        scale = np.maximum(np.abs(np.broadcast_to(row.bound, over.shape)), np.finfo(float).tiny)
        finite = np.isfinite(over)
        worst = float(np.max(over[finite] / scale[finite], initial=0.0))
        if worst > TOLERANCE:
            raise SolverError(
                f"{row.stated()}: HiGHS's policy exceeds it by a factor of {1 + worst!r}: its amounts, "
                f"{row.amounts.min():g} to {row.amounts.max():g}, span more than its tolerances can resolve; leave out "
                "the most expensive models"
            )


def _prices(rows: Sequence[Row], prices: Float64) -> dict[str, float]:
    return {row.name: float(price) for row, price in zip(rows, prices, strict=True)}

"""Infeasible problems: an irreducible infeasible subset (IIS) of the rows, and the nearest bound that makes them feasible."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from p2l_engine.errors import Infeasible, InfeasibleBudget
from p2l_engine.routing import dual, farkas, highs, surplus
from p2l_engine.routing.arrays import Float64
from p2l_engine.routing.problem import Problem, Row, expected
from p2l_engine.routing.program import SolverError
from p2l_engine.routing.surplus import NoPolicy
from p2l_engine.routing.values import ArrayValues

ROUNDS = 15  # of sifting: an explanation is not to take longer than a solution

# The least mean use of another row's amounts that the rows allow (0 without another row); None: the rows are infeasible; NaN:
# not known, for batches whose whole LP would take too long.
Least = Callable[[Sequence[Row], Row | None], float | None]


def infeasible(
    rows: Sequence[Row], row: Row, bound: float, nearest: float | None, index: int | None = None, count: int = 1
) -> Infeasible:
    """The error for conflicting rows: InfeasibleBudget where another budget would be feasible."""
    stated = [Row(r.name, r.amounts, bound, r.negated).stated() if r is row else r.stated() for r in rows]
    if row.name == "budget" and nearest is not None:
        return InfeasibleBudget(bound, nearest, index, count, stated)
    sign = -1.0 if row.negated else 1.0
    return Infeasible(stated, row.name, sign * bound, None if nearest is None else sign * nearest, index, count)


def check_shared(problem: Problem) -> None:
    """Raises Infeasible early where all prompts have the same batch rows: one LP over the mean policy decides."""
    rows = problem.batch_rows
    if problem.mask is None and all(row.shared for row in rows):
        least = _of_block(rows, (), None, 1, problem.values.shape[1])
        if least(rows, None) is None:
            raise _explained(rows, rows, rows, least, None)


def of_prompts(problem: Problem, prompts: range) -> Infeasible | None:
    """The error for the first of these prompts whose own rows are infeasible, if any. Each row alone holds."""
    if len(problem.prompt_rows) < 2:
        return None
    for start in range(prompts.start, prompts.stop, highs.BLOCK):
        some = slice(start, min(start + highs.BLOCK, prompts.stop))
        if _holds(problem, some):
            continue
        while some.stop - some.start > 1:  # halves, of which the first that conflicts has the first such prompt
            middle = (some.start + some.stop) // 2
            first = slice(some.start, middle)
            some = slice(middle, some.stop) if _holds(problem, first) else first
        rows, least = _own(problem, some)
        if least(rows, None) is None:
            return _explained(rows, rows, rows, least, some.start)
    return None


def _holds(problem: Problem, some: slice) -> bool:
    """Whether these prompts' own rows are feasible."""
    rows, least = _own(problem, some)
    return least(rows, None) is not None


def _own(problem: Problem, some: slice) -> tuple[list[Row], Least]:
    """The rows of some prompts, and what decides them."""
    rows = [row.of(some) for row in problem.prompt_rows]
    mask = None if problem.mask is None else problem.mask[some]
    return rows, _of_block((), rows, mask, some.stop - some.start, problem.values.shape[1])


def of_prompt(problem: Problem, row: Row, bound: float, nearest: float, index: int, count: int) -> Infeasible:
    """The error for a prompt whose bound of ``row`` alone is below its least amount, ``nearest``; the first of ``count``."""
    others = [other.of(slice(index, index + 1)) for other in problem.prompt_rows if other is not row]
    if others:
        own, mask = row.of(slice(index, index + 1)), None if problem.mask is None else problem.mask[index : index + 1]
        return infeasible(
            [own], own, bound, _of_block((), (*others, own), mask, 1, problem.values.shape[1])(others, own), index, count
        )
    return infeasible([row], row, bound, nearest, index, count)


def over_batch(problem: Problem) -> Infeasible:
    """The error for rows that are infeasible over the whole batch, or already for one of its prompts."""
    n, m = problem.values.shape
    assert n is not None
    if problem.prompt_rows:
        if conflict := of_prompts(problem, range(n)):
            return conflict
        each = problem.prompt_rows
        if problem.mask is None and all(row.shared and np.ptp(row.bound) == 0 for row in (*each, *problem.batch_rows)):
            # Rows that are the same for all prompts hold for some policies if they hold for the mean of these.
            each, n = tuple(Row(row.name, row.amounts, float(np.ravel(row.bound)[0])) for row in each), 1
        rows, least = (*each, *problem.batch_rows), _of_block(problem.batch_rows, each, problem.mask, n, m)
        return _explained(rows, rows, problem.batch_rows, least, None)
    return _explained(_proven(problem, n, m), problem.batch_rows, problem.batch_rows, _of_dual(problem, n, m), None)


def _proven(problem: Problem, n: int, m: int) -> Sequence[Row]:
    """As few of the batch rows as their surplus proves infeasible, without an LP; all of them where it does not."""

    def infeasible(some: Sequence[Row]) -> bool:
        try:
            surplus.reduce((), some, problem.mask, n, m)
        except NoPolicy:
            return True
        return False

    return _filtered(problem.batch_rows, infeasible) if infeasible(problem.batch_rows) else problem.batch_rows


def _filtered(rows: Sequence[Row], infeasible: Callable[[Sequence[Row]], bool]) -> list[Row]:
    """The deletion filter: none of the rows that it leaves can be left out."""
    subset = list(rows)
    for row in rows:
        rest = [other for other in subset if other is not row]
        if infeasible(rest):
            subset = rest
    return subset


def _of_dual(problem: Problem, n: int, m: int) -> Least:
    block = _of_block(problem.batch_rows, (), problem.mask, n, m)

    def least(some: Sequence[Row], target: Row | None) -> float | None:
        goal = np.zeros(m) if target is None else target.amounts.min() - target.amounts
        try:
            found = dual.solve(ArrayValues(np.broadcast_to(goal, (n, m))), some, problem.mask, rounds=ROUNDS)
        except NoPolicy:
            return None
        except SolverError:
            return block(some, target) if n <= dual.OPEN else np.nan
        return 0.0 if target is None else _above(target, found.indices, found.probabilities)

    return least


def _of_block(batch: Sequence[Row], prompt: Sequence[Row], mask: Any, n: int, m: int) -> Least:
    def least(some: Sequence[Row], target: Row | None) -> float | None:
        each, over = [row for row in some if row in prompt], [row for row in some if row in batch]
        goal = np.ascontiguousarray(np.broadcast_to(np.zeros(m) if target is None else -target.amounts, (n, m)))
        try:
            free = () if target is None else (Row(target.name, target.amounts, np.inf),)
            reduced = surplus.reduce(each, (*over, *free), mask, n, m)
            binding = [reduced.over[k] for k in reduced.binding()]
            if target is not None and binding and len(each) < 2:
                nearest = farkas.least(reduced, n, reduced.over[-1])
                if nearest is not None:
                    return _raised(nearest)
            elif target is None and len(each) + len(binding) < 2:  # its surplus says that it holds
                return 0.0
            else:
                known = farkas.feasible(reduced, n)
                if known is False or (known and target is None):
                    return 0.0 if known else None
            if binding:
                solved = highs.solve_block(goal, reduced.usable, reduced.each, binding)
                indices, probabilities = highs.narrow(solved.x)
            else:
                usable = np.ascontiguousarray(np.broadcast_to(reduced.usable, (n, m)))
                indices, probabilities = highs.solve_prompts(goal, each, usable)
        except NoPolicy:
            return None
        return 0.0 if target is None else _above(target, indices, probabilities)

    return least


def _above(row: Row, indices: npt.NDArray[np.int32], probabilities: Float64) -> float:
    """The mean of what policies use of a row, rounded up: a bound that they keep to, whatever the rounding of their shares."""
    use = expected(row.amounts, indices, probabilities)
    mean = float(use.sum(dtype=np.longdouble) / len(use))
    return _raised(mean) if (probabilities.max(axis=1) < 1).any() else mean


def _raised(mean: float) -> float:
    return mean + surplus.ROUNDINGS * float(np.spacing(abs(mean)))


def _explained(
    conflicting: Sequence[Row], rows: Sequence[Row], movable: Sequence[Row], least: Least, index: int | None
) -> Infeasible:
    """An irreducible infeasible subset of the conflicting rows, and the nearest bound of one movable row that makes all rows
    feasible."""
    subset = _filtered(conflicting, lambda some: least(some, None) is None)
    for row in sorted(subset, key=lambda row: row.name != "budget"):
        nearest = least([other for other in rows if other is not row], row) if row in movable else None
        if nearest is not None and not np.isnan(nearest):
            return infeasible(subset, row, float(np.min(row.bound)), nearest, index)
    return infeasible(subset, subset[-1], float(np.min(subset[-1].bound)), None, index)

"""Rows that cannot hold together: which ones, and how far the nearest bound is that would do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from p2l_engine.errors import Infeasible, InfeasibleBudget
from p2l_engine.routing import dual, highs
from p2l_engine.routing.problem import Problem, Row, expected
from p2l_engine.routing.values import ArrayValues

# The least that the rows allow of another row's amounts, in the mean (0 when none is asked for); None: the rows clash.
Least = Callable[[Sequence[Row], Row | None], float | None]


def infeasible(
    rows: Sequence[Row], row: Row, bound: float, nearest: float | None, index: int | None = None, count: int = 1
) -> Infeasible:
    """The error for clashing rows: InfeasibleBudget where moving the budget mends it."""
    stated = [Row(r.name, r.amounts, bound, r.negated).stated() if r is row else r.stated() for r in rows]
    if row.name == "budget" and nearest is not None:
        return InfeasibleBudget(bound, nearest, index, count, stated)
    sign = -1.0 if row.negated else 1.0
    return Infeasible(stated, row.name, sign * bound, None if nearest is None else sign * nearest, index, count)


def check_shared(problem: Problem) -> None:
    """Raises Infeasible at once where all prompts have the same batch rows: then their mean policy tells."""
    rows = problem.batch_rows
    if problem.mask is None and all(row.shared for row in rows):
        least = _of_block(rows, (), None, 1, problem.values.shape[1])
        if least(rows, None) is None:
            raise _explained(rows, rows, least, None)


def of_prompts(problem: Problem, prompts: range) -> Infeasible | None:
    """The error for the first of these prompts whose own rows clash, if there is one."""
    for i in prompts:
        rows = [row.of(slice(i, i + 1)) for row in problem.prompt_rows]
        mask = None if problem.mask is None else problem.mask[i : i + 1]
        least = _of_block((), rows, mask, 1, problem.values.shape[1])
        if least(rows, None) is None:
            return _explained(rows, rows, least, i)
    return None


def over_batch(problem: Problem) -> Infeasible:
    """The error for rows that clash over the whole batch, or already for one of its prompts."""
    n, m = problem.values.shape
    assert n is not None
    if problem.prompt_rows:
        rows = (*problem.prompt_rows, *problem.batch_rows)
        least = _of_block(problem.batch_rows, problem.prompt_rows, problem.mask, n, m)
        return of_prompts(problem, range(n)) or _explained(rows, problem.batch_rows, least, None)
    return _explained(problem.batch_rows, problem.batch_rows, _of_dual(problem, n, m), None)


def _of_dual(problem: Problem, n: int, m: int) -> Least:
    def least(some: Sequence[Row], target: Row | None) -> float | None:
        goal = np.zeros(m) if target is None else -target.amounts / dual.unit(target)
        try:
            found = dual.solve(ArrayValues(np.broadcast_to(goal, (n, m))), some, problem.mask)
        except highs.Clash:
            return None
        return 0.0 if target is None else float(expected(target.amounts, found.indices, found.probabilities).mean())

    return least


def _of_block(batch: Sequence[Row], prompt: Sequence[Row], mask: Any, n: int, m: int) -> Least:
    def least(some: Sequence[Row], target: Row | None) -> float | None:
        goal = np.zeros((n, m)) if target is None else -np.broadcast_to(target.amounts, (n, m)) / dual.unit(target)
        try:
            x = highs.solve_block(goal, [row for row in some if row in prompt], [row for row in some if row in batch], mask).x
        except highs.Clash:
            return None
        return 0.0 if target is None else float((np.broadcast_to(target.amounts, (n, m)) * x).sum() / n)

    return least


def _explained(rows: Sequence[Row], movable: Sequence[Row], least: Least, index: int | None) -> Infeasible:
    """A smallest set of clashing rows (deletion filter), and the nearest bound of a movable one that mends it alone."""
    guilty = list(rows)
    for row in rows:
        rest = [other for other in guilty if other is not row]
        if least(rest, None) is None:
            guilty = rest
    for row in sorted(guilty, key=lambda row: row.name != "budget"):
        nearest = least([other for other in rows if other is not row], row) if row in movable else None
        if nearest is not None:
            return infeasible(guilty, row, float(np.min(row.bound)), nearest, index)
    return infeasible(guilty, guilty[-1], float(np.min(guilty[-1].bound)), None, index)

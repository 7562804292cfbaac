"""Routing LPs solved in exact rationals: dictionaries and Bland's rule, for a few dozen variables."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import product

import numpy as np

from p2l_engine.routing import Problem
from p2l_engine.routing.problem import Row

Rational = Fraction


def maximum(objective: Sequence[Rational], rows: Sequence[Sequence[Rational]], bounds: Sequence[Rational]) -> Rational | None:
    """The maximum of objective.x under rows.x <= bounds, x >= 0, which is bounded; None where no x satisfies the rows."""
    n, m = len(objective), len(rows)
    # Variables 0..n-1, slacks n..n+m-1, and n+m, which phase 1 lowers to 0. Each row: basic = bound - sum coefficient * free.
    table = {n + i: [bounds[i], {j: Fraction(a) for j, a in enumerate(row) if a}] for i, row in enumerate(rows)}
    goal = [Fraction(0), {j: -Fraction(c) for j, c in enumerate(objective) if c}]
    if any(bound < 0 for bound in bounds):
        helper = n + m
        for row in table.values():
            row[1][helper] = Fraction(-1)
        phase = [Fraction(0), {helper: Fraction(1)}]
        worst = min(table, key=lambda i: table[i][0])
        _pivot(table, [phase, goal], worst, helper)
        _climb(table, phase, [goal])
        if phase[0] != 0:
            return None
        if helper in table:
            row = table[helper][1]
            free = next((j for j, a in row.items() if a), None)
            if free is None:
                del table[helper]
            else:
                _pivot(table, [phase, goal], helper, free)
        for line in [*table.values(), goal]:
            line[1].pop(helper, None)
    _climb(table, goal, [])
    return goal[0]


def _climb(table, goal, others) -> None:
    while True:
        entering = min((j for j, a in goal[1].items() if a < 0), default=None)
        if entering is None:
            return
        ratios = [(row[0] / row[1][entering], basic) for basic, row in table.items() if row[1].get(entering, 0) > 0]
        _pivot(table, [goal, *others], min(ratios)[1], entering)


def _pivot(table, goals, leaving, entering) -> None:
    """Solves the leaving variable's row for the entering one, and substitutes it."""
    bound, row = table.pop(leaving)
    by = row.pop(entering)
    new = [bound / by, {j: a / by for j, a in row.items()} | {leaving: 1 / by}]
    for line in [*table.values(), *goals]:
        times = line[1].pop(entering, Fraction(0))
        if times:
            line[0] -= times * new[0]
            for j, a in new[1].items():
                line[1][j] = line[1].get(j, Fraction(0)) - times * a
                if not line[1][j]:
                    del line[1][j]
    table[entering] = new


def optimum(problem: Problem, relaxed: float = 0.0) -> float | None:
    """The best mean value of any policies; None where there are none. relaxed: raises each bound by this part of it."""
    v = problem.values.take(slice(None))
    n, m = v.shape
    mask = np.ones((n, m), bool) if problem.mask is None else problem.mask
    column = {(i, j): k for k, (i, j) in enumerate((i, j) for i, j in product(range(n), range(m)) if mask[i, j])}
    rows, bounds = [], []

    def add(entries: dict[tuple[int, int], Rational], bound: Rational) -> None:
        row = [Fraction(0)] * len(column)
        for place, amount in entries.items():
            if place in column:
                row[column[place]] += amount
        rows.append(row)
        bounds.append(bound)

    def amount(row: Row, i: int, j: int) -> Rational:
        return Fraction(float(row.amounts[j] if row.shared else row.amounts[i, j]))

    def limit(bound: float) -> Rational:
        return Fraction(bound) + abs(Fraction(bound)) * Fraction(relaxed)

    for i in range(n):
        for sign in (1, -1):
            add({(i, j): Fraction(sign) for j in range(m)}, Fraction(sign))
    for row in problem.prompt_rows:
        for i, bound in enumerate(np.broadcast_to(np.asarray(row.bound, float), (n,))):
            if np.isfinite(bound):
                add({(i, j): amount(row, i, j) for j in range(m)}, limit(float(bound)))
    for row in problem.batch_rows:
        add({(i, j): amount(row, i, j) for i in range(n) for j in range(m)}, n * limit(float(row.bound)))
    objective = [Fraction(float(v[i, j])) for i, j in column]
    best = maximum(objective, rows, bounds)
    return None if best is None else float(best / n)

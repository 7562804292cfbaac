"""Routing LPs by HiGHS, in bulk: the reference in the tests, and the solver for prompts with several rows each.

Rows are given by their surplus and divided by what their bound leaves. A model that uses more of a row than that, a/b > 1,
enters as y = (a/b) p, so that no coefficient exceeds 1.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from p2l_engine.native import routing as native
from p2l_engine.routing import surplus
from p2l_engine.routing.arrays import Float64
from p2l_engine.routing.problem import Row
from p2l_engine.routing.program import Program
from p2l_engine.routing.rounding import ordered
from p2l_engine.routing.surplus import NoPolicy, Surplus

Int32 = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]

BLOCK = 64  # prompts per LP where they share no rows
LOOSELY = 2.0  # times a bound: far from the tolerances


@dataclass(frozen=True, slots=True, eq=False)
class Solved:
    """x [n, M]: probabilities (times weights); prices [K]: dual prices of the batch rows; excess [K]: by how much elastic rows
    are exceeded, in sum."""

    x: Float64
    prices: Float64
    excess: Float64


def solve_block(
    v: Float64,
    usable: Mask,
    each: Sequence[Surplus] = (),
    over: Sequence[Surplus] = (),
    totals: Float64 | None = None,
    penalty: Float64 | None = None,
    weights: Float64 | None = None,
    time_limit: float | None = None,
) -> Solved:
    """One LP over all prompts of v [n, M], their usable models ([n, M] or [1, M]), rows for each prompt and over all.

    totals [K]: what the batch rows may use beyond the least, in sum over the prompts (None: n times their extra). penalty [K]:
    makes the batch rows elastic, at this loss of value per unit of sum. weights [n]: how many equal prompts each one stands
    for; its x sums to that. Raises NoPolicy, SolverError.
    """
    n, m = v.shape
    usable = np.broadcast_to(usable, (n, m))
    ones = np.ones(n) if weights is None else weights
    units = np.array([float(row.extra) for row in over])
    totals = ones.sum() * units if totals is None else totals
    who, which = np.nonzero(usable)
    ratios = [_ratios(row, usable)[who, which] for row in (*each, *over)]
    factors = np.maximum.reduce([np.ones(len(who)), *ratios])
    elastic = 0 if penalty is None else len(over)
    # What a row allows of a model alone, loosely: HiGHS then finds conflicts in presolve, where its simplex method may fail.
    most, hard = ones[who], [np.ones(1)] * len(each) + ([] if elastic else list(totals / units))
    with np.errstate(divide="ignore", over="ignore"):
        for bound, row in zip(hard, ratios, strict=False):
            most = np.minimum(most, np.where(row > 0, LOOSELY * bound / row, np.inf))
    # Columns: the models', the excess of elastic rows, and what each row leaves of its bound.
    slack = len(who) + elastic
    counts, columns, values = [np.bincount(who, minlength=n)], [np.arange(len(who))], [1 / factors]
    for r, row in enumerate(ratios[: len(each)]):
        some = np.flatnonzero(row)
        order = np.argsort(np.append(who[some], np.arange(n)), kind="stable")  # each prompt's models, then its slack
        counts.append(np.bincount(who[some], minlength=n) + 1)
        columns.append(np.append(some, slack + r * n + np.arange(n))[order])
        values.append(np.append((row / factors)[some], np.ones(n))[order])
    slack += n * len(each)
    for k, row in enumerate(ratios[len(each) :]):
        some = np.flatnonzero(row)
        ends, signs = ([len(who) + k, slack + k], [-1.0, 1.0]) if elastic else ([slack + k], [1.0])
        counts.append(np.array([len(some) + len(ends)]))
        columns += [some, np.array(ends)]
        values += [(row / factors)[some], np.array(signs)]
    # Only differences between a prompt's models matter; scaled to at most 1, for HiGHS's tolerances.
    loss = (v - np.where(usable, v, -np.inf).max(axis=1, keepdims=True))[who, which]
    size = float(np.abs(loss).max(initial=0.0)) or 1.0
    penalties = np.zeros(0) if penalty is None else -penalty / size * units
    program = Program(
        np.concatenate([loss / size / factors, penalties, np.zeros(n * len(each) + len(over))]),
        np.concatenate([factors * most, np.full(slack + len(over) - len(who), np.inf)]),
        np.concatenate(counts),
        np.concatenate(columns),
        np.concatenate(values),
        np.concatenate([ones, np.ones(n * len(each)), totals / units]),
        np.concatenate(
            [
                np.zeros(len(who) + elastic),
                *(np.broadcast_to(row.rounding, n) for row in each),
                [n * row.rounding for row in over],
            ]
        ),
        bool(over) and not elastic,
    )
    y, prices = program.solve(f"LP of {n} prompts", time_limit)
    x = np.zeros((n, m))
    x[who, which] = y[: len(who)] / factors
    prices = size * np.abs(prices[len(prices) - len(over) :]) / units
    return Solved(x, prices, y[len(who) :][:elastic] * units if elastic else np.zeros(len(over)))


def _ratios(row: Surplus, usable: Mask) -> Float64:
    """The amounts of usable models as parts of what the bound leaves, [n, M]; 0 where there is no bound."""
    amounts = np.where(usable, row.amounts(), 0.0)
    extra = np.asarray(row.extra, np.float64)
    return np.divide(amounts, extra[:, None] if extra.ndim else extra, out=np.zeros(amounts.shape), where=amounts > 0)


def solve_prompts(
    v: Float64, rows: Sequence[Row], allowed: Mask | None = None, threads: int | None = None, time_limit: float | None = None
) -> tuple[Int32, Float64]:
    """One small LP per prompt, R rows each: indices and probabilities [n, max(2, R + 1)].

    Dominated models are left out; blocks of prompts make one LP; threads share the blocks. That is faster than one LP per
    prompt warm-started from the previous one (python -m bench.solvers measures both).
    """
    n, m = v.shape
    width = max(2, len(rows) + 1)
    indices, probabilities = np.zeros((n, width), np.int32), np.zeros((n, width))
    deadline = None if time_limit is None else time.monotonic() + time_limit
    reduced = surplus.reduce(rows, (), allowed, n, m)
    reduced_usable = np.broadcast_to(reduced.usable, (n, m))

    def run(start: int) -> None:
        some = slice(start, min(start + BLOCK, n))
        own = [row.of(some) for row in reduced.each]
        usable = native.undominated(v[some], [row.row.amounts for row in own], reduced_usable[some])
        left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
        try:
            x = solve_block(v[some], usable, own, time_limit=left).x
        except NoPolicy:
            raise NoPolicy(range(some.start, some.stop)) from None
        indices[some], probabilities[some] = _widest(x, width)

    with ThreadPoolExecutor(threads or native.threads(n)) as pool:
        list(pool.map(run, range(0, n, BLOCK)))
    return indices, probabilities


def _widest(x: Float64, width: int) -> tuple[Int32, Float64]:
    """x [n, M] as policies over each prompt's ``width`` largest entries."""
    m = x.shape[1]
    top = np.argsort(-x, axis=1, kind="stable")[:, : min(width, m)]
    models: Int32 = np.pad(top, ((0, 0), (0, width - top.shape[1])), mode="edge").astype(np.int32)
    probabilities = np.take_along_axis(x, models, 1)
    probabilities[:, m:] = 0.0
    return ordered(models, probabilities / probabilities.sum(axis=1, keepdims=True))


def narrow(x: Float64) -> tuple[Int32, Float64]:
    """x [n, M] as policies, as wide as the most mixed prompt needs, at least 2."""
    return _widest(x, max(2, int((x > 0).sum(axis=1).max(initial=0))))

"""Several rows over a whole batch, to a proven gap: sifting on the multipliers.

Given multipliers of the K rows, every prompt's best model is one pass of C (the pricing step), and the sum of their reduced
values bounds the optimum from above, whatever the multipliers are (weak duality). Nearly all prompts prefer one model clearly;
only those whose best two are nearly level decide how the rows are met. So HiGHS solves the LP of these few prompts exactly,
with the others held at their best model; its multipliers price the next pass. When the policies found are worth as much as the
bound, they are optimal. The first multipliers come from the same method on a sample.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from p2l_engine.routing import highs, native
from p2l_engine.routing.arrays import Float64
from p2l_engine.routing.batch import Batch, equal_prompts
from p2l_engine.routing.highs import Clash, SolverError
from p2l_engine.routing.problem import Row
from p2l_engine.routing.values import Values

Mask = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.intp]

GAP = 1e-9  # the gap at which policies count as optimal, relative where the mean value exceeds 1
ROUNDING = 1e-9  # relative: how far a row may be exceeded
ROUNDS = 40
PENALTY = 10.0  # of exceeding a row by its bound, at first: values lie in [0, 1] as a rule
SAMPLE = 16  # a sample holds one prompt of so many
SMALL = 400  # a batch this small starts from multipliers of zero
UNDECIDED = 1 / 32  # the share of the prompts that the first LP leaves open
LEEWAY = 4.0  # open prompts keep the models within so many times the largest lead of an open prompt


@dataclass(frozen=True, slots=True, eq=False)
class Optimum:
    """indices, probabilities [N, W]; prices [K]; gap: a bound on the mean value that is lost (absolute)."""

    indices: npt.NDArray[np.int32]
    probabilities: Float64
    prices: Float64
    gap: float


@dataclass(frozen=True, slots=True, eq=False)
class Priced:
    """Every prompt's best model at some multipliers: best [N], its reduced value [N] and its lead over the runner-up [N]."""

    best: npt.NDArray[np.int32]
    reduced: Float64
    lead: Float64


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """Policies: choice [N], the model of every prompt that is not open; the open ones [n], the columns [n, M] that their LP
    may use, and its solution x [n, M]. value: in the mean, less what elastic rows cost; excess [K]: of the rows, in sum."""

    choice: npt.NDArray[np.int32]
    open: Indices
    columns: Mask
    x: Float64
    value: float
    excess: Float64


def solve(
    values: Values, rows: Sequence[Row], allowed: Mask | None = None, time_limit: float | None = None, gap: float = GAP
) -> Optimum:
    """The best policies under the rows (amounts.p <= bound in the mean), to a gap of ``gap``.

    At most K prompts are mixed for K binding rows. Raises Clash when no policy satisfies the rows, SolverError (with the gap
    that was reached) at the time limit or when rounding keeps the gap open.
    """
    deadline = np.inf if time_limit is None else time.monotonic() + time_limit
    batch = Batch.of_all(values, rows, allowed)
    groups = equal_prompts(batch)
    if groups is not None:
        batch = batch.of(groups.first, groups.sizes)
    found, prices, reached = _sift(batch, _first_prices(batch, deadline), deadline, gap)
    indices, probabilities = _policies(found)
    if groups is not None:
        indices, probabilities = groups.spread(indices, probabilities)
    return Optimum(indices, probabilities, prices, reached)


def price(batch: Batch, prices: Float64, weight: float = 1.0) -> Priced:
    """The pricing pass over all prompts, by chunks: each one's best model by weight * v - sum_k prices[k] amounts_k."""
    priced = list(zip(prices, batch.rows, strict=True))
    shared = sum((p * row.amounts for p, row in priced if row.shared), np.zeros(batch.values.shape[1]))
    parts, start = [], 0
    for v in batch.values.chunks():
        some = slice(start, start + len(v))
        if weight != 1.0:
            v = v * weight
        for p, row in priced:
            if p and not row.shared:
                v = v - p * row.of(some).amounts
        parts.append(native.best_models(v, shared, None if batch.allowed is None else batch.allowed[some]))
        start += len(v)
    best, reduced, lead = zip(*parts, strict=True)
    return Priced(np.concatenate(best), np.concatenate(reduced), np.concatenate(lead))


def _first_prices(batch: Batch, deadline: float) -> Float64:
    """Multipliers from a sample of the prompts; zeros where there is none or it does not help."""
    n = len(batch)
    if n <= SMALL:
        return np.zeros(len(batch.rows))
    sample = batch.of(np.sort(np.random.default_rng(n).choice(n, max(n // SAMPLE, SMALL), replace=False)))
    try:
        return _sift(sample, _first_prices(sample, deadline), deadline, 1e-6)[1]
    except Clash:
        return np.zeros(len(batch.rows))  # the sample may be infeasible where the whole is not


def _sift(batch: Batch, prices: Float64, deadline: float, gap: float) -> tuple[Found, Float64, float]:
    n, total = len(batch), float(batch.weights.sum())
    bounds = np.array([float(row.bound) for row in batch.rows])
    units = np.array([unit(row) for row in batch.rows])
    count, penalty, bound, reached = min(n, max(2 * SMALL, int(n * UNDECIDED))), PENALTY, np.inf, np.inf
    found: Found | None = None
    for _ in range(ROUNDS):
        priced = price(batch, prices)
        bound = min(bound, float(batch.weights @ priced.reduced) / total + float(prices @ bounds))
        if found is not None:
            reached = max(bound - found.value, 0.0)
            if reached <= gap * max(1.0, abs(found.value)):
                if (found.excess <= total * units * ROUNDING).all():
                    return found, prices, reached
                # The best trade of value against excess at this penalty: nothing satisfies the rows, or they cost more.
                if _impossible(batch, prices, bounds) or penalty > 1e9 * PENALTY:
                    raise Clash
                penalty, bound = 100 * penalty, np.inf
            count = min(n, 2 * count)
        left = deadline - time.monotonic()
        if left < 0:
            raise SolverError(f"batch rows: the time limit was reached at a gap of {reached:.3g}", reached)
        chosen, columns = _candidates(batch, prices, priced, found, count)
        found, prices = _improve(batch, prices, priced, chosen, columns, penalty / units, left)
    raise SolverError(f"batch rows: {ROUNDS} rounds left a gap of {reached:.3g}", reached)


def _candidates(batch: Batch, prices: Float64, priced: Priced, found: Found | None, count: int) -> tuple[Indices, Mask]:
    """The ``count`` prompts whose best two models are nearest to level, those that changed their mind and the last round's
    [n]; and which models of each come near its best [n, M]."""
    n = len(batch)
    near = np.argpartition(priced.lead, count - 1)[:count] if count < n else np.arange(n)
    width = LEEWAY * float(priced.lead[near].max()) if count < n else np.inf
    if found is not None:
        moved = np.flatnonzero(priced.best != found.choice)
        moved = moved[np.argsort(priced.lead[moved], kind="stable")[:count]]
        near = np.union1d(np.union1d(near, moved), found.open)
    prompts = np.sort(near)
    reduced = batch.values.take(prompts).copy()
    for p, row in zip(prices, batch.rows, strict=True):
        reduced -= p * row.of(prompts).amounts
    if batch.allowed is not None:
        reduced[~batch.allowed[prompts]] = -np.inf
    columns = (reduced >= reduced.max(axis=1, keepdims=True) - width) & (reduced > -np.inf)
    if found is not None:
        columns[np.searchsorted(prompts, found.open)] |= found.columns
        columns[np.arange(len(prompts)), found.choice[prompts]] = True
    return prompts, columns


def _improve(
    batch: Batch, prices: Float64, priced: Priced, prompts: Indices, columns: Mask, penalty: Float64, time_limit: float
) -> tuple[Found, Float64]:
    """The LP of the open prompts, every other one at its best model: its policies, and its multipliers."""
    total = float(batch.weights.sum())
    decided = np.ones(len(batch), bool)
    decided[prompts] = False
    rest = np.flatnonzero(decided)
    taken = batch.used(rest, priced.best[rest])
    value = float(batch.weights[rest] @ priced.reduced[rest] + prices @ taken)
    rooms = np.array([total * float(row.bound) for row in batch.rows]) - taken
    rows, v = [row.of(prompts) for row in batch.rows], batch.values.take(prompts)
    limit = None if time_limit == np.inf else time_limit
    solved = highs.solve_block(v, (), rows, columns, rooms, penalty, batch.weights[prompts], limit)
    value += float((solved.x * v).sum() - penalty @ solved.excess)
    return Found(priced.best, prompts, columns, solved.x, value / total, solved.excess), solved.prices


def _impossible(batch: Batch, prices: Float64, bounds: Float64) -> bool:
    """Whether these multipliers prove that no policy satisfies the rows: what any policy uses of their weighted sum, at the
    least, exceeds the weighted sum of the bounds (Farkas)."""
    least = -float(batch.weights @ price(batch, prices, weight=0.0).reduced) / float(batch.weights.sum())
    return least - float(prices @ bounds) > ROUNDING * float(prices @ np.abs(bounds))


def _policies(found: Found) -> tuple[npt.NDArray[np.int32], Float64]:
    mixed, shares = highs.narrow(found.x)
    indices = np.repeat(found.choice[:, None], mixed.shape[1], axis=1)
    probabilities = np.zeros(indices.shape)
    probabilities[:, 0] = 1.0
    indices[found.open], probabilities[found.open] = mixed, shares
    return indices, probabilities


def unit(row: Row) -> float:
    """What a row is measured in: its bound, or its largest amount where the bound is 0."""
    return abs(float(row.bound)) or float(np.abs(row.amounts).max()) or 1.0

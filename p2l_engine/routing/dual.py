"""Several rows over a whole batch, to a proven gap: sifting on the dual prices.

Given dual prices of the K rows, one pass in C finds every prompt's best model (the pricing step), and the sum of their reduced
values is an upper bound on the optimum (weak duality). Nearly all prompts clearly prefer one model; only those whose best two
are nearly level decide how the rows are met. So HiGHS solves LPs over these few, the others fixed at their best model, and its
dual prices start the next pass (rows are given by their surplus):

1. The window of undecided prompts starts as the whole batch. An LP over a sample of it, weighted up to the whole window, moves
   the dual prices; the window shrinks around them each round, and widens if it cannot meet the rows. Dual prices that do not
   lower the bound are rejected.
2. Once the window is small enough, its LP is exact and gives policies. They are optimal if their value reaches the bound;
   otherwise the window grows.

Rows are elastic, at a penalty that rises while they are exceeded, so every LP has a solution; if the rows are infeasible, the
dual prices end up proving it (Farkas).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from p2l_engine.native import routing as native
from p2l_engine.routing import highs, surplus
from p2l_engine.routing.arrays import Float64
from p2l_engine.routing.batch import Batch, equal_prompts
from p2l_engine.routing.near import Near, changed
from p2l_engine.routing.problem import Row
from p2l_engine.routing.program import SolverError, TimeLimit
from p2l_engine.routing.scratch import Scratch, parts, total_of
from p2l_engine.routing.surplus import NoPolicy
from p2l_engine.routing.values import Values

Mask = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.intp]

GAP = 1e-9  # policies within it count as optimal; of the values' range
VALUE_ROUNDING = 1e-14  # relative: how well mean values are known
ROUNDING = 1e-9  # relative: how far a row may be exceeded before its penalty rises
ROUNDS = 40
PENALTY = 10.0  # the first penalty of exceeding a row by what its bound leaves, in units of the values' range
OPEN = 1500  # prompts of an LP: HiGHS takes tenths of a second, and its time grows faster than their number
LARGEST = 1 << 24  # prompts times models of an LP that HiGHS may be given: gigabytes, and an hour
SAMPLE = 1 << 22  # prompts times models of a sample whose dual prices come first: a few seconds' less passes over a large batch
NEAR = 16  # the part of the batch that is undecided around the dual prices of a sample
SHRINK = 3  # the factor by which the window shrinks
NOISE = 1e-7  # of the values' range: breaks ties between models that many prompts value alike
LEEWAY = 4.0  # open prompts keep the models within this multiple of the window's largest lead


@dataclass(frozen=True, slots=True, eq=False)
class Optimum:
    """indices, probabilities [N, W]; prices [K]: dual prices; gap: a bound on the mean value lost (absolute)."""

    indices: npt.NDArray[np.int32]
    probabilities: Float64
    prices: Float64
    gap: float


@dataclass(frozen=True, slots=True, eq=False)
class Priced:
    """Every prompt's best model at given dual prices and noise: best [N], its reduced value without the noise [N], the highest
    reduced value of any model [N], and its lead over the runner-up [N]."""

    best: npt.NDArray[np.int32]
    reduced: Float64
    most: Float64
    lead: Float64


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """Policies: choice [N], the model of every prompt that is not open; the open ones [n], the columns [n, M] that their LP
    may use, and its solution x [n, M]. value: the mean, less the penalties; excess [K] over the rows' bounds, in sum."""

    choice: npt.NDArray[np.int32]
    open: Indices
    columns: Mask
    x: Float64
    value: float
    excess: Float64


def solve(
    values: Values,
    rows: Sequence[Row],
    allowed: Mask | None = None,
    time_limit: float | None = None,
    gap: float = GAP,
    rounds: int = ROUNDS,
) -> Optimum:
    """The best policies under the rows (amounts.p <= bound in the mean), to a gap of ``gap`` times the values' range.

    At most K prompts are mixed for K binding rows. Raises NoPolicy when no policy satisfies the rows, TimeLimit (with the gap
    that was reached), and SolverError when rounding keeps the gap open.
    """
    deadline = np.inf if time_limit is None else time.monotonic() + time_limit
    n, m = values.shape
    if n is None:
        values.take(slice(0))  # refuses an iterator: the values are read several times
    assert n is not None
    reduced = surplus.reduce((), rows, allowed, n, m)
    kept = list(reduced.binding())
    usable = None if reduced.usable.all() else np.broadcast_to(reduced.usable, (n, m))
    batch = Batch.of_all(values, [reduced.over[k] for k in kept], usable)
    groups = equal_prompts(batch)
    if groups is not None:
        batch = batch.of(groups.first, groups.sizes)
    found, of_kept, reached = _sift(batch, deadline, gap, rounds, _of_sample(batch, deadline, gap, rounds))
    indices, probabilities = _policies(found, batch.values.scratch)
    if groups is not None:
        indices, probabilities = groups.spread(indices, probabilities)
    prices = np.zeros(len(rows))
    prices[kept] = of_kept
    return Optimum(indices, probabilities, surplus.complete(reduced, prices, values, allowed), reached)


def price(batch: Batch, prices: Float64, noise: float = 0.0, weight: float = 1.0) -> Priced:
    """The pricing pass over all prompts, by chunks: each one's best usable model by weight * v - sum_k prices[k] amounts_k, of
    amounts beyond the least."""
    priced = [(p, row) for p, row in zip(prices, batch.rows, strict=True) if p]
    shared = sum((p * (row.row.amounts - row.base) for p, row in priced if row.row.shared), np.zeros(batch.values.shape[1]))
    new, n, start = batch.values.scratch.empty, len(batch), 0
    best, reduced, most, lead = new(n, np.int32), new(n, np.float64), new(n, np.float64), new(n, np.float64)
    for v in batch.values.chunks():
        some = slice(start, start + len(v))
        if weight != 1.0:
            v = v * weight
        for p, row in priced:
            if not row.row.shared:
                v = v - p * row.amounts(some)
        usable = None if batch.usable is None else np.ascontiguousarray(batch.usable[some])
        best[some], reduced[some], most[some], lead[some] = native.best_models(v, shared, usable, start, noise)
        for p, row in priced:
            if row.row.shared and len(row.least) > 1:
                above = p * (row.least[some] - row.base)
                reduced[some] += above
                most[some] += above
        start += len(v)
    return Priced(best, reduced, most, lead)


def _of_sample(batch: Batch, deadline: float, gap: float, rounds: int) -> Float64 | None:
    """The dual prices of a sample of a large batch, near which its own are; None for a smaller batch, or without any."""
    n, size = len(batch), SAMPLE // batch.values.shape[1]
    if n < 4 * size:
        return None
    prompts = np.unique(np.random.default_rng(n).integers(0, n, size))
    try:
        return _sift(batch.of(prompts), deadline, gap, rounds)[1]
    except (NoPolicy, SolverError):  # the batch itself says why
        return None


def _sift(batch: Batch, deadline: float, gap: float, rounds: int, first: Float64 | None = None) -> tuple[Found, Float64, float]:
    """first: dual prices that are not far from those that are sought."""
    n, total = len(batch), total_of(batch.weights)
    units = np.array([float(row.extra) for row in batch.rows])
    slack = units * np.array([max(ROUNDING, float(row.rounding)) for row in batch.rows])
    rng = np.random.default_rng(n)
    prices = best_prices = np.zeros(len(batch.rows)) if first is None else first
    span = float(np.ptp(batch.values.take(slice(0, OPEN)))) or 1.0
    noise, largest = (0.0 if n <= OPEN else NOISE * span), 1e9 * PENALTY * span
    bound, reached, penalty, window, limit = np.inf, np.inf, PENALTY * span, SHRINK * n if first is None else n // NEAR, OPEN
    found: Found | None = None
    exceeded = False
    for _ in range(rounds):
        priced = price(batch, prices, noise)
        value = total_of(batch.weights, priced.most) / total + float(prices @ units)
        better = value < bound
        if better:
            bound, best_prices, best = value, prices, priced
            if exceeded and _impossible(batch, prices, units + slack):
                raise NoPolicy
        if found is not None:
            reached = max(bound - found.value, 0.0)
            if reached <= gap * span + VALUE_ROUNDING * abs(found.value):
                if not exceeded:
                    return found, best_prices, reached
                # Optimal at this penalty: if the rows can be met, that takes a higher one.
                if penalty > largest:
                    break
                penalty *= 100
            elif (len(found.open) == n and not noise) or 2 * limit * batch.values.shape[1] > LARGEST:
                break  # an LP of the whole batch has no better one to follow
            window, limit, noise = min(n, 2 * window), 2 * limit, (noise / 10 if 2 * limit < n else 0.0)
        else:
            # Infeasible: widen the window, or raise the penalty if it is whole. Feasible: shrink it.
            if exceeded and window == n:
                penalty = min(100 * penalty, largest)
            window = min(n, SHRINK * window) if exceeded else max(min(n, limit), window // SHRINK)
        left = deadline - time.monotonic()
        if left < 0:
            raise TimeLimit(f"batch rows: the time limit was reached at a gap of {reached:.3g}", reached)
        sampled = window > limit
        near = Near.of(best.lead, window, batch.values.scratch)
        opened = _open(batch, best_prices, best, near, found, near.sample(limit, rng) if sampled else None, noise)
        improved, prices = _improve(batch, best_prices, best, opened, penalty / units, left)
        exceeded = bool((improved.excess > total * slack).any())
        found = None if sampled else improved
    unmet = " and rows unmet" if exceeded else ""
    raise SolverError(f"the gap stayed at {reached:.3g}{unmet}", reached)


@dataclass(frozen=True, slots=True, eq=False)
class Open:
    """The prompts that an LP decides [n], their weights [n]; their values, the values with noise, and the columns that the LP
    may use, all [n, M]."""

    prompts: Indices
    weights: Float64
    v: Float64
    noisy: Float64
    columns: Mask


def _open(
    batch: Batch, prices: Float64, priced: Priced, near: Near, found: Found | None, sample: Indices | None, noise: float
) -> Open:
    """The window's prompts, or a weighted sample of them, each with the models near its best; without a sample also the prompts
    and models of the last exact LP, and the prompts whose best model has changed since."""
    width = LEEWAY * near.most if 2 * near.count <= len(batch) else np.inf
    if sample is not None:
        prompts = np.sort(sample)
        of_near = total_of(batch.weights, near.marked)
        weights = batch.weights[prompts] * (of_near / batch.weights[prompts].sum())
    else:
        prompts = near.prompts()
        if found is not None:
            prompts = np.union1d(np.union1d(prompts, changed(priced.best, found.choice, priced.lead, near.count)), found.open)
        weights = batch.weights[prompts]
    v = batch.values.take(prompts)
    noisy = v + noise * native.noise_of(prompts, v.shape[1]) if noise else v
    usable = np.ones(v.shape, bool) if batch.usable is None else batch.usable[prompts]
    if width == np.inf:
        own = [row.row.of(prompts).amounts for row in batch.rows]
        return Open(prompts, weights, v, noisy, native.undominated(noisy, own, usable))
    reduced = np.where(usable, noisy, -np.inf)
    for p, row in zip(prices, batch.rows, strict=True):
        reduced -= p * row.amounts(prompts)
    columns = usable & (reduced >= reduced.max(axis=1, keepdims=True) - width)
    if found is not None and sample is None:
        columns[np.searchsorted(prompts, found.open)] |= found.columns
        columns[np.arange(len(prompts)), found.choice[prompts]] = True
    return Open(prompts, weights, v, noisy, columns)


def _improve(
    batch: Batch, prices: Float64, priced: Priced, opened: Open, penalty: Float64, time_limit: float
) -> tuple[Found, Float64]:
    """The policies and dual prices of the LP over the open prompts, every other prompt fixed at its best model.

    The use of the others is that of all less the weighted use of the open ones. So a sample's LP sees the rows' true excess,
    and only how prompts respond to dual prices is estimated.
    """
    total = total_of(batch.weights)
    best = priced.best[opened.prompts]
    rest = batch.used(None, priced.best, batch.weights) - batch.used(opened.prompts, best, opened.weights)
    value = float(total_of(batch.weights, priced.reduced) - opened.weights @ priced.reduced[opened.prompts] + prices @ rest)
    totals = np.array([total * float(row.extra) for row in batch.rows]) - rest
    rows = [row.of(opened.prompts) for row in batch.rows]
    limit = None if time_limit == np.inf else time_limit
    left, spent = np.maximum(totals, 0.0), np.maximum(-totals, 0.0)  # no choice here makes up for what the others exceed
    try:
        solved = highs.solve_block(opened.noisy, opened.columns, (), rows, left, penalty, opened.weights, limit)
    except NoPolicy:  # elastic rows can always be met
        raise SolverError(f"HiGHS called an elastic LP of {len(opened.prompts)} prompts infeasible") from None
    excess = solved.excess + spent
    value += float((solved.x * opened.v).sum() - penalty @ excess)
    return Found(priced.best, opened.prompts, opened.columns, solved.x, value / total, excess), solved.prices


def _impossible(batch: Batch, prices: Float64, most: Float64) -> bool:
    """Whether these dual prices prove that no policy satisfies the rows: the least that any policy uses of the rows' weighted
    sum exceeds the weighted sum of what it may use at most (Farkas)."""
    least = -total_of(batch.weights, price(batch, prices, weight=0.0).most) / total_of(batch.weights)
    return least > float(prices @ most)


def _policies(found: Found, scratch: Scratch) -> tuple[npt.NDArray[np.int32], Float64]:
    mixed, shares = highs.narrow(found.x)
    shape = (len(found.choice), mixed.shape[1])
    indices, probabilities = scratch.empty(shape, np.int32), scratch.empty(shape, np.float64)
    for some in parts(len(indices)):
        indices[some] = found.choice[some, None]
    probabilities[:] = 0.0
    probabilities[:, 0] = 1.0
    indices[found.open], probabilities[found.open] = mixed, shares
    return indices, probabilities

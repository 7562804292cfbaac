"""Whether rows over a batch can be met beside the rows of each prompt, and the least use of another row beside them, without an
LP of the batch.

They cannot where weights of theirs prove it: every policy uses more of the weighted sum than the bounds allow (Farkas). The
least use at given weights is one pass over the prompts, in C where each has one row; each pass bounds the least use at all
other weights (Kelley's cutting planes), and a small LP over the passes gives the next weights. The last pass is a proof, or the
passes' policies have a mixture that meets all rows.

The least use of another row is found in the same way: the small LP finds the mixture that meets the rows and uses least; its
dual prices are the next pass's weights (Dantzig and Wolfe, 1960, https://doi.org/10.1287/opre.8.1.101). Each pass bounds that
use from below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from p2l_engine.native import routing as native
from p2l_engine.routing import highs, rounding
from p2l_engine.routing.arrays import Float64
from p2l_engine.routing.problem import expected
from p2l_engine.routing.program import Program
from p2l_engine.routing.surplus import NoPolicy, Reduced, Surplus, shown
from p2l_engine.routing.values import CHUNK

ROUNDS = 60
MARGIN = 1e-6  # of what the bounds leave: closer calls are an LP's
LARGEST = 1e3  # use, in what a bound leaves, that the small LP tells apart
MOST = 200  # passes for the least use; 15 to 50 are usual, and the LP of the batch takes longer than all
GAP = 1e-13  # relative: how well the least use is known


def feasible(reduced: Reduced, n: int) -> bool | None:
    """Whether policies of N prompts meet the rows. None: not known, since it is close. Raises NoPolicy with the prompts, where
    some have no policy at all."""
    over = [reduced.over[k] for k in reduced.binding()]
    if not over:
        return None if len(reduced.each) > 1 else True
    if len(reduced.each) > 1 and any(feasible(replace(reduced, each=(row,)), n) is False for row in reduced.each):
        return False
    return _met(reduced, over, n, len(over))[0]


def least(reduced: Reduced, n: int, target: Surplus) -> float | None:
    """The least mean use of the target's amounts by policies that meet the rows, from above. None: not known to ``GAP``, or no
    policy is clearly within the rows. Raises NoPolicy where none meets them."""
    over, base = [reduced.over[k] for k in reduced.binding()], target.least.mean(dtype=np.longdouble)
    k, unit = len(over), float(np.abs(target.row.amounts).max()) or 1.0
    rows = [*over, replace(target, extra=unit)]
    known, passes = _met(reduced, rows, n, k) if over else (True, _least(reduced, rows, n, np.ones(1))[None])
    if known is False:
        raise NoPolicy
    if known is None:
        return None
    lowest = -np.inf
    for _ in range(MOST):
        mixture, prices = _cheapest(passes)
        highest = float(mixture @ passes[:, k])
        use = _least(reduced, rows, n, np.append(prices, 1.0))
        lowest = max(lowest, float(use[k] + prices @ (use[:k] - 1)))
        if highest - lowest <= GAP * (highest + float(base) / unit):
            return float(unit * np.longdouble(highest) + base)
        passes = np.vstack([passes, use])
    return None


def _met(reduced: Reduced, rows: Sequence[Surplus], n: int, k: int) -> tuple[bool | None, Float64]:
    """Whether policies meet the first k rows (None: it is close), and what each pass used of all of them."""
    weights, passes = np.full(k, 1 / k), np.zeros((0, len(rows)))
    for _ in range(ROUNDS):
        use = _least(reduced, rows, n, np.pad(weights, (0, len(rows) - k)))
        if weights @ use[:k] > 1 + MARGIN:
            return False, passes
        passes = np.vstack([passes, use])
        mixture, weights = _mixture(np.minimum(passes[:, :k], LARGEST))
        if (mixture @ passes[:, :k]).max() < 1 - MARGIN:
            return True, passes
        if not weights.any():
            return None, passes
        weights = weights / weights.sum()
    return None, passes


def _least(reduced: Reduced, rows: Sequence[Surplus], n: int, weights: Float64) -> Float64:
    """The mean use [K] of rows over the batch, in what their bounds leave, by policies that use least of their weighted sum."""
    total = np.zeros(len(rows))
    step = CHUNK if len(reduced.each) < 2 else n
    for start in range(0, n, step):
        some = slice(start, min(start + step, n))
        count = some.stop - start
        usable = shown(reduced.usable, some, n)[:count]
        use = [np.where(usable, row.amounts(some) / float(row.extra), 0.0) for row in rows]
        gain = np.ascontiguousarray(-sum(w * u for w, u in zip(weights, use, strict=True) if w))
        if len(reduced.each) > 1:
            indices, probabilities = highs.solve_prompts(gain, [row.row.of(some) for row in reduced.each], usable)
        else:
            bound, amounts = np.full(count, np.inf), np.zeros(usable.shape)
            for row in reduced.each:
                bound = np.ascontiguousarray(np.broadcast_to(row.extra, n)[some], np.float64)
                amounts = np.ascontiguousarray(np.where(usable, row.amounts(some), 0.0))
            indices, probabilities, *_ = native.solve_budget(gain, amounts, bound, rounding.highest(bound), usable)
        total += [expected(u, indices, probabilities).sum() for u in use]
    return total / n


def _mixture(passes: Float64) -> tuple[Float64, Float64]:
    """The mixture [J] of the passes [J, K] whose largest use is least, and the rows' weights [K] that show it."""
    j, k = passes.shape
    size = float(passes.max()) or 1.0
    # Columns: the passes' shares, the largest use, what each row leaves of it.
    rows = np.hstack([passes.T / size, np.full((k, 1), -1.0), np.eye(k)])
    rows = np.vstack([rows, np.concatenate([np.ones(j), np.zeros(k + 1)])])
    program = Program(
        np.concatenate([np.zeros(j), [-1.0], np.zeros(k)]),
        np.ones(j + 1 + k),
        np.full(k + 1, j + 1 + k),
        np.tile(np.arange(j + 1 + k), k + 1),
        rows.ravel(),
        np.concatenate([np.zeros(k), [1.0]]),
        np.zeros(j + 1 + k),
    )
    y, prices = program.solve(f"LP of {j} passes")
    return y[:j] / y[:j].sum(), np.abs(prices[:k])


def _cheapest(passes: Float64) -> tuple[Float64, Float64]:
    """The mixture [J] of the passes [J, K + 1] that uses least of the last row and at most 1 of each other one, and the dual
    prices [K] of these."""
    j, k = passes.shape[0], passes.shape[1] - 1
    size, factors = float(passes[:, k].max()) or 1.0, np.maximum(passes[:, :k].max(axis=1, initial=1.0), 1.0)
    # Columns: the passes' shares times their largest use, what each row leaves.
    rows = np.hstack([(passes[:, :k] / factors[:, None]).T, np.eye(k)])
    rows = np.vstack([rows, np.concatenate([1 / factors, np.zeros(k)])])
    program = Program(
        np.concatenate([-passes[:, k] / size / factors, np.zeros(k)]),
        np.concatenate([factors, np.ones(k)]),
        np.full(k + 1, j + k),
        np.tile(np.arange(j + k), k + 1),
        rows.ravel(),
        np.ones(k + 1),
        np.zeros(j + k),
    )
    y, prices = program.solve(f"LP of {j} passes")
    return y[:j] / factors, np.abs(prices[:k]) * size

"""Whether rows over a batch can be met beside the rows of each prompt, without an LP of the batch.

They cannot where weights of theirs prove it: every policy uses more of the weighted sum than the bounds allow (Farkas). The
least use at given weights is one pass over the prompts, in C where each has one row; each pass bounds the least use at all
other weights (Kelley's cutting planes), and a small LP over the passes gives the next weights. The last pass is a proof, or the
passes' policies have a mixture that meets all rows.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from p2l_engine.native import routing as native
from p2l_engine.routing import highs, rounding
from p2l_engine.routing.arrays import Float64
from p2l_engine.routing.problem import expected
from p2l_engine.routing.program import Program
from p2l_engine.routing.surplus import Reduced, shown
from p2l_engine.routing.values import CHUNK

ROUNDS = 60
MARGIN = 1e-6  # of what the bounds leave: closer calls are an LP's
LARGEST = 1e3  # use, in what a bound leaves, that the small LP tells apart


def feasible(reduced: Reduced, n: int) -> bool | None:
    """Whether policies of N prompts meet the rows. None: not known, since it is close. Raises NoPolicy with the prompts, where
    some have no policy at all."""
    over = [reduced.over[k] for k in reduced.binding()]
    if not over:
        return None if len(reduced.each) > 1 else True
    if len(reduced.each) > 1 and any(feasible(replace(reduced, each=(row,)), n) is False for row in reduced.each):
        return False
    weights, passes = np.full(len(over), 1 / len(over)), np.zeros((0, len(over)))
    for _ in range(ROUNDS):
        use = _least(reduced, n, weights)
        if weights @ use > 1 + MARGIN:
            return False
        passes = np.vstack([passes, use])
        mixture, weights = _mixture(np.minimum(passes, LARGEST))
        if (mixture @ passes).max() < 1 - MARGIN:
            return True
        if not weights.any():
            return None
        weights = weights / weights.sum()
    return None


def _least(reduced: Reduced, n: int, weights: Float64) -> Float64:
    """The mean use [K] of the batch rows, in what their bounds leave, by policies that use least of their weighted sum."""
    over, total = [reduced.over[k] for k in reduced.binding()], np.zeros(len(weights))
    step = CHUNK if len(reduced.each) < 2 else n
    for start in range(0, n, step):
        some = slice(start, min(start + step, n))
        count = some.stop - start
        usable = shown(reduced.usable, some, n)[:count]
        use = [np.where(usable, row.amounts(some) / float(row.extra), 0.0) for row in over]
        gain = np.ascontiguousarray(-sum(w * u for w, u in zip(weights, use, strict=True)))
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

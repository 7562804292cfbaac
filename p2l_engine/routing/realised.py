"""What policies really cost once their models are drawn: the variance, and the total that is not exceeded."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from p2l_engine.arguments import probability
from p2l_engine.routing import arrays
from p2l_engine.routing.arrays import Array, Float64

ROUNDING = 1e-12  # relative: the bound is raised by more than its own rounding


def variance(costs: Float64, probabilities: Float64) -> Float64:
    """The variance [N] of one draw for each prompt, from costs [N, W] of probabilities [N, W]."""
    beyond_first = costs - costs[:, :1]  # nearly equal costs lose no digits
    mean = (probabilities * beyond_first).sum(axis=1, keepdims=True)
    return np.asarray((probabilities * (beyond_first - mean) ** 2).sum(axis=1))


def total_bound(costs: Float64, probabilities: Float64, delta: float, draws: Array | None = None) -> float:
    """A total cost that the prompts' draws stay within with probability at least 1 - delta.

    costs and probabilities [N, W]; delta in (0, 1); draws [N] whole numbers: prompts of equal ones may share a draw, others are
    independent; None: all are. With the sum's variance V, the draws' excesses over their means at most b, their ranges r and
    L = ln(1 / delta), the mean of the sum is exceeded by at most the least of

    - Cantelli: sqrt(V (1 - delta) / delta);
    - Bernstein: sqrt(2 V L) + b L / 3;
    - Hoeffding: sqrt(L / 2 * sum r^2);
    - the sum of the excesses: every prompt at its most expensive model.

    Boucheron, Lugosi, Massart, Concentration Inequalities (2013), exercise 2.3, theorems 2.10 and 2.8. A shared draw's standard
    deviation, excess and range are at most the sums of its prompts'.
    """
    delta = probability("delta", delta)
    if not len(costs):
        return 0.0
    used = probabilities > 0
    mean = (probabilities * costs).sum(axis=1)
    highest = np.where(used, costs, -np.inf).max(axis=1)
    deviation = np.sqrt(variance(costs, probabilities))
    excess, width = np.maximum(highest - mean, 0.0), highest - np.where(used, costs, np.inf).min(axis=1)
    if draws is not None:
        deviation, excess, width = (np.bincount(_groups(draws, len(costs)), each) for each in (deviation, excess, width))
    v, b, log = float((deviation**2).sum()), float(excess.max()), -math.log(delta)
    beyond = min(
        math.sqrt(v * (1 - delta) / delta),
        math.sqrt(2 * v * log) + b * log / 3,
        math.sqrt(log / 2 * float((width**2).sum())),
        float(excess.sum()),
    )
    return (float(mean.sum()) + beyond) * (1 + ROUNDING)


def _groups(draws: Array, n: int) -> Any:
    ids = arrays.to_numpy(draws)
    if ids.dtype.kind not in "iu" or ids.shape != (n,):
        raise ValueError(f"draws: expected whole numbers [{n}], one for each prompt, got {ids.dtype} {list(ids.shape)}")
    return np.unique(ids, return_inverse=True)[1]

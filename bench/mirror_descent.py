"""The pacer's peer: dual mirror descent (Balseiro, Lu and Mirrokni, "The Best of Many Worlds: Dual Mirror Descent for Online
Allocation Problems", Operations Research 71(1), 2023, https://arxiv.org/abs/2011.10124)."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
Mirror = Literal["Euclidean", "entropy"]


def mirror_descent(
    v: Float64, costs: Float64, budget: float, price: float, step: float, mirror: Mirror
) -> npt.NDArray[np.intp]:
    """The chosen model of each of n prompts in turn, [n]: their Algorithm 1, for win rates v [n, M] and costs [n, M].

    Each prompt gets the argmax of v - price * cost among the models that the rest of n budgets can pay. Then the price moves
    against the subgradient of the dual, budget - cost: by step / sqrt(n), in units of the budget; added to it and cut off at 0
    (the Euclidean mirror map), or to its logarithm (negative entropy). price: at first, win rate per unit of cost.

    It is told what a stream does not tell: n, and, since theirs may reject a request at no cost, what the cheapest models of
    all later prompts will cost, so that it can always pay for these.
    """
    n = len(v)
    x, eta = costs / budget, step / np.sqrt(n)
    cheapest = x.argmin(1)
    least = x[np.arange(n), cheapest]
    later = np.concatenate([np.cumsum(least[::-1])[::-1][1:], [0.0]])
    left, mu = float(n), price * budget
    chosen = np.empty(n, np.intp)
    for t in range(n):
        scores = v[t] - mu * x[t]
        k = scores.argmax()
        if x[t, k] > left - later[t]:
            scores[x[t] > left - later[t]] = -np.inf
            k = scores.argmax() if np.isfinite(scores.max()) else cheapest[t]
        chosen[t] = k
        used = float(x[t, k])
        left -= used
        if mirror == "Euclidean":
            mu = max(0.0, mu - eta * (1 - used))
        else:
            mu *= math.exp(min(max(-eta * (1 - used), -1.0), 1.0))
    return chosen

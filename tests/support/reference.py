"""Reference implementations of the native core in plain numpy, for the tests."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from p2l_engine.routing.arrays import Float64


def sigmoid(x: Float64) -> Float64:
    """1 / (1 + exp(-x)), without overflow."""
    return np.asarray(np.exp(-np.logaddexp(0.0, -x)), np.float64)


def win_rates(theta: Float64, q: Float64) -> Float64:
    """v[n, b] = sum_a W[n, b, a] q[a] with W[n, b, a] = sigmoid(theta[n, b] - theta[n, a]) (paper, equation (6))."""
    win = sigmoid(theta[:, :, None] - theta[:, None, :])
    return np.asarray(np.einsum("nba,na->nb", win, np.broadcast_to(q, theta.shape)))


def upper_hull(costs: Float64, v: Float64) -> list[int]:
    """Models on the upper concave hull of (cost, v): rising cost, rising v, falling slope."""
    hull: list[int] = []
    for m in sorted(range(len(costs)), key=lambda m: (costs[m], -v[m], m)):
        if hull and v[m] <= v[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (v[b] - v[a]) * (costs[m] - costs[a]) > (v[m] - v[a]) * (costs[b] - costs[a]):
                break
            hull.pop()
        hull.append(m)
    return hull


def solve_budget(v: Float64, costs: Float64, budget: Float64) -> tuple[npt.NDArray[np.int32], Float64, Float64, Float64]:
    """The one-budget LP of each prompt by its upper hull; every budget must be feasible."""
    n = len(v)
    indices, probabilities = np.zeros((n, 2), np.int32), np.zeros((n, 2))
    for i, (row, cost, limit) in enumerate(zip(v, np.broadcast_to(costs, v.shape), budget, strict=True)):
        hull = upper_hull(cost, row)
        within = [m for m in hull if cost[m] <= limit]
        a = within[-1]
        b = hull[len(within)] if len(within) < len(hull) else a
        share = (limit - cost[a]) / (cost[b] - cost[a]) if b != a else 0.0
        indices[i] = a, (b if share > 0 else a)
        probabilities[i] = 1 - share, share
    value = (probabilities * np.take_along_axis(v, indices, 1)).sum(1)
    cost = (probabilities * np.take_along_axis(np.broadcast_to(costs, v.shape), indices, 1)).sum(1)
    return indices, probabilities, value, cost


def bt_score(theta: Float64, q: Float64, rate: Float64) -> Float64:
    """The root of sum_a q_a sigmoid(x - theta_a) = rate (paper, equation (9)) by bisection to the last bit."""
    q = np.broadcast_to(q, theta.shape)
    with np.errstate(divide="ignore"):
        logit = np.log(rate) - np.log1p(-rate)
    low = np.where(q > 0, theta, np.inf).min(1) + logit
    high = np.where(q > 0, theta, -np.inf).max(1) + logit
    for _ in range(200):
        middle = low + (high - low) / 2
        with np.errstate(invalid="ignore"):
            above = (q * sigmoid(middle[:, None] - theta)).sum(1) > rate
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return np.asarray(low)


def solve_batch_budget(
    v: Float64, costs: Float64, budget: float
) -> tuple[npt.NDArray[np.int32], Float64, Float64, Float64, float]:
    """One mean budget over the batch: every step along every prompt's hull, by falling slope, until the budget is spent.

    Also returns the price, the slope of the step at which it ends (0 where it never does). The budget must be feasible.
    """
    n, costs = len(v), np.broadcast_to(costs, v.shape)
    hulls = [upper_hull(cost, row) for cost, row in zip(costs, v, strict=True)]
    at, share = [0] * n, np.zeros(n)
    left = n * budget - sum(costs[i, hull[0]] for i, hull in enumerate(hulls))
    slopes = [
        (-(v[i, b] - v[i, a]) / (costs[i, b] - costs[i, a]), i, place)
        for i, hull in enumerate(hulls)
        for place, (a, b) in enumerate(pairwise(hull))
    ]
    price = 0.0
    for slope, i, place in sorted(slopes):
        a, b = hulls[i][place], hulls[i][place + 1]
        extra = costs[i, b] - costs[i, a]
        if extra > left:
            share[i], price = left / extra, -slope
            break
        at[i], left = place + 1, left - extra
    indices = np.array(
        [(hull[k], hull[min(k + (share[i] > 0), len(hull) - 1)]) for i, (hull, k) in enumerate(zip(hulls, at, strict=True))]
    )
    probabilities = np.stack([1 - share, share], axis=1)
    value = (probabilities * np.take_along_axis(v, indices, 1)).sum(1)
    cost = (probabilities * np.take_along_axis(costs, indices, 1)).sum(1)
    return indices.astype(np.int32), probabilities, value, cost, price


def best_models(
    v: Float64, penalty: Float64, allowed: npt.NDArray[np.bool_], noise: Float64
) -> tuple[npt.NDArray[np.intp], Float64, Float64, Float64]:
    """Each prompt's best allowed model by v - penalty + noise [N, M]; without the noise its value, and the most of any; its
    lead over the runner-up with the noise (inf when alone)."""
    plain = np.where(allowed, v - penalty, -np.inf)
    reduced = plain + noise
    ranked = np.sort(np.concatenate([reduced, np.full((len(v), 1), -np.inf)], axis=1), axis=1)
    best = reduced.argmax(axis=1)
    return best, plain[np.arange(len(v)), best], plain.max(axis=1), ranked[:, -1] - ranked[:, -2]


def undominated(v: Float64, amounts: list[Float64], usable: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The usable models that no other one beats with no less value and no more of any row; of equals the first stays."""
    m = v.shape[1]
    kept = usable.copy()
    for j in range(m):
        beaten = usable[:, [j]] & ((v[:, [j]] > v) | (v[:, [j]] == v))
        strictly = v[:, [j]] > v
        for row in amounts:
            row = np.broadcast_to(row, v.shape)
            beaten &= row[:, [j]] <= row
            strictly |= row[:, [j]] < row
        kept &= ~(beaten & (strictly | (j < np.arange(m))))
    return kept

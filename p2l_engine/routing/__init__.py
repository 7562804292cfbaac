"""From coefficients to policies: win rates, budgets and the router's own score. Arrays in, arrays out.

Every function takes numpy arrays, or torch tensors on any device, and returns the kind that it was given (tensors on the
device of the first argument). Budgets and scores are computed in float64 on the CPU, in the native core; so are win rates,
unless theta is on a GPU. N prompts, M models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from p2l_engine.errors import InfeasibleBudget
from p2l_engine.routing import arrays, highs, native
from p2l_engine.routing.arrays import Array

__all__ = ["InfeasibleBudget", "Policies", "bt_score", "solve_batch_budget", "solve_budget", "win_rates"]

TINY = float(np.finfo(float).tiny)
RATE_ROUNDING = 1e-12  # a sum of win rates may exceed 1 by its last bits
INFEASIBLE_SLACK = 1e-12  # relative: a budget this close under the cheapest policy is a rounding of it


@dataclass(frozen=True, slots=True)
class Policies:
    """The policies of N prompts.

    indices [N, W] int32: the models each policy mixes, W >= 2; an unused place repeats the first model.
    probabilities [N, W]: rows sum to 1, 0 where unused. value [N]: expected win rate. cost [N]: expected cost.
    """

    indices: Any
    probabilities: Any
    value: Any
    cost: Any


def win_rates(theta: Array, q: Array) -> Any:
    """Each model's win rate against the opponents, v = W q (paper, equation (6)).

    theta [N, M] coefficients; q [M] or [N, M], non-negative, rows summing to 1. Returns v [N, M] float64 in [0, 1] with
    v[n, b] = sum_a q[a] sigmoid(theta[n, b] - theta[n, a]): the Bradley-Terry reading of the coefficients, the one under
    which the budget LP and the score agree (paper, Theorem 1). CUDA tensors stay on their device, where the sums are
    float32. Raises ValueError for NaN, infinities and bad shapes.
    """
    t = arrays.matrix("theta", theta)
    weights = arrays.opponents(q, t.shape)
    if isinstance(theta, torch.Tensor) and theta.is_cuda:
        from p2l_engine.kernels.win_rates import win_rates as on_gpu

        return on_gpu(theta.contiguous(), torch.from_numpy(weights).to(theta.device)).double()
    return arrays.like(native.win_rates(t, weights), theta)


def solve_budget(
    v: Array, costs: Array, budget: float | Array | None = None, solver: Literal["frontier", "highs"] = "frontier"
) -> Policies:
    """The best randomised choice of each prompt whose expected cost stays within its budget (paper, equation (6)).

    v [N, M] win rates; costs [M] or [N, M], >= 0; budget a number, [N], or None for none. ``frontier`` walks the upper
    concave hull of (cost, v) and is exact; ``highs`` solves the same LP with HiGHS. At most two models per prompt. Ties: of
    equal win rates the cheaper model, of equal costs too the lower index. Raises InfeasibleBudget, with the smallest
    feasible budget, where a prompt's cheapest model costs more than its budget.
    """
    w = arrays.matrix("v", v)
    c = arrays.costs(costs, w.shape)
    limits = arrays.budgets(budget, len(w))
    _check_feasible(c, limits, len(w))
    if solver == "frontier":
        indices, probabilities, value, cost, infeasible = native.solve_budget(w, c, limits)
        if infeasible:
            raise AssertionError(f"{infeasible} prompts infeasible after the check: please report this")
    elif solver == "highs":
        indices, probabilities = highs.solve_budget(w, c, limits)
        value, cost = _expectations(w, c, indices, probabilities)
    else:
        raise ValueError(f"solver: expected 'frontier' or 'highs', got {solver!r}")
    return Policies(*(arrays.like(a, v) for a in (indices, probabilities, value, cost)))


def solve_batch_budget(
    v: Array,
    costs: Array,
    budget: float | None = None,
    max_share: Array | None = None,
    solver: Literal["highs"] = "highs",
) -> Policies:
    """The best policies whose *mean* expected cost over the batch stays within the budget.

    v [N, M]; costs [M] or [N, M]; max_share [M] in [0, 1] bounds each model's mean probability over the batch. One LP of
    N x M columns in HiGHS: exact, for batches of thousands. Raises InfeasibleBudget; ValueError where the shares cannot sum
    to 1.
    """
    w = arrays.matrix("v", v)
    c = arrays.costs(costs, w.shape)
    if solver != "highs":
        raise ValueError(f"solver: expected 'highs', got {solver!r}")
    if len(w) == 0:
        return Policies(*(arrays.like(a, v) for a in (np.zeros((0, 2), np.int32), np.zeros((0, 2)), *np.zeros((2, 0)))))
    limit = float(arrays.budgets(budget, 1)[0])
    shares = None if max_share is None else _shares(max_share, w.shape[1])
    smallest = _cheapest_mean(c, w.shape, shares)
    # With shares the smallest mean cost may come from HiGHS, to its tolerance.
    if smallest > limit * (1 + (INFEASIBLE_SLACK if shares is None else highs.TOLERANCE)):
        raise InfeasibleBudget(limit, smallest)
    indices, probabilities = highs.solve_batch_budget(w, c, max(limit, smallest), shares)
    value, cost = _expectations(w, c, indices, probabilities)
    return Policies(*(arrays.like(a, v) for a in (indices, probabilities, value, cost)))


def bt_score(theta: Array, q: Array, rate: Array) -> Any:
    """The router's own Bradley-Terry coefficient from its win rate (paper, Algorithm 1 step 3, equation (9)).

    theta [N, M]; q [M] or [N, M]; rate [N] in [0, 1], the router's win rate against q. Returns the score [N] that solves
    sum_a q[a] sigmoid(score - theta[n, a]) = rate[n]; -inf at rate 0, +inf at rate 1.
    """
    t = arrays.matrix("theta", theta)
    r = arrays.finite("rate", arrays.to_float64("rate", rate))
    if r.shape != t.shape[:1]:
        raise ValueError(f"rate: expected shape [{len(t)}], got {list(r.shape)}")
    if r.size and (r.min() < 0 or r.max() > 1 + RATE_ROUNDING):
        raise ValueError(f"rate: expected win rates in [0, 1], got {r.min()} to {r.max()}")
    return arrays.like(native.bt_score(t, arrays.opponents(q, t.shape), r), theta)


def _expectations(w: Any, c: Any, indices: Any, probabilities: Any) -> tuple[Any, Any]:
    c = np.broadcast_to(c, w.shape)
    value, cost = ((probabilities * np.take_along_axis(a, indices, 1)).sum(1) for a in (w, c))
    return value, cost


def _check_feasible(c: Any, limits: Any, n: int) -> None:
    """Raises InfeasibleBudget; lifts budgets that miss the cheapest model by rounding alone, in place."""
    cheapest = c.min(axis=-1)
    short = limits < cheapest
    if not short.any():
        return
    bad = limits < cheapest * (1 - INFEASIBLE_SLACK)
    if bad.any():
        i = int(np.argmax(bad))
        raise InfeasibleBudget(float(limits[i]), float(np.broadcast_to(cheapest, n)[i]), i, int(bad.sum()))
    np.maximum(limits, cheapest, out=limits)


def _shares(max_share: Array, m: int) -> Any:
    shares = arrays.finite("max_share", arrays.to_float64("max_share", max_share))
    if shares.shape != (m,) or shares.min() < 0 or shares.max() > 1:
        raise ValueError(f"max_share: expected [{m}] shares in [0, 1], got shape {list(shares.shape)}: {shares}")
    if shares.sum() < 1 - INFEASIBLE_SLACK:
        raise ValueError(f"max_share: the shares sum to {shares.sum():g}; they must leave room for every prompt (>= 1)")
    return shares


def _cheapest_mean(c: Any, shape: tuple[int, int], shares: Any) -> float:
    """The smallest mean cost over the batch that the shares allow."""
    if shares is None:
        return float(np.broadcast_to(c.min(axis=-1), shape[0]).mean())
    if c.ndim == 1:  # fill the cheapest models first
        left, total = 1.0, 0.0
        for j in np.argsort(c):
            total += min(left, shares[j]) * c[j]
            left -= min(left, shares[j])
        return float(total)
    full = np.broadcast_to(c, shape)
    # Scaled to the dearest model: HiGHS's tolerances are absolute.
    indices, probabilities = highs.solve_batch_budget(-full / max(float(full.max()), TINY), full, np.inf, shares)
    return float(_expectations(full, full, indices, probabilities)[1].mean())

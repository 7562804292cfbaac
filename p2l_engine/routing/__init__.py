"""From coefficients to policies: win rates, budgets and the router's own score. Arrays in, arrays out.

Every function takes numpy arrays, or torch tensors on any device, and returns the same kind (tensors on the device of the first
argument). CUDA tensors stay on their device for the Bradley-Terry win rates, one budget per prompt and the score (``cuda``);
everything else is computed in float64 on the CPU, in the native core. Importing this package does not load torch. N prompts,
M models.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any, Literal

import numpy as np

from p2l_engine.errors import Infeasible, InfeasibleBudget, SpendLimitReached, UnknownReservation
from p2l_engine.native import routing as native
from p2l_engine.routing import arrays
from p2l_engine.routing.arrays import Array
from p2l_engine.routing.frontier import Frontier, frontier
from p2l_engine.routing.overspending import overspending
from p2l_engine.routing.pacer import BudgetPacer
from p2l_engine.routing.policies import Policies
from p2l_engine.routing.problem import Problem, Resource, Row, Share, of_models
from p2l_engine.routing.program import SolverError
from p2l_engine.routing.solve import solve, solve_chunk
from p2l_engine.routing.values import ArrayValues, LazyWinRates, Objective, check_objective, compute, tie_parameters
from p2l_engine.spending.limit import Limit
from p2l_engine.spending.records import Balance, Notice, Reservation, Settlement
from p2l_engine.spending.spend_limit import SpendLimit

__all__ = [
    "Balance",
    "BudgetPacer",
    "Frontier",
    "Infeasible",
    "InfeasibleBudget",
    "LazyWinRates",
    "Limit",
    "Notice",
    "Objective",
    "Policies",
    "Problem",
    "Reservation",
    "Resource",
    "Settlement",
    "Share",
    "SolverError",
    "SpendLimit",
    "SpendLimitReached",
    "UnknownReservation",
    "bt_score",
    "frontier",
    "overspending",
    "solve",
    "solve_batch_budget",
    "solve_budget",
    "win_rates",
]

MAX_MODELS_ON_GPU = 4096  # a prompt's models stay in one program's registers
RATE_ROUNDING = 1e-12  # a sum of win rates may exceed 1 by its last bits


def win_rates(theta: Array, q: Array, objective: Objective = "bt", eta: Array | None = None, feedback: str = "bt") -> Any:
    """What routing maximises: each model's win rate against the opponents, v = W q (paper, equation (6)).

    theta [N, M] coefficients; q [M] or [N, M], non-negative, rows summing to 1. Returns v [N, M] float64, by objective:

    - ``bt``: v[n, b] = sum_a q[a] sigmoid(theta[n, b] - theta[n, a]), Bradley-Terry, whatever feedback model the coefficients
      were trained under; only here is the best policy by win rate also the best by score (paper, Theorem 1);
    - ``half-ties``: v[n, b] = sum_a q[a] (P(b wins) + P(neither wins) / 2) under ``feedback`` (rk, rk-reparam, grk; paper, 2.2)
      with its tie parameters eta [N]: a tie, or "both bad", counts as half a win, so W + W' = 1. Equals ``bt`` for bt and
      bt-tie;
    - ``not-bad``: v[n, b] = sigmoid(theta[n, b]), whatever q is. Published routers maximise it for grk, where it is the
      probability that b beats the fictitious bad model of coefficient 0 (paper, 2.2).

    CUDA tensors stay on their device for ``bt``, where the sums are float32. Raises ValueError for NaN, infinities, bad shapes,
    unknown names and missing eta.
    """
    if objective == "bt" and (cuda := _on_gpu(theta)):
        return cuda.win_rates(theta, q)
    t = arrays.matrix("theta", theta)
    weights = arrays.opponents(q, t.shape)
    ties = None if eta is None else tie_parameters(eta, len(t))
    check_objective(objective, ties, feedback)
    return arrays.like(compute(t, weights, objective, ties, feedback), theta)


def solve_budget(
    v: Array, costs: Array, budget: float | Array | None = None, solver: Literal["frontier", "highs"] = "frontier"
) -> Policies:
    """The best randomised choice of each prompt whose expected cost stays within its budget (paper, equation (6)).

    v [N, M] win rates; costs [M] or [N, M], >= 0; budget a number, [N], or None for none. ``frontier`` walks the upper
    concave hull of (cost, v) and is exact; ``highs`` solves the same LP with HiGHS. At most two models per prompt. Ties: of
    equal win rates the cheaper model, of equal costs too the lower index. Raises InfeasibleBudget, with the smallest
    feasible budget, where a prompt's cheapest model costs more than its budget. ``solve`` takes further rows and masks.
    """
    if solver not in ("frontier", "highs"):
        raise ValueError(f"solver: expected 'frontier' or 'highs', got {solver!r}")
    if solver == "highs":
        return _like(solve(Problem(v, costs, budget), solver), v)
    if cuda := _on_gpu(v):
        on_gpu: Policies = cuda.solve_budget(v, costs, budget)
        return on_gpu
    # Services call this for every prompt: straight to the hull.
    w = arrays.matrix("v", v)
    row = Row("budget", arrays.costs(costs, w.shape), arrays.budgets(budget, len(w)))
    indices, probabilities, value, cost = solve_chunk(row, w, None, 0)
    return _like(Policies(indices, probabilities, value, cost, mixed_costs=of_models(row.amounts, indices)), v)


def solve_batch_budget(
    v: Array | LazyWinRates,
    costs: Array,
    budget: float | None = None,
    max_share: Array | None = None,
    min_share: Array | None = None,
    solver: Literal["dual", "highs"] = "dual",
) -> Policies:
    """The best policies whose *mean* expected cost over the batch stays within the budget.

    v [N, M] or LazyWinRates; costs [M] or [N, M]; max_share and min_share [M] in [0, 1] bound each model's mean probability
    over the batch. ``dual``: exact with one row, one prompt mixed at most; with shares to a proven gap of 1e-9, at most as many
    prompts mixed as rows bind; ``highs``: one LP of N x M columns, for batches of thousands. Raises InfeasibleBudget;
    Infeasible, with the conflicting rows, where shares cannot hold.
    """
    if solver not in ("dual", "highs"):
        raise ValueError(f"solver: expected 'dual' or 'highs', got {solver!r}")
    values = v if isinstance(v, LazyWinRates) else ArrayValues(v)
    m = values.shape[1]
    lower, upper = _shares("min_share", min_share, m, 0.0), _shares("max_share", max_share, m, 1.0)
    shares = [Share(j, float(upper[j]), float(lower[j])) for j in range(m) if upper[j] < 1 or lower[j] > 0]
    problem = Problem(values, costs, budget, "batch", shares=shares)
    return _like(solve(problem, "highs" if solver == "highs" else "auto"), v)


def bt_score(theta: Array, q: Array, rate: Array) -> Any:
    """The router's own Bradley-Terry coefficient from its win rate (paper, Algorithm 1 step 3, equation (9)).

    theta [N, M]; q [M] or [N, M]; rate [N] in [0, 1], the router's win rate against q. Returns the score [N] that solves
    sum_a q[a] sigmoid(score - theta[n, a]) = rate[n]; -inf at rate 0, +inf at rate 1.
    """
    if arrays.is_tensor(rate) and rate.is_cuda and (cuda := _on_gpu(theta)):
        return cuda.bt_score(theta, q, rate)
    t = arrays.matrix("theta", theta)
    r = arrays.finite("rate", arrays.to_float64("rate", rate))
    if r.shape != t.shape[:1]:
        raise ValueError(f"rate: expected shape [{len(t)}], got {list(r.shape)}")
    if r.size and (r.min() < 0 or r.max() > 1 + RATE_ROUNDING):
        raise ValueError(f"rate: expected win rates in [0, 1], got {r.min()} to {r.max()}")
    return arrays.like(native.bt_score(t, arrays.opponents(q, t.shape), r), theta)


def _on_gpu(value: object) -> ModuleType | None:
    """The module with the GPU's kernels, if ``value`` is a tensor [N, M] on a GPU that they take; else None."""
    if not (arrays.is_tensor(value) and value.is_cuda and value.ndim == 2 and 1 <= value.shape[1] <= MAX_MODELS_ON_GPU):
        return None
    from p2l_engine.routing import cuda  # here: Triton is optional and takes a second to import

    return cuda


def _like(policies: Policies, given: Any) -> Policies:
    """The policies as tensors on ``given``'s device, if it is a tensor."""
    if not arrays.is_tensor(given):
        return policies
    columns = {
        name: arrays.like(getattr(policies, name), given)
        for name in ("indices", "probabilities", "value", "cost", "mixed_costs")
    }
    return replace(policies, **columns)


def _shares(name: str, share: Array | None, m: int, absent: float) -> Any:
    if share is None:
        return np.full(m, absent)
    shares = arrays.finite(name, arrays.to_float64(name, share))
    if shares.shape != (m,) or shares.min() < 0 or shares.max() > 1:
        raise ValueError(f"{name}: expected [{m}] shares in [0, 1], got shape {list(shares.shape)}: {shares}")
    return shares

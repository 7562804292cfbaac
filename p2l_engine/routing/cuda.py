"""The stages that stay on a GPU when their arrays are there: win rates, one budget per prompt, the score.

They run ``p2l_engine.kernels``; the rest of routing runs on the CPU. Each function synchronises once, to check its arguments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from p2l_engine.errors import InfeasibleBudget
from p2l_engine.kernels import bt_score as root
from p2l_engine.kernels import budget_lp as lp
from p2l_engine.kernels import win_rates as rates
from p2l_engine.routing import arrays
from p2l_engine.routing.policies import Policies
from p2l_engine.routing.rounding import SLACK


def win_rates(theta: Tensor, q: object) -> Tensor:
    """``routing.win_rates`` for bt, summed in float32; returns float64."""
    t = _finite("theta", theta)
    weights = torch.from_numpy(arrays.opponents(q, _shape(t))).to(t.device)
    with torch.cuda.device_of(t):
        return rates.win_rates(t, weights).double()


def solve_budget(v: Tensor, costs: object, budget: object) -> Policies:
    """``routing.solve_budget`` with the solver ``frontier``; the same optimum, or another one of equal value."""
    w = _finite("v", v)
    amounts = torch.from_numpy(arrays.costs(costs, _shape(w))).to(w.device)
    limits = torch.from_numpy(arrays.budgets(budget, len(w))).to(w.device)
    smallest = amounts.expand_as(w).amin(1)
    limits = _reached(limits, smallest)
    with torch.cuda.device_of(w):
        indices, probabilities, value, cost = lp.budget_lp(w, amounts, limits)
    short = limits < smallest
    if bool(short.any()):
        first = int(short.int().argmax())
        raise InfeasibleBudget(float(limits[first]), float(smallest[first]), first, int(short.sum()))
    mixed = amounts.expand_as(w).gather(1, indices.long())
    why = "one row for each prompt, on the GPU: a line over two models"
    return Policies(indices, probabilities, value, cost, why=why, mixed_costs=mixed)


def bt_score(theta: Tensor, q: object, rate: Tensor) -> Tensor:
    """``routing.bt_score``; rate [N], also on the device, is within [0, 1] up to rounding."""
    t = _finite("theta", theta)
    weights = torch.from_numpy(arrays.opponents(q, _shape(t))).to(t.device)
    with torch.cuda.device_of(t):
        return root.bt_score(t, weights, rate.double().clamp(0.0, 1.0).contiguous())


def policies(
    theta: Tensor, v: Tensor, columns: Tensor, costs: Tensor, limits: Tensor, q: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """From win rates to scores without synchronising: what a router does with a batch on the GPU.

    theta and v [N, M] float32; columns [K]: the models that may be chosen; costs [K], limits [N] and q [M] float64. Returns
    indices [N, 2], probabilities [N, 2], value, cost and score [N], and whether all of theta [N] is finite; where cost >
    limits, the budget was infeasible.
    """
    smallest = costs.min()
    limits = _reached(limits, smallest)
    indices, probabilities, value, cost = lp.budget_lp(v.index_select(1, columns), costs, limits)
    score = root.bt_score(theta, q, value.clamp(0.0, 1.0))
    return indices, probabilities, value, cost, score, torch.isfinite(theta).all(1)


def _reached(limits: Tensor, smallest: Tensor) -> Tensor:
    """The budgets [N], raised to the smallest feasible ones where they are short of them by a rounding."""
    highest = limits
    for _ in range(SLACK):
        highest = torch.nextafter(highest, torch.full_like(highest, torch.inf))
    return torch.where((limits < smallest) & (highest >= smallest), smallest, limits)


def _finite(name: str, given: Tensor) -> Tensor:
    if not given.is_floating_point():
        raise TypeError(f"{name}: expected floating point on the GPU, got {given.dtype}")
    tensor = given.detach().contiguous()
    if not bool(torch.isfinite(tensor).all()):
        place = (~torch.isfinite(tensor)).nonzero()[0].tolist()
        raise ValueError(f"{name}{place}: expected a finite number, got {float(tensor[tuple(place)])}")
    return tensor


def _shape(tensor: Tensor) -> tuple[int, int]:
    return int(tensor.shape[0]), int(tensor.shape[1])

"""How much more than a budget is really spent: policies look for low expected costs, and so for those that are too low."""

from __future__ import annotations

import numpy as np

from p2l_engine.arguments import finite_number
from p2l_engine.routing import arrays
from p2l_engine.routing.arrays import Array
from p2l_engine.routing.problem import Problem
from p2l_engine.routing.problem import expected as expected_amounts
from p2l_engine.routing.solve import solve

MOST = 64.0  # the largest factor
HALVINGS = 24  # of the interval of its logarithm


def overspending(value: Array, expected: Array, paid: Array, budget: float) -> float:
    """By what a budget over a batch is to be divided (or expected costs multiplied), so that what is really spent is within it
    on prompts like these: 1 at least.

    value [N, M]: what is maximised, and expected [N, M] > 0: costs, both predicted for prompts that they were not learned from
    (in parts, each from the others: cross-fitting); else the factor is too small. paid [N, M] >= 0: what the answers really
    cost. budget: mean cost of a prompt. Raises ValueError for other shapes and values, and where the cheapest models of all
    prompts really cost more than the budget.
    """
    budget = finite_number("budget", budget, "a number above 0", lambda b: b > 0)
    given = (("value", value), ("expected", expected), ("paid", paid))
    v, costs, real = (arrays.finite(name, arrays.to_float64(name, of)) for name, of in given)
    if v.ndim != 2 or not v.size or costs.shape != v.shape or real.shape != v.shape:
        raise ValueError(f"value, expected, paid: expected one shape [N, M], got {[list(of.shape) for of in (v, costs, real)]}")
    if not (costs > 0).all() or not (real >= 0).all():
        raise ValueError("expected, paid: expected costs above 0, and real ones of at least 0")

    def spent(factor: float) -> float:
        # Where the cheapest models are expected to cost more than the budget, they are chosen.
        limit = max(budget / factor, float(costs.min(1).mean()) * (1 + 1e-9))
        chosen = solve(Problem(v, costs, limit, "batch"))
        return float(expected_amounts(real, chosen.indices, chosen.probabilities).mean())

    low, high = 0.0, float(np.log(MOST))
    if spent(1.0) <= budget:
        return 1.0
    if (least := spent(MOST)) > budget:
        raise ValueError(f"budget: expected at least {least:g}, which the cheapest models really cost, got {budget:g}")
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(float(np.exp(middle))) > budget else (low, middle)
    return float(np.exp(high))

"""The choice for one request: which models may take it, which policy is best, and what comes after a failure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from p2l_engine import routing
from p2l_engine.exploration import DRAWN
from p2l_engine.routing import BudgetPacer, thompson
from p2l_engine.routing.thompson import Propensity

Float64 = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Draw = Callable[[Sequence[int], Sequence[float]], int]


@dataclass(frozen=True, slots=True)
class Pick:
    """A policy over the K models, and the model drawn from it. rate and cost are the policy's.

    price, most: the win rate per USD and the highest cost by which it was chosen; None: by a budget, or without one. explored:
    the model's propensity where the policy is that of a draw of the coefficients.
    """

    model: int
    policy: dict[int, float]
    rate: float
    cost: float
    why: str
    price: float | None = None
    most: float = math.inf
    explored: Propensity | None = None

    @property
    def propensity(self) -> float:
        """The probability with which the model was drawn."""
        return self.policy[self.model] if self.explored is None else self.explored.value

    @property
    def propensity_error(self) -> float:
        """An upper bound on the standard error of ``propensity``; 0 where it is exact."""
        return 0.0 if self.explored is None else self.explored.error


def choose(
    rates: Float64, costs: Float64, allowed: Mask, draw: Draw, budget: float | None = None, price: float | None = None
) -> Pick:
    """The best policy over the allowed models.

    rates [K] win rates; costs [K] expected; draw: of one of several models by their probabilities. budget: an upper bound on
    the expected cost; price: instead of it, win rate per unit of cost. Raises InfeasibleBudget; ValueError
    where no model is allowed.
    """
    models = np.flatnonzero(allowed)
    if not len(models):
        raise ValueError("allowed: expected one model at least, got none")
    v, x = rates[models], costs[models]
    if price is not None:
        k = _best(-x if price == np.inf else v - price * x, v, x)
        why = (
            "lowest cost: the mean budget is overspent"
            if price == np.inf
            else f"highest win rate less cost at {price:.4g} per USD"
        )
        return Pick(int(models[k]), {int(models[k]): 1.0}, float(v[k]), float(x[k]), why, price)
    if budget is None:  # the LP's answer too
        k = _best(v, v, x)
        return Pick(int(models[k]), {int(models[k]): 1.0}, float(v[k]), float(x[k]), "highest win rate (no budget)")
    policies = routing.solve_budget(v[None], x, budget)
    (indices,), (probabilities,) = policies.indices.tolist(), policies.probabilities.tolist()
    policy = {int(models[i]): p for i, p in zip(indices, probabilities, strict=True) if p > 0}
    bound = f"a budget of {budget:g} USD"
    why = f"highest win rate ({bound})" if len(policy) == 1 else f"highest win rate within {bound}: a mix of {len(policy)}"
    return Pick(draw(list(policy), list(policy.values())), policy, float(policies.value[0]), float(policies.cost[0]), why)


def paced(rates: Float64, costs: Float64, allowed: Mask, pacer: BudgetPacer) -> Pick:
    """The pacer's choice, which it counts. See ``BudgetPacer.choose``."""
    found = pacer.choose_at(rates, costs, allowed)
    k, price = found.model, found.price
    why = f"highest win rate less cost at {price:.4g} per USD: a mean budget of {pacer.budget:g} USD"
    return Pick(k, {k: 1.0}, float(rates[k]), float(costs[k]), why, price, found.most)


def chances(pick: Pick, rates: Float64, costs: Float64, allowed: Mask, budget: float | None) -> Float64:
    """The probability [S] of the picked model under each of S rows of win rates [S, K], by the budget or the price by which it
    was picked."""
    models = np.flatnonzero(allowed)
    v, x = np.ascontiguousarray(rates[:, models]), costs[models]
    if pick.price is None and budget is not None:
        policies = routing.solve_budget(v, x, budget)
        return np.asarray((policies.probabilities * (models[policies.indices] == pick.model)).sum(axis=1))
    best = thompson.paced(v, x, pick.price or 0.0, pick.most)
    return np.asarray(models[best] == pick.model, np.float64)


def explored(pick: Pick, rates: Float64, propensity: Propensity) -> Pick:
    """The pick from a draw of the coefficients, with its propensity over it, and its win rate by rates [K] at their means."""
    rate = sum(p * float(rates[k]) for k, p in pick.policy.items())
    return replace(pick, rate=rate, why=f"{pick.why}; {DRAWN}", explored=propensity)


def fallbacks(
    rates: Float64, costs: Float64, allowed: Mask, first: int, draw: Draw, budget: float | None, price: float | None, most: int
) -> list[int]:
    """The models that would be chosen one after the other if each before failed."""
    left, found = allowed.copy(), list[int]()
    left[first] = False
    while left.any() and len(found) < most:
        try:
            k = choose(rates, costs, left, draw, budget, price).model
        except routing.InfeasibleBudget:
            break
        found.append(k)
        left[k] = False
    return found


def _best(scores: Float64, v: Float64, x: Float64) -> int:
    return int(np.lexsort((x, -v, -scores))[0])

"""What a router that explores decides: policies under a draw of the coefficients, and each decision's propensity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from p2l_engine.constraints import Constraints
from p2l_engine.decision import Decision, Draws
from p2l_engine.routing import Policies, Problem, arrays, solve, thompson
from p2l_engine.routing.arrays import Float64
from p2l_engine.routing.thompson import Posterior

NO_UNCERTAINTY = (
    "explore: expected a checkpoint that knows how sure it is of its coefficients, got one without uncertainty; "
    "'p2l-engine adapt' makes one from votes"
)
DRAWN = "its coefficients drawn from their posterior"

Rates = Callable[[Float64, slice], Float64]  # theta [S, M] of these prompts -> what is maximised [S, K]
# The same of prompt i, given the usable ones of the K models and all their costs [K]: 0 for those that cannot be chosen.
Contending = Callable[[Float64, int, npt.NDArray[np.intp], Float64], Float64]


@dataclass(frozen=True, slots=True, eq=False)
class Explored:
    """The best policies of N prompts under one draw of their coefficients, posteriors[i].drawn.

    columns [K]: the models that may be chosen, of the M. by_order: whether the problem's values are the drawn coefficients,
    whose order alone decides, and not their win rates. rates and contending: win rates at other draws.
    """

    posteriors: Sequence[Posterior]
    problem: Problem
    policies: Policies
    columns: npt.NDArray[np.intp]
    rates: Rates
    contending: Contending
    by_order: bool

    def with_propensity(self, i: int, model: int, decision: Decision) -> Decision:
        """The decision for prompt i, for the model of this column, with its propensity over both draws."""
        posterior, own = self.posteriors[i], decision.propensity
        found = None
        if self.by_order:
            theta, deviation = posterior.theta[self.columns], posterior.deviation[self.columns]
            found = thompson.propensity_of_order(theta, deviation, self.problem, i, model, own)
        if found is None:
            found = posterior.propensity(own, lambda theta: self._chances(i, model, theta))
        return replace(decision, why=f"{decision.why}; {DRAWN}", propensity=found.value, propensity_error=found.error)

    def _chances(self, i: int, model: int, theta: Float64) -> Float64:
        cost = None if self.by_order else thompson.only_cost(self.problem, self.policies.prices, i)
        if self.by_order:
            values = theta[:, self.columns]
        elif cost is None:
            values = self.rates(theta, slice(i, i + 1))
        else:
            mask = self.problem.mask
            usable = np.arange(len(cost)) if mask is None else np.flatnonzero(mask[i])
            values = self.contending(theta, i, usable, cost)
        return thompson.chances(self.problem, self.policies.prices, i, model, values)


def posteriors(
    theta: Float64,
    deviation: npt.NDArray[np.float32] | None,
    draws: Draws,
    turns: Sequence[Sequence[str]],
    tokens: Sequence[str | None],
) -> list[Posterior]:
    """What is believed of each prompt, with draws of its own: theta and deviation [N, M], its user turns and token. Raises
    ValueError where there is no deviation, or one that is not finite and >= 0."""
    spread = known_deviation(theta, deviation)
    rows = zip(theta, spread, turns, tokens, strict=True)
    return [Posterior(mean, around, draws.generator(user, token)) for mean, around, user, token in rows]


def known_deviation(theta: npt.NDArray[np.floating[Any]], deviation: npt.NDArray[np.float32] | None) -> Float64:
    """The deviation [N, M] of theta, checked: see ``posteriors``."""
    if deviation is None:
        raise ValueError(NO_UNCERTAINTY)
    spread = arrays.matrix("deviation", deviation)
    if spread.shape != theta.shape or spread.min(initial=0.0) < 0:
        raise ValueError(
            f"deviation: expected numbers >= 0, {list(theta.shape)}, got {list(spread.shape)}, {spread.min():g} the least"
        )
    return spread


def explore(
    believed: Sequence[Posterior],
    constraints: Constraints,
    names: Sequence[str],
    costs: Float64,
    columns: npt.NDArray[np.intp],
    rates: Rates,
    contending: Contending,
    policies: Policies | None = None,
) -> Explored:
    """The policies of N prompts under a draw of each one's coefficients, over the K models of ``names``.

    costs: of these models, [K] or [N, K]. policies: these, where they were solved with other prompts; None: solved here.

    Raises ValueError for more than one bound for each prompt: a propensity would take a thousand LPs.
    """
    drawn = np.array([posterior.drawn for posterior in believed])
    problem = constraints.problem(drawn[:, columns], costs, names)
    if len(problem.prompt_rows) > 1:
        bounds = ", ".join(row.name for row in problem.prompt_rows)
        raise ValueError(f"constraints: expected one bound for each prompt at most where the router explores, got {bounds}")
    by_order = thompson.order_decides(problem)
    if not by_order:
        problem = replace(problem, value=rates(drawn, slice(None)))
    return Explored(believed, problem, solve(problem) if policies is None else policies, columns, rates, contending, by_order)

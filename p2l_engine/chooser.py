"""From coefficients to decisions, for a checkpoint's models and a catalog. Needs no engine, and does not load torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from p2l_engine import routing
from p2l_engine.catalog import Catalog
from p2l_engine.catalog_rates import CatalogRates
from p2l_engine.coefficients import Coefficients
from p2l_engine.constraints import UNCONSTRAINED, Constraints
from p2l_engine.decision import Decision, Draws, generator_of
from p2l_engine.expected_costs import ExpectedCosts
from p2l_engine.exploration import DRAWN, Explored, explore, known_deviation, posteriors
from p2l_engine.feedback import FeedbackModel
from p2l_engine.opponents import Opponents, weights_of
from p2l_engine.prompts.parse import Prompt, user_turns
from p2l_engine.routing import BudgetPacer, Objective, Policies, arrays, thompson
from p2l_engine.routing.arrays import Float64
from p2l_engine.routing.problem import expected
from p2l_engine.routing.thompson import Posterior
from p2l_engine.routing.values import Values

Explore = Literal["thompson"]


class Chooser:
    """Chooses, for each prompt, the policy of highest win rate within the constraints (paper, Theorem 1).

    models: the checkpoint's M models, in the order of its coefficients. feedback: its feedback model. opponents: what win rates
    are measured against, over all models of the checkpoint: "uniform", {name: weight} (0 for the others) or an array
    [M]; weights sum to 1. seed: of the draws from mixed policies; the same seed and prompt give the same draw in every batch.
    unmatched: what to do with models of the catalog that the checkpoint does not know, and the reverse: "error", or "leave_out"
    of the choice (models left out still count as opponents). objective: what is maximised, as in ``routing.win_rates``;
    decisions' win rates are of that kind, their scores are always Bradley-Terry.
    explore: "thompson" chooses by a draw of each prompt's coefficients from their posterior (Thompson 1933; Chapelle and Li
    2011), under the same constraints, so that models of few votes get the traffic that they may deserve; None: by the means.

    Attributes: ``catalog`` and its K ``names`` and ``costs`` [K] that may be chosen; ``q`` [M], the opponents' weights. Where
    coefficients come with expected usage, costs are each prompt's own: see ``costs_of``. Raises CatalogError and ValueError.
    """

    def __init__(
        self,
        models: Sequence[str],
        feedback: FeedbackModel,
        catalog: Catalog,
        opponents: Opponents = "uniform",
        seed: int = 0,
        unmatched: Literal["error", "leave_out"] = "error",
        objective: Objective = "bt",
        explore: Explore | None = None,
    ) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed: expected an integer, got {seed!r}")
        if feedback.of_values:
            raise ValueError(
                f"feedback model: expected a model of votes, got {feedback.name!r}, whose coefficients give no win rates; "
                "routing.solve_budget(theta, costs, budget) maximises its expected values"
            )
        if objective not in ("bt", "half-ties", "not-bad"):
            raise ValueError(f"objective: expected 'bt', 'half-ties' or 'not-bad', got {objective!r}")
        if objective == "half-ties" and feedback.rao_kupper and not feedback.has_eta:
            objective = "bt"  # the same for Bradley-Terry
        if explore not in (None, "thompson"):
            raise ValueError(f"explore: expected 'thompson' or None, got {explore!r}")
        self.models, self.feedback, self.seed, self.objective = tuple(models), feedback, seed, objective
        self.explore: Explore | None = explore
        if not isinstance(catalog, Catalog):
            raise TypeError(f"catalog: expected a Catalog (Catalog.from_yaml reads a file), got {type(catalog).__name__}")
        self.catalog = catalog.matched(self.models, unmatched)
        self.q = weights_of(opponents, self.models)
        self.names = self.catalog.names
        self._columns = np.array([self.models.index(name) for name in self.names])
        self._expected = ExpectedCosts(self.catalog, self._columns)
        self.costs = self._expected.given
        self._rates = CatalogRates(self.q, self._columns, objective, feedback)
        self._draws = Draws(seed, self.names)

    def decide(
        self,
        coefficients: Coefficients,
        prompts: Sequence[Prompt],
        constraints: Constraints = UNCONSTRAINED,
        draws: Sequence[str | None] | None = None,
        policies: Policies | None = None,
    ) -> list[Decision]:
        """The decisions for prompts whose coefficients are known, in order.

        draws: a text for each prompt, such as a request's id: equal prompts with different texts are drawn independently; None:
        all alike. policies: of these prompts, where they were solved with others; under the draws of their coefficients where
        the router explores. None: solved here. Where the router explores, propensities under constraints over the batch are
        those at the dual prices of this batch's draws. Raises PromptError, InfeasibleBudget and Infeasible; ValueError for
        coefficients of other models or another number of prompts, for constraints that are wrong, and for exploring without a
        deviation, or with several bounds for each prompt.
        """
        if coefficients.models != self.models or len(coefficients) != len(prompts):
            raise ValueError(
                f"coefficients: expected those of {len(prompts)} prompts from this router's engine, got {len(coefficients)} "
                f"rows over {len(coefficients.models)} models"
            )
        theta = arrays.matrix("theta", coefficients.theta)
        v = self._rates.of(theta, coefficients.eta)
        turns = [user_turns(prompt, i) for i, prompt in enumerate(prompts)]
        tokens = _tokens(draws, len(turns))
        costs, explored = self.costs_of(coefficients), None
        if self.explore and turns:
            explored = self._explored(coefficients, theta, turns, tokens, constraints, costs, policies)
            policies = explored.policies
        elif policies is None:
            policies = self.solve(v, constraints, costs)
        if explored is not None:
            policies = replace(policies, value=expected(v, policies.indices, policies.probabilities))
        scores = self._rates.scores(theta, policies, v)
        bound = "no budget" if constraints.budget is None else f"budget per {constraints.budget_scope}"
        columns = (policies.indices, policies.probabilities, policies.cost, policies.value, scores)
        rows = zip(turns, *(column.tolist() for column in columns), tokens, strict=True)
        decisions = [self._draws.decide(user, bound, *row) for user, *row in rows]
        if coefficients.usage is not None:
            decisions = self._expected.on(decisions, coefficients, policies.indices, policies.probabilities)
        if coefficients.kept is not None:
            decisions = [one.with_kept(kept) for one, kept in zip(decisions, coefficients.kept.tolist(), strict=True)]
        if explored is None:
            return decisions
        models = [self.names.index(decision.model) for decision in decisions]
        return [explored.with_propensity(i, k, decision) for i, (k, decision) in enumerate(zip(models, decisions, strict=True))]

    def pace(
        self, coefficients: Coefficients, pacer: BudgetPacer, prompt: Prompt | None = None, draw: str | None = None
    ) -> Decision:
        """The decision for one prompt of a stream, under the pacer's mean budget. prompt and draw: what a router that explores
        draws by, as in ``decide``; the propensity is the one at the pacer's price at this moment."""
        theta = arrays.matrix("theta", coefficients.theta)
        v = self._rates.of(theta, coefficients.eta)
        posterior = None
        if self.explore is not None:
            if prompt is None:
                raise ValueError(
                    "prompt: expected the prompt of these coefficients, by which a router that explores draws, got None"
                )
            posterior = self.posterior(coefficients, prompt, draw)
        rates = v if posterior is None else self._rates.of(posterior.drawn[None], coefficients.eta)
        costs = self._expected.costs_of_one(coefficients)
        choice = pacer.choose_at(rates[0], costs)
        price = choice.price
        why = f"highest win rate less cost at {price:.4g} per {self.catalog.unit}: a mean budget of {pacer.budget:g}"
        if price == math.inf:
            why = f"lowest cost: a mean budget of {pacer.budget:g} was overspent by {pacer.allowance:g} or more"
        return self._priced(coefficients, theta, v, posterior, choice.model, costs, price, choice.most, why)

    def at_price(self, coefficients: Coefficients, prompt: Prompt, price: float, draw: str | None = None) -> Decision:
        """The decision for one prompt at a price, win rate per unit of cost, of a router that explores."""
        theta = arrays.matrix("theta", coefficients.theta)
        posterior = self.posterior(coefficients, prompt, draw)
        costs = self._expected.costs_of_one(coefficients)
        k = int(thompson.paced(self._rates.of(posterior.drawn[None], coefficients.eta), costs, price)[0])
        why = f"highest win rate less cost at {price:.4g} per {self.catalog.unit}"
        v = self._rates.of(theta, coefficients.eta)
        return self._priced(coefficients, theta, v, posterior, k, costs, price, math.inf, why)

    def _priced(
        self,
        coefficients: Coefficients,
        theta: Float64,
        v: Float64,
        posterior: Posterior | None,
        k: int,
        costs: Float64,
        price: float,
        most: float,
        why: str,
    ) -> Decision:
        """The decision for model k, which was chosen at a price among the models of at most this cost."""
        name = self.names[k]
        score = self._rates.score_of_model(theta, v, k)
        decision = Decision(name, {name: 1.0}, float(costs[k]), float(v[0, k]), score, why, 1.0)
        if coefficients.usage is not None:
            (decision,) = self._expected.on([decision], coefficients, np.array([[k]], np.int32), np.ones((1, 1)))
        if coefficients.kept is not None:
            decision = decision.with_kept(float(coefficients.kept[0]))
        if posterior is None:
            return decision
        every = np.arange(len(self.names))

        def chosen(drawn: Float64) -> npt.NDArray[np.bool_]:
            rates = self._rates.contending(drawn, coefficients.eta, every, costs)
            return np.asarray(thompson.paced(rates, costs, price, most) == k)

        found = posterior.propensity(1.0, chosen)
        return replace(decision, why=f"{decision.why}; {DRAWN}", propensity=found.value, propensity_error=found.error)

    def posterior(self, coefficients: Coefficients, prompt: Prompt, draw: str | None = None) -> Posterior:
        """What is believed of one prompt's coefficients, and the draw from it; ``draw`` as in ``decide``. Raises PromptError;
        ValueError where the coefficients have no deviation."""
        theta, turns = arrays.matrix("theta", coefficients.theta), [user_turns(prompt)]
        return posteriors(theta, coefficients.deviation, self._draws, turns, _tokens([draw], 1))[0]

    def costs_of(self, coefficients: Coefficients) -> Float64:
        """What requests are expected to cost, [K] or [N, K], in the catalog's unit: see ``ExpectedCosts``."""
        return self._expected.costs(coefficients)

    def seconds_of(self, coefficients: Coefficients) -> Float64:
        """How long answers are expected to take, [N, K] seconds: the amounts of a ``routing.Resource``. Raises ValueError where
        the checkpoint has not learned it."""
        return self._expected.seconds(coefficients)

    def usage_of(
        self, coefficients: Coefficients, indices: npt.NDArray[np.int32], probabilities: Float64
    ) -> tuple[Float64 | None, Float64 | None]:
        """The output tokens and seconds [N] that policies over ``names`` are expected to take, None where unknown."""
        return self._expected.usage(coefficients, indices, probabilities)

    def solve(self, v: Float64 | Values, constraints: Constraints = UNCONSTRAINED, costs: Float64 | None = None) -> Policies:
        """The best policies over the K models of ``names``, from ``win_rates`` v [N, K] and costs [K] or [N, K] (``costs_of``),
        None: the catalog's. Raises Infeasible, InfeasibleBudget."""
        if not isinstance(constraints, Constraints):
            raise TypeError(f"constraints: expected Constraints(budget=...), got {constraints!r}")
        if constraints.only_prompt_budgets and not isinstance(v, Values):
            return routing.solve_budget(v, self.costs if costs is None else costs, constraints.limits)
        return routing.solve(constraints.problem(v, self.costs if costs is None else costs, self.names))

    def win_rates(self, coefficients: Coefficients, drawn: Float64 | None = None) -> Float64:
        """What is maximised, [N, K]: the win rates of the K models of ``names`` against the opponents. drawn [S, M]: draws of
        one prompt's theta, in place of its own; the result is [S, K]."""
        theta = coefficients.theta if drawn is None else drawn
        return self._rates.of(arrays.matrix("theta", theta), coefficients.eta)

    def scores(self, coefficients: Coefficients, policies: Policies, v: Float64) -> Float64:
        """The Bradley-Terry score [N] of each prompt's policy; v [N, K] are the same coefficients' ``win_rates``."""
        return self._rates.scores(arrays.matrix("theta", coefficients.theta), policies, v)

    def draw_key(self, turns: Sequence[str], draw: str | None = None) -> bytes:
        """What ``drawn`` draws a prompt's coefficients by; ``draw`` as in ``decide``."""
        return self._draws.key(turns, draw)

    def drawn(self, coefficients: Coefficients, keys: Sequence[bytes]) -> Float64:
        """The draws of theta [N, M] by which ``decide`` chooses for prompts of these keys."""
        theta, deviation = (
            arrays.matrix("theta", coefficients.theta),
            known_deviation(coefficients.theta, coefficients.deviation),
        )
        rows = zip(theta, deviation, keys, strict=True)
        found = [Posterior(mean, around, generator_of(key)).drawn for mean, around, key in rows]
        return np.array(found).reshape(theta.shape)

    def draw(self, turns: Sequence[str], indices: Sequence[int], probabilities: Sequence[float]) -> int:
        """The index in ``names`` of the model that a prompt of these user turns gets under a mixed policy."""
        return self._draws.draw(turns, indices, probabilities)

    def _explored(
        self,
        coefficients: Coefficients,
        theta: Float64,
        turns: Sequence[Sequence[str]],
        tokens: Sequence[str | None],
        constraints: Constraints,
        costs: Float64,
        policies: Policies | None,
    ) -> Explored:
        eta = coefficients.eta
        believed = posteriors(theta, coefficients.deviation, self._draws, turns, tokens)
        return explore(
            believed, constraints, self.names, costs, self._columns,
            lambda drawn, some: self._rates.of(drawn, None if eta is None else eta[some]),
            lambda drawn, i, usable, each: self._rates.contending(drawn, None if eta is None else eta[i : i + 1], usable, each),
            policies,
        )  # fmt: skip

    def contending(self, coefficients: Coefficients, drawn: Float64, usable: npt.NDArray[np.intp], costs: Float64) -> Float64:
        """``win_rates`` of draws [S, M] of one prompt's theta, [S, K]; 0 for models beside the ``usable`` ones, and for those
        that no policy with one bound on these costs [K], and no price of them, would choose: a cheaper one is better."""
        return self._rates.contending(drawn, coefficients.eta, usable, costs)


def _tokens(draws: Sequence[str | None] | None, count: int) -> Sequence[str | None]:
    """The texts that prompts are drawn by, one for each, checked."""
    if draws is None:
        return [None] * count
    if isinstance(draws, str) or len(draws) != count:
        raise ValueError(f"draws: expected a text for each of {count} prompts, got {draws!r:.80}")
    for i, draw in enumerate(draws):
        if draw is not None and not isinstance(draw, str):
            raise TypeError(f"draws[{i}]: expected a text or None, got {draw!r:.80}")
    return draws

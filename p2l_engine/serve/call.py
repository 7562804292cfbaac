"""One request under way: what it may cost at each model, which one takes it, and what became of it."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from p2l_engine import routing
from p2l_engine.apis.api import Api, Usage
from p2l_engine.apis.ask import AUTO, Ask
from p2l_engine.coefficients import Coefficients
from p2l_engine.decision import why_with
from p2l_engine.decision_log.record import Attempt, Record
from p2l_engine.errors import InfeasibleBudget
from p2l_engine.routing import BudgetPacer, Objective
from p2l_engine.routing.thompson import Posterior
from p2l_engine.serve import choice
from p2l_engine.serve.bill import Bill
from p2l_engine.serve.choice import Float64, Mask, Pick
from p2l_engine.serve.health import Deployment
from p2l_engine.serve.options import Options
from p2l_engine.serve.plan import Plan
from p2l_engine.serve.settings import Key

FALLBACKS = 4  # that a decision names


@dataclass(eq=False)
class Call:
    """See the module. headers: the client's; secret: its key; bill: what it may cost; mask: the models that may take it,
    reasons: why the others may not."""

    plan: Plan
    api: Api
    ask: Ask
    options: Options
    key: Key | None
    session: str
    headers: Mapping[str, str]
    secret: str | None
    bill: Bill
    api_name: str
    began: float = field(default_factory=time.perf_counter)
    started: float = field(default_factory=time.time)
    deadline: float = 0.0  # on the monotonic clock
    id: str = field(default_factory=lambda: f"dec_{os.urandom(16).hex()}")
    mask: Mask = field(default_factory=lambda: np.zeros(0, bool))
    reasons: dict[str, str] = field(default_factory=dict)
    coefficients: Coefficients | None = None
    turns_hash: str = ""
    rates: Float64 = field(default_factory=lambda: np.zeros(0))
    posterior: Posterior | None = None  # where the server explores
    drawn: Float64 = field(default_factory=lambda: np.zeros(0))  # win rates [K] of its draw; without exploration, the same
    costs: Float64 = field(default_factory=lambda: np.zeros(0))
    cached: tuple[int, ...] = ()
    tokens_out: Float64 = field(default_factory=lambda: np.zeros(0))
    foreseen: Float64 | None = None  # output tokens [K] of an answer, as the checkpoint expects them
    trace: dict[str, str] = field(default_factory=dict)  # headers under which providers continue a trace
    homes: frozenset[str] | None = None  # base URLs of the providers that can read its encrypted reasoning; None: all
    pacer: BudgetPacer | None = None
    first: Pick | None = None
    now: Pick | None = None
    paid: float | None = None  # what the pacer counted for it, USD; None: it is none of the pacer's
    spent_before: float = 0.0  # expected cost of failed attempts that may be billed, USD
    attempts: list[Attempt] = field(default_factory=list)
    stages: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.deadline = time.monotonic() + self.plan.serve.timeouts.total

    @property
    def pinned(self) -> bool:
        """Whether the caller named a model."""
        return self.ask.model != AUTO

    @property
    def objective(self) -> Objective:
        """What is maximised."""
        return self.options.objective or self.plan.serve.objective

    def mark(self, stage: str) -> None:
        """Notes when a stage ended, in milliseconds since the request came."""
        self.stages[stage] = round(1000 * (time.perf_counter() - self.began), 3)

    def score(self, coefficients: Coefficients) -> None:
        """Takes the prompt's coefficients: win rates [K], 0 for models that the checkpoint does not know. Where the server
        explores, a session keeps its draw while the user turns are the same."""
        self.coefficients = coefficients
        self.rates = self.drawn = self.plan.win_rates.of(self.turns_hash, coefficients, self.objective)
        if self.plan.serve.explore is not None and not self.pinned:
            self.posterior = self.plan.choosers[self.objective].posterior(coefficients, self.ask.turns, self.session)
            self.drawn = self._rates(coefficients, self.posterior.drawn[None])[0]

    def _rates(self, coefficients: Coefficients, drawn: Float64) -> Float64:
        """Win rates [S, K] of the plan's models, 0 for those that the checkpoint does not know, at draws [S, M] of theta."""
        known = self.plan.choosers[self.objective].win_rates(coefficients, drawn)
        found = np.zeros((len(known), len(self.plan.names)))
        found[:, self.plan.columns] = known
        return found

    def _contending(self, coefficients: Coefficients, drawn: Float64, mask: Mask) -> Float64:
        """``_rates``, but 0 for models beside the mask, and those that cannot be chosen since a cheaper one is better."""
        columns = self.plan.columns
        chooser, usable = self.plan.choosers[self.objective], np.flatnonzero(mask[columns])
        found = np.zeros((len(drawn), len(self.plan.names)))
        found[:, columns] = chooser.contending(coefficients, drawn, usable, self.costs[columns])
        return found

    def choose(self, mask: Mask, count: bool = True) -> Pick:
        """The choice among the models of a mask. count: whether the pacer pays for it. Raises InfeasibleBudget."""
        if self.pinned:
            k = int(np.flatnonzero(mask)[0])
            if self.budget_left is not None and self.costs[k] > self.budget_left:
                raise InfeasibleBudget(self.budget_left, float(self.costs[k]))
            rate = math.nan if self.coefficients is None else float(self.rates[k])
            return Pick(k, {k: 1.0}, rate, float(self.costs[k]), "named by the caller")
        if self.options.budget is None and self.pacer is not None:
            if count:
                chosen = choice.paced(self.drawn, self.costs, mask, self.pacer)
                self.paid = chosen.cost
            else:
                chosen = choice.choose(self.drawn, self.costs, mask, self._draw, price=self.pacer.price)
        else:
            chosen = choice.choose(self.drawn, self.costs, mask, self._draw, self.budget_left)
        if self.posterior is None or self.coefficients is None:
            return chosen
        known, budget = self.coefficients, self.budget_left
        found = self.posterior.propensity(
            chosen.propensity,
            lambda theta: choice.chances(chosen, self._contending(known, theta, mask), self.costs, mask, budget),
        )
        return choice.explored(chosen, self.rates, found)

    def fallbacks(self, most: int = FALLBACKS) -> list[str]:
        """The models that would follow if each before failed."""
        if self.first is None or self.pinned:
            return []
        price = None if self.options.budget is not None or self.pacer is None else self.pacer.price
        found = choice.fallbacks(
            self.drawn, self.costs, self.mask, self.first.model, self._draw, self.options.budget, price, most
        )
        return [self.plan.names[k] for k in found]

    @property
    def budget_left(self) -> float | None:
        """What this request's own budget has left after attempts that may be billed."""
        return None if self.options.budget is None else max(self.options.budget - self.spent_before, 0.0)

    def bradley_terry_score(self, chosen: Pick) -> float | None:
        """The router's own coefficient for this prompt (paper, Algorithm 1); None where nothing is known."""
        if self.coefficients is None:
            return None
        if len(chosen.policy) == 1:  # a single model's is its own: it wins as often as itself
            known, name = self.coefficients.models, self.plan.names[chosen.model]
            return float(self.coefficients.theta[0, known.index(name)]) if name in known else None
        chooser = self.plan.choosers["bt"]
        rates = self.plan.win_rates.of(self.turns_hash, self.coefficients, "bt")
        value = min(max(sum(p * rates[k] for k, p in chosen.policy.items()), 0.0), 1.0)
        return float(routing.bt_score(self.coefficients.theta, chooser.q, np.array([value]))[0])

    def why(self, chosen: Pick) -> str:
        """Why a model was chosen, and how much of the prompt's own coefficients this relies on."""
        kept = None if self.pinned or self.coefficients is None else self.coefficients.kept
        return why_with(chosen.why, None if kept is None else float(kept[0]))

    def deployments(self, k: int) -> list[Deployment]:
        """Where model k takes requests of this API."""
        found = [d for d in self.plan.deployments[k] if d.provider.api == self.ask.api]
        if self.bill.kept is not None:
            found = [d for d in found if d.name == self.bill.kept.deployment]
        return found if self.homes is None else [d for d in found if d.provider.base_url in self.homes]

    def record(
        self, status: int, outcome: str, model: str | None, usage: Usage | None, cost: Fraction | None, estimated: bool
    ) -> Record:
        """The log's row."""
        names, first = self.plan.names, self.first
        self.mark("total")
        return Record(
            id=self.id,
            time=self.started,
            key=self.key.id if self.key else None,
            session=self.session,
            turns_hash=self.turns_hash,
            turns=tuple(self.ask.turns) if self.plan.serve.log_prompts else None,
            api=self.api_name,
            asked=self.ask.model,
            chosen=names[first.model] if first else "",
            model=model or "",
            policy={names[k]: p for k, p in first.policy.items()} if first else {},
            propensity=first.propensity if first else 1.0,
            propensity_error=first.propensity_error if first else 0.0,
            candidates=tuple(names[k] for k in np.flatnonzero(self.mask)),
            win_rate=first.rate if first and self.coefficients else None,
            score=self.bradley_terry_score(first) if first else None,
            budget=self.options.budget,
            expected_cost=first.cost if first else 0.0,
            cost=None if cost is None else float(cost),
            estimated=estimated,
            tokens_in=usage.tokens_in if usage else None,
            tokens_cached=usage.cached if usage else None,
            tokens_out=usage.tokens_out if usage else None,
            streamed=self.ask.stream,
            status=status,
            outcome=outcome,
            attempts=tuple(self.attempts),
            latency=self.stages,
        )

    def _draw(self, indices: Any, probabilities: Any) -> int:
        return self.plan.choosers[self.objective].draw(self.ask.turns, indices, probabilities)

"""What a running server holds, and how it decides: from a body to a call with a mask, costs and a choice."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from sqlalchemy.exc import SQLAlchemyError

from p2l_engine.apis.api import Api
from p2l_engine.apis.ask import AUTO, BadRequest
from p2l_engine.errors import InfeasibleBudget, PromptError, SpendLimitReached
from p2l_engine.routing import BudgetPacer
from p2l_engine.serve.async_spend_limit import AsyncSpendLimit
from p2l_engine.serve.bill import Bill
from p2l_engine.serve.call import Call
from p2l_engine.serve.choice import Mask, Pick
from p2l_engine.serve.eligibility import DOWN, Kind, in_words
from p2l_engine.serve.expectations import Expectations
from p2l_engine.serve.gate import Gate, secret_of
from p2l_engine.serve.health import Health
from p2l_engine.serve.options import of_caller, options_of, session_of
from p2l_engine.serve.plan import Plan, carry_over
from p2l_engine.serve.scorer import Scorer, key_of
from p2l_engine.serve.sessions import SessionMemory
from p2l_engine.serve.settings import Key
from p2l_engine.serve.tokens import TokenCounter
from p2l_engine.serve.upstream import Upstream

logger = logging.getLogger(__name__)

MOST_REFERENCES = 5_000  # of one request: each is looked up


class Refused(Exception):
    """A request that is answered with an error. retry_after: seconds."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after


@dataclass(eq=False)
class Service:
    """The parts of a running server. plan, gate, pacer and expectations follow the configuration; ``adopt`` swaps them."""

    plan: Plan
    scorer: Scorer
    counter: TokenCounter
    upstream: Upstream
    spending: AsyncSpendLimit
    sessions: SessionMemory
    health: Health
    gate: Gate
    pacer: BudgetPacer | None
    expectations: Expectations
    own_counters: Mapping[str, TokenCounter]  # by model, where its provider's tokens are known
    spending_fails: bool = False  # whether the last reservation could not be made, since its store fails

    def adopt(self, plan: Plan) -> None:
        """Replaces the configuration, at once: requests under way keep theirs. What was learned is carried over."""
        before, serve = self.plan, plan.serve
        carry_over(before, plan)
        self.gate = Gate(serve.keys)
        if (serve.budget, serve.horizon) != (before.serve.budget, before.serve.horizon):
            self.pacer = pacer_of(plan)
        self.expectations = Expectations(plan.config.models, self.expectations)
        self.health.cooldown = serve.cooldown
        self.scorer.patience, self.scorer.most, self.scorer.kept = serve.queue.seconds, serve.queue.most, serve.queue.cached
        self.sessions.seconds, self.sessions.most = serve.sessions.cache_seconds, serve.sessions.most
        self.plan = plan

    async def call(self, api: Api, body: Mapping[str, Any], headers: Mapping[str, str], key: Key | None, name: str) -> Call:
        """Reads a request. Raises BadRequest."""
        began = time.perf_counter()
        body = dict(body)
        if name == "route":  # the decision alone needs neither
            body.setdefault("model", "auto")
            if api.name == "messages":
                body.setdefault("max_tokens", 1)
        options = options_of(body, headers)
        if name == "route":
            options = replace(options, dry_run=True)
        ask = api.ask(body)
        if ask.model != AUTO and ask.model not in self.plan.index:
            raise BadRequest(
                f"model: expected 'auto' or a model of the catalog, got {ask.model!r:.80}", "model", 404, "model_not_found"
            )
        for model in sorted(options.models or ()):
            if model not in self.plan.index:
                raise BadRequest(f"p2l.models: expected models of the catalog, got {model!r:.80}", "p2l.models")
        if ask.model == AUTO:
            self.scorer.admit(ask.turns)
        session = session_of(options, body, headers, key, ask.session)
        counted = await self.counter.counted(ask.texts)
        bill = Bill(self.plan, ask, counted)
        call = Call(self.plan, api, ask, options, key, session, headers, secret_of(headers), bill, name, began)
        for model, counter in self.own_counters.items():
            if (k := call.plan.index.get(model)) is not None and ask.model in (AUTO, model):
                call.bill.own[k] = await counter.counted(ask.texts)
        call.pacer = self.pacer
        call.mark("parse")
        return call

    async def decide(self, call: Call) -> Pick:
        """Masks, prices and chooses. Raises Refused."""
        plan = call.plan
        await self.sessions.find_answers(self._kept_ids(call))
        self._mask(call)
        if not call.mask.any():
            raise self._untakable(call)
        if not call.pinned or call.options.explain or call.options.dry_run:
            try:
                coefficients, call.turns_hash = await self.scorer.coefficients(call.ask.turns)
            except PromptError as error:
                raise Refused(400, error.problem, "messages") from None
            call.score(coefficients.of_first(len(plan.choosers["bt"].models)))
            call.foreseen = plan.foreseen(coefficients)
        else:
            call.rates = call.drawn = np.zeros(len(plan.names))
            call.turns_hash = key_of(call.ask.turns)
            if plan.serve.learn is not None:
                self.scorer.prepare(call.ask.turns)  # for feedback on the answer
        call.mark("coefficients")
        call.cached = self._cached(call)
        call.tokens_out = self.expectations.tokens_out(call.ask.max_tokens, call.ask.outputs, call.foreseen)
        bill = call.bill
        tokens_in = np.array([bill.tokens_in(k) for k in range(len(plan.names))]) if bill.differing() else bill.tokens_in()
        cached = np.array(call.cached, float)
        call.costs = plan.prices.expected(tokens_in, cached, call.tokens_out, call.ask.sound, call.ask.spoken)
        if call.ask.extras.tier is not None:
            call.costs = call.costs * [float(bill.factor(k)) for k in range(len(plan.names))]
        call.first = call.now = self.chosen(call, call.mask, count=not call.options.dry_run)
        call.mark("choose")
        return call.first

    def chosen(self, call: Call, mask: Mask, count: bool) -> Pick:
        """The choice among the models of a mask. count: whether the pacer pays for it. Raises Refused."""
        try:
            return call.choose(mask, count)
        except InfeasibleBudget as error:
            raise Refused(402, str(error).replace(" for prompt 0", ""), "p2l.budget", "budget_infeasible") from None

    async def reserve(self, call: Call, mask: Mask) -> tuple[Pick, str | None]:
        """Reserves the worst case of the call's model; where it does not fit, of another that does, by configuration.

        Returns the choice and the reservation's token. Raises Refused.
        """
        assert call.now is not None, "decide() comes first"
        if self.spending.limit is None:
            return call.now, None
        chosen, mask, worst = call.now, mask.copy(), call.bill.worst
        while True:
            try:
                token = await self.spending.reserve(worst(chosen.model), call.key.id if call.key else None)
                self.note_spending_store(None)
                return chosen, token
            except SQLAlchemyError as error:  # no money is spent that cannot be counted
                self.note_spending_store(error)
                raise Refused(503, "what may be spent cannot be looked up; try again", None, "unavailable", 5.0) from None
            except SpendLimitReached as refused:
                self.note_spending_store(None)
                left = float(refused.left)
                retry = None if refused.frees_at is None else max(refused.frees_at.timestamp() - time.time(), 1.0)
                mask[chosen.model] = False
                for k in np.flatnonzero(mask).tolist():
                    fits = float(worst(k)) <= left if call.plan.serve.over_limit == "cheaper" else call.plan.prices.is_free(k)
                    mask[k] = fits
                if call.pinned or call.plan.serve.over_limit == "refuse" or not mask.any():
                    limits = " and ".join(refused.limits)
                    message = f"this request may cost {float(refused.worst_case):g} USD, and {left:g} USD are left of {limits}"
                    raise Refused(402, message, None, "spend_limit", retry) from None
                chosen = call.now = self.chosen(call, mask, count=False)

    def note_spending_store(self, error: SQLAlchemyError | None) -> None:
        """Says once that the store of spend limits fails, and once that it works again."""
        if error is not None and not self.spending_fails:
            logger.error("the store of spend limits fails (%s): requests are refused until it works", type(error).__name__)
        elif error is None and self.spending_fails:
            logger.warning("the store of spend limits works again")
        self.spending_fails = error is not None

    def _mask(self, call: Call) -> None:
        """Which models may take the request, and why others may not."""
        self._look_up(call)
        ask, key, kept = call.ask, call.key, call.bill.kept
        kind = Kind(
            ask.api, ask.needs, call.api_name == "route", ask.model if call.pinned else None,
            None if key is None or key.models is None else tuple(key.models), call.options.models,
            None if kept is None else kept.deployment, call.homes,
        )  # fmt: skip
        answer = ask.max_tokens or 1
        tokens = call.bill.most_tokens_in() + answer
        own = {k: call.bill.most_tokens_in(k) + answer for k in call.bill.differing()}
        unbounded = call.bill.unbounded if self.spending.limit is not None and ask.extras.may_be_unbounded else None
        call.mask, call.reasons = call.plan.eligibility.of(
            kind, tokens, ask.max_tokens, call.deployments, self.health.is_up, own, unbounded
        )

    def _kept_ids(self, call: Call) -> list[str]:
        """What must be the caller's own of that which providers keep, as ``sessions`` knows it. The keys of this server share
        the provider's account: it does not tell them apart. Raises Refused."""
        references = call.ask.references if call.key is not None else ()
        if len(references) > MOST_REFERENCES:
            message = f"expected at most {MOST_REFERENCES} references to earlier answers, got {len(references)}"
            raise Refused(400, message)
        return [of_caller(call.key, name) for name in (call.ask.previous, *references) if name is not None]

    def _look_up(self, call: Call) -> None:
        """What the session says of a request: who keeps the answer that it continues, who wrote its reasoning."""
        ask = call.ask
        if ask.previous is not None:
            call.bill.kept = self.sessions.of_answer(of_caller(call.key, ask.previous))
            # A named model may know the answer all the same; but whose it is, or what it costs to read it again, is not known.
            if call.bill.kept is None and (call.key is not None or not call.pinned or self.spending.limit is not None):
                message = "previous_response_id: not known to this server; send the whole input"
                raise Refused(404, message, "previous_response_id", "previous_response_not_found")
        if call.key is not None and any(self.sessions.of_answer(kept) is None for kept in self._kept_ids(call)):
            message = "this request refers to an item, a container or audio that is not known to this server; send it whole"
            raise Refused(404, message, None, "not_found")
        last = self.sessions.last(call.session) if ask.sealed and not call.pinned else None
        if last is not None and last in call.plan.index:
            group = call.plan.deployments[call.plan.index[last]]
            call.homes = frozenset(d.provider.base_url for d in group) or None

    def _untakable(self, call: Call) -> Refused:
        """The error where no model may take the request."""
        down = [name for name, why in call.reasons.items() if why == DOWN]
        if down:
            return Refused(503, "all models that could answer are down", None, "unavailable", self.seconds_down(call, down))
        too_long = any("do not fit into its context" in why for why in call.reasons.values())
        message = f"no model can take this request: {in_words(call.reasons)}"
        return Refused(400, message, None, "context_length_exceeded" if too_long else None)

    def seconds_down(self, call: Call, names: list[str]) -> float:
        """Until the first of these models may be tried again."""
        groups = [call.plan.deployments[call.plan.index[name]] for name in names]
        return max(1.0, math.ceil(min(self.health.seconds_left(d) for group in groups for d in group)))

    def _cached(self, call: Call) -> tuple[int, ...]:
        found = self.sessions.cached(call.session, call.bill.counted, call.plan.names)
        for k, counted in call.bill.own.items():
            if found[k]:
                (found[k],) = self.sessions.cached(call.session, counted, call.plan.names[k : k + 1])
        return tuple(
            tokens if tokens >= model.cached_from else 0 for tokens, model in zip(found, call.plan.models, strict=True)
        )


def pacer_of(plan: Plan) -> BudgetPacer | None:
    """A pacer for the configured mean budget; None without one."""
    return None if plan.serve.budget is None else BudgetPacer(plan.serve.budget, horizon=plan.serve.horizon)

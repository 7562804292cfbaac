"""Attempts to get a call answered: deployment after deployment, model after model, within the money and the time left."""

from __future__ import annotations

import asyncio
import math
import random
import time
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import orjson

from p2l_engine.decision_log.record import Attempt
from p2l_engine.serve.call import Call
from p2l_engine.serve.choice import Pick
from p2l_engine.serve.health import Deployment
from p2l_engine.serve.service import Refused, Service
from p2l_engine.serve.upstream import Opened, Whole
from p2l_engine.serve.upstream_failure import UpstreamFailed


class PassedOn(Exception):
    """The provider refused the request itself: its own error goes to the client. retry_after: seconds."""

    def __init__(self, status: int, body: bytes, retry_after: float | None = None) -> None:
        super().__init__(status)
        self.status, self.body, self.retry_after = status, body, retry_after


@dataclass(eq=False)
class Attempts:
    """The attempts of one call. token: of its present reservation; deployment: the present one; sending: whether it may be at
    work; lost: worst cases, USD, of failed attempts that may be billed."""

    service: Service
    call: Call
    token: str | None = None
    deployment: Deployment | None = None
    sending: bool = False
    lost: Fraction = Fraction(0)

    async def answer(self) -> Whole | Opened:
        """Tries deployments until one answers. Raises Refused, PassedOn."""
        service, call = self.service, self.call
        retries, deadline = call.plan.serve.retries, call.deadline
        mask, tried, widened, rounds = call.mask.copy(), set[str](), False, 0
        chosen, self.token = await service.reserve(call, mask)
        call.mark("reserve")
        while True:
            self.deployment = self._pick(chosen, tried)
            start, self.sending = time.perf_counter(), True
            try:
                found = await service.upstream.send(
                    self.deployment, call.api, call.ask, call.plan.serve, deadline, call.headers, call.secret, call.trace
                )
            except UpstreamFailed as failed:
                failure = failed
            else:
                self._note(200, None, start)  # still at work, if it streams
                service.health.answered(self.deployment)
                return found
            self._note(failure.status, failure.error, start)
            self._give_up(failure, chosen)
            tried.add(self.deployment.name)
            if failure.blame == "request":
                raise PassedOn(failure.status or 400, self._error_of(failure), failure.retry_after)
            if failure.blame == "context":
                mask &= self._wider(chosen.model)
                if widened or not mask.any():
                    raise PassedOn(failure.status if failure.status and failure.status != 200 else 400, self._error_of(failure))
                widened = True
            if len(call.attempts) >= retries.attempts or time.monotonic() >= deadline:
                raise self._unavailable(failure)
            if failure.blame in ("deployment", "configuration") and self._others(chosen.model, tried):
                pass  # the same model, elsewhere
            else:
                mask[chosen.model] = False
                if mask.any():
                    try:
                        chosen = call.now = service.chosen(call, mask, count=False)
                    except Refused:  # what is left of the budget affords none
                        raise self._unavailable(failure) from None
                elif failure.blame == "configuration":  # to try again changes nothing
                    raise self._unavailable(failure)
                else:
                    mask[chosen.model] = True
                    rounds += 1
                    tried.clear()
                    await self._wait(failure, rounds, deadline)
            chosen, self.token = await service.reserve(call, mask)

    def _pick(self, chosen: Pick, tried: set[str]) -> Deployment:
        """A deployment of the model that was not tried yet."""
        every = self.call.deployments(chosen.model)
        group = [d for d in every if d.name not in tried]
        return self.service.health.pick(group) or (group or every)[0]

    def _others(self, k: int, tried: set[str]) -> bool:
        return any(d.name not in tried and self.service.health.is_up(d) for d in self.call.deployments(k))

    def _wider(self, k: int) -> Any:
        """The models whose context window is larger than that of model k."""
        windows = np.array([math.inf if model.context is None else model.context for model in self.call.plan.models])
        return windows > windows[k]

    def _give_up(self, failure: UpstreamFailed, chosen: Pick) -> None:
        """After a failed attempt: the deployment's health, and what the attempt may have cost."""
        call, deployment = self.call, self.deployment
        assert deployment is not None
        if failure.blame == "deployment":
            self.service.health.failed(deployment, failure.retry_after)
        elif failure.blame == "configuration":
            self.service.health.misconfigured(deployment, failure.message)
        else:
            self.service.health.answered(deployment)
        amount = call.bill.worst(chosen.model) if failure.sent else Fraction(0)
        if failure.sent:
            self.lost += amount
            call.spent_before += float(call.costs[chosen.model])
        self.service.spending.settle(self.token, amount)
        self.token, self.sending = None, False

    def _error_of(self, failure: UpstreamFailed) -> bytes:
        if failure.body is not None:
            return failure.body
        code = "context_length_exceeded" if failure.blame == "context" else None
        return orjson.dumps(self.call.api.error(failure.status or 400, failure.message, None, code))

    def _unavailable(self, failure: UpstreamFailed) -> Refused:
        """The error after the last attempt."""
        call = self.call
        if failure.error == "deadline" or time.monotonic() >= call.deadline:
            return Refused(504, f"no model answered in time: {failure.message}", None, "timeout")
        names = sorted({attempt.model for attempt in call.attempts})
        seconds = max(self.service.seconds_down(call, names), failure.retry_after or 0.0)
        return Refused(
            503, f"no model answered after {len(call.attempts)} attempts: {failure.message}", None, "unavailable", seconds
        )

    async def _wait(self, failure: UpstreamFailed, rounds: int, deadline: float) -> None:
        """Before the only model is tried again. Raises Refused where that would take too long."""
        retries = self.call.plan.serve.retries
        seconds = min(retries.backoff * 2 ** (rounds - 1), retries.most) * random.uniform(0.5, 1.0)
        seconds = max(seconds, failure.retry_after or 0.0)
        if seconds > retries.most or time.monotonic() + seconds >= deadline:
            raise self._unavailable(failure)
        await asyncio.sleep(seconds)

    def cut(self, error: str) -> None:
        """The stream that had begun has broken off."""
        assert self.deployment is not None
        self.service.health.failed(self.deployment)
        last = self.call.attempts[-1]
        self.call.attempts[-1] = Attempt(last.model, last.deployment, last.status, error, last.seconds)

    def _note(self, status: int | None, error: str | None, start: float) -> None:
        assert self.deployment is not None
        seconds = round(time.perf_counter() - start, 6)
        self.call.attempts.append(Attempt(self.deployment.model, self.deployment.name, status, error, seconds))

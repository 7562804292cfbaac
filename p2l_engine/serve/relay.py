"""A decided request to its answer: attempts, fallbacks within the money that is left, and bytes passed through."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import orjson

from p2l_engine.serve.answers import CachedAnswer
from p2l_engine.serve.api import Usage
from p2l_engine.serve.call import Call
from p2l_engine.serve.choice import Pick
from p2l_engine.serve.health import Deployment
from p2l_engine.serve.record import Attempt, Record
from p2l_engine.serve.replay import Keeper, replayed
from p2l_engine.serve.scorer import Overloaded
from p2l_engine.serve.service import Refused, Service
from p2l_engine.serve.upstream import Opened, StreamCut, UpstreamFailed, Whole

Send = Callable[[dict[str, Any]], Awaitable[None]]
JSON = b"application/json"
STREAM_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


class PassedOn(Exception):
    """The provider refused the request itself: its own error goes to the client."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(status)
        self.status, self.body = status, body


@dataclass(eq=False)
class Relay:
    """Answers one call. finished: takes its record; keeper: knows what the cache of answers has, and wants, of it."""

    service: Service
    call: Call
    finished: Callable[[Record], None]
    keeper: Keeper
    lost: Fraction = Fraction(0)  # worst cases of attempts that may be billed
    token: str | None = None
    deployment: Deployment | None = None
    opened: Opened | None = None
    sending: bool = False  # whether a deployment may be at work
    done: bool = False

    async def answer(self, send: Send) -> None:
        """Sends the whole response. Every way out settles the reservation and writes the record once."""
        call = self.call
        try:
            if (stored := await self.keeper.stored()) is not None:
                await self._replay(stored, send)
                return
            await self._decide()
            if call.options.dry_run:
                self._finish(200, "decision")
                await respond(send, 200, orjson.dumps(call.decision()), self.headers())
                return
            found = await self._attempts()
            call.mark("first_byte")
            if isinstance(found, Whole):
                await self._whole(found, send)
            else:
                await self._stream(found, send)
        except Refused as refused:
            self._finish(refused.status, "refused" if refused.status < 500 else "failed")
            body = call.api.error(refused.status, refused.message, refused.param, refused.code)
            await respond(send, refused.status, orjson.dumps(body), self.headers(refused.retry_after))
        except PassedOn as passed:
            self._finish(passed.status, "refused")
            await respond(send, passed.status, passed.body, self.headers())
        except Exception:
            self._finish(500, "failed", *self._seen())
            raise
        finally:
            if self.opened is not None:
                self.opened.close()
            self._finish(499, "left", *self._seen())  # unless it has ended: the client left, or the server stops

    def _seen(self) -> tuple[Usage | None, int | None]:
        """The usage and the characters of a stream so far."""
        return (None, None) if self.opened is None else (self.opened.reader.usage, self.opened.reader.characters)

    def headers(self, retry_after: float | None = None) -> list[tuple[bytes, bytes]]:
        """What every response says of its decision."""
        call, now = self.call, self.call.now
        found = [(b"x-p2l-decision", call.id.encode()), (b"x-p2l-attempts", str(len(call.attempts)).encode())]
        if now is not None:
            found += [
                (b"x-p2l-model", call.plan.names[now.model].encode("ascii", "backslashreplace")),
                (b"x-p2l-expected-cost", f"{now.cost:.9g}".encode()),
            ]
            if not math.isnan(now.rate):  # a named model's is not computed
                found.append((b"x-p2l-win-rate", f"{now.rate:.6g}".encode()))
        if self.keeper.state is not None:
            found.append((b"x-p2l-cache", self.keeper.state.encode()))
        if retry_after is not None:
            found.append((b"retry-after", str(math.ceil(retry_after)).encode()))
        return found

    async def _replay(self, stored: CachedAnswer, send: Send) -> None:
        """Answers with what an equal request got."""
        self.done = True
        replayed(self.call, stored, self.finished)
        if stored.answer_id is not None and self.call.ask.api == "responses":
            self.service.sessions.remember_answer(stored.answer_id, stored.deployment)
        if stored.streamed:
            await send({"type": "http.response.start", "status": 200, "headers": [*STREAM_HEADERS, *self.headers()]})
            await send({"type": "http.response.body", "body": stored.body, "more_body": False})
        else:
            await respond(send, 200, stored.body, self.headers())

    async def _decide(self) -> None:
        """Raises Refused."""
        try:
            async with asyncio.timeout(self.call.deadline - time.monotonic()):
                await self.service.decide(self.call)
        except TimeoutError:
            raise Refused(504, "the decision took longer than the request may last", None, "timeout") from None
        except Overloaded as error:
            raise Refused(503, str(error), None, "overloaded", error.retry_after) from None

    async def _attempts(self) -> Whole | Opened:
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
                if isinstance(found, Opened):
                    self.opened = found
                return found
            self._note(failure.status, failure.error, start)
            self._give_up(failure, chosen)
            tried.add(self.deployment.name)
            if failure.blame == "request":
                raise PassedOn(failure.status or 400, self._error_of(failure))
            if failure.blame == "context":
                mask &= self._wider(chosen.model)
                if widened or not mask.any():
                    raise PassedOn(failure.status if failure.status and failure.status != 200 else 400, self._error_of(failure))
                widened = True
            if len(call.attempts) >= retries.attempts or time.monotonic() >= deadline:
                raise self._unavailable(failure)
            if failure.blame == "deployment" and self._others(chosen.model, tried):
                pass  # the same model, elsewhere
            else:
                mask[chosen.model] = False
                if mask.any():
                    try:
                        chosen = call.now = service.chosen(call, mask, count=False)
                    except Refused:  # what is left of the budget affords none
                        raise self._unavailable(failure) from None
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
        else:
            self.service.health.answered(deployment)
        amount = call.worst(chosen.model) if failure.sent else Fraction(0)
        if failure.sent:
            self.lost += amount
            call.spent_before += float(call.costs[chosen.model])
        self.service.purse.settle(self.token, amount)
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

    def _note(self, status: int | None, error: str | None, start: float) -> None:
        assert self.deployment is not None
        seconds = round(time.perf_counter() - start, 6)
        self.call.attempts.append(Attempt(self.deployment.model, self.deployment.name, status, error, seconds))

    async def _whole(self, found: Whole, send: Send) -> None:
        # Counted before it is sent: a client that leaves now has cost what it cost.
        answer_id = found.answer.get("id")
        answer_id = answer_id if isinstance(answer_id, str) else None
        self._finish(200, "answered", found.usage, _characters(found), answer_id)
        self.keeper.keep(found, answer_id, self.call.attempts[-1].deployment)
        extra = [(name.encode(), value.encode("latin-1", "replace")) for name, value in found.headers.items()]
        await respond(send, 200, found.body, [*self.headers(), *extra])

    async def _stream(self, opened: Opened, send: Send) -> None:
        extra = [(name.encode(), value.encode("latin-1", "replace")) for name, value in opened.headers.items()]
        headers = [*STREAM_HEADERS, *self.headers(), *extra]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        last = b""
        try:
            async for data in opened.events():
                self.keeper.add(data)
                await send({"type": "http.response.body", "body": data, "more_body": True})
            outcome = "answered"
        except StreamCut as cut:
            assert self.deployment is not None
            self.service.health.failed(self.deployment)
            last, outcome = self.call.api.error_event(f"the answer was cut off: {cut.message}"), "cut"
            self._reword_last(cut.error)
        answer_id = getattr(opened.reader, "answer_id", None)
        self._finish(200, outcome, opened.reader.usage, opened.reader.characters, answer_id)
        if outcome == "answered":
            self.keeper.keep(opened, answer_id, self.call.attempts[-1].deployment)
        await send({"type": "http.response.body", "body": last, "more_body": False})

    def _reword_last(self, error: str) -> None:
        last = self.call.attempts[-1]
        self.call.attempts[-1] = Attempt(last.model, last.deployment, last.status, error, last.seconds)

    def _finish(
        self, status: int, outcome: str, usage: Usage | None = None, written: int | None = None, answer_id: str | None = None
    ) -> None:
        """Settles, learns and logs, once. written: characters of the answer; None: nothing came."""
        service, call, now = self.service, self.call, self.call.now
        if self.done:
            return
        self.done = True
        cost, estimated, name = self.lost, self.lost > 0, None
        if self.sending and now is not None and self.deployment is not None:
            name, estimated = call.plan.names[now.model], estimated or usage is None or outcome != "answered"
            if usage is None and written is not None:
                usage = call.estimated(written)
            own = call.worst(now.model) if usage is None else call.plan.prices.cost(now.model, usage)
            cost += own
            service.purse.settle(self.token, own)
            if outcome == "answered" and usage is not None:
                service.expectations.add(now.model, usage.tokens_out, call.ask.outputs)
                service.sessions.remember(call.session, name, call.counted)
                if answer_id is not None and call.ask.api == "responses":
                    service.sessions.remember_answer(answer_id, self.deployment.name)
        else:
            service.purse.settle(self.token, Fraction(0))
        self.token = None
        if call.pacer is not None and call.paid is not None:
            call.pacer.settle(float(cost) - call.paid)
        self.finished(call.record(status, outcome, name, usage, None if outcome == "decision" else cost, estimated))


async def respond(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]], kind: bytes = JSON) -> None:
    """A whole response."""
    first = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*first, *headers]})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _characters(found: Whole) -> int | None:
    """What an answer without usage may have written: its whole body, at most."""
    return len(found.body) if found.usage is None else None

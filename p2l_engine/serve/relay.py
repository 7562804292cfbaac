"""A request to its response: bytes are passed through, money is settled, and the record is written once."""

from __future__ import annotations

import asyncio
import contextlib
import math
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import orjson

from p2l_engine.apis.api import Usage
from p2l_engine.decision_log.record import Record
from p2l_engine.serve.answers import CachedAnswer
from p2l_engine.serve.attempts import Attempts, PassedOn
from p2l_engine.serve.call import Call
from p2l_engine.serve.explanation import decision
from p2l_engine.serve.options import of_caller
from p2l_engine.serve.replay import Keeper, replayed
from p2l_engine.serve.scorer import Overloaded
from p2l_engine.serve.service import Refused, Service
from p2l_engine.serve.sessions import KeptAnswer
from p2l_engine.serve.upstream import Opened, StreamCut, Whole

Send = Callable[[dict[str, Any]], Awaitable[None]]
JSON = b"application/json"
LAST_WORDS = 1.0  # seconds that a client may take for the event that ends its stream when the server stops
UNSEEN = ("unreadable", "idle", "deadline")  # ends of a stream after which its provider may have written on, and bill it
STREAM_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


@dataclass(eq=False)
class Relay:
    """Answers one call. finished: takes its record; keeper: knows what the cache of answers has, and wants, of it."""

    service: Service
    call: Call
    finished: Callable[[Record], None]
    keeper: Keeper
    opened: Opened | None = None
    done: bool = False

    def __post_init__(self) -> None:
        self._attempts = Attempts(self.service, self.call)

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
                await respond(send, 200, orjson.dumps(decision(call)), self.headers())
                return
            found = await self._attempts.answer()
            call.mark("first_byte")
            if isinstance(found, Whole):
                await self._whole(found, send)
            else:
                self.opened = found
                await self._stream(found, send)
        except Refused as refused:
            self._finish(refused.status, "refused" if refused.status < 500 else "failed")
            body = call.api.error(refused.status, refused.message, refused.param, refused.code)
            await respond(send, refused.status, orjson.dumps(body), self.headers(refused.retry_after))
        except PassedOn as passed:
            self._finish(passed.status, "refused")
            await respond(send, passed.status, passed.body, self.headers(passed.retry_after))
        finally:
            if self.opened is not None:
                self.opened.close()
            # Unless it has ended: an error of the server's own, or the client left, or the server stops.
            ended = (500, "failed") if isinstance(sys.exception(), Exception) else (499, "left")
            self._finish(*ended, *self._seen())

    def _seen(self) -> tuple[Usage | None, int | None]:
        """The usage and the bytes of text of a stream so far."""
        return (None, None) if self.opened is None else (self.opened.reader.usage, self.opened.reader.written)

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
            self._remember([stored.answer_id], stored.deployment, stored.usage)
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

    async def _whole(self, found: Whole, send: Send) -> None:
        # Counted before it is sent: a client that leaves now has cost what it cost.
        answer_id = found.answer.get("id")
        answer_id = answer_id if isinstance(answer_id, str) else None
        self._finish(200, "answered", found.usage, _written(found), self.call.api.kept(found.answer))
        self.keeper.keep(found, answer_id, self.call.attempts[-1].deployment)
        extra = [(name.encode(), value.encode("latin-1", "replace")) for name, value in found.headers.items()]
        await respond(send, 200, found.body, [*self.headers(), *extra])

    async def _stream(self, opened: Opened, send: Send) -> None:
        extra = [(name.encode(), value.encode("latin-1", "replace")) for name, value in opened.headers.items()]
        headers = [*STREAM_HEADERS, *self.headers(), *extra]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        last, outcome, written = b"", "answered", True
        try:
            async for data in opened.events():
                self.keeper.add(data)
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except StreamCut as cut:
            self._attempts.cut(cut.error)
            last, outcome = self.call.api.error_event(f"the answer was cut off: {cut.message}"), "cut"
            written = cut.error not in UNSEEN
        except asyncio.CancelledError:  # the server stops, or the client has left, who does not see this
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LAST_WORDS):
                    last = self.call.api.error_event("the answer was cut off: the server stops")
                    await send({"type": "http.response.body", "body": last, "more_body": False})
            raise
        answer_id = getattr(opened.reader, "answer_id", None)
        self._finish(200, outcome, opened.reader.usage, opened.reader.written if written else None, opened.reader.kept)
        if outcome == "answered":
            self.keeper.keep(opened, answer_id, self.call.attempts[-1].deployment)
        await send({"type": "http.response.body", "body": last, "more_body": False})

    def _finish(
        self, status: int, outcome: str, usage: Usage | None = None, written: int | None = None, kept: Sequence[str] = ()
    ) -> None:
        """Settles, learns and logs, once. written: bytes of the answer; None: nothing came. kept: see ``Api.kept``."""
        service, call, now = self.service, self.call, self.call.now
        if self.done:
            return
        self.done = True
        attempts = self._attempts
        cost, estimated, name = attempts.lost, attempts.lost > 0, None
        if attempts.sending and now is not None and attempts.deployment is not None:
            name = call.plan.names[now.model]
            usage, own, reported = self._paid(now.model, outcome, usage, written)
            cost, estimated = cost + own, estimated or not reported
            attempts.deployment.reasons |= usage is not None and usage.reasoning > 0
            service.spending.settle(attempts.token, own)
            if outcome == "answered":
                service.sessions.remember(call.session, name, call.bill.counted)
                k = service.plan.index.get(name)  # of the present configuration, which may be another one than the call's
                if reported and usage is not None and k is not None and call.ask.max_tokens != 0:
                    foreseen = None if call.foreseen is None else float(call.foreseen[now.model])
                    service.expectations.add(k, usage.tokens_out, call.ask.outputs, foreseen, call.ask.max_tokens)
                self._remember(kept, attempts.deployment.name, usage)
        else:
            service.spending.settle(attempts.token, Fraction(0))
        attempts.token = None
        if call.pacer is not None and call.paid is not None:
            call.pacer.settle(float(cost) - call.paid)
        if outcome == "decision" and call.options.explain:
            return  # a look at what would be decided, such as the page takes at each pause in typing
        self.finished(call.record(status, outcome, name, usage, None if outcome == "decision" else cost, estimated))

    def _remember(self, kept: Sequence[str], deployment: str, usage: Usage | None) -> None:
        """The deployment keeps this answer, under these ids, and the conversation before it."""
        if not kept:
            return
        tokens = self.call.bill.most_tokens_in() if usage is None else usage.tokens_in + usage.tokens_out
        for name in kept:
            self.service.sessions.remember_answer(of_caller(self.call.key, name), KeptAnswer(deployment, tokens))

    def _paid(self, k: int, outcome: str, usage: Usage | None, written: int | None) -> tuple[Usage | None, Fraction, bool]:
        """Usage and cost of the attempt that model k answered, and whether the provider has reported them."""
        call = self.call
        if usage is not None and outcome == "answered":
            return usage, call.bill.cost(k, usage), True
        if written is None or call.ask.extras.tools:  # it may have been answered in full, or have called its tools unseen
            return usage, call.bill.worst(k), False
        found = call.bill.estimated(k, written, usage, time.perf_counter() - call.began)
        return found, min(call.bill.cost(k, found), call.bill.worst(k)), False


async def respond(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]], kind: bytes = JSON) -> None:
    """A whole response."""
    first = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*first, *headers]})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _written(found: Whole) -> int | None:
    """What an answer without usage may have written: its whole body, at most."""
    return len(found.body) if found.usage is None else None

"""A request and the cache of answers: whether it may be used, what is kept of its answer, and an answer sent again."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Literal

from p2l_engine.decision_log.record import Record
from p2l_engine.serve.answers import Answers, CachedAnswer, key_of_call
from p2l_engine.serve.call import Call
from p2l_engine.serve.choice import Pick
from p2l_engine.serve.scorer import key_of
from p2l_engine.serve.upstream import Opened, Whole

# What a provider keeps between requests, or works at after it has answered: an equal request would get another answer.
STATEFUL = ("background", "container", "conversation")
UNFINISHED = ("queued", "in_progress")  # the status of such answers


class Keeper:
    """Looks for the answer of one request, and keeps the one that it gets.

    state: of the request, as its response says; None where there is no cache, and for dry runs. A client opts out with
    ``cache-control: no-cache``, and its answer replaces the stored one; or with ``no-store``, and it is not stored.
    """

    def __init__(self, answers: Answers | None, call: Call) -> None:
        self.state: Literal["hit", "miss", "bypass"] | None = None
        self._answers, self._call = answers, call
        self._key: str | None = None
        self._parts, self._size = list[bytes](), 0
        self._wanted = True
        if answers is None or call.options.dry_run:
            return
        self.state = "bypass"
        wishes = {part.partition("=")[0].strip().lower() for part in call.headers.get("cache-control", "").split(",")}
        if "no-store" in wishes or any(call.ask.body.get(name) for name in STATEFUL):
            return
        try:
            self._key = key_of_call(call)
        except ValueError:  # nested too deeply, for providers too
            return
        self._wanted = "no-cache" not in wishes

    async def stored(self) -> CachedAnswer | None:
        """The stored answer; None where there is none, or none is wanted."""
        if self._answers is None or self._key is None or not self._wanted:
            return None
        found = await self._answers.get(self._key)
        self.state = "miss" if found is None else "hit"
        return found

    def add(self, data: bytes) -> None:
        """A piece of a stream that the client sees."""
        if self._answers is None or self._key is None:
            return
        self._size += len(data)
        if self._size > self._answers.largest:
            self._key = None
            self._parts.clear()
        else:
            self._parts.append(data)

    def keep(self, found: Whole | Opened, answer_id: str | None, deployment: str) -> None:
        """The answer is complete. That of a fallback is not kept: the model that was chosen may answer the next request."""
        call = self._call
        if self._answers is None or self._key is None or call.first is None or call.now is None:
            return
        if call.now.model != call.first.model:
            return
        if isinstance(found, Whole):
            if found.answer.get("status") in UNFINISHED:
                return
            body, usage = found.body, found.usage
        else:
            body, usage = b"".join(self._parts), found.reader.usage
        routed = call.coefficients is not None
        answer = CachedAnswer(
            body, isinstance(found, Opened), call.plan.names[call.now.model], deployment, usage, call.now.cost,
            call.now.rate if routed else None, call.bradley_terry_score(call.first), answer_id,
        )  # fmt: skip
        self._answers.put(self._key, answer)


def replayed(call: Call, answer: CachedAnswer, finished: Callable[[Record], None]) -> None:
    """Makes a stored answer the call's: its choice costs nothing. finished: takes its record."""
    k = call.plan.index[answer.model]
    rate = math.nan if answer.win_rate is None else answer.win_rate
    call.first = call.now = Pick(k, {k: 1.0}, rate, 0.0, "an equal request was answered before")
    call.turns_hash = key_of(call.ask.turns)
    call.mark("first_byte")
    record = call.record(200, "cached", answer.model, answer.usage, Fraction(0), False)
    finished(replace(record, candidates=(answer.model,), win_rate=answer.win_rate, score=answer.score))

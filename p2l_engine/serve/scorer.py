"""Coefficients of prompts: from a cache, or from the engine, which runs off the event loop and takes what it can."""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol, TypeVar

from p2l_engine.apis.ask import digest
from p2l_engine.coefficients import Coefficients
from p2l_engine.prompts.parse import Turns

R = TypeVar("R")

FIRST_GUESS = 0.05  # seconds that a prompt takes the engine, before any was computed


class Overloaded(RuntimeError):
    """More prompts wait for the engine than its queue holds. retry_after: seconds."""

    def __init__(self, retry_after: float) -> None:
        super().__init__("the engine's queue is full; try again later")
        self.retry_after = retry_after


class Computer(Protocol):
    """Computes coefficients outside the event loop: ``engine.batcher.Batcher``, or engines elsewhere."""

    def submit(self, prompt: Turns, finish: Callable[[Coefficients], R], /) -> Future[R]:
        """``finish`` of a prompt's coefficients; the future raises PromptError."""

    def close(self) -> None:
        """Finishes what has begun."""


class Scorer:
    """most: prompts that may wait for the engine; kept: prompts whose coefficients are remembered."""

    def __init__(self, computer: Computer, most: int, kept: int) -> None:
        self.most, self.kept = most, kept
        self.hits = self.misses = 0
        self._computer = computer
        self._known: OrderedDict[str, Coefficients] = OrderedDict()
        self._waiting: dict[str, asyncio.Future[Coefficients]] = {}
        self._seconds = FIRST_GUESS  # that a prompt takes, as a running mean

    @property
    def waiting(self) -> int:
        """Prompts that the engine has not answered yet."""
        return len(self._waiting)

    def close(self) -> None:
        """Finishes what the engine has begun."""
        self._computer.close()

    async def coefficients(self, turns: Turns) -> tuple[Coefficients, str]:
        """The coefficients of one prompt, and the hash of its turns. Requests for the same turns share one computation.

        Raises Overloaded, at once; PromptError.
        """
        key = digest([turn.encode() for turn in turns])
        if (found := self._known.get(key)) is not None:
            self.hits += 1
            self._known.move_to_end(key)
            return found, key
        self.misses += 1
        future = self._waiting.get(key)
        if future is None:
            if len(self._waiting) >= self.most:
                raise Overloaded(max(1.0, math.ceil(self._seconds * len(self._waiting))))
            future = asyncio.ensure_future(self._compute(key, turns))
            future.add_done_callback(_observed)
            self._waiting[key] = future
        # Shielded: the client that asked first may leave while others wait for the same.
        return await asyncio.shield(future), key

    async def batch(self, prompts: Sequence[Turns]) -> list[Coefficients]:
        """The coefficients of several prompts. Raises as ``coefficients``."""
        new = {digest([turn.encode() for turn in turns]) for turns in prompts} - self._known.keys() - self._waiting.keys()
        if len(self._waiting) + len(new) > self.most:
            raise Overloaded(max(1.0, math.ceil(self._seconds * (len(self._waiting) + len(new)))))
        found = await asyncio.gather(*(self.coefficients(turns) for turns in prompts))
        return [coefficients for coefficients, _ in found]

    async def _compute(self, key: str, turns: Turns) -> Coefficients:
        began, ahead = time.perf_counter(), len(self._waiting) + 1
        try:
            found = await asyncio.wrap_future(self._computer.submit(turns, lambda coefficients: coefficients))
        finally:
            del self._waiting[key]
        self._seconds += 0.1 * ((time.perf_counter() - began) / ahead - self._seconds)
        self._known[key] = found
        while len(self._known) > self.kept:
            self._known.popitem(last=False)
        return found


def _observed(future: asyncio.Future[Coefficients]) -> None:
    """An error that nobody waits for any more is no news."""
    if not future.cancelled():
        future.exception()

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

ALWAYS = 4  # prompts that may wait, however long they take
STEP = 1.02  # by which what is usual moves with each prompt
FEW = 2  # while more come than the engine can compute: the one that it computes, and one that waits
MANY = 8  # refusals in a row that are more than a burst
RECENT = 16  # prompts whose share of refusals says whether that goes on
CALM = 1.0  # seconds after which it is over, from when at most half of these were refused
TOGETHER = 16  # prompts of a batch that wait at a time


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
    """patience: seconds that a prompt may have to wait for the engine, most: prompts that may wait; kept: prompts whose
    coefficients are remembered. renewed: what brings coefficients up to date that were computed before; None: they stay so.

    A burst may wait so long. Where many in a row had to be refused, more come than the engine can compute, and a full queue
    would only make all of them late: until for a second at most half of the recent prompts were refused, a prompt may wait as
    long as prompts usually take, or behind one other, and those that waited before are refused too.
    """

    def __init__(
        self,
        computer: Computer,
        patience: float,
        most: int,
        kept: int,
        renewed: Callable[[Coefficients], Coefficients] | None = None,
    ) -> None:
        self.patience, self.most, self.kept = patience, most, kept
        self.hits = self.misses = 0
        self._computer, self._renewed = computer, renewed
        self._known: OrderedDict[str, Coefficients] = OrderedDict()
        self._waiting: dict[str, asyncio.Future[Coefficients]] = {}
        self._computing: dict[str, Future[Coefficients]] = {}
        self._promised = set[str]()  # of these, those that a batch waits for
        self._refused = 0  # in a row
        self._share = 0.0  # of the recent prompts, that were refused
        self._overloaded = 0.0  # until then, on the monotonic clock
        self._usual = 0.0  # the median of seconds from a prompt to its coefficients, while not overloaded
        self._seconds = 0.0  # that a prompt takes, as a running mean; 0: none was computed yet

    @property
    def waiting(self) -> int:
        """Prompts that the engine has not answered yet."""
        return len(self._waiting)

    def close(self) -> None:
        """Finishes what the engine has begun."""
        self._computer.close()

    def admit(self, turns: Turns) -> None:
        """Raises Overloaded where these turns would find the queue full: before anything else is done for them."""
        if self._waiting:
            key = key_of(turns)
            if key not in self._known and key not in self._waiting:
                self._check()

    async def coefficients(self, turns: Turns, admitted: bool = False) -> tuple[Coefficients, str]:
        """The coefficients of one prompt, and the hash of its turns. Requests for the same turns share one computation.

        admitted: past the queue's bounds. Raises Overloaded, at once; PromptError.
        """
        key = key_of(turns)
        if (found := self._known.get(key)) is not None:
            self.hits += 1
            self._known.move_to_end(key)
            if self._renewed is not None:
                found = self._known[key] = self._renewed(found)
            return found, key
        self.misses += 1
        future = self._waiting.get(key)
        if future is None:
            if not admitted:
                self._check()
            future = asyncio.ensure_future(self._compute(key, turns))
            future.add_done_callback(_observed)
            self._waiting[key] = future
        if admitted:
            self._promised.add(key)
        # Shielded: the client that asked first may leave while others wait for the same.
        found = await asyncio.shield(future)
        return found if self._renewed is None else self._renewed(found), key

    def prepare(self, turns: Turns) -> None:
        """Has a prompt computed that no request waits for, unless others wait."""
        key = key_of(turns)
        if key not in self._known and len(self._waiting) < FEW and key not in self._waiting:
            self._waiting[key] = asyncio.ensure_future(self._compute(key, turns))
            self._waiting[key].add_done_callback(_observed)

    async def batch(self, prompts: Sequence[Turns]) -> list[Coefficients]:
        """The coefficients of several prompts, some at a time: single requests get their turn in between. Raises Overloaded
        where the queue is full at the beginning; PromptError."""
        self._check()
        found = list[tuple[Coefficients, str]]()
        for start in range(0, len(prompts), TOGETHER):
            found += await asyncio.gather(*(self.coefficients(turns, True) for turns in prompts[start : start + TOGETHER]))
        # Renewed together: of one head, over the same models.
        return [coefficients if self._renewed is None else self._renewed(coefficients) for coefficients, _ in found]

    def _check(self) -> None:
        """Raises Overloaded where a prompt would have to wait too long."""
        ahead, now = len(self._waiting), time.monotonic()
        overloaded = now < self._overloaded
        few, patience = (FEW, min(self._usual, self.patience)) if overloaded else (ALWAYS, self.patience)
        admitted = ahead < self.most and (ahead < few or ahead * self._seconds <= patience)
        self._share += ((not admitted) - self._share) / RECENT
        if admitted:
            self._refused = 0
            return
        self._refused += 1
        if self._refused == MANY and not overloaded:
            for key, computing in list(self._computing.items()):
                if key not in self._promised:
                    computing.cancel()  # unless the engine has begun with it
        if self._refused >= MANY or (overloaded and self._share > 0.5):
            self._overloaded = now + CALM
        raise self._overload(ahead)

    def _overload(self, ahead: int) -> Overloaded:
        return Overloaded(max(1.0, math.ceil(self._seconds * ahead)))

    async def _compute(self, key: str, turns: Turns) -> Coefficients:
        began, ahead = time.perf_counter(), len(self._waiting) + 1
        try:
            self._computing[key] = self._computer.submit(turns, lambda coefficients: coefficients)
            found = await asyncio.wrap_future(self._computing[key])
        except asyncio.CancelledError:
            if self._computing[key].cancelled():
                raise self._overload(ahead) from None
            raise
        finally:
            del self._waiting[key]
            self._computing.pop(key, None)  # there is none where the computer is closed
            self._promised.discard(key)
        took = time.perf_counter() - began
        seconds = took / ahead
        if time.monotonic() >= self._overloaded:
            # Not the mean: a few that the machine kept waiting are not usual.
            self._usual = self._usual * (STEP if took > self._usual else 1 / STEP) or took
        # Bounded: a prompt that waited for a replica to be replaced says little about the next.
        self._seconds += 0.1 * (min(seconds, 3 * self._seconds) - self._seconds) if self._seconds else seconds
        self._known[key] = found
        while len(self._known) > self.kept:
            self._known.popitem(last=False)
        return found


def key_of(turns: Turns) -> str:
    """The hash of a prompt's user turns, by which it is known."""
    return digest([turn.encode() for turn in turns])


def _observed(future: asyncio.Future[Coefficients]) -> None:
    """Marks an error as seen, for the case that all clients have left: asyncio would log it."""
    if not future.cancelled():
        future.exception()

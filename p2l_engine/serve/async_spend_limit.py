"""Hard limits on money for the event loop: calls of a SpendLimit that come while it is busy share its next transaction."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

from sqlalchemy.exc import SQLAlchemyError

from p2l_engine.errors import UnknownReservation
from p2l_engine.routing import SpendLimit
from p2l_engine.spending.calls import Reserve, Settle
from p2l_engine.spending.records import Settlement

logger = logging.getLogger(__name__)

RETRIES = (0.05, 0.5, 2.0, 10.0, 30.0)  # seconds before a settlement is tried again
MARGIN = 60.0  # seconds beyond the longest request, after which a reservation's process must be dead
LINGER = 0.02  # seconds that settlements wait for a reservation to share its transaction: no client waits for them
TOGETHER = 64  # calls of a transaction at most: other processes wait for its end

Answer = str | Settlement | Exception


class AsyncSpendLimit:
    """limit: None for none. longest: seconds that a request may last, with all its attempts."""

    def __init__(self, limit: SpendLimit | None, longest: float) -> None:
        self.limit, self._longest = limit, longest
        self._held = set[str]()  # reservations that this process will settle: not of a dead one, whatever the clock says
        self._thread = ThreadPoolExecutor(1, "p2l-spending")
        self._waiting: list[tuple[Reserve | Settle, Callable[[Answer], None]]] = []
        self._unsettled = 0  # settlements that are not stored yet
        self._settled: asyncio.Event | None = None  # set once there are none, where a caller waits for that
        self._busy = False
        self._lingering: asyncio.TimerHandle | None = None

    def adopt(self, limit: SpendLimit | None, longest: float) -> None:
        """Replaces the limits by others on the same store."""
        self.limit, self._longest = limit, max(self._longest, longest)

    async def reserve(self, worst: Fraction, key: str | None) -> str | None:
        """Reserves the most that a request can cost. Raises SpendLimitReached; SQLAlchemyError where the store is away."""
        if self.limit is None:
            return None
        answered: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def take(answer: Answer) -> None:
            if isinstance(answer, str) and answered.done():  # the client has left meanwhile
                self.settle(answer, Fraction(0))
            elif isinstance(answer, str):
                self._held.add(answer)
                answered.set_result(answer)
            elif isinstance(answer, Exception) and not answered.done():
                answered.set_exception(answer)

        entry = (Reserve(worst, key), take)
        self._waiting.append(entry)
        self._begin()
        try:
            return await answered
        except asyncio.CancelledError:  # the client has left
            if entry in self._waiting:
                self._waiting.remove(entry)
            elif not answered.cancelled() and answered.exception() is None:
                self.settle(answered.result(), Fraction(0))
            raise

    def settle(self, token: str | None, amount: Fraction) -> None:
        """Replaces a reservation by what was spent, soon; tries again while the store is away."""
        if token is None or self.limit is None:
            return
        self._unsettled += 1
        self._held.add(token)
        self._try(Settle(token, amount), 0)

    async def sweep(self) -> int:
        """Counts in full what dead processes had reserved: their requests may have been answered. Returns how many."""
        if self.limit is None:
            return 0
        limit, before = self.limit, time.time() - self._longest - MARGIN
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(self._thread, limit.reservations)
        # Here, not in the thread: by now the loop has been told of each reservation that was made before these were read.
        dead = [of for of in found if of.made.timestamp() < before and of.token not in self._held]

        def count_in_full() -> int:
            counted = 0
            for reservation in dead:
                try:
                    limit.settle(reservation.token, reservation.worst_case)
                except UnknownReservation:  # another process was faster
                    continue
                counted += 1
            return counted

        count = await loop.run_in_executor(self._thread, count_in_full) if dead else 0
        if count:
            logger.warning("%d reservations of processes that died were counted in full", count)
        return count

    async def drain(self) -> None:
        """Waits until everything is settled."""
        while self._unsettled or self._busy:
            self._settled = self._settled or asyncio.Event()
            self._begin()
            await self._settled.wait()

    def close(self) -> None:
        """Ends the thread; what is not settled then stays reserved."""
        if self._unsettled:
            logger.error("%d settlements could not be stored; their reservations count in full", self._unsettled)
        self._thread.shutdown(wait=True)
        if self.limit is not None:
            self.limit.close()

    def _try(self, call: Settle, tries: int) -> None:
        """Settles with the next reservation, or when settlements have waited long enough."""

        def take(answer: Answer) -> None:
            if isinstance(answer, SQLAlchemyError) and tries < len(RETRIES):
                logger.warning("a settlement could not be stored; trying again in %g s", RETRIES[tries])
                asyncio.get_running_loop().call_later(RETRIES[tries], self._try, call, tries + 1)
                return
            if isinstance(answer, UnknownReservation):
                logger.warning("a reservation was settled by another process, in full")
            elif isinstance(answer, Exception):
                logger.error("a settlement could not be stored; its reservation counts in full", exc_info=answer)
            self._held.discard(call.token)
            self._unsettled -= 1

        self._waiting.append((call, take))
        if self._settled is not None:
            self._begin()
        elif self._lingering is None:
            self._lingering = asyncio.get_running_loop().call_later(LINGER, self._begin)

    def _begin(self) -> None:
        """Begins a transaction with the calls that wait, in their order, unless one is under way."""
        if self._lingering is not None:
            self._lingering.cancel()
            self._lingering = None
        if self._busy or not self._waiting:
            return
        limit = self.limit
        assert limit is not None
        self._busy = True
        group, self._waiting = self._waiting[:TOGETHER], self._waiting[TOGETHER:]
        made = asyncio.get_running_loop().run_in_executor(self._thread, limit.together, [call for call, _ in group])
        made.add_done_callback(lambda made: self._end([take for _, take in group], made))

    def _end(self, callbacks: list[Callable[[Answer], None]], made: asyncio.Future[list[Answer]]) -> None:
        self._busy = False
        try:
            answers = made.result()
        except Exception as error:  # whatever it is, no caller may wait forever
            answers = [error] * len(callbacks)
        for take, answer in zip(callbacks, answers, strict=True):
            take(answer)
        # No timer: settlements have waited long enough meanwhile, or were too many for one transaction.
        if self._lingering is None or self._settled is not None or any(isinstance(call, Reserve) for call, _ in self._waiting):
            self._begin()
        if self._settled is not None and not (self._unsettled or self._busy):
            self._settled.set()
            self._settled = None

"""Hard limits on money for the event loop: a SpendLimit whose transactions run in threads, in order."""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

from sqlalchemy.exc import SQLAlchemyError

from p2l_engine.errors import UnknownReservation
from p2l_engine.routing import SpendLimit

logger = logging.getLogger(__name__)

RETRIES = (0.05, 0.5, 2.0, 10.0, 30.0)  # seconds before a settlement is tried again
MARGIN = 60.0  # seconds beyond the longest request, after which a reservation's process must be dead
CONNECTIONS = 4  # transactions at a time


class Purse:
    """limit: None for none. longest: seconds that a request may last, with all its attempts."""

    def __init__(self, limit: SpendLimit | None, longest: float) -> None:
        self.limit, self._longest = limit, longest
        self._threads = ThreadPoolExecutor(CONNECTIONS, "p2l-spending")
        self._settling: set[asyncio.Task[None]] = set()

    async def reserve(self, worst: Fraction, key: str | None) -> str | None:
        """Reserves the most that a request can cost. Raises SpendLimitReached; SQLAlchemyError where the store is away."""
        if self.limit is None:
            return None
        limit = self.limit
        reserving = asyncio.get_running_loop().run_in_executor(self._threads, lambda: limit.reserve(worst, key))
        try:
            return await asyncio.shield(reserving)
        except asyncio.CancelledError:  # the client left: what the thread reserves meanwhile is given back
            reserving.add_done_callback(self._given_back)
            raise

    def settle(self, token: str | None, amount: Fraction) -> None:
        """Replaces a reservation by what was spent, soon; tries again while the store is away."""
        if token is None or self.limit is None:
            return
        task = asyncio.get_running_loop().create_task(self._settle(token, amount))
        self._settling.add(task)
        task.add_done_callback(self._settled)

    async def sweep(self) -> int:
        """Counts in full what dead processes had reserved: their requests may have been answered. Returns how many."""
        if self.limit is None:
            return 0
        limit, before = self.limit, time.time() - self._longest - MARGIN

        def count_in_full() -> int:
            dead = [found for found in limit.reservations() if found.made.timestamp() < before]
            for reservation in dead:
                try:
                    limit.settle(reservation.token, reservation.worst_case)
                except UnknownReservation:  # another process was faster
                    continue
            return len(dead)

        count = await asyncio.get_running_loop().run_in_executor(self._threads, count_in_full)
        if count:
            logger.warning("%d reservations of processes that died were counted in full", count)
        return count

    async def drain(self) -> None:
        """Waits until everything is settled."""
        while self._settling:
            await asyncio.gather(*self._settling, return_exceptions=True)  # each is logged by itself

    def close(self) -> None:
        """Ends the threads; what is not settled then stays reserved."""
        if self._settling:
            logger.error("%d settlements could not be stored; their reservations count in full", len(self._settling))
        self._threads.shutdown(wait=True)
        if self.limit is not None:
            self.limit.close()

    def _settled(self, task: asyncio.Task[None]) -> None:
        self._settling.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a settlement failed; its reservation counts in full", exc_info=error)

    def _given_back(self, reserving: asyncio.Future[str]) -> None:
        if not reserving.cancelled() and reserving.exception() is None:
            self.settle(reserving.result(), Fraction(0))

    async def _settle(self, token: str, amount: Fraction) -> None:
        limit = self.limit
        assert limit is not None
        for seconds in (*RETRIES, None):
            try:
                await asyncio.get_running_loop().run_in_executor(self._threads, lambda: limit.settle(token, amount))
                return
            except UnknownReservation:
                logger.warning("a reservation was settled by another process, in full")
                return
            except SQLAlchemyError:
                if seconds is None:
                    logger.exception("a settlement could not be stored; its reservation counts in full")
                    return
                logger.warning("a settlement could not be stored; trying again in %g s", seconds)
                await asyncio.sleep(seconds)

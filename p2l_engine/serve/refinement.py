"""The optimum over all votes that a server has learned from, found from time to time in a thread of low priority."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable

from p2l_engine.learning.learner import Learner

OLDEST = 10.0  # seconds after which the optimum is found again, however few votes are new,
RARELY = 20.0  # or so many times as long as that took last, if that is more: at most a twentieth of a core
NICE = 10  # where threads have a priority of their own (Linux)

logger = logging.getLogger(__name__)


class Refinement:
    """done: called, in the thread, once an optimum was found. count: how many were; failures: how many could not be; seconds:
    that all of them took."""

    def __init__(self, done: Callable[[], object]) -> None:
        self.count = self.failures = 0
        self.seconds = 0.0
        self._done = done
        self._thread: threading.Thread | None = None
        self._ended, self._took = time.monotonic(), 0.0

    def begin_if_due(self, learner: Learner, votes: int) -> None:
        """Starts, unless it is under way, where ``votes`` are new (a tenth of all, if that is more), or some are old."""
        pending, since = learner.pending, time.monotonic() - self._ended
        if not pending or (self._thread is not None and self._thread.is_alive()):
            return
        if pending >= max(votes, learner.votes // 10) or since > max(OLDEST, RARELY * self._took):
            self._thread = threading.Thread(target=self._run, args=(learner,), name="refining", daemon=True)
            self._thread.start()

    def _run(self, learner: Learner) -> None:
        lower_priority()
        began = time.perf_counter()
        try:
            learner.refine()
            self._done()
            self.count += 1
        except Exception:  # whatever it is, updates continue
            self.failures += 1
            logger.exception("the optimum over all votes was not found")
        self._took = time.perf_counter() - began
        self.seconds += self._took
        self._ended = time.monotonic()


def lower_priority() -> None:
    """Lets requests go before this thread."""
    if hasattr(os, "setpriority"):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)

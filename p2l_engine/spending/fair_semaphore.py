"""A semaphore that waiting threads get in the order in which they came."""

from __future__ import annotations

import threading
from collections import deque


class FairSemaphore:
    """threading's own lets a thread that comes back at once pass all that wait: under load, some wait forever.

    places: how many threads may have a turn at a time.
    """

    def __init__(self, places: int) -> None:
        self._lock = threading.Lock()
        self._free = places
        self._waiting: deque[threading.Lock] = deque()

    def acquire(self, timeout: float) -> bool:
        """Waits for this thread's turn; False where it has not come within ``timeout`` seconds."""
        with self._lock:
            if self._free:
                self._free -= 1
                return True
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        if turn.acquire(timeout=timeout):
            return True
        with self._lock:
            if turn not in self._waiting:
                return True  # it came in this moment
            self._waiting.remove(turn)
            return False

    def release(self) -> None:
        """Gives the turn to the thread that has waited longest."""
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._free += 1

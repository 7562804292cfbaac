"""A clock that ticks at a fixed rate, finer than an event loop's timers, which are a millisecond coarse."""

from __future__ import annotations

import asyncio
import ctypes
import os
import struct
import time
from collections.abc import Callable

_LIBC = ctypes.CDLL(None, use_errno=True)


class Ticks:
    """Linux's timerfd. Calls ``due`` for each tick with the time (of ``time.perf_counter``) at which it should have come, late
    ones too, until ``count`` have come."""

    def __init__(self, rate: float, count: int, due: Callable[[float], None]) -> None:
        self._interval, self._left, self._due = 1.0 / rate, count, due
        self.ended = asyncio.get_running_loop().create_future()
        self._descriptor = _LIBC.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK)
        if self._descriptor < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        nanoseconds = round(self._interval * 1e9)
        whole, rest = divmod(nanoseconds, 10**9)
        setting = struct.pack("4q", whole, rest, whole, rest)
        asyncio.get_running_loop().add_reader(self._descriptor, self._tick)
        self._next = time.perf_counter() + nanoseconds / 1e9
        self._interval = nanoseconds / 1e9
        if _LIBC.timerfd_settime(self._descriptor, 0, setting, None):
            raise OSError(ctypes.get_errno(), "timerfd_settime")

    def _tick(self) -> None:
        (expired,) = struct.unpack("Q", os.read(self._descriptor, 8))
        for _ in range(min(expired, self._left)):
            self._due(self._next)
            self._next += self._interval
        self._left -= min(expired, self._left)
        if not self._left and not self.ended.done():
            asyncio.get_running_loop().remove_reader(self._descriptor)
            os.close(self._descriptor)
            self.ended.set_result(None)

"""An event loop whose clock jumps to what happens next: hours of load in a moment, the same on every machine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

R = TypeVar("R")


class VirtualLoop(asyncio.SelectorEventLoop):
    """Without threads and sockets: nothing but timers moves its clock."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        select = self._selector.select

        def jump(timeout: float | None = None) -> Any:
            ready = select(0)
            if not ready and timeout:
                self.now += timeout
            return ready

        self._selector.select = jump

    def time(self) -> float:
        """Seconds since it began."""
        return self.now

    perf_counter = monotonic = time  # for modules that read the clock of ``time``


class VirtualEngine:
    """Computes all prompts that wait together. seconds: of a batch, and of the prompts of a batch, drawn by ``draw``."""

    def __init__(self, loop: VirtualLoop, batch: float, draw: Callable[[], float]) -> None:
        self._loop, self._batch, self._draw = loop, batch, draw
        self._waiting, self._busy = list[Future[Any]](), False

    def submit(self, prompt: Any, finish: Callable[[Any], R]) -> Future[R]:
        """See ``scorer.Computer``."""
        future: Future[R] = Future()
        self._waiting.append(future)
        if not self._busy:
            self._busy = True
            self._loop.call_later(0.0003, self._begin)
        return future

    def close(self) -> None:
        """Nothing."""

    def _begin(self) -> None:
        batch = [future for future in self._waiting if future.set_running_or_notify_cancel()]
        self._waiting, self._busy = [], bool(batch)
        if batch:
            self._loop.call_later(self._batch + sum(self._draw() for _ in batch), self._end, batch)

    def _end(self, batch: list[Future[Any]]) -> None:
        for future in batch:
            future.set_result("coefficients")
        self._begin()


def run(body: Callable[[VirtualLoop], Coroutine[Any, Any, R]]) -> R:
    """Runs a coroutine to its end in a loop of its own."""
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(body(loop))
    finally:
        loop.close()

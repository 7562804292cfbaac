"""Many callers, one engine: calls that arrive at the same time run as one packed batch.

A call that finds the engine idle runs at once, in its own thread. Calls that arrive while the engine is busy wait and then run
together. Callers who have just been served often call again at once. So, when calls are waiting as a batch ends, the next batch
waits until as many calls have arrived as the last one had, at most ``wait`` seconds.

Importing this module registers two hooks. A forked child has none of its parent's threads, so every batcher starts anew there.
When Python ends, calls that wait are cancelled and the batch under way is waited for: a thread that is in torch then would
abort the process.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from time import monotonic
from typing import Generic, TypeVar

from p2l_engine.arguments import finite_number
from p2l_engine.coefficients import Coefficients
from p2l_engine.engine import Engine
from p2l_engine.prompts.parse import Prompt

R = TypeVar("R")

_all: weakref.WeakSet[Batcher] = weakref.WeakSet()

WAIT = 0.0008  # seconds
CALLS_PER_BATCH = 512
LONGEST_END = 30.0  # seconds that the end of Python waits for a batch


@dataclass(frozen=True, slots=True)
class _Call(Generic[R]):
    prompt: Prompt
    finish: Callable[[Coefficients], R]  # makes the caller's result of its coefficients
    future: Future[R] = field(default_factory=Future)


class Batcher:
    """Runs the prompts of concurrent callers through one engine; each caller gets its own result or its own error.

    wait: seconds, >= 0, that a call may wait for others while the engine is free. Raises ValueError for anything else.
    """

    def __init__(self, engine: Engine, wait: float = WAIT) -> None:
        self.engine, self.wait = engine, finite_number("wait", wait, "seconds >= 0", lambda seconds: seconds >= 0)
        self._closed = False
        self._start()
        _all.add(self)

    def _start(self) -> None:
        """The initial state; set again in a forked child, whose copies of calls and locks belong to threads it lacks."""
        self._waiting: deque[_Call[object]] = deque()
        self._changed = threading.Condition()
        self._engine_free = threading.Lock()
        self._worker: threading.Thread | None = None
        self._direct = 0  # calls that run in their own threads
        self._callers, self._ended = 0, 0.0  # when the last batch ended, and how many it served or kept waiting

    def run(self, prompt: Prompt, finish: Callable[[Coefficients], R]) -> R:
        """``finish`` of the prompt's coefficients. Raises what the engine or ``finish`` raises; RuntimeError once closed."""
        if threading.current_thread() is self._worker:  # a call from within a call: this thread has the engine already
            return finish(self.engine.coefficients([prompt]))
        with self._changed:
            direct = not self._waiting and not self._closed and self._engine_free.acquire(blocking=False)
            self._direct += direct
        if not direct:
            return self.submit(prompt, finish).result()
        try:
            try:
                coefficients = self.engine.coefficients([prompt])
            finally:
                self._end(1)
                self._engine_free.release()
            return finish(coefficients)
        finally:
            with self._changed:
                self._direct -= 1
                self._changed.notify_all()

    def submit(self, prompt: Prompt, finish: Callable[[Coefficients], R]) -> Future[R]:
        """``run`` as a future; ``finish`` runs in the batcher's thread. Raises RuntimeError once closed."""
        call = _Call(prompt, finish)
        with self._changed:
            if self._closed:
                raise RuntimeError("the router is closed: make a new one")
            self._waiting.append(call)  # type: ignore[arg-type]
            if self._worker is None:
                self._worker = threading.Thread(target=self._serve, name="p2l-batcher", daemon=True)
                self._worker.start()
            self._changed.notify_all()
        return call.future

    def close(self) -> None:
        """Refuses new calls, finishes the waiting ones, and returns when these are done."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            while self._direct:
                self._changed.wait()
        if self._worker is not None and self._worker is not threading.current_thread():
            self._worker.join()

    def _end_early(self) -> None:
        """As ``close``, but calls that wait are cancelled, and those that run in threads of their callers are theirs."""
        with self._changed:
            self._closed = True
            for call in self._waiting:
                call.future.cancel()
            self._waiting.clear()
            self._changed.notify_all()
        if self._worker is not None:
            self._worker.join(LONGEST_END)

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if not self._waiting:
                    return
            with self._engine_free:
                self._end(self._run(self._gathered()))

    def _gathered(self) -> list[_Call[object]]:
        with self._changed:
            enough, until = min(self._callers, CALLS_PER_BATCH), self._ended + self.wait
            while len(self._waiting) < enough and not self._closed and (left := until - monotonic()) > 0:
                self._changed.wait(left)
            calls = [self._waiting.popleft() for _ in range(min(len(self._waiting), CALLS_PER_BATCH))]
        return [call for call in calls if call.future.set_running_or_notify_cancel()]

    def _end(self, served: int) -> None:
        self._callers, self._ended = served + len(self._waiting), monotonic()

    def _run(self, calls: list[_Call[object]]) -> int:
        """Settles every call and returns their number. It keeps no references: calls keep the router alive."""
        try:
            together = self.engine.coefficients([call.prompt for call in calls])
        except BaseException as error:
            if len(calls) == 1:
                calls[0].future.set_exception(error)
                return 1
            for call in calls:  # one by one, so that only the call at fault fails
                self._run([call])
            return len(calls)
        for i, call in enumerate(calls):
            try:
                call.future.set_result(call.finish(together.row(i)))
            except BaseException as error:
                call.future.set_exception(error)
        return len(calls)


@atexit.register
def _end_early() -> None:
    for batcher in list(_all):
        batcher._end_early()


def _start_anew() -> None:
    for batcher in list(_all):
        batcher._start()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)

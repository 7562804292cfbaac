"""Many callers, one engine: calls that arrive together are gathered into one packed batch.

A call that finds the engine idle runs at once, in its own thread. Calls that arrive while it is busy wait for it and then go
together. Callers who have just been served often come back at once: when calls are waiting as a batch ends, the next one
lingers until as many are there as there were, at most ``wait`` seconds.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from time import monotonic
from typing import Generic, TypeVar

from p2l_engine.coefficients import Coefficients
from p2l_engine.engine import Engine
from p2l_engine.prompts.parse import Prompt, user_turns

R = TypeVar("R")

_all: weakref.WeakSet[Batcher] = weakref.WeakSet()

WAIT = 0.0008  # seconds
CALLS_PER_BATCH = 512


@dataclass(frozen=True, slots=True)
class _Call(Generic[R]):
    prompt: Prompt
    finish: Callable[[Coefficients], R]  # what the caller wants of its coefficients
    future: Future[R] = field(default_factory=Future)


class Batcher:
    """Runs the prompts of concurrent callers through one engine.

    wait: seconds, >= 0: how long a call may wait for others while the engine is free. Each caller gets its own result or its
    own error.
    """

    def __init__(self, engine: Engine, wait: float = WAIT) -> None:
        if isinstance(wait, bool) or not isinstance(wait, int | float) or not 0 <= wait < float("inf"):
            raise ValueError(f"wait: expected seconds >= 0, got {wait!r}")
        self.engine, self.wait = engine, float(wait)
        self._closed = False
        self._start()
        _all.add(self)

    def _start(self) -> None:
        """As new: also in a child process, which inherits the calls and locks of threads that it does not have."""
        self._waiting: deque[_Call[object]] = deque()
        self._changed = threading.Condition()
        self._engine_free = threading.Lock()
        self._worker: threading.Thread | None = None
        self._direct = 0  # calls that run in their own threads
        self._callers, self._ended = 0, 0.0  # when the last batch ended, and how many it served or kept waiting

    def run(self, prompt: Prompt, finish: Callable[[Coefficients], R]) -> R:
        """``finish`` of the prompt's coefficients; raises what either of them raises."""
        if threading.current_thread() is self._worker:  # a call from within a call: the engine is this thread's
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
        """The same, to be waited for elsewhere; ``finish`` runs in the batcher's thread. RuntimeError once closed."""
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
        """Takes no more calls, finishes those that wait, and returns when they are done."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            while self._direct:
                self._changed.wait()
        if self._worker is not None and self._worker is not threading.current_thread():
            self._worker.join()

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
        """Settles every call; returns how many there were. Nothing here may outlive it: a call holds on to its router."""
        readable = []
        for call in calls:
            try:
                user_turns(call.prompt)
                readable.append(call)
            except BaseException as error:
                call.future.set_exception(error)
        try:
            together = self.engine.coefficients([call.prompt for call in readable])
        except BaseException as error:
            if len(readable) == 1:
                readable[0].future.set_exception(error)
                return len(calls)
            for call in readable:  # one at a time, so that the fault stays with its owner
                self._run([call])
            return len(calls)
        for i, call in enumerate(readable):
            try:
                call.future.set_result(call.finish(together.row(i)))
            except BaseException as error:
                call.future.set_exception(error)
        return len(calls)


def _start_anew() -> None:
    for batcher in list(_all):
        batcher._start()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)

"""Progress on stderr: a bar on a terminal; elsewhere a line every few seconds."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from p2l_engine.cli.terminal import err, note

SECONDS = 5.0  # between lines where stderr is no terminal

Show = Callable[[float, str], None]


@contextmanager
def progress(total: int, unit: str = "prompts") -> Iterator[Callable[[int], None]]:
    """Yields a function to be called with the number of units that have just been finished; any thread may call it."""
    done, lock = 0, threading.Lock()
    with meter() as show:

        def advance(finished: int) -> None:
            nonlocal done
            with lock:
                done += finished
                show(done / max(total, 1), f"{done:,} of {total:,} {unit}")

        show(0.0, f"0 of {total:,} {unit}")
        yield advance


@contextmanager
def meter() -> Iterator[Show]:
    """Yields a function to be called with the share of the work that is done, 0 to 1, and a few words on it."""
    if sys.stderr.isatty() and err().is_interactive:
        with _bar() as show:
            yield show
        return
    lines = Lines()
    yield lines.show
    lines.end()


@contextmanager
def _bar() -> Iterator[Show]:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    text = TextColumn("{task.description}", markup=False)
    columns = (BarColumn(), TaskProgressColumn(), text, TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err(), transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda share, words: bar.update(task, completed=share, description=words)


class Lines:
    """A line whenever ``SECONDS`` have passed since the last one, and one at the end if there were any; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._start = self._shown = self._begun = time.monotonic()  # begun: the stage whose share this is
        self._share, self._pending = 0.0, None  # type: float, str | None

    def show(self, share: float, words: str) -> None:
        """Keeps the newest state; prints it where it is time."""
        with self._lock:
            now = time.monotonic()
            self._begun, self._share = now if share < self._share else self._begun, share
            left = (now - self._begun) * (1 - share) / share if 0 < share < 1 else 0.0
            remaining = f", about {left:,.0f} s left" if left else ""
            self._pending = f"{share:.0%}: {words}, {now - self._start:,.0f} s{remaining}"
            if now - self._shown >= SECONDS:
                self._print(now)

    def end(self) -> None:
        """Prints the last state, unless it was printed or nothing was."""
        with self._lock:
            if self._pending is not None and self._shown > self._start:
                self._print(time.monotonic())

    def _print(self, now: float) -> None:
        note(self._pending or "")
        self._shown, self._pending = now, None

"""Output to the terminal: tables on stdout; notes, logs and errors on stderr."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


@functools.cache
def out() -> Console:
    """Standard output, for tables."""
    from rich.console import Console

    return Console()


@functools.cache
def err() -> Console:
    """Standard error. One console for everything, so that lines appear above a progress bar and not within it."""
    from rich.console import Console

    return Console(stderr=True)


def encodable(text: str) -> str:
    """The text as standard output can show it: characters that its encoding lacks are escaped before widths are measured."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def ellipsis() -> str:
    """What stands for text that is left out."""
    return "…" if encodable("…") == "…" else "..."


def note(text: str, warning: bool = False) -> None:
    """One line on stderr, printed literally."""
    err().print(text, style="yellow" if warning else None, markup=False, highlight=False, emoji=False, soft_wrap=True)


def error_line(text: str) -> None:
    """The line that a command ends with when it fails. Works without rich, which may be what is missing."""
    print("error:", " ".join(line.strip() for line in text.splitlines() if line.strip()), file=sys.stderr)


@contextmanager
def status(text: str) -> Iterator[None]:
    """A spinner and ``text`` while something short runs; nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield
        return
    with err().status(text, spinner="line"):
        yield


@contextmanager
def interruptible(advice: str = "") -> Iterator[None]:
    """Ctrl-C ends the command in one line, with the status that shells give to SIGINT: 130."""
    try:
        yield
    except KeyboardInterrupt:
        import typer

        note(f"interrupted{advice}")
        raise typer.Exit(130) from None


class LogLines(logging.Handler):
    """Log records as lines on stderr, warnings and errors with their level."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text, loud = self.format(record), record.levelno >= logging.WARNING
            note(f"{record.levelname.lower()}: {text}" if loud else text, warning=loud)
        except Exception:  # as in every logging.Handler: a log line must not end the command; this prints the traceback
            self.handleError(record)

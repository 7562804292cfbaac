"""The command line, run within the test's process."""

from __future__ import annotations

import io
import os
from typing import NamedTuple
from unittest import mock

from p2l_engine.cli import run, terminal


class Ended(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """Standard error without line breaks and frames."""
        return " ".join(self.err.replace("│", " ").split())


def p2l_engine(*arguments: str | bytes, text: str | bytes = "", encoding: str = "utf-8") -> Ended:
    """Runs ``p2l-engine`` with these arguments and standard input, on a terminal of 160 columns that is none."""
    given = text.encode() if isinstance(text, str) else text
    streams = {"stdin": io.TextIOWrapper(io.BytesIO(given), encoding="utf-8")}
    streams |= {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    consoles = (terminal.out, terminal.err)  # they read the width when they are made
    with mock.patch.multiple("sys", **streams), mock.patch.dict(os.environ, COLUMNS="160"):
        for console in consoles:
            console.cache_clear()
        try:
            status = run([os.fsdecode(argument) for argument in arguments])
        finally:
            for console in consoles:
                console.cache_clear()
    out, err = (_text(streams[name]) for name in ("stdout", "stderr"))
    return Ended(status, out, err)


def _text(stream: io.TextIOWrapper) -> str:
    stream.flush()
    stream.seek(0)
    return stream.read()

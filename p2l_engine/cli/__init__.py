"""The command line, ``p2l-engine``: needs the extra ``cli`` (typer, rich, matplotlib).

Starting it is cheap: this package loads typer and nothing else; each command imports what it needs when it runs.
"""

from __future__ import annotations

import atexit
import io
import logging
import os
import sys
from collections.abc import Sequence

from p2l_engine.cli.terminal import LogLines, error_line


def main() -> None:
    """The console script: it ends the process, with the command's status, even if its caller catches SystemExit. Programs that
    go on call ``run``."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by 2>&-: what is written there goes nowhere, and not into the next file
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (until the process ends)
    ended: list[int] = []
    atexit.register(_leave, ended)  # before any library registers a handler, and so called after all of them
    ended.append(run())
    sys.exit(ended[0])


def _leave(ended: Sequence[int]) -> None:
    """Ends the process here, with the status of a command that has ended: when Python takes itself apart, a thread that is
    still in torch or Arrow would abort it (status 134). Output that cannot be written is left to Python, which says so."""
    if not ended:  # an error that keeps its traceback
        return
    logging.shutdown()
    try:
        for stream in (sys.stdout, sys.stderr):
            if not stream.closed:
                stream.flush()
    except OSError:
        return
    os._exit(ended[0])


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, 2 after an error in one line, 130 after Ctrl-C, or the command's own.

    arguments: None for those of the process. Errors outside the project's own and Python's usual ones keep their traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A character that the terminal's encoding lacks must not fail a command whose work is done.
            stream.reconfigure(errors="backslashreplace")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # also read by transformers; the commands show their own
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[LogLines()])
    logging.getLogger("p2l_engine.tables.layouts").setLevel(logging.INFO)  # where it found the prompts
    logging.getLogger("p2l_engine.engine.auto_dtype").setLevel(logging.INFO)  # which dtype it took
    try:
        from p2l_engine.cli.app import command_line

        command_line()(arguments)
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            return ended.code or 0
        error_line(str(ended.code))
    except ModuleNotFoundError as error:
        from p2l_engine.cli.extras import hint

        error_line(f"{error}{hint(error.name)}")
    except (ValueError, TypeError, OSError, ArithmeticError, RuntimeError, ImportError) as error:
        error_line(str(error))
    return 2

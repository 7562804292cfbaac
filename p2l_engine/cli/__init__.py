"""The command line: p2l-engine route, batch, leaderboard, strengths, frontier, eval, export, info. Needs the extra ``cli``
(typer, rich, matplotlib)."""

from __future__ import annotations

import logging
import sys

import transformers
import typer
from rich.logging import RichHandler

from p2l_engine.cli.batch import batch
from p2l_engine.cli.evaluate import evaluate
from p2l_engine.cli.export import export
from p2l_engine.cli.frontier import frontier
from p2l_engine.cli.info import info
from p2l_engine.cli.inputs import err
from p2l_engine.cli.leaderboard import leaderboard
from p2l_engine.cli.route import route
from p2l_engine.cli.strengths import strengths

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Prompt-to-Leaderboard: route prompts to chat models.")
for command in (route, batch, leaderboard, strengths, frontier, export, info):
    app.command()(command)
app.command("eval")(evaluate)


def main() -> None:
    """The console script: typer's own errors as they are, the project's errors in one line and exit status 2."""
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=err, show_path=False, show_time=False)],
    )
    transformers.utils.logging.disable_progress_bar()
    try:
        app()
    except ModuleNotFoundError as error:
        extra = "ray" if error.name == "ray" else "batch" if "batch" in sys.argv[1:2] else "train"
        message = f"error: {error}: this command needs the extra {extra!r}: pip install 'p2l-engine[{extra}]'"
        err.print(message, style="red", markup=False)
        sys.exit(2)
    except (ValueError, TypeError, OSError, ArithmeticError, RuntimeError) as error:
        message = f"error: {error}".encode(errors="backslashreplace").decode()
        err.print(message, style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)

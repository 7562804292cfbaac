"""The app: its commands, ``--version``, and how help is written."""

from __future__ import annotations

from collections import defaultdict
from functools import cache
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from p2l_engine import __version__
from p2l_engine.cli import log
from p2l_engine.cli.adapt import adapt
from p2l_engine.cli.batch import batch
from p2l_engine.cli.calibrate import calibrate
from p2l_engine.cli.evaluate import evaluate
from p2l_engine.cli.export import export
from p2l_engine.cli.frontier import frontier
from p2l_engine.cli.info import info
from p2l_engine.cli.leaderboard import leaderboard
from p2l_engine.cli.lengths import lengths
from p2l_engine.cli.replay import replay
from p2l_engine.cli.route import route
from p2l_engine.cli.serve import serve
from p2l_engine.cli.shrink import shrink
from p2l_engine.cli.strengths import strengths
from p2l_engine.cli.terminal import interruptible
from p2l_engine.cli.train import train


class Commands(TyperGroup):
    """All commands: Ctrl-C ends each in one line."""

    def invoke(self, ctx: Any) -> Any:
        with interruptible():
            return super().invoke(ctx)


class Command(TyperCommand):
    """One command, whose help shows options under the heading of their ``rich_help_panel``."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        rows: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for param in self.get_params(ctx):
            row = param.get_help_record(ctx)
            kind = "Arguments" if param.param_type_name == "argument" else "Options"
            if row is not None:
                rows[getattr(param, "rich_help_panel", None) or kind].append(row)
        for heading in sorted(rows, key=lambda name: name not in ("Arguments", "Options")):
            with formatter.section(heading):
                formatter.write_dl(rows[heading])


# Markup is off: it would read "OLD:NEW:" as an emoji and "[name]" as a style, and it costs a third of the start.
app = typer.Typer(cls=Commands, no_args_is_help=True, rich_markup_mode=None)
for name, command in (
    ("route", route),
    ("batch", batch),
    ("serve", serve),
    ("leaderboard", leaderboard),
    ("strengths", strengths),
    ("frontier", frontier),
    ("eval", evaluate),
    ("replay", replay),
    ("train", train),
    ("adapt", adapt),
    ("calibrate", calibrate),
    ("shrink", shrink),
    ("lengths", lengths),
    ("export", export),
    ("info", info),
):
    app.command(name, cls=Command)(command)
of_log = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Show, export or delete what a server has logged.")
of_log.command("show", cls=Command)(log.show)
of_log.command("export", cls=Command)(log.export)
of_log.command("delete", cls=Command)(log.delete)
app.add_typer(of_log, name="log")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"p2l-engine {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Prompt-to-Leaderboard: predicts which chat models answer a prompt best, and chooses one within a budget.

    Exit status: 0 if all went well, 2 after an error (written to standard error), 130 after Ctrl-C; of batch, also 3 if some
    rows have an error, and 4 if no row was routed; of shrink, also 1 if nothing was written.
    """


@cache
def command_line() -> Any:
    """The commands, made of their functions once in a process."""
    return get_command(app)

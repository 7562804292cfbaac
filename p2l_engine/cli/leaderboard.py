"""p2l-engine leaderboard."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path, PurePath
from typing import Annotated

import typer

from p2l_engine.cli.inputs import (
    PLOTS,
    PROMPT_FILE,
    Checkpoint,
    Column,
    CsvEscape,
    Date,
    Device,
    Dtype,
    check_writable,
    load_engine,
    short,
)
from p2l_engine.cli.progress import progress
from p2l_engine.cli.terminal import note, out
from p2l_engine.cli.top import All, Top, cut, limit
from p2l_engine.plotting import TOP

OVER_TIME = "Over time"  # heading of options


class Periods(StrEnum):
    """How long a period is, in UTC; weeks are ISO 8601's."""

    DAY = "day"
    WEEK = "week"
    MONTH = "month"


def leaderboard(
    prompt: Annotated[str | None, typer.Argument(help="One prompt; or use --file, or standard input as one text.")] = None,
    file: Annotated[str | None, typer.Option(help="Read the prompt from this file or URI: its whole text.")] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help=f"One leaderboard over all prompts of this file: {PROMPT_FILE}. Objects and tables may have a weight for each "
            "prompt."
        ),
    ] = None,
    column: Column = None,
    csv_escape: CsvEscape = None,
    bootstrap: Annotated[
        int | None,
        typer.Option(
            min=0, help="With --prompts: number of bootstrap samples for the intervals. Default: 200.", show_default=False
        ),
    ] = None,
    top: Top = TOP,
    all_models: All = False,
    plot: Annotated[Path | None, typer.Option(help="Draw a bar chart into this file (.png, .svg, .pdf).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines instead of a table.")] = False,
    period: Annotated[
        Periods | None,
        typer.Option(
            help="With --prompts: a leaderboard for each day, week or month, by the column time or timestamp, and what "
            "changed from one to the next. --prompts may be a folder that 'log export' wrote.",
            show_default=False,
            rich_help_panel=OVER_TIME,
        ),
    ] = None,
    by: Annotated[
        str | None,
        typer.Option(
            help="With --period: for each value of this column, such as key or session.",
            show_default=False,
            rich_help_panel=OVER_TIME,
        ),
    ] = None,
    votes: Annotated[
        str | None,
        typer.Option(
            help="With --period: votes with a timestamp, on which to test in each period whether the checkpoint is still "
            "calibrated. Default: those of the log export.",
            show_default=False,
            rich_help_panel=OVER_TIME,
        ),
    ] = None,
    checkpoint: Checkpoint = None,
    device: Device = None,
    dtype: Dtype = None,
    date: Date = None,
) -> None:
    """Show the leaderboard of one prompt, or of a set of prompts."""
    from p2l_engine.cli.prompts import PromptFile, check_no_column, read_stdin, read_text
    from p2l_engine.cli.table import print_table
    from p2l_engine.jsonable import to_json
    from p2l_engine.leaderboard import Leaderboard
    from p2l_engine.prompts.parse import user_turns

    check_writable(plot, "--plot", PLOTS)
    if period is not None:
        if prompts is None or prompt is not None or file is not None:
            raise typer.BadParameter("needs --prompts, and no other prompts", param_hint="--period")
        from p2l_engine.cli.traffic import over_time

        engine = load_engine(checkpoint, device, dtype, date)
        samples, most = 200 if bootstrap is None else bootstrap, limit(top, all_models)
        over_time(engine, prompts, column, csv_escape, by, period.value, votes, samples, most, plot, as_json)
        return
    if by is not None or votes is not None:
        raise typer.BadParameter("needs --period", param_hint="--by, --votes")
    if plot is not None:  # now: a missing package must not fail a command whose work is done
        from p2l_engine.cli.plots import leaderboard as draw
    if prompts is not None:
        if prompt is not None or file is not None:
            raise typer.BadParameter("give one prompt or a file of prompts, not both", param_hint="--prompts")
        given = PromptFile.read(prompts, column, csv_escape)
        batch, weights = given.prompts, given.weights()
        engine = load_engine(checkpoint, device, dtype, date)
        with progress(len(batch)) as advance:
            c = engine.coefficients(batch, advance)
        board = Leaderboard.over(c, weights, bootstrap=200 if bootstrap is None else bootstrap)
        title = f"{len(batch):,} prompts of {PurePath(given.name).name}{'' if weights is None else ', weighted'}"
    else:
        if prompt is not None and file is not None:
            raise typer.BadParameter("give a prompt or a file, not both", param_hint="--file")
        if bootstrap is not None:
            raise typer.BadParameter("needs --prompts", param_hint="--bootstrap")
        check_no_column(column)
        text = prompt if prompt is not None else read_text(file) if file is not None else read_stdin()
        user_turns(text)
        board = Leaderboard.of(load_engine(checkpoint, device, dtype, date).coefficients([text]))
        title = text
    shown = board.standings[: limit(top, all_models)]
    left_out = cut(len(shown), len(board))
    if plot is not None:
        draw(shown, short(title, 100) + left_out, plot)
        note(f"wrote {plot}")
    bounded = any(standing.interval for standing in board)
    if as_json:
        for standing in board:
            fields = to_json(standing)
            if not bounded:
                del fields["low"], fields["high"]
            print(json.dumps(fields))
        return
    rows = []
    for standing in shown:
        rate = "" if standing.win_rate is None else f"{standing.win_rate:.1%}"
        interval = [standing.interval] if bounded else []
        rows.append((str(standing.rank), standing.model, f"{standing.coefficient:.3f}", rate, *interval))
    columns = ("rank", "model", "coefficient", "win rate", *(["95% interval"] if bounded else []))
    print_table(short(title, 90) + left_out, columns, rows, out())

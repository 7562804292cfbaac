"""p2l-engine leaderboard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from p2l_engine.cli.inputs import Checkpoint, Device, DtypeOption, err, load_engine, out, read_stdin, read_text, short
from p2l_engine.leaderboard import Leaderboard
from p2l_engine.prompts import user_turns


def leaderboard(
    prompt: Annotated[str | None, typer.Argument(help="One prompt; or use --file, or standard input as one text.")] = None,
    file: Annotated[Path | None, typer.Option(help="The prompt from a file, whole.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also write a bar chart to this file (.png, .svg, .pdf).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines instead of a table.")] = False,
    checkpoint: Checkpoint = None,
    device: Device = None,
    dtype: DtypeOption = None,
) -> None:
    """Show the leaderboard of one prompt."""
    text = prompt if prompt is not None else read_text(file) if file else read_stdin()
    user_turns(text)
    board = Leaderboard.of(load_engine(checkpoint, device, dtype).coefficients([text]))
    if plot is not None:
        from p2l_engine import plot as plots

        plots.leaderboard(board, short(text, 110), plot)
        err.print(f"wrote {plot}", highlight=False, markup=False)
    if as_json:
        for place in board:
            print(
                json.dumps(
                    {
                        "rank": place.rank,
                        "model": place.model,
                        "coefficient": place.coefficient,
                        "win_rate": place.win_rate,
                    }
                )
            )
        return
    table = Table(title=Text(short(text, 90)), title_justify="left")
    for name, justify in (("rank", "right"), ("model", "left"), ("coefficient", "right"), ("win rate", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for place in board:
        table.add_row(str(place.rank), Text(place.model), f"{place.coefficient:.3f}", f"{place.win_rate:.1%}")
    out.print(table)

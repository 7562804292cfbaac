"""``p2l-engine eval --adapt``: learning curves of models, or of sources of votes, each left out in turn."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from p2l_engine.backbone.head import Head
from p2l_engine.cli.inputs import write_json
from p2l_engine.cli.progress import progress
from p2l_engine.cli.table import print_table
from p2l_engine.cli.terminal import note, out
from p2l_engine.engine import Engine
from p2l_engine.jsonable import to_json
from p2l_engine.learning.curves import leave_one_out
from p2l_engine.learning.hidden import Float32, cache_folder, hidden_states
from p2l_engine.learning.source_curves import leave_one_source_out
from p2l_engine.votes import Votes
from p2l_engine.votes.by_source import read_by_source

WIDTH = 1.96  # of a 95% interval, in standard errors


def models(engine: Engine, votes: Votes) -> None:
    """Prints learning curves of the checkpoint's models."""
    rows = [
        (f"{p.votes:,}", str(p.models), f"{p.loss:.4f}", f"{p.own_row:.4f}", _interval(p.excess, p.error))
        for p in leave_one_out(_head(engine), engine.models, engine.feedback, votes, _states(engine, votes))
    ]
    columns = ("votes", "models", "log-loss", "own row's", "difference (95%)")
    print_table("A model's row, left out and learned again: log-loss of its held-out votes", columns, rows, out())


def sources(
    engine: Engine,
    path: str,
    by: str,
    columns: Mapping[str, str] | None,
    max_dropped: float,
    csv_escape: str | None,
    seed: int,
    plot: Path | None,
    as_json: Path | None,
) -> None:
    """Prints learning curves of the sources that a column of the votes names, and draws and writes them."""
    if plot is not None:  # now: a missing package must not fail a command whose work is done
        from p2l_engine.cli.plots import source_curves as draw
    votes, source, dropped = read_by_source(path, by, engine.feedback, columns, max_dropped, csv_escape=csv_escape)
    for line in dropped.lines():
        note(f"dropped {line}", warning=True)
    states = _states(engine, votes)
    found = leave_one_source_out(
        _head(engine), engine.models, engine.feedback, votes, source, states, engine.uncertainty, seed=seed
    )
    points = tuple(found)
    for name in dict.fromkeys(point.source for point in points):
        of = [point for point in points if point.source == name]
        rows = [
            (
                f"{p.votes:,}",
                f"{p.loss:.4f} ({WIDTH * p.loss_error:.4f})",
                f"{p.gain:+.4f} ({WIDTH * p.gain_error:.4f})",
                f"{p.help:+.4f} ({WIDTH * p.help_error:.4f})",
            )
            for p in of
        ]
        title = (
            f"{by} {name}, learned after the others: {of[0].new} new models, log-loss of held-out votes on {of[0].prompts:,} "
            "prompts (half of a 95% interval)"
        )
        print_table(title, ("votes", "log-loss", "gain by the votes", "gain by other sources"), rows, out())
    if plot is not None:
        draw(points, plot)
        note(f"wrote {plot}")
    if as_json is not None:
        write_json({"by": by, "points": to_json(points)}, as_json)


def _head(engine: Engine) -> Head:
    return Head(engine.head.weight.cpu(), engine.head.bias.cpu(), engine.head.n_models)


def _states(engine: Engine, votes: Votes) -> Float32:
    with progress(len(votes.prompts)) as advance:
        return hidden_states(engine, [list(turns) for turns in votes.prompts], cache_folder(), advance)


def _interval(value: float, error: float) -> str:
    return f"{value:+.4f} ({value - WIDTH * error:+.4f} to {value + WIDTH * error:+.4f})"

"""p2l-engine calibrate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from p2l_engine.cli.inputs import (
    PLOTS,
    CsvEscape,
    Date,
    Device,
    Dtype,
    Sources,
    VoteColumn,
    check_writable,
    load_engine,
    vote_columns,
    write_json,
)
from p2l_engine.cli.progress import progress
from p2l_engine.cli.terminal import note, out, status
from p2l_engine.tables.limits import MAX_DROPPED

if TYPE_CHECKING:
    from p2l_engine.learning.calibration import CalibrationReport
    from p2l_engine.learning.candidates import Kind

MAPS = ("none", "temperature", "offsets", "both", "isotonic")
FIGURES = {"log_loss": "log-loss", "brier": "Brier score", "ece": "calibration error"}
OF_VALUES = {"log_loss": "log-loss", "squared_error": "squared error", "bias": "bias of the mean"}


def calibrate(
    checkpoint: Annotated[str, typer.Argument(help="Folder, name on the hub, or built-in name, such as builtin/llmrouter-9.")],
    votes: Annotated[
        str,
        typer.Option(
            help="Own votes (or scores of every model): a table (.parquet, .csv, .jsonl), a folder, glob or URI of such files, "
            "or a data set on the hub. Not those that the checkpoint was trained on."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the new checkpoint; missing or empty.")],
    maps: Annotated[
        list[str] | None,
        typer.Option(
            "--map",
            help=f"Choose among these maps; may be repeated: {', '.join(MAPS)}. isotonic cannot be exported. Default: all.",
            show_default=False,
        ),
    ] = None,
    sources: Sources = None,
    column: VoteColumn = None,
    csv_escape: CsvEscape = None,
    max_dropped: Annotated[float, typer.Option(min=0, max=1, help="The share of rows that may be invalid.")] = MAX_DROPPED,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the reliability before and after into this file (.png, .svg, .pdf).")
    ] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
    bootstrap: Annotated[int, typer.Option(min=2, help="Number of bootstrap samples for the intervals.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the folds and of the bootstrap.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
    date: Date = None,
) -> None:
    """Fit scale, offsets or a monotone map of a checkpoint's coefficients on own votes, and write the calibrated checkpoint.

    Cross-validation over prompts chooses the simplest map that is as good as the best one within one standard error. The
    figures before and after are of votes that neither the map nor its choice has seen.
    """
    from p2l_engine import checkpoint as checkpoints
    from p2l_engine.checkpoint.rewrite import check_target
    from p2l_engine.jsonable import to_json
    from p2l_engine.learning import calibrated
    from p2l_engine.learning.calibration import among_known
    from p2l_engine.learning.calibration import calibrate as fit
    from p2l_engine.learning.candidates import candidates
    from p2l_engine.votes.by_source import read_within

    wrong = sorted({*(maps or ())} - {*MAPS})
    if wrong:
        raise typer.BadParameter(f"expected some of {', '.join(MAPS)}, got {', '.join(wrong)}", param_hint="--map")
    check_writable(plot, "--plot", PLOTS)
    check_writable(as_json, "--json")
    if plot is not None:  # now: a missing package must not fail a command whose work is done
        from p2l_engine.cli.plots import reliability as draw
    kinds = cast("tuple[Kind, ...]", tuple(maps) if maps else MAPS)
    engine = load_engine(checkpoint, device, dtype, date)
    check_target(engine.folder, output)
    columns = vote_columns(column)
    given, dropped = read_within(votes, sources, engine.feedback, columns, max_dropped, complete=True, csv_escape=csv_escape)
    for line in dropped.lines():
        note(f"dropped {line}", warning=True)
    known, others = among_known(given, engine.models)
    if others:
        unknown = sorted(set(given.models) - set(engine.models))
        note(f"skipped {others:,} votes on models that the checkpoint does not know: {', '.join(unknown[:8])}", warning=True)
    with progress(len(known.prompts)) as advance:
        coefficients = engine.coefficients(known.prompts, advance)
    with progress(len(candidates(kinds)), "maps") as advance:
        found, report = fit(coefficients, known, kinds, bootstrap, seed, advance)
    with status("writing"):
        calibrated.write(checkpoints.load(checkpoint, date), output, found, report)
    _show(report)
    note(f"wrote {output}")
    if plot is not None:
        draw(report.curve_before, report.curve_after, engine.feedback.of_values, plot)
        note(f"wrote {plot}")
    if as_json:
        write_json(to_json(report) | {"skipped": others}, as_json)


def _show(report: CalibrationReport) -> None:
    from p2l_engine.cli.table import print_table

    counts = f"{report.votes:,} votes on {report.prompts:,} prompts of {report.conversations:,} conversations"
    rows: Sequence[Sequence[str]] = [
        (
            one.candidate,
            f"{one.loss:.5f}",
            f"{one.above_best:.5f}",
            f"{one.error:.5f}",
            "yes" * (one.candidate == report.chosen),
        )
        for one in report.candidates
    ]
    columns = ("map", "log-loss", "above the best", "std. error", "chosen")
    print_table(f"{counts}, {report.folds} folds: mean log-loss of votes not seen", columns, rows, out())
    if report.parameters:
        rows = [(name, f"{one.value:.3f}", f"{one.error:.3f}") for name, one in report.parameters.items()]
        print_table(f"{report.chosen}: parameters, fitted to all votes", ("parameter", "value", "std. error"), rows, out())
    rows = [
        (shown, *(f"{of[name].value:.4f} ({of[name].low:.4f} to {of[name].high:.4f})" for of in (report.before, report.after)))
        for name, shown in (OF_VALUES if "bias" in report.before else FIGURES).items()
        if name in report.before and name in report.after
    ]
    print_table(
        "on votes that neither the map nor its choice has seen, with 95% intervals", ("", "before", "after"), rows, out()
    )
    if report.gain is not None:
        gain = report.gain
        note(f"log-loss falls by {gain.value:.4f} ({gain.low:.4f} to {gain.high:.4f}) on votes not seen")
        if report.chosen != "none" and gain.value <= 0:
            note("no gain on votes not seen: more votes, or the checkpoint as it was, may serve better", warning=True)
    if report.chosen == "none":
        note("no map is better than none by more than a standard error: the new checkpoint has the same coefficients")

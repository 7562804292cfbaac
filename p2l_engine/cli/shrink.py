"""p2l-engine shrink."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from p2l_engine.cli.inputs import CsvEscape, Date, Device, Dtype, VoteColumn, check_writable, vote_columns, write_json
from p2l_engine.cli.progress import progress
from p2l_engine.cli.terminal import note, out, status
from p2l_engine.tables.limits import MAX_DROPPED

if TYPE_CHECKING:
    from p2l_engine.learning.shrinkage import ShrinkageReport

MOST = 5000  # training prompts whose hidden states are computed


def shrink(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint folder or name on the hub.")],
    trained_on: Annotated[
        str,
        typer.Option(
            help="The votes or scores that the checkpoint was trained on: a table (.parquet, .csv, .jsonl), a folder, glob or "
            "URI of such files, or a data set on the hub. Prompts that --votes has too are left out, also in another spelling."
        ),
    ],
    votes: Annotated[
        str, typer.Option(help="Votes or scores on prompts of other kinds, beside some of the same kinds: the same formats.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the new checkpoint; missing or empty.")],
    by: Annotated[
        str | None,
        typer.Option(
            help="The column of --votes that names their sources, or 'file': what is chosen is measured on each source by the "
            "others. Default: five parts at random.",
            show_default=False,
        ),
    ] = None,
    sources: Annotated[
        str | None,
        typer.Option(
            help="The column of --trained-on that names the sources of scores, or 'file': scores compare within one source "
            "only. Default: all are of one source.",
            show_default=False,
        ),
    ] = None,
    column: VoteColumn = None,
    csv_escape: CsvEscape = None,
    max_dropped: Annotated[float, typer.Option(min=0, max=1, help="The share of rows that may be invalid.")] = MAX_DROPPED,
    cache: Annotated[bool, typer.Option(help="Keep hidden states of prompts in the user's cache folder.")] = True,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the parts and of the sample of training prompts.")] = 0,
    device: Device = None,
    dtype: Dtype = None,
    date: Date = None,
) -> None:
    """Let coefficients of prompts of new kinds fall back to one leaderboard, as far as votes ask for it.

    The kinds of training prompts are the column category (of scores: task) of --trained-on, or clusters where there is none.

    Nothing is written, and the exit status is 1, where no shrinkage makes votes likelier by a standard error.
    """
    check_writable(as_json, "--json")
    with status("loading"):
        import numpy as np

        from p2l_engine import checkpoint as checkpoints
        from p2l_engine.checkpoint.rewrite import check_target
        from p2l_engine.engine import Engine
        from p2l_engine.jsonable import to_json
        from p2l_engine.learning import hidden, shrinkage
        from p2l_engine.learning.calibration import among_known
        from p2l_engine.votes.by_source import balanced, read_by_source, read_within
        from p2l_engine.votes.splits import folded

        loaded = checkpoints.load(checkpoint, date)
    if loaded.theta_map is not None:
        raise ValueError(
            f"{loaded.folder}: calibrated by a monotone map (calibration.json), which comes behind a shrinkage: shrink the "
            "checkpoint it came from, and calibrate that again"
        )
    check_target(loaded.folder, output)
    columns = vote_columns(column)
    source = None
    if by is None:
        given, dropped = read_within(
            votes, None, loaded.feedback, columns, max_dropped, answers_once=True, csv_escape=csv_escape
        )
    else:
        given, label, dropped = read_by_source(
            votes, by, loaded.feedback, columns, max_dropped, answers_once=True, csv_escape=csv_escape
        )
        source = dict(zip((given.prompts[p] for p in given.prompt), label.tolist(), strict=True))
    trained, other = read_within(
        trained_on, sources, loaded.feedback, columns, max_dropped, answers_once=True, csv_escape=csv_escape
    )
    for line in (*dropped.lines(), *other.lines()):
        note(f"dropped {line}", warning=True)
    known, unknown = among_known(given, loaded.models)
    if unknown:
        note(f"skipped {unknown:,} votes on models that the checkpoint does not know", warning=True)
    trained, _ = among_known(trained, loaded.models)
    measured_on = {folded(prompt[0]) for prompt in known.prompts}
    rest = [i for i, prompt in enumerate(trained.prompts) if folded(prompt[0]) not in measured_on]
    if len(rest) < len(trained.prompts):
        note(f"left {len(trained.prompts) - len(rest):,} prompts out of --trained-on: --votes has them too")
    shrinkage.check_enough(len(rest))
    trained = trained.of(rest)
    some = np.random.default_rng(seed).permutation(len(rest))[:MOST]
    every = [*(trained.prompts[i] for i in some), *known.prompts]
    engine = Engine(replace(loaded, shrinkage=None), device, dtype)
    store = hidden.cache_folder() if cache else None
    with progress(len(every)) as advance:
        states = hidden.hidden_states(engine, [list(turns) for turns in every], store, advance)
    outputs = shrinkage.marginal_outputs(loaded.feedback, trained)
    kinds = None if trained.category is None else [trained.category[i] for i in some]
    start, away = shrinkage.of_training(loaded.head, outputs, states[: len(some)], int(loaded.config.hidden_size), kinds, seed)
    parts = None
    if source is not None:
        parts = np.array([source[prompt] for prompt in known.prompts])
        known = balanced(known, parts[known.prompt], 0.0)  # each source counts alike
    found, report = shrinkage.fit(start, away, loaded.head, loaded.feedback, known, states[len(some) :], parts, seed)
    _show(report, by)
    if as_json is not None:
        write_json(to_json(report), as_json)
    if found is None:
        note("no shrinkage makes these votes likelier by a standard error: nothing was written", warning=True)
        raise typer.Exit(1)
    with status("writing"):
        shrinkage.write(loaded, output, found, report)
    note(f"wrote {output}")


def _show(report: ShrinkageReport, by: str | None) -> None:
    from p2l_engine.cli.table import print_table

    rows = [
        (name, f"{prompts:,}", f"{kept:.1%}", f"{gain:+.4f} ({error:.4f})")
        for name, (prompts, kept, gain, error) in report.by_part.items()
    ]
    rows.append(("all", f"{report.prompts:,}", f"{report.kept:.1%}", f"{report.gain:+.4f} ({report.gain_error:.4f})"))
    losses = f"{report.before:.4f}, shrunk as the other parts ask for {report.after:.4f}"
    title = f"log-loss of {report.votes:,} votes: {losses}"
    print_table(title, (by or "part", "prompts", "kept", "gain (std. error)"), rows, out())
    if report.middle is not None and report.width is not None:
        note(
            f"half of the differences between models are kept at distance {report.middle:.1f} from the kinds of training "
            f"prompts, 95% at {report.middle - 3 * report.width:.1f}, 5% at {report.middle + 3 * report.width:.1f}"
        )

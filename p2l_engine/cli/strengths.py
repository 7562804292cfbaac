"""p2l-engine strengths."""

from __future__ import annotations

from pathlib import Path
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
    check_model,
    check_writable,
    load_engine,
    swaps_of,
    write_json,
)
from p2l_engine.cli.progress import progress
from p2l_engine.cli.terminal import note, out
from p2l_engine.cli.top import All, Top, limit
from p2l_engine.plotting import TOP


def strengths(
    file: Annotated[
        str,
        typer.Argument(
            help=f"Prompts: {PROMPT_FILE}. Objects and tables may have a category (or task) and a weight for each prompt."
        ),
    ],
    column: Column = None,
    csv_escape: CsvEscape = None,
    reference: Annotated[
        str | None,
        typer.Option(help="The model to measure the others against. Default: the middle one of the leaderboard."),
    ] = None,
    model: Annotated[list[str] | None, typer.Option(help="Measure this model; may be repeated. Default: all models.")] = None,
    replace: Annotated[
        list[str] | None,
        typer.Option(help="OLD:NEW: show by category what changes if NEW replaces OLD; may be repeated."),
    ] = None,
    cluster: Annotated[bool, typer.Option("--cluster", help="Find categories by clustering the prompts.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the win rates by category into this file (.png, .svg, .pdf).")] = None,
    html: Annotated[
        Path | None,
        typer.Option(help="Write the report to this file: one page with plots and all figures."),
    ] = None,
    as_json: Annotated[
        Path | None, typer.Option("--json", help="Write all figures to this file; with --cluster also each prompt's cluster.")
    ] = None,
    bootstrap: Annotated[int, typer.Option(min=2, help="Number of bootstrap samples for the intervals.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    top: Top = TOP,
    all_models: All = False,
    checkpoint: Checkpoint = None,
    device: Device = None,
    dtype: Dtype = None,
    date: Date = None,
) -> None:
    """Show what each model is good at, by category of prompts, and what changes when one model replaces another."""
    from p2l_engine.cli.figures import show_replacements, show_strengths
    from p2l_engine.cli.prompts import CATEGORY, PromptFile
    from p2l_engine.evaluation.report import ReportOptions, survey
    from p2l_engine.jsonable import to_json

    check_writable(plot, "--plot", PLOTS)
    check_writable(html, "--html")
    check_writable(as_json, "--json")
    if plot or html:  # now: a missing package must not fail a command whose work is done
        from p2l_engine.evaluation import html as pages
        from p2l_engine.evaluation import plots
    given = PromptFile.read(file, column, csv_escape)
    categories, weights = given.categories(), given.weights()
    if cluster and categories is not None:
        raise typer.BadParameter("these prompts have categories already", param_hint="--cluster")
    engine = load_engine(checkpoint, device, dtype, date)
    swaps = swaps_of(replace, engine.models)
    for name in (reference, *(model or [])):
        check_model(name, engine.models, "--reference, --model")
    if categories is None and not cluster:
        categories = ["all"] * len(given.prompts)
        columns = " or ".join(CATEGORY)
        note(f"{given.name}: no column {columns}: all prompts are one category (or use --cluster)", warning=True)
    options = ReportOptions(bootstrap, seed, reference=reference, shown=model or None, replacements=swaps, cluster=cluster)
    with progress(len(given.prompts)) as advance:
        report = survey(engine, given.prompts, categories, weights, options, advance)
    shown = limit(top, all_models)
    show_strengths(report, out(), shown)
    show_replacements(report.replacements or (), out())
    if plot:
        plots.save("strengths", report, plot, shown)
        note(f"wrote {plot}")
    if as_json:
        write_json(to_json(report), as_json)
    if html:
        pages.write(report, html, shown)
        note(f"wrote {html}")

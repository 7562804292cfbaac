"""p2l-engine strengths."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from p2l_engine.cli.inputs import (
    PLOTS,
    Checkpoint,
    Column,
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


def strengths(
    file: Annotated[
        Path,
        typer.Argument(
            help="Prompts, no votes: .jsonl (text, turns, messages, or an object with 'prompt' and perhaps 'category' and "
            "'weight'), .csv or .parquet (such columns), else one a line."
        ),
    ],
    column: Column = "prompt",
    reference: Annotated[
        str | None,
        typer.Option(help="The model that others are measured against; the leaderboard's middle one when not given."),
    ] = None,
    model: Annotated[list[str] | None, typer.Option(help="Show this model; may be repeated; all when not given.")] = None,
    replace: Annotated[
        list[str] | None, typer.Option(help="OLD:NEW: what gets better and what worse by category; may be repeated.")
    ] = None,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="Find categories by clustering, for prompts that have none.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw the win rates by category to this file (.png, .svg, .pdf).")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write the report here: one page with plots, and leaderboards by category.")
    ] = None,
    as_json: Annotated[
        Path | None, typer.Option("--json", help="Write every figure here; with --cluster each prompt's cluster, too.")
    ] = None,
    bootstrap: Annotated[int, typer.Option(min=2, help="Bootstrap samples behind the intervals.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    checkpoint: Checkpoint = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Show by category of prompts what each model is good at, and what gets better or worse when one replaces another."""
    from p2l_engine.cli.figures import show_strengths
    from p2l_engine.cli.prompts import CATEGORY, PromptFile
    from p2l_engine.evaluation import html as pages
    from p2l_engine.evaluation import plots
    from p2l_engine.evaluation import report as reports

    check_writable(plot, "--plot", PLOTS)
    check_writable(html, "--html")
    check_writable(as_json, "--json")
    given = PromptFile.read(file, column)
    categories, weights = given.categories(), given.weights()
    if cluster and categories is not None:
        raise typer.BadParameter("these prompts have categories already", param_hint="--cluster")
    engine = load_engine(checkpoint, device, dtype)
    swaps = swaps_of(replace, engine.models)
    for name in (reference, *(model or [])):
        check_model(name, engine.models, "--reference, --model")
    if categories is None and not cluster:
        categories = ["all"] * len(given.prompts)
        columns = " or ".join(CATEGORY)
        note(f"{file}: no column {columns}: all prompts are one category (or use --cluster)", warning=True)
    asked = reports.Asked(bootstrap, seed, reference=reference, shown=model or None, replacements=swaps, cluster=cluster)
    with progress(len(given.prompts)) as advance:
        report = reports.survey(engine, given.prompts, categories, weights, asked, advance)
    show_strengths(report, out())
    if plot:
        plots.save("strengths", report, plot)
        note(f"wrote {plot}")
    if as_json:
        write_json(report, as_json)
    if html:
        pages.write(report, html)
        note(f"wrote {html}")

"""p2l-engine eval."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from p2l_engine.cli.inputs import (
    ENGINE,
    PLOTS,
    CatalogFile,
    Checkpoint,
    CsvEscape,
    Date,
    Device,
    VoteColumn,
    check_model,
    check_writable,
    load_engine,
    swaps_of,
    vote_columns,
    write_json,
)
from p2l_engine.cli.progress import progress
from p2l_engine.cli.terminal import note, out, status
from p2l_engine.cli.top import All, Top, limit
from p2l_engine.plotting import TOP
from p2l_engine.tables.limits import MAX_DROPPED

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from p2l_engine.engine import Engine


def evaluate(
    votes: Annotated[
        str | None,
        typer.Option(
            help="Votes to evaluate on: a table (.parquet, .csv, .jsonl), a folder, glob or URI of such files, or a data set "
            "on the hub. Default: those that the checkpoint's training config held out."
        ),
    ] = None,
    training: Annotated[
        str | None, typer.Option(help="With --votes: the training votes, for the baselines; named in the same way.")
    ] = None,
    column: VoteColumn = None,
    csv_escape: CsvEscape = None,
    max_dropped: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help=f"With --votes: the share of rows that may be invalid. Default: {MAX_DROPPED}.",
            show_default=False,
        ),
    ] = None,
    part: Annotated[str, typer.Option(help="Without --votes: held-out, or validation.")] = "held-out",
    html: Annotated[Path | None, typer.Option(help="Write the report to this file: one page with plots.")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
    card: Annotated[
        bool, typer.Option("--card", help="Write README.md, the model card, and evaluation.json into the checkpoint's folder.")
    ] = False,
    bootstrap: Annotated[int, typer.Option(min=2, help="Number of bootstrap samples for the intervals.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap and of random prompts.")] = 0,
    reference: Annotated[str | None, typer.Option(help="Print strengths by category, measured against this model.")] = None,
    replace: Annotated[
        list[str] | None,
        typer.Option(help="OLD:NEW: show by category what changes if NEW replaces OLD; may be repeated."),
    ] = None,
    budget: Annotated[list[float] | None, typer.Option(help="A mean cost in the routing table; may be repeated.")] = None,
    probes: Annotated[
        bool, typer.Option("--probes", help="Compare with ridge regression, kNN and a perceptron on the untrained backbone.")
    ] = False,
    cluster: Annotated[bool, typer.Option("--cluster", help="Find categories by clustering the prompts.")] = False,
    adapting: Annotated[
        bool,
        typer.Option("--adapt", help="Leave out each model's row and learn it again from its votes: how many does one need?"),
    ] = False,
    by: Annotated[
        str | None,
        typer.Option(
            help="With --adapt and --votes: the column that names the votes' sources, or 'file'. Leaves out each source "
            "instead of each model, and prints no report."
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="With --by: draw the learning curves to this file (.png, .svg or .pdf).")
    ] = None,
    top: Top = TOP,
    all_models: All = False,
    catalog: CatalogFile = None,
    checkpoint: Checkpoint = None,
    device: Device = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            help="float32 (fp32), bfloat16 (bf16) or, on CPUs, int8; auto: as in other commands. Repeated: the report "
            "is in the first, and has a table of what each costs in quality, beside float32. Default: bfloat16 where hardware "
            "multiplies it, else float32.",
            show_default=False,
            rich_help_panel=ENGINE,
        ),
    ] = None,
    date: Date = None,
) -> None:
    """Evaluate a checkpoint on votes: accuracy, calibration, leaderboards, routing, strengths and weaknesses."""
    from p2l_engine.catalog import Catalog
    from p2l_engine.checkpoint.card import write as write_card
    from p2l_engine.cli.figures import show
    from p2l_engine.evaluation import report as reports
    from p2l_engine.evaluation import sources
    from p2l_engine.jsonable import to_json

    if part not in ("held-out", "validation"):
        raise typer.BadParameter(f"expected held-out or validation, got {part!r}", param_hint="--part")
    check_writable(html, "--html")
    check_writable(as_json, "--json")
    if html:  # now: a missing package must not fail a command whose work is done
        from p2l_engine.evaluation import html as pages
    check_writable(plot, "--plot", PLOTS)
    if by is not None and not (adapting and votes is not None):
        raise typer.BadParameter("needs --adapt and --votes", param_hint="--by")
    if plot is not None and by is None:
        raise typer.BadParameter("needs --by", param_hint="--plot")
    if by is not None and (
        html or card or training or probes or cluster or budget or reference or replace or part != "held-out"
        or len(dtype or ()) > 1
    ):  # fmt: skip
        raise typer.BadParameter("prints learning curves alone: leave out the options of the report", param_hint="--by")
    engine, others = _engines(checkpoint, device, dtype or [], date)
    if by is not None and votes is not None:
        from p2l_engine.cli.left_out import sources as left_out_sources

        share, columns = MAX_DROPPED if max_dropped is None else max_dropped, vote_columns(column)
        left_out_sources(engine, votes, by, columns, share, csv_escape, seed, plot, as_json)
        return
    swaps = swaps_of(replace, engine.models)
    check_model(reference, engine.models, "--reference")
    if votes is None and training is not None:
        raise typer.BadParameter("needs --votes", param_hint="--training")
    if votes is None and max_dropped is not None:
        raise typer.BadParameter("needs --votes; the training config has its own", param_hint="--max-dropped")
    if votes is None and vote_columns(column):
        raise typer.BadParameter("needs --votes; the training config names the columns of its own votes", param_hint="--column")
    if votes is None and csv_escape is not None:
        raise typer.BadParameter("needs --votes; the training config has its own", param_hint="--csv-escape")
    if votes is not None and part != "held-out":
        raise typer.BadParameter("only for the checkpoint's own data, not with --votes", param_hint="--part")
    if engine.feedback.of_values and (swaps or reference or cluster):
        raise typer.BadParameter(f"{engine.feedback.name} compares no models", param_hint="--replace, --reference, --cluster")
    own = engine.folder / "catalog.yaml"
    prices = Catalog.from_yaml(catalog or own) if catalog or own.is_file() else None
    chosen: Literal["held-out", "validation"] = "validation" if part == "validation" else "held-out"
    if votes is None:
        found = sources.of_config(engine, chosen, prices)
    else:
        share, columns = MAX_DROPPED if max_dropped is None else max_dropped, vote_columns(column)
        found = sources.of_files(engine, votes, training, prices, share, columns, csv_escape)
    for line in found.dropped.lines():
        note(f"dropped {line}", warning=True)
    held_out = found.held_out
    if budget and found.scores is None:
        raise typer.BadParameter("needs scores of every model, and --training scores with --votes", param_hint="--budget")
    if budget:
        _check_budgets(budget, found.scores.costs if found.scores is not None else None)
    if reference and held_out.category is None and not cluster:
        raise typer.BadParameter("needs categories: a column of that name, or --cluster", param_hint="--reference")
    if cluster and held_out.category is not None:
        raise typer.BadParameter("these votes have categories already", param_hint="--cluster")
    predicted = None
    if probes:
        if found.scores is None or found.training is None or "pretrain_model_name" not in found.config:
            raise typer.BadParameter("needs scores and the checkpoint's own training config", param_hint="--probes")
        with progress(len(held_out.prompts) + len(found.training.prompts)) as advance:
            base = str(found.config["pretrain_model_name"])
            predicted = reports.probes(base, found.config, found.training, held_out, found.scores, advance)
    options = reports.ReportOptions(bootstrap, seed, budget, reference, replacements=swaps, probes=predicted, cluster=cluster)
    with progress(len(held_out.prompts) * (1 + len(others))) as advance:
        made = (make() for make in others)
        report = reports.evaluate(engine, held_out, found.training, found.scores, options, advance, made)
    shown = limit(top, all_models)
    show(report, out(), strengths=reference is not None, top=shown)
    if adapting:
        from p2l_engine.cli.left_out import models as left_out_models

        left_out_models(engine, held_out)
    if as_json:
        write_json(to_json(report), as_json)
    if card:
        write_card(engine.folder, report)
        note(f"wrote {engine.folder / 'README.md'}")
    if html:
        pages.write(report, html, shown)
        note(f"wrote {html}")


def _engines(
    name: str | None, device: str | None, dtypes: Sequence[str], date: str | None
) -> tuple[Engine, list[Callable[[], Engine]]]:
    """The report's engine, in the first dtype. Where there are several, also what makes the others, float32 among them: one at
    a time, as each may have gigabytes. Raises ValueError for a dtype that cannot be used, before anything is computed."""
    if len(dtypes) < 2:
        return load_engine(name, device, dtypes[0] if dtypes else None, date), []
    import torch

    from p2l_engine import checkpoint
    from p2l_engine.backbone import check_dtype
    from p2l_engine.engine import Engine, as_device, as_dtype
    from p2l_engine.engine.device import is_auto

    if any(map(is_auto, dtypes)):
        raise typer.BadParameter("auto is one of the others: leave it out, or give it alone", param_hint="--dtype")
    place = as_device(device)
    kinds = list(dict.fromkeys([*(as_dtype(one, place) for one in dtypes), torch.float32]))
    with status("loading the checkpoint"):
        loaded = checkpoint.load(name, date)
        for kind in kinds:
            check_dtype(loaded.config, place, kind)
        first, *rest = (partial(Engine, loaded, place, kind) for kind in kinds)
        return first(), list(rest)


def _check_budgets(budgets: Sequence[float], costs: npt.NDArray[np.float64] | None) -> None:
    if costs is None:
        raise typer.BadParameter("needs costs: a catalog", param_hint="--budget")
    for budget in budgets:
        if not costs.min() <= budget < math.inf:
            problem = f"expected a mean cost of at least the cheapest model's {costs.min():g}, got {budget:g}"
            raise typer.BadParameter(problem, param_hint="--budget")

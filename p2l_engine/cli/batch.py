"""p2l-engine batch."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from p2l_engine.cli.inputs import (
    CatalogOption,
    Checkpoint,
    Device,
    Dtype,
    DtypeOption,
    LeaveOut,
    Scope,
    err,
    load_engine,
    load_router,
    numbers_of,
    out,
    shares_of,
)
from p2l_engine.engine import Engine
from p2l_engine.router import Opponents

if TYPE_CHECKING:
    from p2l_engine.batch.ray import Cluster

ROWS_PER_PART = 8192  # as in ``batch.Asked``, without importing pyarrow for every other command


class Floats(StrEnum):
    """What written coefficients are stored as."""

    FLOAT16 = "float16"
    FLOAT32 = "float32"


def batch(
    inputs: Annotated[
        list[str],
        typer.Argument(help="Files (parquet, csv, jsonl, these two also .gz or .zst), folders, globs; or URIs such as s3://."),
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="A folder, or its URI: parquet parts in the rows' order.")],
    column: Annotated[str, typer.Option(help="The prompts: text, a list of user turns, or of messages.")] = "prompt",
    plain_text: Annotated[
        bool, typer.Option("--plain-text", help="Text is text, even where it is a list of turns as JSON.")
    ] = False,
    keep: Annotated[
        list[str] | None,
        typer.Option(help="A column that the output repeats; may be repeated; '' for none. Without it, all."),
    ] = None,
    budget: Annotated[float | None, typer.Option(help="Upper bound on the expected cost, in the catalog's unit.")] = None,
    budget_scope: Annotated[Scope, typer.Option(help="Bound each prompt's cost, or the mean over all rows.")] = Scope.PROMPT,
    price: Annotated[
        float | None,
        typer.Option(help="Instead of a budget: the price that an earlier run's budget over its rows had.", show_default=False),
    ] = None,
    max_share: Annotated[
        list[str] | None, typer.Option(help="NAME=SHARE: at most this share of the rows; may be repeated.")
    ] = None,
    min_share: Annotated[
        list[str] | None, typer.Option(help="NAME=SHARE: at least this share of the rows; may be repeated.")
    ] = None,
    coefficients: Annotated[
        Floats | None, typer.Option(help="Also write theta and eta, so stored.", show_default=False)
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first row that cannot be routed.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw away what an earlier run left in the output folder.")
    ] = False,
    rows_per_part: Annotated[
        int, typer.Option(min=1, help="Of a part of the output, which is computed and resumed together.")
    ] = ROWS_PER_PART,
    state: Annotated[
        str | None,
        typer.Option(help="Local folder of a run's state until it ends; by default within the output.", show_default=False),
    ] = None,
    catalog: CatalogOption = None,
    leave_out: LeaveOut = False,
    opponent: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=WEIGHT: what win rates are measured against; may be repeated; the weights sum to 1. Without it, "
            "all models of the checkpoint alike."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draws from mixed policies.")] = 0,
    checkpoint: Checkpoint = None,
    device: Device = None,
    dtype: DtypeOption = None,
    ray: Annotated[
        str | None,
        typer.Option(
            help="Compute coefficients on this Ray cluster: auto, HOST:PORT, or local for one on this machine.",
            show_default=False,
        ),
    ] = None,
    ray_workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="With --ray; one for each GPU, or for each node where there is none, when not given.",
            show_default=False,
        ),
    ] = None,
    tokens_per_batch: Annotated[
        int | None,
        typer.Option(min=1, help="Of a forward pass; 4,096 on a CPU, 32,768 on a GPU when not given.", show_default=False),
    ] = None,
) -> None:
    """Route files of prompts, of any length. Killed, the same command goes on where it was."""
    from p2l_engine.batch import Asked, Report, run
    from p2l_engine.tables.storage import Place

    asked = Asked(
        inputs=inputs,
        output=output,
        column=column,
        plain_text=plain_text,
        keep=[] if keep == [""] else keep,
        budget=budget,
        budget_scope=budget_scope.value,
        price=price,
        max_share=shares_of(max_share, "--max-share"),
        min_share=shares_of(min_share, "--min-share"),
        coefficients=coefficients.value if coefficients else None,
        strict=strict,
        state=state,
        rows_per_part=rows_per_part,
    )
    opponents: Opponents = numbers_of(opponent, "--opponent") if opponent else "uniform"
    engine = load_engine(checkpoint, device if ray is None else "cpu", dtype, tokens_per_batch)
    router = load_router(engine, catalog, leave_out, seed, opponents)
    columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), TimeRemainingColumn())
    with (
        _cluster(engine, checkpoint, ray, ray_workers, device, dtype, tokens_per_batch) as cluster,
        Progress(*columns, console=err, transient=True) as bar,
    ):
        task, lock = bar.add_task("reading", total=1.0), threading.Lock()

        def show(report: Report) -> None:
            with lock:
                seconds = max(bar.tasks[0].elapsed or 0.0, 1e-9)
                speed = f"{report.rows / seconds:,.0f} rows/s, {report.tokens / seconds:,.0f} tokens/s"
                done = f"{report.rows:,} rows, {report.parts:,} parts, spend {report.spend:,.4g}"
                bar.update(task, completed=report.read, description=f"{done}; {speed}")

        report = run(router, asked, restart, show, cluster)
    _show(report, router.catalog.unit, Place.of(output).shown)


def _cluster(
    engine: Engine,
    checkpoint: str | None,
    address: str | None,
    workers: int | None,
    device: str | None,
    dtype: Dtype | None,
    tokens_per_batch: int | None,
) -> AbstractContextManager[Cluster | None]:
    if address is None:
        if workers is not None:
            raise typer.BadParameter("expected --ray beside it", param_hint="--ray-workers")
        return nullcontext()
    from p2l_engine.batch.ray import Cluster

    kind = getattr(torch, dtype.value) if dtype else None
    with err.status("connecting to Ray"):
        return Cluster(engine, checkpoint, address, workers, device, kind, tokens_per_batch)


def _show(report: object, unit: str, output: str) -> None:
    from p2l_engine.batch import Report

    assert isinstance(report, Report)
    table = Table(title=Text(output), title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("rows", f"{report.rows:,}")
    table.add_row("routed", f"{report.routed:,}")
    table.add_row("with an error", f"{report.rows - report.routed:,}")
    table.add_row("same prompt as an earlier row", f"{report.repeated:,}")
    if report.resumed:
        table.add_row("prompts computed before", f"{report.resumed:,}")
    table.add_row(f"sum of expected costs ({unit})", f"{report.spend:,.6g}")
    for row, price in report.prices.items():
        table.add_row(Text(f"price of {row}: win rate for one unit more"), f"{price:.4g}")
    if report.seconds:
        table.add_row("seconds", f"{report.seconds['all']:,.1f}")
    out.print(table)

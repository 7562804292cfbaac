"""p2l-engine batch."""

from __future__ import annotations

import threading
import time
from contextlib import AbstractContextManager, nullcontext
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from p2l_engine.batch.config import KEPT_BYTES, ROWS_PER_PART
from p2l_engine.cli.batch_summary import print_summary, status_of
from p2l_engine.cli.inputs import (
    BudgetScope,
    CatalogFile,
    Checkpoint,
    Column,
    CsvEscape,
    Date,
    Device,
    Dtype,
    LeaveOut,
    load_engine,
    load_router,
    numbers_of,
    shares_of,
)
from p2l_engine.cli.progress import Show, meter
from p2l_engine.cli.terminal import interruptible, status

if TYPE_CHECKING:
    from collections.abc import Callable

    from p2l_engine.batch import Report
    from p2l_engine.batch.ray import Cluster
    from p2l_engine.engine import Engine
    from p2l_engine.opponents import Opponents

READING, DECIDING, RUN, CLUSTER = "Reading", "Deciding", "Running", "Ray"  # headings in the help


class Floats(StrEnum):
    """Types that coefficients are stored in."""

    FLOAT16 = "float16"
    FLOAT32 = "float32"


class Formats(StrEnum):
    """Formats of the output's files."""

    PARQUET = "parquet"
    JSONL = "jsonl"
    CSV = "csv"


class WriteAs(StrEnum):
    """Requests that rows are written as."""

    OPENAI_BATCH = "openai-batch"


class SplitBy(StrEnum):
    """Columns that split the output."""

    MODEL = "model"


class Errors(StrEnum):
    """What an invalid row costs."""

    ROW = "row"
    STOP = "stop"


class Explore(StrEnum):
    """Ways to explore."""

    THOMPSON = "thompson"


def batch(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Files (.parquet, .csv, .jsonl; the last two also compressed as .gz or .zst), folders and globs, or URIs "
            "such as s3://bucket/folder."
        ),
    ],
    output: Annotated[
        str, typer.Option("--output", "-o", help="Folder or URI for the results: files of parts, in the order of the input.")
    ],
    column: Column = None,
    plain_text: Annotated[
        bool,
        typer.Option("--plain-text", help="Never parse a prompt as a JSON list of turns.", rich_help_panel=READING),
    ] = False,
    csv_escape: CsvEscape = None,
    partitions: Annotated[
        bool,
        typer.Option(
            "--partitions/--no-partitions",
            help="Whether folders such as lang=en/ are columns.",
            rich_help_panel=READING,
        ),
    ] = True,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            help="Input column to copy to the output; may be repeated; '' for none. Default: all columns.",
            show_default=False,
            rich_help_panel=READING,
        ),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="The same as --errors stop.", rich_help_panel=READING),
    ] = False,
    errors: Annotated[
        Errors | None,
        typer.Option(
            help="What a row costs that cannot be routed or kept: row, an error in its own column error, or stop, the run. "
            "Default: row.",
            show_default=False,
            rich_help_panel=READING,
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(help="Upper bound on the expected cost, in the catalog's unit.", rich_help_panel=DECIDING),
    ] = None,
    budget_scope: Annotated[
        BudgetScope,
        typer.Option(help="Apply the budget to each row's cost, or to the mean cost of all rows.", rich_help_panel=DECIDING),
    ] = BudgetScope.PROMPT,
    price: Annotated[
        float | None,
        typer.Option(
            help="Instead of a budget: the dual price of an earlier run's budget (win rate per unit of cost).",
            show_default=False,
            rich_help_panel=DECIDING,
        ),
    ] = None,
    max_share: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=SHARE: send at most this share of the rows to a model. May be repeated.",
            rich_help_panel=DECIDING,
        ),
    ] = None,
    min_share: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=SHARE: send at least this share of the rows to a model. May be repeated.",
            rich_help_panel=DECIDING,
        ),
    ] = None,
    opponent: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=WEIGHT: a model that win rates are measured against. May be repeated; the weights sum to 1. "
            "Default: all models of the checkpoint, equally.",
            show_default=False,
            rich_help_panel=DECIDING,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed for drawing a model where a policy mixes two.", rich_help_panel=DECIDING)] = 0,
    explore: Annotated[
        Explore | None,
        typer.Option(
            help="Draw each row's coefficients from their posterior, where the checkpoint has one; adds the columns propensity "
            "and propensity_error.",
            show_default=False,
            rich_help_panel=DECIDING,
        ),
    ] = None,
    draw: Annotated[
        str | None,
        typer.Option(
            help="Kept input column, such as an id, by which rows with equal prompts are drawn independently. Default: alike.",
            show_default=False,
            rich_help_panel=DECIDING,
        ),
    ] = None,
    source: Annotated[
        bool,
        typer.Option(
            "--source/--no-source", help="Write where each row comes from: source_file and source_row.", rich_help_panel=RUN
        ),
    ] = True,
    output_format: Annotated[
        Formats | None,
        typer.Option(
            "--format",
            help="Format of the output's files. Default: parquet; with --as, jsonl.",
            show_default=False,
            rich_help_panel=RUN,
        ),
    ] = None,
    split_by: Annotated[
        SplitBy | None,
        typer.Option(
            help="Write each model's rows into files of their own, and rows with an error into files named errors-.",
            show_default=False,
            rich_help_panel=RUN,
        ),
    ] = None,
    write_as: Annotated[
        WriteAs | None,
        typer.Option(
            "--as",
            help="Write the rows as requests of OpenAI's batch API, which can be submitted; with --split-by model.",
            show_default=False,
            rich_help_panel=RUN,
        ),
    ] = None,
    coefficients: Annotated[
        Floats | None,
        typer.Option(
            help="Also write each row's theta and eta, rounded to this type.", show_default=False, rich_help_panel=RUN
        ),
    ] = None,
    restart: Annotated[
        bool,
        typer.Option("--restart", help="Delete an earlier run from the output folder and start again.", rich_help_panel=RUN),
    ] = False,
    rows_per_part: Annotated[
        int,
        typer.Option(
            min=1, help="Rows of one output file. A file is the unit of work that a resumed run repeats.", rich_help_panel=RUN
        ),
    ] = ROWS_PER_PART,
    state: Annotated[
        str | None,
        typer.Option(
            help="Local folder for the run's coefficients. Default: OUT.run, beside the output OUT.",
            show_default=False,
            rich_help_panel=RUN,
        ),
    ] = None,
    keep_coefficients: Annotated[
        bool | None,
        typer.Option(
            "--keep-coefficients/--no-keep-coefficients",
            help="Keep the coefficients when the run is complete, so that another budget needs no forward pass. Default: up to "
            f"{KEPT_BYTES >> 30} GiB.",
            show_default=False,
            rich_help_panel=RUN,
        ),
    ] = None,
    tokens_per_batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens in one forward pass. Default: 4,096 on a CPU, 32,768 on a GPU.",
            show_default=False,
            rich_help_panel=RUN,
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            help="Compute coefficients on a Ray cluster: auto, HOST:PORT, or local to start one on this machine.",
            show_default=False,
            rich_help_panel=CLUSTER,
        ),
    ] = None,
    ray_workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of workers. Default: one for each GPU, or one for each node if there is no GPU.",
            show_default=False,
            rich_help_panel=CLUSTER,
        ),
    ] = None,
    catalog: CatalogFile = None,
    leave_out: LeaveOut = False,
    checkpoint: Checkpoint = None,
    device: Device = None,
    dtype: Dtype = None,
    date: Date = None,
) -> None:
    """Route files of prompts of any size. After an interruption, the same command continues the run; with another budget,
    catalog or columns, it decides again from the coefficients that are there.

    Exit status: 0 if every row was routed, 3 if some rows have an error, 4 if no row was routed; 2 after an error, 130 after
    Ctrl-C.
    """
    if strict and errors is Errors.ROW:
        raise typer.BadParameter("row cannot be combined with --strict", param_hint="--errors")
    shares, least = shares_of(max_share, "--max-share"), shares_of(min_share, "--min-share")
    opponents: Opponents = numbers_of(opponent, "--opponent") if opponent else "uniform"
    if ray is None and ray_workers is not None:
        raise typer.BadParameter("needs --ray", param_hint="--ray-workers")
    if write_as is not None and split_by is None:
        raise typer.BadParameter("needs --split-by model, since OpenAI takes one model in a file", param_hint="--as")
    if write_as is not None and output_format not in (None, Formats.JSONL):
        raise typer.BadParameter(f"requests are jsonl, got {output_format.value}: leave it out", param_hint="--format")
    from p2l_engine.batch import BatchConfig, run
    from p2l_engine.tables.storage import Location

    config = BatchConfig(
        inputs=inputs,
        output=output,
        column=column,
        plain_text=plain_text,
        partitions=partitions,
        csv_escape=csv_escape,
        keep=[] if keep == [""] else keep,
        source=source,
        format=(output_format or Formats.PARQUET).value,
        split_by=split_by.value if split_by else None,
        write_as=write_as.value if write_as else None,
        budget=budget,
        budget_scope=budget_scope.value,
        price=price,
        max_share=shares,
        min_share=least,
        coefficients=coefficients.value if coefficients else None,
        strict=strict or errors is Errors.STOP,
        draw=draw,
        state=state,
        rows_per_part=rows_per_part,
        keep_coefficients=keep_coefficients,
    )
    engine = load_engine(checkpoint, device if ray is None else "cpu", dtype, date, tokens_per_batch)
    router = load_router(engine, catalog, leave_out, seed, opponents, explore.value if explore else None)
    with (
        interruptible("; the same command continues the run"),
        _cluster(engine, checkpoint, ray, ray_workers, device, dtype, tokens_per_batch) as cluster,
        meter() as show,
    ):
        report = run(router, config, restart, _shown(show), cluster)
    print_summary(report, router.catalog.unit, Location.of(output).shown, split_by is not None)
    if report.routed < report.rows:
        raise typer.Exit(status_of(report))


def _cluster(
    engine: Engine,
    checkpoint: str | None,
    address: str | None,
    workers: int | None,
    device: str | None,
    dtype: str | None,
    tokens_per_batch: int | None,
) -> AbstractContextManager[Cluster | None]:
    if address is None:
        return nullcontext()
    with status("connecting to Ray"):
        from p2l_engine.batch.ray import Cluster

        return Cluster(engine, checkpoint, address, workers, device, dtype, tokens_per_batch)


def _shown(show: Show) -> Callable[[Report], None]:
    """What ``run`` calls, from several threads, whenever it has done something."""
    start, lock = time.perf_counter(), threading.Lock()

    def update(report: Report) -> None:
        with lock:
            seconds = max(time.perf_counter() - start, 1e-9)
            done = f"{report.rows:,} rows, {report.parts:,} parts, spend {report.spend:,.4g}"
            show(report.read, f"{done}; {report.rows / seconds:,.0f} rows/s, {report.tokens / seconds:,.0f} tokens/s")

    return update

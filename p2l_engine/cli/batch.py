"""p2l-engine batch."""

from __future__ import annotations

import threading
import time
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import typer

from p2l_engine.batch.config import ROWS_PER_PART
from p2l_engine.cli.batch_options import (
    BudgetOption,
    BudgetScopeOption,
    CoefficientsOption,
    DrawOption,
    Errors,
    ErrorsOption,
    ExploreOption,
    Formats,
    InputsArgument,
    KeepCoefficientsOption,
    KeepOption,
    MaxShareOption,
    MinShareOption,
    OpponentOption,
    OutputFormatOption,
    OutputOption,
    PartitionsOption,
    PlainTextOption,
    PriceOption,
    RayOption,
    RayWorkersOption,
    RestartOption,
    RowsPerPartOption,
    SeedOption,
    SourceOption,
    SplitByOption,
    StateOption,
    StrictOption,
    TokensPerBatchOption,
    WriteAsOption,
)
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


def batch(
    inputs: InputsArgument,
    output: OutputOption,
    column: Column = None,
    plain_text: PlainTextOption = False,
    csv_escape: CsvEscape = None,
    partitions: PartitionsOption = True,
    keep: KeepOption = None,
    strict: StrictOption = False,
    errors: ErrorsOption = None,
    budget: BudgetOption = None,
    budget_scope: BudgetScopeOption = BudgetScope.PROMPT,
    price: PriceOption = None,
    max_share: MaxShareOption = None,
    min_share: MinShareOption = None,
    opponent: OpponentOption = None,
    seed: SeedOption = 0,
    explore: ExploreOption = None,
    draw: DrawOption = None,
    source: SourceOption = True,
    output_format: OutputFormatOption = None,
    split_by: SplitByOption = None,
    write_as: WriteAsOption = None,
    coefficients: CoefficientsOption = None,
    restart: RestartOption = False,
    rows_per_part: RowsPerPartOption = ROWS_PER_PART,
    state: StateOption = None,
    keep_coefficients: KeepCoefficientsOption = None,
    tokens_per_batch: TokensPerBatchOption = None,
    ray: RayOption = None,
    ray_workers: RayWorkersOption = None,
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
        report = run(router, config, restart, _shown(show), cluster, lambda what, share: show(share, what))
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

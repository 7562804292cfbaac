"""A finished batch run with another budget: seconds and forward passes, beside those of the first run.

    python -m bench.decided_again --rows 15000 --csv bench/results/decided_again_cpu.csv

Prompts of one to five words, nearly all different; a backbone of two layers, which is only run the first time. Each line is a
run into the same folder: the first; a budget for each row; one over the batch; other kept columns; and the last one once more.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import setting, subjects
from bench.batch import short_prompts
from p2l_engine import Catalog, Engine, Router
from p2l_engine.batch import BatchConfig, run
from p2l_engine.catalog import CatalogModel

MODELS = 9
STEPS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("a new run", {"budget": 0.3}),
    ("another budget for each row", {"budget": 0.5}),
    ("a budget over the batch", {"budget": 0.5, "budget_scope": "batch"}),
    ("other kept columns", {"budget": 0.5, "budget_scope": "batch", "keep": []}),
    ("the same again", {"budget": 0.5, "budget_scope": "batch", "keep": []}),
)


@dataclass(frozen=True)
class DecidedRow:
    """One run: seconds, seconds of CPU, prompts that it computed, and prompts whose coefficients were there."""

    run: str
    rows: int
    seconds: float
    cpu_seconds: float
    computed: int
    found: int


def decided(rows: int, work: Path) -> list[DecidedRow]:
    """The steps, in a folder."""
    engine = Engine(subjects.checkpoint("tiny", MODELS, torch.device("cpu"), torch.float32), torch.device("cpu"))
    engine.folder = engine.base = work
    router = Router(engine, Catalog(tuple(CatalogModel(name, 0.1 * (i + 1)) for i, name in enumerate(engine.models))))
    short_prompts(rows, work / "prompts.parquet")
    found = []
    for name, options in STEPS:
        start, cpu = time.perf_counter(), time.process_time()
        report = run(router, BatchConfig([work / "prompts.parquet"], work / "out", **options))
        seconds = time.perf_counter() - start, time.process_time() - cpu
        found.append(DecidedRow(name, report.rows, *seconds, report.computed, report.resumed))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.decided_again", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=setting.positive, default=15_000, help="prompts")
    parser.add_argument("--csv", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        rows = decided(arguments.rows, Path(work))
    for row in rows:
        print(
            f"{row.run}: {row.rows:,} rows in {row.seconds:.1f} s ({row.cpu_seconds:.1f} s of CPU); "
            f"{row.computed:,} prompts computed, {row.found:,} found"
        )
    if arguments.csv:
        setting.write_rows(arguments.csv, rows, torch.device("cpu"))


if __name__ == "__main__":
    setting.run(main)

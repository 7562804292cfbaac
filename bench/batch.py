"""The cost of a batch run apart from its backbone, stage by stage.

    python -m bench.batch --prompts ../shared/data/routing_scores_two_models.parquet --csv bench/results/batch_cpu.csv
    python -m bench.batch --short 1000000
    OMP_NUM_THREADS=1 python -m bench.batch --spilled 10000000 --csv bench/results/batch_spilled_cpu.csv

The first uses builtin/llmrouter-9. The second generates N prompts of a few tokens, nearly all different, and routes them
with a backbone so small that the other stages dominate. The third solves a budget over N / 5 and N rows, without and with caps
on shares, from coefficients on disk, each in a process of its own. Memory is the peak of the process less its memory with the
model loaded; in the third, without the files that it has mapped, which the system writes to the disk when it needs their pages.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench import setting, spilled, subjects
from bench.measure import Peak, apart, resident
from p2l_engine import Catalog, Engine, Router
from p2l_engine.batch import BatchConfig, Report, run
from p2l_engine.catalog import CatalogModel

BUDGET = 0.3


class TimedBackbone:
    """A backbone that counts the seconds spent in it."""

    def __init__(self, backbone: Any) -> None:
        self._backbone, self.seconds = backbone, 0.0

    def __call__(self, *arguments: Any) -> Any:
        start = time.perf_counter()
        out = self._backbone(*arguments)
        self.seconds += time.perf_counter() - start
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backbone, name)


def short_prompts(count: int, path: Path) -> None:
    """Prompts of one to five words; one in a hundred is a repetition."""
    rng, words = np.random.default_rng(0), np.array(subjects.words())
    lengths = rng.integers(1, 6, count)
    picked = words[rng.integers(0, len(words), lengths.sum())]
    texts = [" ".join(part) for part in np.split(picked, lengths.cumsum()[:-1])]
    numbered = [f"{text} {i}" if rng.random() > 0.01 else texts[0] for i, text in enumerate(texts)]
    pq.write_table(pa.table({"id": np.arange(count), "prompt": numbered}), path)


def bench(router: Router, prompts: str, console: Console) -> tuple[Report, float, float]:
    """The report; seconds in the backbone; GiB beyond the model."""
    backbone: Any = TimedBackbone(router.engine.backbone)
    router.engine.backbone = backbone
    router.engine.coefficients(["warm", "up " * 100, "and again"])
    backbone.seconds = 0.0
    folder = Path(tempfile.mkdtemp())
    with Peak(resident) as memory:
        columns = (TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("rows")
            config = BatchConfig([prompts], str(folder / "out"), keep=[], budget=BUDGET, budget_scope="batch")
            report = run(router, config, progress=lambda r: bar.update(task, description=f"{r.rows:,} rows, {r.parts} parts"))
    shutil.rmtree(folder)
    return report, backbone.seconds, memory.most - memory.first


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.batch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument("--prompts", help="a file with a column prompt: route it with builtin/llmrouter-9")
    subject.add_argument("--short", type=setting.positive, metavar="N", help="route N short prompts with a tiny backbone")
    subject.add_argument("--spilled", type=setting.positive, metavar="N", help="solve a budget over N rows from disk")
    parser.add_argument("--csv", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    device = torch.device("cpu")
    if arguments.spilled:
        rows = [("models", str(spilled.MODELS))]
        for count in (-(-arguments.spilled // 5), arguments.spilled):
            for shares, what in ((False, "a budget"), (True, "a budget and three caps on shares")):
                figures = apart(spilled.solve_spilled, count, shares)
                title = f"{count:,} rows, {what}"
                rows += [(f"{title}: {name}", f"{value:.3g}") for name, value in figures.items() if name != "gib"]
    else:
        rows, device = end_to_end(arguments.prompts, arguments.short)
    machine = setting.setting(device)
    table = Table(title=machine, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("figure", "value"))
            writer.writerows((*rows, ("machine", machine)))


def end_to_end(prompts: str | None, short: int | None) -> tuple[list[tuple[str, str]], torch.device]:
    """The figures of a run of these prompts, or of so many short ones; and its device."""
    with tempfile.TemporaryDirectory() as work:
        if prompts is not None:
            engine = Engine.from_pretrained("builtin/llmrouter-9")
            catalog = Catalog.from_yaml(engine.folder / "catalog.yaml")
        else:
            device, prompts = torch.device("cpu"), str(Path(work) / "prompts.parquet")
            engine = Engine(subjects.checkpoint("tiny", 9, device, torch.float32), device)
            engine.folder, engine.base = Path(work), Path(work)
            catalog = Catalog(tuple(CatalogModel(name, 0.1 * (i + 1)) for i, name in enumerate(engine.models)))
            short_prompts(short or 0, Path(prompts))
        report, backbone, gib = bench(Router(engine, catalog), prompts, Console(stderr=True))
    whole = report.seconds["all"]
    rows = [
        ("rows", f"{report.rows:,}"),
        ("prompts computed", f"{report.computed:,}"),
        ("tokens computed", f"{report.tokens:,}"),
        ("seconds", f"{whole:.1f}"),
        ("prompts/s", f"{report.rows / whole:,.1f}"),
        ("tokens/s", f"{report.tokens / whole:,.0f}"),
        ("share of the time in the backbone, %", f"{100 * backbone / whole:.1f}"),
        ("share of the time not in the backbone, %", f"{100 * (1 - backbone / whole):.1f}"),
        ("GiB beyond the model", f"{gib:.2f}"),
        *((f"seconds {stage} (stages overlap)", f"{took:.1f}") for stage, took in report.seconds.items() if stage != "all"),
    ]
    return rows, engine.device


if __name__ == "__main__":
    setting.run(main)

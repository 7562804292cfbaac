"""How far theta in each dtype is from float32's, by shape: python -m bench.dtypes --model smollm2-135m qwen2.5-0.5b.

Architectures with random weights and random prompts: no checkpoint of most sizes is at hand. What a dtype costs in quality,
``p2l-engine eval --dtype float32 --dtype int8`` measures on a checkpoint's held-out prompts. These figures say how roundings
add up over a shape's layers, and nothing about choices; ``smollm2-135m`` is to be read beside the default checkpoint, which has
that shape and trained weights.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench import subjects
from bench.setting import positive, run, write_rows
from p2l_engine import Engine
from p2l_engine.engine import as_dtype
from p2l_engine.evaluation import dtypes


@dataclass(frozen=True)
class DtypeRow:
    """One dtype of one shape. deviation, largest: of theta, root mean square and largest, over theta's standard deviation in
    float32."""

    subject: str
    dtype: str
    prompts: int
    deviation: float
    largest: float


def rows(name: str, names: list[str], count: int, console: Console) -> list[DtypeRow]:
    """Of the architecture ``name``, a row for each dtype."""
    device, prompts = torch.device("cpu"), subjects.prompts(count)
    loaded = subjects.checkpoint(name, 130, device, torch.float32)
    exact, found = None, []
    for kind in dict.fromkeys([torch.float32, *(as_dtype(one, device) for one in names)]):
        engine = Engine(loaded, device, kind)
        with Progress(console=console) as bar:
            task = bar.add_task(f"{name}, {kind}", total=count)
            c = engine.coefficients(prompts, partial(bar.advance, task))
        exact = c if exact is None else exact
        of, spread = dtypes.of(kind, c, exact, None), float(exact.theta.std())
        found.append(DtypeRow(name, of.dtype, count, of.deviation / spread, of.largest / spread))
    return found


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", required=True, choices=subjects.ARCHITECTURES, help="with random weights")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "int8"], help="compared with float32")
    parser.add_argument("--count", type=positive, default=100, help="random prompts")
    parser.add_argument("--csv", type=Path, help="also write the rows here")
    args = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)
    found = [row for name in args.model for row in rows(name, args.dtype, args.count, console)]
    table = Table("", "dtype", "prompts", "rms", "largest", title="theta beside float32's, over its standard deviation")
    for r in found:
        table.add_row(r.subject, r.dtype, str(r.prompts), f"{r.deviation:.4f}", f"{r.largest:.4f}")
    console.print(table)
    if args.csv:
        write_rows(args.csv, found, torch.device("cpu"))


if __name__ == "__main__":
    run(main)

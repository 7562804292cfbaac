"""What a dtype costs in quality: python -m bench.dtypes --checkpoint default --csv bench/results/dtypes.csv.

The checkpoint's held-out prompts in each dtype that this CPU computes, beside float32: the deviation of theta (root mean square
and largest, of differences between a prompt's models: what all of them share changes nothing), log-loss per vote, mean true
score of the routed model, the share of prompts whose chosen model is another one, and what that choice loses in win rate
against all models (points, by float32's win rates: mean over all prompts, and largest). With --model: an architecture with
random weights and random prompts, which have no votes.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench import subjects
from bench.setting import positive, run, write_rows
from p2l_engine import Engine, checkpoint, routing
from p2l_engine.coefficients import Coefficients
from p2l_engine.evaluation import sources
from p2l_engine.evaluation.metrics import Prediction
from p2l_engine.evaluation.sources import Sources


@dataclass(frozen=True)
class DtypeRow:
    """One dtype; log_loss and routed are None where there are no votes, and the rest is 0 for float32. Win rates in points."""

    subject: str
    dtype: str
    prompts: int
    deviation: float
    largest: float
    log_loss: float | None
    routed: float | None
    other_choice: float
    win_rate_lost: float
    most_lost: float


def row(subject: str, dtype: str, exact: Coefficients, found: Coefficients, votes: Sources | None) -> DtypeRow:
    """found: the coefficients in ``dtype``; exact: those in float32."""
    difference = (found.theta - exact.theta).astype(np.float64)
    difference -= difference.mean(1, keepdims=True)
    rows, chosen, first = np.arange(len(exact)), found.theta.argmax(1), exact.theta.argmax(1)
    v = routing.win_rates(exact.theta.astype(np.float64), np.full(len(exact.models), 1 / len(exact.models)))
    lost = 100 * (v[rows, first] - v[rows, chosen])
    log_loss = routed = None
    if votes is not None:
        prediction = Prediction.of(exact.feedback, found.theta, found.eta, votes.held_out)
        log_loss = float(np.average(prediction.loss, weights=votes.held_out.weight))
        routed = None if votes.scores is None else float(votes.scores.held_out[rows, chosen].mean())
    return DtypeRow(
        subject, dtype, len(exact), float(np.sqrt(np.square(difference).mean())), float(np.abs(difference).max()), log_loss,
        routed, float((chosen != first).mean()), float(lost.mean()), float(lost.max()),
    )  # fmt: skip


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", nargs="*", default=[], help="folders, hub names or 'default'")
    parser.add_argument("--model", nargs="*", default=[], choices=subjects.ARCHITECTURES, help="random weights")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "int8"], help="compared with float32")
    parser.add_argument("--count", type=positive, default=100, help="random prompts of an architecture")
    parser.add_argument("--csv", type=Path, help="also write the rows here")
    args = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)
    rows, device = list[DtypeRow](), torch.device("cpu")
    for name in [*(args.checkpoint or ([] if args.model else ["default"])), *args.model]:
        random = name in args.model
        loaded = subjects.checkpoint(name, 130, device, torch.float32) if random else checkpoint.load(name)
        votes, exact = None, None
        for dtype in ["float32", *args.dtype]:
            engine = Engine(loaded, device, dtype)
            if exact is None:
                votes = None if random else sources.of_config(engine, "held-out", None)
                prompts = subjects.prompts(args.count) if votes is None else votes.held_out.prompts
            with Progress(console=console) as bar:
                task = bar.add_task(f"{name}, {dtype}", total=len(prompts))
                found = engine.coefficients(prompts, partial(bar.advance, task))
            exact = found if exact is None else exact
            rows.append(row(name, dtype, exact, found, votes))
    table = Table("", "dtype", "prompts", "rms", "largest", "loss", "routed", "other", "lost", "most", title="Beside float32")
    for r in rows:
        figures_of = (r.deviation, r.largest, r.log_loss, r.routed, r.other_choice, r.win_rate_lost, r.most_lost)
        table.add_row(r.subject, r.dtype, str(r.prompts), *("" if value is None else f"{value:.4f}" for value in figures_of))
    console.print(table)
    if args.csv:
        write_rows(args.csv, rows, device)


if __name__ == "__main__":
    run(main)

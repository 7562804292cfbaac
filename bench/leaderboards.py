"""Leaderboards over many prompts, from their coefficients: python -m bench.leaderboards.

Sums of outcome probabilities over --prompts prompts, streamed in chunks, and the fit to them; without intervals, and with
--bootstrap samples. Coefficients are random: a common leaderboard and as much again for each prompt.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bench.setting import positive, run, write_rows
from p2l_engine.coefficients import Coefficients
from p2l_engine.feedback import feedback_model
from p2l_engine.leaderboard import Leaderboard, OutcomeSums

CHUNK = 4096


@dataclass(frozen=True)
class Row:
    """Seconds of the sums and of the fits."""

    feedback: str
    models: int
    prompts: int
    bootstrap: int
    summing: float
    fitting: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=positive, default=130)
    parser.add_argument("--prompts", type=positive, default=100_000)
    parser.add_argument("--bootstrap", type=positive, default=200)
    parser.add_argument("--feedback", nargs="+", default=["bt", "grk"], help="feedback models")
    parser.add_argument("--csv", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    console, rows = Console(), []
    shown = Table(title="seconds", title_justify="left")
    for column in ("feedback model", "models", "prompts", "bootstrap samples", "summing", "fitting"):
        shown.add_column(column, justify="left" if column == "feedback model" else "right")
    for name in arguments.feedback:
        for bootstrap in (0, arguments.bootstrap):
            row = measure(name, arguments.models, arguments.prompts, bootstrap)
            console.print(f"{name}, {bootstrap} samples: summing {row.summing:.1f} s, fitting {row.fitting:.1f} s")
            shown.add_row(name, str(row.models), f"{row.prompts:,}", str(bootstrap), f"{row.summing:.1f}", f"{row.fitting:.1f}")
            rows.append(row)
    console.print(shown)
    if arguments.csv:
        write_rows(arguments.csv, rows, torch.device("cpu"))


def measure(name: str, models: int, prompts: int, bootstrap: int) -> Row:
    feedback, rng = feedback_model(name), np.random.default_rng(0)
    names, common = tuple(f"model {i}" for i in range(models)), rng.normal(size=models)
    sums, summing = OutcomeSums(feedback, names, bootstrap), 0.0
    for first in range(0, prompts, CHUNK):
        n = min(CHUNK, prompts - first)
        theta = (common + rng.normal(size=(n, models))).astype(np.float32)
        some = Coefficients(theta, rng.normal(size=n).astype(np.float32) if feedback.has_eta else None, names, feedback)
        start = time.perf_counter()
        sums.add(some)
        summing += time.perf_counter() - start
    start = time.perf_counter()
    Leaderboard.fitted(sums)
    return Row(name, models, prompts, bootstrap, summing, time.perf_counter() - start)


if __name__ == "__main__":
    run(main)

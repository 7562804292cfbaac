"""What a mean budget over a stream loses to hindsight: python -m bench.streams.

Streams of 10,000 prompts of each kind of bench/traffic.py, routed by the pacer and by dual mirror descent
(bench/mirror_descent.py), both with the price of past traffic at first and with the pacer's first price. Both are told the
number of prompts; "open" is the pacer that is not. Off the budget: the
mean cost's distance from it, on the stream where that is greatest; lost: points of win rate below the batch budget's optimum
in hindsight, mean and worst of the streams; more on: on how many of them the pacer loses more. Ahead: the most that dual
mirror descent had spent beyond the budget of the prompts so far, in budgets; the pacer is never ahead by more than 100 while
something cheaper is allowed.

Dual mirror descent's step is tuned in its favour: of steps that span two orders, and both mirror maps, the one that loses
least on all of these streams together (their geometric mean, so that all kinds count alike). It is told the cheapest costs
of the prompts to come, too.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.mirror_descent import Mirror, mirror_descent
from bench.setting import positive
from bench.traffic import KINDS, Stream, streams
from p2l_engine import routing
from p2l_engine.routing import BudgetPacer

STEPS: tuple[tuple[Mirror, float], ...] = (
    ("Euclidean", 0.03), ("Euclidean", 0.1), ("Euclidean", 0.3), ("Euclidean", 1.0), ("Euclidean", 3.0),
    ("entropy", 0.3), ("entropy", 1.0), ("entropy", 3.0),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Run:
    """One router on one stream. ahead: the most that it had spent beyond the budget of the prompts so far, in budgets."""

    kind: str
    number: int
    first_price: str
    router: str
    off_percent: float
    lost_points: float
    ahead: float


def measure(kind: str, number: int, stream: Stream, steps: Sequence[tuple[Mirror, float]] = STEPS) -> list[Run]:
    """The pacer, and dual mirror descent with each step, on one stream."""
    v, costs, budget = stream.v, stream.costs, stream.budget
    best = float(routing.solve_batch_budget(v, costs, budget).value.mean())
    binds = stream.past_costs.min() <= budget
    past = routing.solve_batch_budget(stream.past, stream.past_costs, budget).prices["budget"] if binds else 0.0
    runs = []

    def add(first_price: str, router: str, chosen: Sequence[int] | npt.NDArray[np.intp]) -> None:
        paid = costs[np.arange(len(v)), chosen] / budget
        ahead = float((np.cumsum(paid) - np.arange(1, len(v) + 1)).max(initial=0.0))
        lost = 100 * (best - float(v[np.arange(len(v)), chosen].mean()))
        runs.append(Run(kind, number, first_price, router, 100 * (float(paid.mean()) - 1), lost, ahead))

    for first_price, price in (("past", past), ("none", None)):
        start = BudgetPacer(budget, price).price
        for router, prompts in (("pacer", len(v)), ("open", None)):
            pacer = BudgetPacer(budget, price, prompts=prompts)
            add(first_price, router, [pacer.choose(*prompt) for prompt in zip(v, costs, strict=True)])
        for mirror, step in steps:
            add(first_price, f"{mirror} {step}", mirror_descent(v, costs, budget, start, step, mirror))
    return runs


def least_short(stream: Stream, allowance: float) -> float:
    """How far, in percent, any router ends below the budget that is never more than ``allowance`` budgets ahead of it, and
    takes no model that costs more than the prompt's best: what the last prompts cannot use has to be spent before them."""
    v = stream.v
    best = np.where(v == v.max(axis=1, keepdims=True), stream.costs, np.inf).min(axis=1) / stream.budget
    unused = float(np.cumsum((1 - best)[::-1]).max(initial=0.0))
    return 100 * max(unused - allowance, 0.0) / len(v)


def tuned(runs: Sequence[Run]) -> str:
    """The step of dual mirror descent that loses least on these streams: the geometric mean, where all kinds count alike."""
    losses: dict[str, list[float]] = {f"{mirror} {step}": [] for mirror, step in STEPS}
    for run in runs:
        if run.router in losses:
            losses[run.router].append(np.log(max(run.lost_points, 1e-3)))
    return min(losses, key=lambda name: float(np.mean(losses[name])))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.streams", description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=positive, default=8, help="number of streams of each kind")
    parser.add_argument("--prompts", type=positive, default=10_000, help="prompts of a stream")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="kinds of streams")
    parser.add_argument("--csv", type=Path, help="also write a row for each stream and router here")
    arguments = parser.parse_args()
    console, runs = Console(), []
    short: dict[str, list[float]] = {}
    for kind in track(arguments.kinds, "streams", console=console, transient=True):
        for number, stream in enumerate(streams(kind, arguments.streams, arguments.prompts)):
            allowance = BudgetPacer(stream.budget, prompts=len(stream.v)).allowance / stream.budget
            short.setdefault(kind, []).append(least_short(stream, allowance))
            runs += measure(kind, number, stream)
    peer = tuned(runs)
    runs = [run for run in runs if run.router in ("pacer", "open", peer)]
    title = f"{arguments.streams} streams of {arguments.prompts:,} prompts of each kind; dual mirror descent: {peer} / sqrt(n)"
    table = Table(title=title, title_justify="left")
    figures = ("off, %: pacer", "open", "peer", "lost: pacer", "open", "peer", "worst: pacer", "peer", "more on", "ahead: peer")
    for column in ("stream", "price", *figures):
        table.add_column(column, justify="left" if column in ("stream", "price") else "right")
    for kind, first_price in itertools.product(arguments.kinds, ("past", "none")):
        some = [run for run in runs if (run.kind, run.first_price) == (kind, first_price)]
        pacer, unaware, other = ([run for run in some if run.router == router] for router in ("pacer", "open", peer))
        off = [f"{max((run.off_percent for run in own), key=abs):+.2f}" for own in (pacer, unaware, other)]
        mean = [f"{np.mean([run.lost_points for run in own]):.3f}" for own in (pacer, unaware, other)]
        worst = [f"{max(run.lost_points for run in own):.3f}" for own in (pacer, other)]
        more = sum(a.lost_points > b.lost_points for a, b in zip(pacer, other, strict=True))
        ahead = f"{max(run.ahead for run in other):.0f}"
        table.add_row(kind, first_price, *off, *mean, *worst, str(more), ahead, end_section=first_price == "none")
    console.print(table)
    for kind, least in short.items():
        if any(least):
            of_each = ", ".join(f"{x:.2f}" for x in least)
            console.print(f"{kind}: any router within the pacer's allowance ends at least so many % short: {of_each}")
    if arguments.csv:
        with arguments.csv.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(asdict(runs[0])))
            writer.writeheader()
            writer.writerows({k: f"{x:.6g}" if isinstance(x, float) else x for k, x in asdict(run).items()} for run in runs)


if __name__ == "__main__":
    main()

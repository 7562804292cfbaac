"""What a mean budget over a stream loses to hindsight: python -m bench.streams.

24 random streams of 10,000 prompts whose mix shifts halfway, each under a budget that binds in both halves, routed by the pacer
with a price learned on past traffic and without one. Mean cost: its distance from the budget; lost: points of win rate below
the batch budget's optimum in hindsight.
"""

from __future__ import annotations

import argparse

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.setting import positive
from p2l_engine import routing
from p2l_engine.routing import BudgetPacer

Float64 = npt.NDArray[np.float64]


def stream(seed: int, n: int, shift: bool = True) -> tuple[Float64, Float64, Float64]:
    """Win rates [n, M] of n prompts over models of costs that span two orders; halfway the expensive models get better or
    worse.

    Also win rates of 3,000 prompts of past traffic, and the costs [M].
    """
    rng = np.random.default_rng(seed)
    m = int(rng.integers(3, 30))
    costs = np.exp(rng.normal(size=m))
    strength = 0.4 * np.log(costs) + 0.3 * rng.normal(size=m)
    theta = rng.normal(size=(n, m)) + strength
    if shift:
        theta[n // 2 :] += strength * rng.uniform(-0.7, 1)
    past = rng.normal(size=(3000, m)) + strength
    q = np.full(m, 1 / m)
    return routing.win_rates(theta, q), routing.win_rates(past, q), costs


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.streams", description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=positive, default=24, help="number of streams")
    parser.add_argument("--prompts", type=positive, default=10_000, help="prompts of a stream")
    arguments = parser.parse_args()
    n, console = arguments.prompts, Console()
    off: dict[str, list[float]] = {"learned on past traffic": [], "none": []}
    lost: dict[str, list[float]] = {name: [] for name in off}
    for seed in track(range(arguments.streams), "streams", console=console, transient=True):
        v, past, costs = stream(seed, n)
        unbounded = min(costs[half.argmax(1)].mean() for half in (v[: n // 2], v[n // 2 :]))
        budget = float(costs.min() + 0.4 * (unbounded - costs.min()))
        best = float(routing.solve_batch_budget(v, costs, budget).value.mean())
        for name, pacer in zip(off, (BudgetPacer.learned(past, costs, budget), BudgetPacer(budget)), strict=True):
            chosen = np.array([pacer.choose(row, costs) for row in v])
            off[name].append(100 * abs(pacer.mean_cost / budget - 1))
            lost[name].append(100 * (best - float(v[np.arange(len(v)), chosen].mean())))
    table = Table(title=f"{arguments.streams} streams of {n:,} prompts", title_justify="left")
    for column in (
        "price at first",
        "mean cost off the budget, %: median",
        "worst",
        "points of win rate lost: median",
        "worst",
    ):
        table.add_column(column, justify="left" if column == "price at first" else "right")
    for name in off:
        figures = (np.median(off[name]), max(off[name]), np.median(lost[name]), max(lost[name]))
        table.add_row(name, *(f"{figure:.3f}" for figure in figures))
    console.print(table)


if __name__ == "__main__":
    main()

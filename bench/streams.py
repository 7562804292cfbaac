"""What a mean budget over a stream loses to hindsight: python -m bench.streams.

Twenty-four random streams of 10,000 prompts whose mix shifts halfway, each under a budget that binds in both halves, routed
by the pacer with a price learned on past traffic and without one. Mean cost: how far from the budget; lost: points of win
rate under the batch budget's optimum in hindsight.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import track
from rich.table import Table

from p2l_engine import routing
from p2l_engine.routing import BudgetPacer

Float64 = npt.NDArray[np.float64]


def stream(seed: int, n: int, shift: bool = True) -> tuple[Float64, Float64, Float64]:
    """Win rates [n, M] of n prompts over models of costs that span two orders; halfway the dear models pull ahead or fall back.

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
    console = Console()
    off: dict[str, list[float]] = {"learned on past traffic": [], "none": []}
    lost: dict[str, list[float]] = {name: [] for name in off}
    for seed in track(range(24), "streams", console=console, transient=True):
        v, past, costs = stream(seed, 10_000)
        unbounded = min(costs[half.argmax(1)].mean() for half in (v[:5000], v[5000:]))
        budget = float(costs.min() + 0.4 * (unbounded - costs.min()))
        best = float(routing.solve_batch_budget(v, costs, budget).value.mean())
        for name, pacer in zip(off, (BudgetPacer.learned(past, costs, budget), BudgetPacer(budget)), strict=True):
            chosen = np.array([pacer.choose(row, costs) for row in v])
            off[name].append(100 * abs(pacer.mean_cost / budget - 1))
            lost[name].append(100 * (best - float(v[np.arange(len(v)), chosen].mean())))
    table = Table(title="24 streams of 10,000 prompts", title_justify="left")
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

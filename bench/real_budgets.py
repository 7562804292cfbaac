"""What budgets buy on real prompts: python -m bench.real_budgets.

builtin/llmrouter-9 routes the held-out prompts of routing_scores.parquet (never trained on, train/configs/llmrouter-9.yaml) at
five mean budgets. True score: what the chosen models really scored, in expectation over mixed policies. "best single": the
model with the best mean score on the training prompts among those within the budget. The pacer sees the prompts one by one,
in the order of the file, and starts from the price that the training prompts had (horizon 100). The oracle knows every score:
the batch budget's optimum on them.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from p2l_engine import Catalog, Engine, Router, routing
from p2l_engine.routing import BudgetPacer, Policies
from p2l_engine.routing.arrays import Float64
from p2l_engine.routing.problem import expected
from p2l_engine.train import data
from p2l_engine.train.config import TrainConfig
from p2l_engine.votes import score_matrix

BUDGETS = (0.15, 0.2, 0.3, 0.5, 0.7)


def figures(policies: Policies, scores: Float64, v: Float64) -> tuple[float, float, float]:
    """Mean true score, mean cost, mean expected win rate."""
    score, rate = (float(expected(of, policies.indices, policies.probabilities).mean()) for of in (scores, v))
    return score, float(policies.cost.mean()), rate


def certain(chosen: Float64, costs: Float64) -> Policies:
    """Policies of one model each."""
    indices = np.stack([chosen, chosen], axis=1).astype(np.int32)
    return Policies(indices, np.tile([1.0, 0.0], (len(chosen), 1)), np.zeros(len(chosen)), costs[chosen])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.real_budgets", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="builtin/llmrouter-9", help="folder or name, with a catalog.yaml")
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS, help="mean costs, in the catalog's unit")
    parser.add_argument("--config", default="train/configs/llmrouter-9.yaml", help="data and split")
    parser.add_argument("--csv", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    config, console = TrainConfig.load(arguments.config), Console()
    training, _, held_out = data.load(config)
    assert held_out is not None
    engine = Engine.from_pretrained(arguments.checkpoint)
    router = Router(engine, Catalog.from_yaml(engine.folder / "catalog.yaml"))
    prompts, models, matrix = score_matrix(config.train_data_path)
    row, columns = {prompt: i for i, prompt in enumerate(prompts)}, [models.index(name) for name in router.names]
    known, scores = (matrix[[row[p] for p in part.prompts]][:, columns] for part in (training, held_out))
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("prompts", total=len(training.prompts) + len(held_out.prompts))
        past, v = (
            router.win_rates(engine.coefficients(part.prompts, lambda n: bar.advance(task, n))) for part in (training, held_out)
        )
    costs, n = router.costs, len(v)
    rows = []
    for budget in arguments.budgets:
        within = np.flatnonzero(costs <= budget)
        single = int(within[known[:, within].mean(0).argmax()])
        each, batch = routing.solve_budget(v, costs, budget), routing.solve_batch_budget(v, costs, budget)
        same_spend = routing.solve_batch_budget(v, costs, float(each.cost.mean()))
        assert same_spend.value.mean() >= each.value.mean() - 1e-12
        pacer = BudgetPacer.learned(past, costs, budget, horizon=100)
        paced = np.array([pacer.choose(rates, costs) for rates in v])
        for name, policies in (
            ("best single model within the budget", certain(np.full(n, single), costs)),
            ("budget for each prompt", each),
            ("budget over the batch", batch),
            ("pacer, prompt by prompt", certain(paced, costs)),
            ("oracle: true scores known", routing.solve_batch_budget(scores, costs, budget)),
        ):
            rows.append((budget, name, *figures(policies, scores, v)))
    table = Table(title=f"{n} held-out prompts; cost in {router.catalog.unit}", title_justify="left")
    for name in ("budget", "router", "mean true score", "mean cost", "mean expected win rate"):
        table.add_column(name, justify="left" if name == "router" else "right")
    for i, (budget, name, score, cost, rate) in enumerate(rows):
        table.add_row(f"{budget:g}", name, f"{score:.4f}", f"{cost:.4f}", f"{rate:.4f}", end_section=i % 5 == 4)
    console.print(table)
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["budget", "router", "mean_true_score", "mean_cost", "mean_expected_win_rate"])
            writer.writerows(rows)


if __name__ == "__main__":
    main()

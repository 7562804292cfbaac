"""One table of several evaluations: mean and spread over seeds, each row on the same split.

for s in 0 1 2: train with split_seed: s, then p2l-engine eval --checkpoint runs/NAME-s
    --catalog p2l_engine/builtin/llmrouter-9/catalog.yaml --probes --budget 0.2 --json s.json
python -m bench.seeds s0.json s1.json s2.json --csv bench/results/seeds.csv
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from p2l_engine.checkpoint.card import CHOICES, FIGURES, PREDICTORS
from p2l_engine.jsonable import from_json
from p2l_engine.reports import Evaluation

UNDER_BUDGET = {
    "batch": "this checkpoint, one budget over the batch",
    "prompt": "this checkpoint, a budget for each prompt",
    **{name: f"{CHOICES[name]}, one budget over the batch" for name in ("ridge", "knn", "mlp", "oracle")},
}


def figures_of(report: Evaluation) -> dict[tuple[str, str], float]:
    """(row, figure) to value."""
    if report.votes is None:
        raise SystemExit("expected evaluations on votes, got one on values")
    overall = report.votes.overall
    found = {
        (label, name): overall[predictor][figure].value
        for predictor, label in PREDICTORS.items()
        for figure, name in FIGURES.items()
        if figure in overall.get(predictor, {})
    }
    base = found[PREDICTORS["marginal"], FIGURES["log_loss"]]
    for label in PREDICTORS.values():
        if (label, FIGURES["log_loss"]) in found:
            found[label, "log-loss under the marginal's, %"] = 100 * (1 - found[label, FIGURES["log_loss"]] / base)
    if report.routing is None:
        return found
    for choice, label in CHOICES.items():
        if choice in report.routing.choices:
            gain = report.routing.choices[choice].points_over_best_single
            found[label.format("by training scores"), "points over the best single model"] = gain
    for row in report.routing.budgets.rows if report.routing.budgets is not None else ():
        for choice, label in UNDER_BUDGET.items():
            if choice in row.routers:
                points = f"points over the best single model at a mean cost of {row.budget:g}"
                found[label, points] = row.routers[choice].points_over_best_single
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.seeds", description=__doc__.splitlines()[0])
    parser.add_argument("reports", nargs="+", type=Path, help="what `p2l-engine eval --json` wrote, one for each seed")
    parser.add_argument("--csv", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    every = [figures_of(from_json(Evaluation, json.loads(path.read_text(encoding="utf-8")))) for path in arguments.reports]
    table = Table(title=f"mean (standard deviation) over {len(every)} seeds", title_justify="left")
    for name in ("row", "figure", "mean (sd)", "each"):
        table.add_column(name, justify="left" if name in ("row", "figure") else "right")
    rows = []
    for row, figure in every[0]:
        values = [of[row, figure] for of in every if (row, figure) in of]
        if len(values) < len(every):
            raise SystemExit(f"{row!r}, {figure!r}: expected in all {len(every)} reports, found in {len(values)}")
        spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        each = " ".join(f"{value:.4g}" for value in values)
        table.add_row(row.replace("*", ""), figure, f"{np.mean(values):.4g} ({spread:.2g})", each)
        rows.append((row.replace("*", ""), figure, f"{np.mean(values):.6g}", f"{spread:.3g}", each))
    Console().print(table)
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("row", "figure", "mean", "standard deviation", "each"))
            writer.writerows(rows)


if __name__ == "__main__":
    main()

"""A new model joins a checkpoint with few votes: each model of a score table is left out in turn and added again.

    python -m bench.adapting --backbone frozen --csv bench/results/adapting.csv --plot docs/adapting.svg

frozen: the default checkpoint's backbone before its training; a head is fitted to the votes on the other models, so that
nothing has seen the model that is left out. default: the default checkpoint without that model's row; its backbone was trained
on votes on all models, so that its figures are too good.

Votes to learn from are on two thirds of the prompts: the new model against a random other one on a random prompt. On the other
prompts are measured the log-loss of its votes against every other model, and the mean true score of the model that has the
highest coefficient. Compared: one number for the model, added to the mean of the other models' coefficients (offset); ridge
regression on hidden states from scratch; the votes on the nearest prompts (knn); and the whole head fitted again to all votes,
those on the other models included (retrained).
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from bench.ways_to_join import compared, task_of
from p2l_engine import Engine
from p2l_engine.checkpoint import DEFAULT
from p2l_engine.evaluation.features import frozen
from p2l_engine.feedback import feedback_model
from p2l_engine.learning.hidden import cache_folder, hidden_states
from p2l_engine.plotting import BLUE, GREY, ORANGE, YELLOW, save
from p2l_engine.votes import score_matrix

Float64 = npt.NDArray[np.float64]

SIZES = (0, 10, 30, 100, 300, 1000, 3000)
COLUMNS = ("backbone", "model", "seed", "votes", "method", "log_loss", "standard_error", "score")
Row = tuple[str, str, int, int, str, float, float, float]
NAMED = {
    "adapt": (BLUE, "adapt"),
    "offset": (ORANGE, "offset alone"),
    "ridge": (YELLOW, "ridge from scratch"),
    "knn": ("#7a9e3b", "nearest votes"),
    "retrained": (GREY, "head retrained"),
}


def measured(
    backbone: str, sizes: Sequence[int], seeds: int, prompts: int, retrain_at: Sequence[int], table: str
) -> Iterator[Row]:
    """The rows of all left-out models. prompts: at most, at random, of those with at most 600 characters."""
    every, names, scores = score_matrix(table)
    short = np.flatnonzero([sum(map(len, turns)) <= 600 for turns in every])
    kept = np.sort(np.random.default_rng(0).permutation(short)[:prompts])
    training = json.loads((DEFAULT / "training_config.json").read_text(encoding="utf-8"))
    default = backbone == "default"
    engine = Engine.from_pretrained() if default else Engine(frozen(training["pretrain_model_name"], training))
    states = hidden_states(engine, [list(every[i]) for i in kept], cache_folder()).astype(np.float64)
    feedback = feedback_model(training["loss_type"])
    for k, name in enumerate(names):
        task = task_of(feedback, names, states, scores[kept], k, engine.head if default else None)
        for n in sizes:
            for seed in range(seeds if n else 1):
                for method, found in compared(task, n, seed, n in retrain_at and seed == 0).items():
                    yield backbone, name, seed, n, method, *found


def summary(rows: Sequence[Row]) -> list[tuple[str, int, str, float, float, float, float]]:
    """For each backbone, size and method: the mean log-loss over models and seeds, how much higher it is than that of adapt,
    with the standard error of this difference over the models, and the mean true score."""
    found = []
    keys = sorted({(row[0], row[3], row[4]) for row in rows}, key=lambda key: (key[0], key[1], list(NAMED).index(key[2])))
    for backbone, n, method in keys:
        of = {row[1:3]: row[5:] for row in rows if (row[0], row[3], row[4]) == (backbone, n, method)}
        adapted = {row[1:3]: row[5:] for row in rows if (row[0], row[3], row[4]) == (backbone, n, "adapt")}
        by_model: dict[str, list[float]] = {}
        for (model, seed), (loss, _, _) in of.items():
            if (model, seed) in adapted:
                by_model.setdefault(model, []).append(loss - adapted[model, seed][0])
        apart = np.array([float(np.mean(each)) for each in by_model.values()] or [np.nan])
        error = float(apart.std(ddof=1) / np.sqrt(len(apart))) if len(apart) > 1 else 0.0
        loss, _, score = np.mean(list(of.values()), 0)
        found.append((backbone, n, method, float(loss), float(apart.mean()), error, float(score)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.adapting", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--table", default="../shared/data/routing_scores.parquet", help="scores of every model on every prompt"
    )
    parser.add_argument("--backbone", choices=("frozen", "default"), default="frozen")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="VOTES")
    parser.add_argument("--seeds", type=int, default=1, help="draws of the votes, for each model and size")
    parser.add_argument("--prompts", type=int, default=2000)
    parser.add_argument(
        "--retrain-at", type=int, nargs="*", default=(300,), metavar="VOTES", help="fit the head again at these"
    )
    parser.add_argument("--csv", type=Path, help="write the rows here as they come; those of other backbones are kept")
    parser.add_argument("--plot", type=Path, help="also draw them, to a .png, .svg or .pdf file")
    arguments = parser.parse_args()
    rows = [row for row in read(arguments.csv) if row[0] != arguments.backbone] if arguments.csv else []
    for row in measured(
        arguments.backbone, arguments.sizes, arguments.seeds, arguments.prompts, arguments.retrain_at, arguments.table
    ):
        rows.append(row)
        if arguments.csv:
            write(rows, arguments.csv)
    table = Table(title="log-loss of held-out votes with the new model; mean true score routed", title_justify="left")
    for name in ("backbone", "votes", "method", "log-loss", "above adapt (s.e.)", "score"):
        table.add_column(name, justify="right")
    for backbone, n, method, loss, apart, error, score in summary(rows):
        table.add_row(backbone, f"{n:,}", NAMED[method][1], f"{loss:.4f}", f"{apart:+.4f} ({error:.4f})", f"{score:.4f}")
    Console().print(table)
    if arguments.plot:
        draw(rows, arguments.plot)


def read(path: Path) -> list[Row]:
    """The rows of a file that ``write`` wrote; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        cells = list(csv.reader(file))[1:]
    return [(b, model, int(seed), int(n), of, float(x), float(y), float(z)) for b, model, seed, n, of, x, y, z in cells]


def write(rows: Sequence[Row], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows((*row[:5], *(f"{x:.6g}" for x in row[5:])) for row in rows)


def draw(rows: Sequence[Row], path: Path) -> None:
    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = figure.subplots()
    found = [row for row in summary(rows) if row[0] == "frozen"] or summary(rows)
    for method, (colour, label) in NAMED.items():
        points = [(max(n, 3), loss) for _, n, of, loss, *_ in found if of == method]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=colour, label=label)
    axes.set_xscale("log")
    ticks = sorted({n for _, n, *_ in found})
    axes.set_xticks([max(n, 3) for n in ticks], [f"{n:,}" for n in ticks])
    axes.minorticks_off()
    axes.set_xlabel("votes on the new model")
    axes.set_ylabel("log-loss of its held-out votes, mean of the models")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


if __name__ == "__main__":
    main()

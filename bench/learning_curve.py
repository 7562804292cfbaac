"""The learning curve: the log-loss on held-out votes by the number of training votes (the paper's Figure 2).

    python -m bench.learning_curve --csv bench/results/learning_curve.csv --plot docs/learning_curve.svg

Every point is a training run of its own on a share of the training prompts, with the config's epochs and learning rate; a
smaller share is part of a larger one, the held-out prompts are the same. For comparison, from the same training votes: one
leaderboard for all prompts, and one for each category. Existing runs are not trained again.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from p2l_engine import Engine
from p2l_engine.evaluation import sources
from p2l_engine.evaluation.predictors import compare, predictions
from p2l_engine.plotting import BLUE, ORANGE, YELLOW, save
from p2l_engine.train.config import TrainConfig
from p2l_engine.train.run import train
from p2l_engine.votes.marginal import category_fits, marginal_fit

NAMES = ("proj_name", "output_dir", "license", "description")  # keys of a config that change no weight
SHARES = (0.0625, 0.125, 0.25, 0.5, 1.0)
NAMED = {"p2l": (BLUE, "P2L"), "category": (YELLOW, "category known"), "marginal": (ORANGE, "marginal")}


def trained(config: TrainConfig, share: float) -> Path:
    """The checkpoint of this share of the training prompts. Raises ValueError where its folder holds another run."""
    config = config.model_copy(update={"train_share": share, "proj_name": f"{config.proj_name}-{share:g}"})
    folder = train(config, if_present="resume")
    stored = json.loads((folder / "training_config.json").read_text(encoding="utf-8"))
    wanted = json.loads(config.model_dump_json())
    defaults = {key: field.default for key, field in TrainConfig.model_fields.items()}  # for keys that are newer than that run
    changed = sorted(key for key in wanted if stored.get(key, defaults[key]) != wanted[key] and key not in NAMES)
    if changed:
        raise ValueError(f"{folder}: trained with other values of {', '.join(changed)}: remove it, or name another --output")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.learning_curve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="train/configs/two-epochs.yaml")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, metavar="SHARE")
    parser.add_argument("--output", help="folder of the runs (default: the config's output_dir)")
    parser.add_argument("--csv", type=Path, help="also write the rows here")
    parser.add_argument("--plot", type=Path, help="also draw them, to a .png, .svg or .pdf file")
    arguments = parser.parse_args()
    config = TrainConfig.load(arguments.config)
    if arguments.output:
        config = config.model_copy(update={"output_dir": arguments.output})
    rows: list[tuple[float, int, int, str, str, float, float, float]] = []
    for share in sorted(arguments.shares):
        engine = Engine.from_pretrained(trained(config, share))
        found = sources.of_config(engine, "held-out", None)
        assert found.training is not None
        marginal = marginal_fit(engine.feedback, found.training)
        fits = None if found.training.category is None else category_fits(engine.feedback, found.training, marginal)
        of = predictions(engine.coefficients(found.held_out.prompts), marginal, found.held_out, fits)
        figures = compare(of, found.held_out, bootstrap=200).overall
        size = (share, len(found.training.prompts), len(found.training))
        for predictor in NAMED:
            for figure in ("log_loss", "accuracy_4", "accuracy_3", "accuracy_2"):
                if figure in figures.get(predictor, {}):
                    cell = figures[predictor][figure]
                    rows.append((*size, predictor, figure, cell.value, cell.low, cell.high))
    table = Table(title="held-out log-loss of a vote (95% interval)", title_justify="left")
    for name in ("training prompts", "votes", "predictor", "log-loss"):
        table.add_column(name, justify="right")
    for _, prompts, votes, predictor, figure, value, low, high in rows:
        if figure == "log_loss":
            table.add_row(f"{prompts:,}", f"{votes:,}", NAMED[predictor][1], f"{value:.4f} ({low:.3f} to {high:.3f})")
    Console().print(table)
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("share", "prompts", "votes", "predictor", "figure", "value", "low", "high"))
            writer.writerows((*row[:5], *(f"{x:.6g}" for x in row[5:])) for row in rows)
    if arguments.plot:
        draw(rows, arguments.plot)


def draw(rows: list[tuple[float, int, int, str, str, float, float, float]], path: Path) -> None:
    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for predictor, (colour, label) in NAMED.items():
        points = [
            (votes, value, low, high)
            for _, _, votes, of, name, value, low, high in rows
            if (of, name) == (predictor, "log_loss")
        ]
        if points:
            votes, value, low, high = zip(*points, strict=True)
            axes.plot(votes, value, "o-", color=colour, label=label)
            axes.fill_between(votes, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set_xscale("log")
    axes.set_xlabel("training votes")
    axes.set_ylabel("held-out log-loss, 95% interval over prompts")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


if __name__ == "__main__":
    main()

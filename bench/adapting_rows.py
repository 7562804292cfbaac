"""The rows of bench.adapting: files of them, their means, a table and a figure."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from p2l_engine.plotting import BLUE, GREY, ORANGE, YELLOW, save

SIZES = (0, 10, 30, 100, 300, 1000, 3000)
TRAINED_ON = "routing_scores"  # what builtin/llmrouter-9 was trained on
COLUMNS = ("source", "backbone", "model", "seed", "votes", "method", "log_loss", "standard_error", "score")
NAMED = {
    "adapt": (BLUE, "adapt"),
    "offset": (ORANGE, "offset alone"),
    "ridge": (YELLOW, "ridge from scratch"),
    "knn": ("#7a9e3b", "nearest votes"),
    "retrained": (GREY, "head retrained"),
    "residual": ("#56B4E9", "adapt with a residual"),
}


@dataclass(frozen=True, slots=True)
class Row:
    """What one way to add a model gives, from one draw of the votes: mean log-loss of the held-out votes and its standard error
    over prompts, and the mean true score of the models that come first."""

    source: str
    backbone: str
    model: str
    seed: int
    votes: int
    method: str
    log_loss: float
    standard_error: float
    score: float


@dataclass(frozen=True, slots=True)
class Summary:
    """Of a method at a size, mean over the models, of each the mean over draws: log-loss, how much higher it is than that of
    adapt, with the standard error of this difference over the models, and the mean true score, with the same for it."""

    votes: int
    method: str
    models: int
    log_loss: float
    above: float
    above_error: float
    score: float
    below: float
    below_error: float


def summary(rows: Sequence[Row]) -> list[Summary]:
    """Of rows of one backbone, of one source or several: each source's models count alike."""
    at = {(row.source, row.model, row.votes, row.seed, row.method): row for row in rows}
    found = []
    for n, method in sorted({(row.votes, row.method) for row in rows}, key=lambda key: (key[0], list(NAMED).index(key[1]))):
        by_model: dict[tuple[str, str], list[tuple[float, float, float, float]]] = {}
        for (source, model, size, seed, of), row in at.items():
            base = at.get((source, model, size, seed, "adapt"))
            if (size, of) == (n, method) and base is not None:
                each = (row.log_loss, row.log_loss - base.log_loss, row.score, base.score - row.score)
                by_model.setdefault((source, model), []).append(each)
        means = np.array([np.mean(each, 0) for each in by_model.values()])
        if not len(means):
            continue
        error = means.std(0, ddof=1) / np.sqrt(len(means)) if len(means) > 1 else np.zeros(4)
        loss, above, score, below = means.mean(0).tolist()
        found.append(Summary(n, method, len(means), loss, above, float(error[1]), score, below, float(error[3])))
    return found


def panels(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows by source and backbone, as their titles; then all whose new models their backbone has not seen."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(f"{row.source}, {row.backbone} backbone", []).append(row)
    unseen = [row for row in rows if not (row.source == TRAINED_ON and row.backbone == "default")]
    if len({row.source for row in unseen}) > 1:
        found["all sources"] = unseen
    return found


def show(title: str, rows: Sequence[Row]) -> None:
    table = Table(title=f"{title}: log-loss of held-out votes with the new model; mean true score routed", title_justify="left")
    for name in ("votes", "method", "models", "log-loss", "above adapt (s.e.)", "score", "below adapt (s.e.)"):
        table.add_column(name, justify="right")
    for at in summary(rows):
        table.add_row(
            f"{at.votes:,}",
            NAMED[at.method][1],
            str(at.models),
            f"{at.log_loss:.4f}",
            f"{at.above:+.4f} ({at.above_error:.4f})",
            f"{at.score:.4f}",
            f"{at.below:+.4f} ({at.below_error:.4f})",
        )
    Console(width=120).print(table)


def read(path: Path) -> list[Row]:
    """The rows of a file that ``write`` wrote; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        cells = list(csv.reader(file))[1:]
    return [
        Row(source, backbone, model, int(seed), int(n), method, *map(float, figures))
        for source, backbone, model, seed, n, method, *figures in cells
    ]


def write(rows: Sequence[Row], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for row in rows:
            *names, loss, error, score = astuple(row)
            writer.writerow([*names, *(f"{x:.6g}" for x in (loss, error, score))])


def draw(rows: Sequence[Row], path: Path) -> None:
    """A column for each source whose new models nothing has seen, the log-loss above the mean true score."""
    chosen = {title: of for title, of in panels(rows).items() if title != "all sources" and "adapt" in {r.method for r in of}}
    chosen = {t: of for t, of in chosen.items() if (of[0].source, of[0].backbone) != (TRAINED_ON, "default")} or chosen
    figure = Figure(figsize=(max(1.2 + 2.6 * len(chosen), 6.5), 5.4), layout="constrained")
    grid = figure.subplots(2, len(chosen), squeeze=False, sharex=True)
    for (title, of), (top, bottom) in zip(chosen.items(), grid.T, strict=True):
        found = [at for at in summary(of) if at.method != "residual"]
        most = max(at.votes for at in found if at.method == "adapt")
        for method, (colour, label) in NAMED.items():
            points = [at for at in found if at.method == method]
            if not points:
                continue
            x = [max(at.votes, 3) for at in points]
            style = "o" if method == "retrained" else "o-"
            errors = [at.above_error for at in points]
            top.errorbar(x, [at.log_loss for at in points], errors, fmt=style, color=colour, label=label, ms=3, lw=1.2)
            bottom.errorbar(
                x, [at.score for at in points], [at.below_error for at in points], fmt=style, color=colour, ms=3, lw=1.2
            )
        top.set_title(title.partition(",")[0].replace("_", " "), fontsize=9)
        top.set_xscale("log")
        ticks = [n for n in SIZES if n <= most]
        bottom.set_xticks([max(n, 3) for n in ticks], [f"{n:,}" for n in ticks], fontsize=7, rotation=45)
        bottom.minorticks_off()
        for axes in (top, bottom):
            axes.tick_params(axis="y", labelsize=7)
            axes.spines[["top", "right"]].set_visible(False)
    grid[0, 0].set_ylabel("log-loss of the model's held-out votes", fontsize=8)
    grid[1, 0].set_ylabel("mean true score routed", fontsize=8)
    figure.supxlabel("votes on the new model (bars: standard error of the difference from adapt)", fontsize=8)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=len(labels) if len(chosen) > 1 else 3, frameon=False, fontsize=7
    )
    save(figure, path)

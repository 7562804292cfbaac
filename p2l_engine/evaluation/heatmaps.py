"""The report's coloured tables of models: ranks, choices, strengths and reliability by category."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from p2l_engine.plotting import DIVERGING, SEQUENTIAL
from p2l_engine.reports import BaseReport, Figures, Leaderboards, Strengths

if TYPE_CHECKING:
    from numpy.typing import NDArray


def ranks(figure: Figure, boards: Leaderboards, top: int | None) -> None:
    """Each category's ranks of the first ``top`` models (None: all) of the aggregated leaderboard."""
    assert boards.categories is not None
    models = [standing.model for standing in boards.aggregated[:top]]
    rank = {name: {standing.model: standing.rank for standing in standings} for name, standings in boards.categories.items()}
    values = np.array([[of[model] for of in rank.values()] for model in models], np.float64)
    label = f"rank within the category{cut(len(models), len(boards.aggregated))}"
    _heat(figure, values, models, list(rank), label, f"{SEQUENTIAL}_r", 1, max(len(boards.aggregated), 2))


def choices(figure: Figure, report: BaseReport, top: int | None) -> None:
    """The share of each category's prompts that the router gives to each model."""
    assert report.choices is not None
    models, share = report.checkpoint.models, np.array(list(report.choices.values())).T
    ordered = np.argsort(-share.mean(1), kind="stable").tolist()
    chosen = ([m for m in ordered if share[m].mean() >= 0.01] or ordered)[:top]  # 1% as in the paper
    label = "share of the category's prompts, % (models of at least 1% over all categories)"
    _heat(figure, 100 * share[chosen], [models[m] for m in chosen], list(report.choices), label, SEQUENTIAL, 0, 100)


def strengths(figure: Figure, report: BaseReport, top: int | None) -> None:
    """Win rates against the reference, by category."""
    assert report.strengths is not None
    of = report.strengths
    values = {name: entry.win_rate for name, entry in of.categories.items()}
    _by_model(figure, report, values, f"win rate against {of.reference}, %", DIVERGING, top)


def reliability(figure: Figure, report: BaseReport, top: int | None) -> None:
    """How surely the models' answers are not bad, by category."""
    values = reliabilities(report.strengths)
    _by_model(figure, report, values, "reliability: sigmoid of the coefficient, %", SEQUENTIAL, top)


def reliabilities(of: Strengths | None) -> dict[str, Figures]:
    """Each category's figures of reliability; none for models that are not grounded."""
    entries = {} if of is None else of.categories
    return {name: entry.reliability for name, entry in entries.items() if entry.reliability is not None}


def _by_model(figure: Figure, report: BaseReport, of: Mapping[str, Figures], label: str, colours: str, top: int | None) -> None:
    every = report.ranked(next(iter(of.values())))
    values = np.array([[100 * figures[model].value for figures in of.values()] for model in every[:top]])
    _heat(figure, values, every[:top], list(of), f"{label}{cut(len(values), len(every))}", colours, 0, 100)


def cut(shown: int, total: int) -> str:
    """A few words for a label, where not all models are shown."""
    return "" if shown == total else f" (the first {shown} of {total} models)"


def short(name: str) -> str:
    """A name of at most 28 characters, without its middle."""
    return name if len(name) <= 28 else f"{name[:13]}…{name[-14:]}"


def _heat(
    figure: Figure,
    values: NDArray[np.float64],
    rows: Sequence[str],
    columns: Sequence[str],
    label: str,
    colours: str,
    low: float,
    high: float,
) -> None:
    """A coloured table of values [rows, columns], each printed in its cell."""
    figure.set_size_inches(2.8 + max(0.42 * len(columns), 2.4), 2.2 + 0.27 * len(rows))
    axes = figure.subplots()
    image = axes.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto")
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            dark = np.dot(image.to_rgba(value)[:3], (0.299, 0.587, 0.114)) < 0.5
            axes.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=7, color="white" if dark else "black")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks(range(len(columns)), [short(name) for name in columns], rotation=40, ha="right")
    figure.suptitle(label, fontsize=9, x=0.01, ha="left")

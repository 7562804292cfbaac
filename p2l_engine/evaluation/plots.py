"""The report's plots, each drawn into a matplotlib figure from the report's own figures."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from p2l_engine import plotting
from p2l_engine.evaluation import heatmaps
from p2l_engine.plotting import BLUE, GREY, ORANGE, TOP, YELLOW
from p2l_engine.reports import (
    BaseReport,
    BudgetRow,
    Budgets,
    Calibration,
    CategoryFigures,
    Evaluation,
    Growth,
    Leaderboards,
    Replacement,
)

PREDICTORS = {"p2l": (BLUE, "o"), "category": (YELLOW, "s"), "marginal": (ORANGE, "^"), "constant": (GREY, "x")}
ROUTERS = {
    "batch": (BLUE, "o-", "router, one budget over the batch"),
    "prompt": (ORANGE, "^-", "router, the same budget for each prompt"),
}
PROBES = {"ridge": ":", "knn": "--", "mlp": "-."}
VERDICTS = {"better": (BLUE, "^"), "worse": (ORANGE, "v"), "unclear": (GREY, "o")}


def plots_of(report: BaseReport, top: int | None = TOP) -> dict[str, Callable[[Figure], None]]:
    """The function that draws each plot for which the report has figures, by name. top: models in a plot (None: all)."""
    boards = report.leaderboards
    found: dict[str, Callable[[Figure], None]] = {}
    if isinstance(report, Evaluation):
        if report.votes is not None:
            found["calibration"] = partial(_calibration, curve=report.votes.calibration)
        if report.votes is not None and report.votes.categories:
            found["categories"] = partial(_categories, of=report.votes.categories)
    found["leaderboards"] = partial(_leaderboards, boards=boards, top=top)
    if boards.categories:
        found["ranks"] = partial(heatmaps.ranks, boards=boards, top=top)
    if isinstance(report, Evaluation):
        if report.growth is not None:
            found["growth"] = partial(_growth, overall=report.growth)
        if report.routing is not None and report.routing.budgets is not None and report.routing.budgets.rows:
            found["budgets"] = partial(_budgets, budgets=report.routing.budgets)
    if report.choices:
        found["choices"] = partial(heatmaps.choices, report=report, top=top)
    if report.strengths is not None and report.strengths.categories:
        found["strengths"] = partial(heatmaps.strengths, report=report, top=top)
        if heatmaps.reliabilities(report.strengths):
            found["reliability"] = partial(heatmaps.reliability, report=report, top=top)
    return found


def svg(draw: Callable[[Figure], None], name: str) -> str:
    """One plot as an SVG element; equal figures give equal bytes."""
    # No date, and ids from a fixed salt.
    with rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "font.size": 9, "text.parse_math": False}):
        figure = Figure(figsize=(8, 4.2), layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        with warnings.catch_warnings():
            # The browser's fonts draw the text; matplotlib's own only measure it.
            warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    # Several drawings share a page, where ids must be unique.
    text = re.sub(r'id="([^"]+)"', rf'id="{name}-\1"', text[text.index("<svg") :])
    return re.sub(r'(url\(#|href="#)', rf"\1{name}-", text)


def save(name: str, report: BaseReport, path: Path, top: int | None = TOP) -> None:
    """One plot as a file, in the format that the path's suffix names."""
    with rc_context({"font.size": 9, "text.parse_math": False}):
        figure = Figure(figsize=(8, 4.2), layout="constrained")
        plots_of(report, top)[name](figure)
        plotting.save(figure, path)


def replacement(figure: Figure, swap: Replacement) -> None:
    """How often the new model is preferred, by category."""
    axes, entries = figure.subplots(), [swap.overall, *swap.categories]
    figure.set_size_inches(8, 1.2 + 0.3 * len(entries))
    for verdict, (colour, marker) in VERDICTS.items():
        some = [(i, entry) for i, entry in enumerate(entries) if entry.verdict == verdict]
        if some:
            rate = np.array([entry.win_rate for _, entry in some])
            ends = np.array([(entry.low, entry.high) for _, entry in some])
            spread = np.maximum([rate - ends[:, 0], ends[:, 1] - rate], 0)
            axes.errorbar(rate, [i for i, _ in some], xerr=spread, fmt=marker, color=colour, label=verdict)
    axes.axvline(0.5, color=GREY, linewidth=0.8)
    axes.set_yticks(range(len(entries)), [entry.category for entry in entries])
    axes.invert_yaxis()
    axes.set_xlabel(f"how often {swap.new} is preferred to {swap.old}, with 95% intervals over prompts")
    axes.legend(frameon=False, fontsize=8)


def _calibration(figure: Figure, curve: Calibration) -> None:
    axes = figure.subplots()
    figure.set_size_inches(5, 4.6)
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8)
    share = np.array(curve.weight) / sum(curve.weight)
    axes.scatter(curve.predicted, curve.came, s=20 + 1500 * share, color=BLUE, alpha=0.6)
    if curve.low is not None and curve.high is not None:
        came = np.array(curve.came)
        spread = np.maximum([came - curve.low, curve.high - came], 0)
        axes.errorbar(curve.predicted, came, yerr=spread, color=BLUE, linewidth=1)
    axes.set_xlabel("probability of the likeliest outcome")
    axes.set_ylabel("observed frequency")


def _categories(figure: Figure, of: Mapping[str, CategoryFigures]) -> None:
    axes, names = figure.subplots(), list(of)
    figure.set_size_inches(8, 1.4 + 0.34 * len(names))
    for i, (predictor, (colour, marker)) in enumerate(PREDICTORS.items()):
        cells = [of[name].predictors.get(predictor, {}).get("log_loss") for name in names]
        known = [cell for cell in cells if cell is not None]
        if len(known) < len(names):
            continue
        values = np.array([cell.value for cell in known])
        ends = np.array([(cell.low, cell.high) for cell in known])
        spread = np.maximum([values - ends[:, 0], ends[:, 1] - values], 0)
        y = np.arange(len(names)) + 0.16 * (i - 1.5)
        axes.errorbar(values, y, xerr=spread, fmt=marker, color=colour, label=predictor, markersize=5)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(y=0.02)
    axes.set_xlabel("log-loss of a vote, with 95% intervals over prompts")
    axes.legend(frameon=False)


def _leaderboards(figure: Figure, boards: Leaderboards, top: int | None) -> None:
    axes, shown = figure.subplots(), boards.aggregated[:top]
    names = [standing.model for standing in shown]
    figure.set_size_inches(8, 1.4 + 0.34 * len(names))
    kinds = (("aggregated", boards.aggregated, BLUE, "o"), ("marginal", boards.marginal, ORANGE, "^"))
    for i, (name, standings, colour, marker) in enumerate(kinds):
        if standings is None:
            continue
        of = {standing.model: standing for standing in standings}
        x = np.array([of[model].coefficient for model in names])
        ends = np.array([[of[model].low, of[model].high] for model in names], np.float64)
        y = np.arange(len(names)) + 0.2 * (i - 0.5)
        spread = np.nan_to_num(np.abs(ends - x[:, None])).T if np.isfinite(ends).any() else None
        axes.errorbar(x, y, xerr=spread, fmt=marker, color=colour, label=name)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(y=0.02)
    axes.set_xlabel(f"coefficient, with 95% intervals over prompts{heatmaps.cut(len(names), len(boards.aggregated))}")
    axes.legend(frameon=False)


def _growth(figure: Figure, overall: Growth) -> None:
    of = {"all prompts": overall, **(overall.categories or {})}
    across = min(len(of), 4)
    down = -(-len(of) // across)
    figure.set_size_inches(8, 4.2 if down == 1 else 1.2 + 2.4 * down)
    panels = figure.subplots(down, across, sharey=True, squeeze=False).ravel()
    for axes, (name, growth) in zip(panels, of.items(), strict=False):
        n = [row.prompts for row in growth.distances]
        axes.plot(n, [row.mean for row in growth.distances], "o-", color=BLUE, label="aggregated, over this many prompts")
        low, high = ([getattr(row, end) for row in growth.distances] for end in ("low", "high"))
        axes.fill_between(n, low, high, color=BLUE, alpha=0.2, linewidth=0)
        if growth.marginal_of_training is not None:
            axes.axhline(growth.marginal_of_training, color=ORANGE, linestyle="--", label="marginal, of the training votes")
        _log_scale(axes)
        axes.set_ylim(bottom=0)
        axes.set_title(heatmaps.short(name), fontsize=9)
    for axes in panels[len(of) :]:
        axes.remove()
    figure.supxlabel("prompts", fontsize=9)
    figure.supylabel("L1 distance of win rates\nfrom the votes' marginal leaderboard", fontsize=9)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)


def _budgets(figure: Figure, budgets: Budgets) -> None:
    axes, rows = figure.subplots(), budgets.rows
    for name, (colour, style, label) in ROUTERS.items():
        axes.plot(*_curve(rows, name), style, color=colour, label=label)
    for name, style in PROBES.items():
        if all(name in row.routers for row in rows):
            axes.plot(*_curve(rows, name), style, color=GREY, label=f"{name}, one budget over the batch")
    singles = {row.best_single.model: row.best_single for row in rows}
    for model, single in singles.items():
        axes.scatter(single.mean_cost, single.mean_score, facecolors="none", edgecolors="black", zorder=3)
        axes.annotate(model, (single.mean_cost, single.mean_score), xytext=(5, -8), textcoords="offset points", fontsize=7)
    _log_scale(axes)
    axes.set_xlabel(f"mean cost ({budgets.unit})" if budgets.unit else "mean cost")
    axes.set_ylabel("mean true score")
    axes.legend(frameon=False, fontsize=8)


def _log_scale(axes: Axes) -> None:
    """A log axis with plain numbers at powers of ten, or at finer steps on a short axis. Matplotlib's own labels are formulas,
    which are switched off: model names must not be read as such."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    narrow = high < 30 * low
    axes.xaxis.set_major_locator(LogLocator(10, (1, 2, 3, 5, 7) if high < 4 * low else (1, 2, 5) if narrow else (1,)))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def _curve(rows: Sequence[BudgetRow], name: str) -> tuple[list[float], list[float]]:
    return [row.routers[name].mean_cost for row in rows], [row.routers[name].mean_score for row in rows]

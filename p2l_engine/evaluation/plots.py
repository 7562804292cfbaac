"""The report's plots, each drawn into a matplotlib figure from the report's own figures."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from p2l_engine import plot

BLUE, GREEN, GOLD, GREY, RED = "#3b6ea5", "#5a9a68", "#b8860b", "#888888", "#b0413e"
PREDICTORS = {"p2l": BLUE, "category": GREEN, "marginal": GOLD, "constant": GREY}
ROUTERS = {"batch": (BLUE, "router, one budget over the batch"), "prompt": (GREEN, "router, the budget for each prompt")}
PROBES = {"ridge": ":", "knn": "--", "mlp": "-."}


def has(report: dict[str, Any], name: str) -> bool:
    """Whether the report holds what the plot of that name shows."""
    if name == "budgets":
        return bool(report.get("routing", {}).get("budgets", {}).get("rows"))
    if name == "reliability":
        return any("reliability" in entry for entry in report.get("strengths", {}).get("categories", {}).values())
    if name == "ranks":
        return bool(report.get("leaderboards", {}).get("categories"))
    if name in ("calibration", "categories"):
        return bool(report.get("votes", {}).get(name))
    return bool(report.get(name))


def svg(draw: Callable[[Figure, dict[str, Any]], None], report: dict[str, Any], name: str) -> str:
    """One plot as an SVG element; the same figures give the same bytes."""
    # No date, and ids from a fixed salt.
    with rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "font.size": 9, "text.parse_math": False}):
        figure = Figure(figsize=(8, 4.2), layout="constrained")
        draw(figure, report)
        buffer = io.StringIO()
        with warnings.catch_warnings():
            # The browser's fonts draw the text; matplotlib's own only measure it.
            warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
            figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    # Several drawings share a page: their ids must not meet.
    text = re.sub(r'id="([^"]+)"', rf'id="{name}-\1"', text[text.index("<svg") :])
    return re.sub(r'(url\(#|href="#)', rf"\1{name}-", text)


def save(name: str, report: dict[str, Any], path: Path) -> None:
    """One plot as a file of its own, of the kind that the path's suffix names."""
    with rc_context({"font.size": 9, "text.parse_math": False}):
        figure = Figure(figsize=(8, 4.2), layout="constrained")
        PLOTS[name](figure, report)
        plot.save(figure, path)


def _calibration(figure: Figure, report: dict[str, Any]) -> None:
    curve, axes = report["votes"]["calibration"], figure.subplots()
    figure.set_size_inches(5, 4.6)
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8)
    share = np.array(curve["weight"]) / sum(curve["weight"])
    axes.scatter(curve["predicted"], curve["came"], s=20 + 1500 * share, color=BLUE, alpha=0.6)
    came = np.array(curve["came"])
    spread = np.maximum([came - curve["low"], curve["high"] - came], 0)
    axes.errorbar(curve["predicted"], came, yerr=spread, color=BLUE, linewidth=1)
    axes.set_xlabel("probability of the likeliest outcome")
    axes.set_ylabel("how often it came")


def _categories(figure: Figure, report: dict[str, Any]) -> None:
    of, axes = report["votes"]["categories"], figure.subplots()
    names = list(of)
    figure.set_size_inches(8, 1.4 + 0.34 * len(names))
    for i, (predictor, colour) in enumerate(PREDICTORS.items()):
        cells = [of[name].get(predictor, {}).get("log_loss") for name in names]
        if any(cell is None for cell in cells):
            continue
        values = np.array([[cell["value"], cell["low"], cell["high"]] for cell in cells])
        spread = np.maximum(np.abs(values[:, 1:] - values[:, :1]).T, 0)
        axes.errorbar(
            values[:, 0], np.arange(len(names)) + 0.16 * (i - 1.5), xerr=spread, fmt="o", color=colour, label=predictor
        )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("log-loss of a vote, with 95% intervals over prompts")
    axes.legend(frameon=False)


def _leaderboards(figure: Figure, report: dict[str, Any]) -> None:
    axes, boards = figure.subplots(), report["leaderboards"]
    names = [place["model"] for place in boards["aggregated"]]
    figure.set_size_inches(8, 1.4 + 0.34 * len(names))
    for i, (name, colour) in enumerate((("aggregated", BLUE), ("marginal", GOLD))):
        if name not in boards:
            continue
        of = {place["model"]: place for place in boards[name]}
        x = np.array([of[model]["coefficient"] for model in names])
        ends = np.array([[of[model]["low"], of[model]["high"]] for model in names])
        y = np.arange(len(names)) + 0.2 * (i - 0.5)
        axes.errorbar(x, y, xerr=np.abs(ends - x[:, None]).T, fmt="o", color=colour, label=name)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("coefficient, with 95% intervals over prompts")
    axes.legend(frameon=False)


def _growth(figure: Figure, report: dict[str, Any]) -> None:
    whole = report["growth"]
    of = {"all prompts": whole, **whole.get("categories", {})}
    across = min(len(of), 4)
    down = -(-len(of) // across)
    figure.set_size_inches(8, 4.2 if down == 1 else 1.2 + 2.4 * down)
    panels = figure.subplots(down, across, sharey=True, squeeze=False).ravel()
    for axes, (name, growth) in zip(panels, of.items(), strict=False):
        rows = growth["distances"]
        n = [row["prompts"] for row in rows]
        axes.plot(n, [row["mean"] for row in rows], "o-", color=BLUE, label="aggregated over so many prompts")
        axes.fill_between(n, [row["low"] for row in rows], [row["high"] for row in rows], color=BLUE, alpha=0.2, linewidth=0)
        if "marginal_of_training" in growth:
            axes.axhline(growth["marginal_of_training"], color=GOLD, linestyle="--", label="marginal, of the training votes")
        _log_scale(axes)
        axes.set_ylim(bottom=0)
        axes.set_title(_short(name), fontsize=9)
    for axes in panels[len(of) :]:
        axes.remove()
    figure.supxlabel("prompts", fontsize=9)
    figure.supylabel("L1 distance of wins\nto the votes' marginal leaderboard", fontsize=9)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)


def _budgets(figure: Figure, report: dict[str, Any]) -> None:
    axes, budgets = figure.subplots(), report["routing"]["budgets"]
    for name, (colour, label) in ROUTERS.items():
        axes.plot(*_curve(budgets["rows"], name), "o-", color=colour, label=label)
    for name, style in PROBES.items():
        if all(name in row for row in budgets["rows"]):
            axes.plot(*_curve(budgets["rows"], name), style, color=GREY, label=f"{name}, one budget over the batch")
    singles = {row["best_single"]["model"]: row["best_single"] for row in budgets["rows"]}
    for model, entry in singles.items():
        axes.scatter(entry["mean_cost"], entry["mean_score"], facecolors="none", edgecolors="black", zorder=3)
        axes.annotate(model, (entry["mean_cost"], entry["mean_score"]), xytext=(5, -8), textcoords="offset points", fontsize=7)
    _log_scale(axes)
    axes.set_xlabel(f"mean cost ({budgets['unit']})" if budgets["unit"] else "mean cost")
    axes.set_ylabel("mean true score")
    axes.legend(frameon=False, fontsize=8)


def _log_scale(axes: Axes) -> None:
    """Powers of ten, or 1, 2, 5 where there are few of them, as plain numbers: matplotlib's own labels are formulas, and names
    in these plots must not be read as such."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    narrow = high < 30 * low
    axes.xaxis.set_major_locator(LogLocator(10, (1, 2, 3, 5, 7) if high < 4 * low else (1, 2, 5) if narrow else (1,)))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def _curve(rows: list[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    return [row[name]["mean_cost"] for row in rows], [row[name]["mean_score"] for row in rows]


def _ranks(figure: Figure, report: dict[str, Any]) -> None:
    boards = report["leaderboards"]
    models = [place["model"] for place in boards["aggregated"]]
    rank = {name: {place["model"]: place["rank"] for place in places} for name, places in boards["categories"].items()}
    values = np.array([[of[model] for of in rank.values()] for model in models], np.float64)
    _heat(figure, values, models, list(rank), "rank within the category", 1, "Blues_r", 1, 1.6 * len(models))


def _choices(figure: Figure, report: dict[str, Any]) -> None:
    of, models = report["choices"], report["checkpoint"]["models"]
    share = np.array(list(of.values())).T
    shown = np.flatnonzero(share.mean(1) >= 0.01)  # as in the paper
    _heat(figure, share[shown], [models[m] for m in shown], list(of), "share of the category's prompts, %", 100, "Blues", 0, 1)


def _strengths(figure: Figure, report: dict[str, Any]) -> None:
    of = report["strengths"]
    _heat(figure, *_by_model(of, "win_rate"), f"win rate against {of['reference']}, %", 100, "RdYlGn", 0, 1)


def _reliability(figure: Figure, report: dict[str, Any]) -> None:
    _heat(figure, *_by_model(report["strengths"], "reliability"), "sigmoid of the coefficient, %", 100, "RdYlGn", 0, 1)


def replacement(figure: Figure, swap: dict[str, Any]) -> None:
    axes, entries = figure.subplots(), [swap["overall"], *swap["categories"]]
    figure.set_size_inches(8, 1.2 + 0.3 * len(entries))
    colours = {"better": GREEN, "worse": RED, "unclear": GREY}
    for i, entry in enumerate(entries):
        spread = [[max(entry["win_rate"] - entry["low"], 0)], [max(entry["high"] - entry["win_rate"], 0)]]
        axes.errorbar(entry["win_rate"], i, xerr=spread, fmt="o", color=colours[entry["verdict"]])
    axes.axvline(0.5, color=GREY, linewidth=0.8)
    axes.set_yticks(range(len(entries)), [entry["category"] for entry in entries])
    axes.invert_yaxis()
    axes.set_xlabel(f"how often {swap['new']} is preferred to {swap['old']}, with 95% intervals over prompts")


def _short(name: str) -> str:
    return name if len(name) <= 28 else f"{name[:27]}…"


def _by_model(of: dict[str, Any], figure: str) -> tuple[Any, list[str], list[str]]:
    categories = list(of["categories"])
    models = list(of["categories"][categories[0]][figure])
    values = [[of["categories"][category][figure][model]["value"] for category in categories] for model in models]
    return np.array(values), models, categories


def _heat(
    figure: Figure,
    values: Any,
    rows: list[str],
    columns: list[str],
    label: str,
    times: float,
    colours: str,
    low: float,
    high: float,
) -> None:
    figure.set_size_inches(2.8 + 0.55 * len(columns), 2.2 + 0.3 * len(rows))
    axes = figure.subplots()
    image = axes.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto")
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            dark = np.dot(image.to_rgba(value)[:3], (0.299, 0.587, 0.114)) < 0.45
            colour = "white" if dark else "black"
            axes.text(j, i, f"{times * value:.0f}", ha="center", va="center", fontsize=7, color=colour)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks(range(len(columns)), [_short(name) for name in columns], rotation=40, ha="right")
    axes.set_title(label, fontsize=9, loc="left")


PLOTS: dict[str, Callable[[Figure, dict[str, Any]], None]] = {
    "calibration": _calibration,
    "categories": _categories,
    "leaderboards": _leaderboards,
    "ranks": _ranks,
    "growth": _growth,
    "budgets": _budgets,
    "choices": _choices,
    "strengths": _strengths,
    "reliability": _reliability,
}

"""Plots, for people who would rather look than read. Needs the extra ``cli`` (matplotlib)."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from p2l_engine import routing
from p2l_engine.leaderboard import Leaderboard
from p2l_engine.routing import Frontier
from p2l_engine.routing.arrays import Float64

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)


def leaderboard(board: Leaderboard, title: str, path: str | Path) -> None:
    """A bar chart of coefficients and, beside it, win rates, from best to worst, written to ``path``."""
    from matplotlib.figure import Figure

    names = [place.model for place in board]
    figure = Figure(figsize=(11, 1.2 + 0.32 * len(names)), layout="constrained")
    rates = [100 * place.win_rate for place in board if place.win_rate is not None]
    panels = [([place.coefficient for place in board], "coefficient")]
    panels += [(rates, "win rate against the opponents, %")] if rates else []
    left, *rest = np.atleast_1d(figure.subplots(1, len(panels), sharey=True)).tolist()
    ends = [
        (place.coefficient - place.low, place.high - place.coefficient)
        for place in board
        if place.low is not None and place.high is not None
    ]
    spread = np.clip(np.array(ends), 0, None).T if len(ends) == len(names) else None
    for axes, (values, label) in zip((left, *rest), panels, strict=True):
        more = {"xerr": spread, "ecolor": "#888888"} if axes is left else {}
        bars = axes.barh(names, values, color="#3b6ea5" if axes is left else "#5a9a68", **more)
        axes.bar_label(bars, fmt="%.2f" if axes is left else "%.1f", padding=3, fontsize=8)
        axes.set_xlabel(label)
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
        axes.axvline(0 if axes is left else 50, color="#888888", linewidth=0.8, zorder=0)
    left.invert_yaxis()
    figure.suptitle(title, fontsize=10, x=0.01, ha="left", parse_math=False)
    save(figure, path)


def frontier(
    curve: Frontier, v: Float64, costs: Float64, names: Sequence[str], unit: str, title: str, path: str | Path
) -> None:
    """Cost against win rate, as in the paper's Figure 4: the batch budget's curve, the per-prompt budget's below it, and the
    single models as open circles. v [N, M] and costs [M] are those of the curve."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    thin = curve.thinned()
    axes.plot(thin.cost, 100 * thin.value, color="#b8860b", linewidth=2, label="router, one budget over the batch")
    least = float(np.broadcast_to(costs, v.shape).min(axis=1).max())
    budgets = np.linspace(least, max(float(costs.max()), least), 60)
    each = [routing.solve_budget(v, costs, float(budget)) for budget in budgets]
    axes.plot(
        [p.cost.mean() for p in each], [100 * p.value.mean() for p in each],
        color="#3b6ea5", linestyle="--", label="router, the same budget for each prompt",
    )  # fmt: skip
    axes.scatter(
        curve.model_cost, 100 * curve.model_value, facecolors="none", edgecolors="black", label="one model for all", zorder=3
    )
    for name, x, y in zip(names, curve.model_cost, 100 * curve.model_value, strict=True):
        axes.annotate(name, (x, y), xytext=(5, -3), textcoords="offset points", fontsize=7, parse_math=False)
    axes.set_xlabel(f"mean cost ({unit})", parse_math=False)
    axes.set_ylabel("mean win rate against the opponents, %")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left", parse_math=False)
    save(figure, path)


def save(figure: Figure, path: str | Path) -> None:
    """Writes the figure, in the kind that the path's suffix names."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        figure.savefig(path, dpi=150)
    lacking = [w for w in seen if "missing from font" in str(w.message)]
    if lacking:
        logger.warning("%s: the plot's font lacks %d of its characters, which are drawn as boxes", path, len(lacking))
    for w in seen:
        if w not in lacking:
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)

"""The plots of ``leaderboard``, ``frontier``, ``calibrate`` and ``eval --adapt``. Needs the extra ``cli`` (matplotlib)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from p2l_engine import routing
from p2l_engine.leaderboard import Leaderboard
from p2l_engine.learning.source_curves import SourcePoint
from p2l_engine.plotting import BLUE, GREY, ORANGE, YELLOW, save
from p2l_engine.reports import Calibration, Standing
from p2l_engine.routing import Frontier
from p2l_engine.routing.arrays import Float64

COLOURS = 8  # models that lines in one panel can show


def leaderboard(standings: Sequence[Standing], title: str, path: str | Path) -> None:
    """A bar chart of coefficients, with the ends that their intervals have, and of win rates, from best to worst."""
    names = [standing.model for standing in standings]
    figure = Figure(figsize=(11, 1.2 + 0.32 * len(names)), layout="constrained")
    rates = [100 * standing.win_rate for standing in standings if standing.win_rate is not None]
    panels = [([standing.coefficient for standing in standings], "coefficient")]
    panels += [(rates, "win rate against the opponents, %")] if rates else []
    left, *rest = np.atleast_1d(figure.subplots(1, len(panels), sharey=True)).tolist()
    ends = np.array([(standing.low, standing.high) for standing in standings], np.float64)
    away = np.abs(ends - np.array([[standing.coefficient] for standing in standings]))
    spread = np.nan_to_num(away).T if np.isfinite(ends).any() else None
    for axes, (values, label) in zip((left, *rest), panels, strict=True):
        more = {"xerr": spread, "ecolor": GREY} if axes is left else {}
        bars = axes.barh(names, values, color=BLUE if axes is left else YELLOW, **more)
        axes.bar_label(bars, fmt="%.2f" if axes is left else "%.1f", padding=3, fontsize=8)
        axes.set_xlabel(label)
        axes.margins(x=0.12, y=0.01)
        axes.spines[["top", "right"]].set_visible(False)
        axes.axvline(0 if axes is left else 50, color=GREY, linewidth=0.8, zorder=0)
    left.invert_yaxis()
    figure.suptitle(title, fontsize=10, x=0.01, ha="left", parse_math=False)
    save(figure, path)


def frontier(
    curve: Frontier,
    v: Float64,
    costs: Float64,
    names: Sequence[str],
    unit: str,
    title: str,
    path: str | Path,
    named: Collection[str] | None = None,
) -> None:
    """Mean cost and win rate, as in the paper's Figure 4: the batch budget's curve, the per-prompt budget's below it, and the
    single models as circles. v [N, M] and costs, [M] or [N, M], are those of the curve. named: the models to label (None: all);
    of many models, only where there is space."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    thin = curve.thinned()
    axes.plot(thin.cost, 100 * thin.value, color=ORANGE, linewidth=2, label="router, one budget over the batch")
    least = float(np.broadcast_to(costs, v.shape).min(axis=1).max())
    budgets = np.linspace(least, max(float(costs.max()), least), 60)
    each = [routing.solve_budget(v, costs, float(budget)) for budget in budgets]
    axes.plot(
        [p.cost.mean() for p in each], [100 * p.value.mean() for p in each],
        color=BLUE, linestyle="--", label="router, the same budget for each prompt",
    )  # fmt: skip
    axes.scatter(
        curve.model_cost, 100 * curve.model_value, facecolors="none", edgecolors="black", label="one model for all", zorder=3
    )
    rows = zip(names, curve.model_cost.tolist(), (100 * curve.model_value).tolist(), strict=True)
    labelled = sorted((row for row in rows if named is None or row[0] in named), key=lambda row: -row[2])
    taken: list[tuple[float, float]] = []
    for name, x, y in labelled:
        right, up = axes.transData.transform((x, y)).tolist()
        # Of many models, the best ones have labels and the others only where there is space.
        if len(labelled) < len(names) and any(abs(right - a) < 220 and abs(up - b) < 12 for a, b in taken):
            continue
        taken.append((right, up))
        axes.annotate(name, (x, y), xytext=(5, -3), textcoords="offset points", fontsize=7, parse_math=False)
    axes.set_xlabel(f"mean cost ({unit})", parse_math=False)
    axes.set_ylabel("mean win rate against the opponents, %")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left", parse_math=False)
    save(figure, path)


def reliability(before: Calibration, after: Calibration, values: bool, path: str | Path) -> None:
    """How often the likeliest outcome came (or the mean value) by what was predicted, before and after a calibration, with 95%
    intervals over prompts; the size of a point is its share of the votes."""
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    ends = [of for curve in (before, after) for of in (curve.predicted, curve.came)]
    low, high = (0.0, 1.0) if not values else (min(map(min, ends)), max(map(max, ends)))
    for axes, curve, colour, title in ((left, before, ORANGE, "before"), (right, after, BLUE, "after")):
        axes.plot([low, high], [low, high], color=GREY, linewidth=0.8, zorder=0)
        came, share = np.array(curve.came), np.array(curve.weight) / sum(curve.weight)
        if curve.low is not None and curve.high is not None:
            spread = np.maximum([came - curve.low, curve.high - came], 0)
            axes.errorbar(curve.predicted, came, yerr=spread, fmt="none", color=colour, linewidth=1)
        axes.scatter(curve.predicted, came, s=12 + 600 * share, color=colour, alpha=0.7)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("predicted value" if values else "probability of the likeliest outcome")
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylabel("mean value" if values else "how often it came")
    if not values:
        least = min(min(curve.predicted) for curve in (before, after))
        left.set_xlim(max(0.0, least - 0.05), 1.02)
        left.set_ylim(-0.02, 1.05)
    save(figure, path)


def over_time(boards: Mapping[str, Mapping[str, Leaderboard]], top: int | None, path: str | Path) -> None:
    """Coefficients by period with their intervals, a panel for each group; the models of each panel are those that lead
    its last period, at most eight."""
    columns = min(len(boards), 3)
    lines = -(-len(boards) // columns)
    figure = Figure(figsize=(max(5.0 * columns, 7.0), 3.4 * lines), layout="constrained")
    panels = np.atleast_1d(figure.subplots(lines, columns, squeeze=False)).ravel().tolist()
    for axes, (group, of) in zip(panels, boards.items(), strict=False):
        periods = list(of)
        models = [standing.model for standing in of[periods[-1]]][: min(top or COLOURS, COLOURS)]
        for i, model in enumerate(models):
            standings = [next(one for one in of[period] if one.model == model) for period in periods]
            x = np.arange(len(periods)) + 0.05 * (i - len(models) / 2)
            y = np.array([one.coefficient for one in standings])
            ends = np.array([(one.low, one.high) for one in standings], np.float64)
            spread = np.nan_to_num(np.maximum(np.abs(ends - y[:, None]), 0)).T
            axes.errorbar(
                x, y, yerr=spread, fmt="o-", color=f"C{i}", markersize=3.5, linewidth=1.2, elinewidth=0.8, label=model
            )
        axes.set_xticks(range(len(periods)), periods, rotation=30, ha="right", fontsize=8)
        axes.set_title(group, fontsize=10, loc="left", parse_math=False)
        axes.spines[["top", "right"]].set_visible(False)
        for text in axes.legend(fontsize=7, frameon=False, bbox_to_anchor=(1, 1), loc="upper left").get_texts():
            text.set_parse_math(False)
    for axes in panels[len(boards) :]:
        axes.set_visible(False)
    panels[0].set_ylabel("coefficient, with 95% intervals over prompts")
    save(figure, path)


def source_curves(points: Sequence[SourcePoint], path: str | Path) -> None:
    """Log-loss by votes of each left-out source, with 95% intervals, a panel for each; and that of the rows that were learned
    without the other sources' votes."""
    names = list(dict.fromkeys(point.source for point in points))
    columns = min(len(names), 3)
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(max(3.6 * columns, 5.0), 3.2 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel().tolist()
    for axes, name in zip(panels, names, strict=False):
        of = [point for point in points if point.source == name]
        x = [max(point.votes, 3) for point in of]
        loss, spread = [point.loss for point in of], [1.96 * point.loss_error for point in of]
        axes.errorbar(
            x, loss, yerr=spread, fmt="o-", color=BLUE, markersize=3.5, linewidth=1.2, label="after the other sources"
        )
        alone, apart = [point.loss + point.help for point in of], [1.96 * point.help_error for point in of]
        axes.errorbar(x, alone, yerr=apart, fmt="s--", color=ORANGE, markersize=3.5, linewidth=1.2, label="these votes alone")
        axes.set_xscale("log")
        axes.set_xticks(x, [f"{point.votes:,}" for point in of], fontsize=7, rotation=45)
        axes.minorticks_off()
        axes.set_title(name, fontsize=9, loc="left", parse_math=False)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    panels[0].legend(frameon=False, fontsize=7)
    figure.supxlabel("votes of the source", fontsize=9)
    figure.supylabel("log-loss of its held-out votes", fontsize=9)
    save(figure, path)

"""The plot of ``p2l-engine replay``. Needs the extra ``cli`` (matplotlib)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing

from p2l_engine.plotting import BLUE, GREY, ORANGE, save
from p2l_engine.replay.report import ReplayReport, shown_figure
from p2l_engine.reports import Figure

LABEL, NEAR = 7.0, (110.0, 13.0)  # pixels: from a point to its name's middle; names that are nearer than that overlap


def plane(report: ReplayReport, path: str | Path) -> None:
    """Policies on the plane of cost and value, with intervals; a line through those that no other one beats. Policies of
    unknown cost, and refused ones, are named above. Costs are the log's, or where it has none, the catalogs'."""
    drawing = Drawing(figsize=(9, 5.5), layout="constrained")
    axes = drawing.subplots()
    points: list[tuple[str, Figure, Figure]] = []
    left_out = []
    for of in report.policies:
        value, cost = shown_figure(of.value), shown_figure(of.cost)
        if cost is None and of.expected_cost is not None:
            cost = Figure(of.expected_cost, of.expected_cost, of.expected_cost)
        if value is None or cost is None:
            left_out.append(f"{of.name} ({'refused' if of.verdict == 'refused' else 'cost unknown'})")
        else:
            points.append((of.name, cost, value))
    best = _frontier([(cost.value, value.value) for _, cost, value in points])
    if len(best) > 1:
        line = np.array([(points[i][1].value, points[i][2].value) for i in best])
        axes.step(line[:, 0], line[:, 1], where="post", color=ORANGE, linewidth=1.2, label="not beaten at this cost", zorder=1)
    for i, (_, cost, value) in enumerate(points):
        label = None if i else f"policy, {report.level:.0%} interval"
        axes.errorbar(
            cost.value, value.value, xerr=_ends(cost), yerr=_ends(value), fmt="o", markersize=5,
            color=BLUE, ecolor=GREY, elinewidth=0.9, capsize=2, zorder=2, label=label,
        )  # fmt: skip
    axes.margins(x=0.1, y=0.1)
    axes.set_xlabel("mean cost of a decision")
    axes.set_ylabel("mean score" if report.of == "score" else "win rate against the log's choices")
    _label(axes, points)
    axes.spines[["top", "right"]].set_visible(False)
    if points:
        drawing.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    exact = any(of.verdict == "exact" for of in report.policies)
    title = f"{report.rows:,} prompts" if exact else f"{report.rows:,} decisions, {report.with_reward:,} with feedback"
    if left_out:
        title += f"; not drawn: {', '.join(left_out)}"
    drawing.suptitle(title, fontsize=10, x=0.01, ha="left", parse_math=False, wrap=True)
    save(drawing, path)


def _label(axes: Axes, points: Sequence[tuple[str, Figure, Figure]]) -> None:
    """The policies' names, each above its point, or below it where an earlier one is in the way."""
    taken: list[tuple[float, float]] = []
    for name, cost, value in points:
        x, y = axes.transData.transform((cost.value, value.value)).tolist()
        above = not any(abs(x - a) < NEAR[0] and abs(y + LABEL - b) < NEAR[1] for a, b in taken)
        taken.append((x, y + LABEL if above else y - 2 * LABEL))
        beside = (6.0, 5.0 if above else -11.0)
        where = (cost.value, value.value)
        axes.annotate(name, where, xytext=beside, textcoords="offset points", fontsize=8, parse_math=False)


def _frontier(points: list[tuple[float, float]]) -> list[int]:
    """The points (cost, value) that no other one beats, by rising cost."""
    found: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not found or points[i][1] > points[found[-1]][1]:
            found.append(i)
    return found


def _ends(figure: Figure) -> list[list[float]]:
    away = np.nan_to_num(np.array([[figure.value - figure.low], [figure.high - figure.value]]), posinf=0.0)
    return [[float(x)] for (x,) in away.clip(0.0)]

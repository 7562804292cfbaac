"""The plot of ``p2l-engine replay``. Needs the extra ``cli`` (matplotlib)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.transforms import Bbox

from p2l_engine.plotting import BLUE, GREY, ORANGE, save
from p2l_engine.replay.report import ReplayReport, shown_figure
from p2l_engine.reports import Figure

GAP, STEPS = 4.0, range(0, 240, 12)  # pixels: from a point to its name, and how much farther away it may be
LONGEST = 40  # characters of a name that are shown


def plane(report: ReplayReport, path: str | Path) -> None:
    """Writes ``drawn`` to a file."""
    save(drawn(report), path)


def drawn(report: ReplayReport) -> Drawing:
    """Policies on the plane of cost and value, with intervals; a line through those that no other one beats. Policies of
    unknown cost, and refused ones, are named above. Costs are the log's; where it has none of any policy, those expected by the
    first policy's catalog and by others of its unit: amounts of different units, or spent and expected, are not compared."""
    drawing = Drawing(figsize=(9, 5.5), layout="constrained")
    axes = drawing.subplots()
    points: list[tuple[str, Figure, Figure]] = []
    left_out = []
    spent = any(of.cost for of in report.policies)
    unit = next((of.unit for of in report.policies if of.value and of.unit is not None), None)
    for of in report.policies:
        value, cost = shown_figure(of.value), shown_figure(of.cost)
        if not spent and of.expected_cost is not None and of.unit == unit:
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
    axes.set_xlabel("mean cost of a decision" if spent or unit is None else f"mean expected cost of a decision, {unit}")
    axes.set_ylabel("mean score" if report.of == "score" else "win rate against the log's choices")
    axes.spines[["top", "right"]].set_visible(False)
    if points:
        drawing.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    exact = any(of.verdict == "exact" for of in report.policies)
    title = f"{report.rows:,} prompts" if exact else f"{report.rows:,} decisions, {report.with_reward:,} with feedback"
    if left_out:
        title += f"; not drawn: {', '.join(left_out)}"
    drawing.suptitle(title, fontsize=10, x=0.01, ha="left", parse_math=False, wrap=True)
    _label(drawing, axes, points)
    return drawing


def _label(drawing: Drawing, axes: Axes, points: Sequence[tuple[str, Figure, Figure]]) -> None:
    """The policies' names, each where it covers no other name and no point, as near to its own as that allows; a line leads to
    one that is farther away."""
    drawing.draw_without_rendering()  # the layout, from which positions follow
    places = [axes.transData.transform((cost.value, value.value)) for _, cost, value in points]
    taken = [Bbox.from_bounds(x - GAP / 2, y - GAP / 2, GAP, GAP) for x, y in places]
    for (name, cost, value), (x, y) in zip(points, places, strict=True):
        shown = name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"
        text = axes.text(0, 0, shown, fontsize=8, parse_math=False, transform=None, in_layout=False)
        size = text.get_window_extent()
        boxes = [
            Bbox.from_bounds(x + (GAP + aside if right else -GAP - aside - size.width), low, size.width, size.height)
            for step in STEPS
            for aside, low in (
                (step / 3, y + GAP + step),
                (step / 3, y - GAP - step - size.height),
                (step, y - size.height / 2),
            )
            for right in (True, False)
        ]
        inside = [box for box in boxes if axes.bbox.x0 <= box.x0 and axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1
                  and box.x1 <= drawing.bbox.x1]  # fmt: skip
        box = next((box for box in inside if box.count_overlaps(taken) == 0), boxes[0])
        taken.append(box)
        text.remove()
        near = (min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1))
        offset = ((box.x0 - x) * 72 / drawing.dpi, (box.y0 - size.y0 - y) * 72 / drawing.dpi)
        where = (cost.value, value.value)
        axes.annotate(
            shown, where, offset, textcoords="offset points", fontsize=8, parse_math=False, in_layout=False,
            annotation_clip=False,
        )  # fmt: skip
        if np.hypot(near[0] - x, near[1] - y) > 3 * GAP:
            axes.annotate(
                "", where, ((near[0] - x) * 72 / drawing.dpi, (near[1] - y) * 72 / drawing.dpi), textcoords="offset points",
                arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 3}, in_layout=False,
            )  # fmt: skip


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

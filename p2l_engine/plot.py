"""Plots, for people who would rather look than read. Needs the extra ``cli`` (matplotlib)."""

from __future__ import annotations

from pathlib import Path

from p2l_engine.leaderboard import Leaderboard


def leaderboard(board: Leaderboard, title: str, path: str | Path) -> None:
    """A bar chart of coefficients and, beside it, win rates, from best to worst, written to ``path``."""
    from matplotlib.figure import Figure

    names = [place.model for place in board]
    figure = Figure(figsize=(11, 1.2 + 0.32 * len(names)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, values, label in (
        (left, [place.coefficient for place in board], "coefficient"),
        (right, [100 * place.win_rate for place in board], "win rate against the opponents, %"),
    ):
        bars = axes.barh(names, values, color="#3b6ea5" if axes is left else "#5a9a68")
        axes.bar_label(bars, fmt="%.2f" if axes is left else "%.1f", padding=3, fontsize=8)
        axes.set_xlabel(label)
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
        axes.axvline(0 if axes is left else 50, color="#888888", linewidth=0.8, zorder=0)
    left.invert_yaxis()
    figure.suptitle(title, fontsize=10, x=0.01, ha="left", parse_math=False)
    figure.savefig(path, dpi=150)

"""What ``p2l-engine eval`` prints of a report."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

LEFT = {"figure", "choice", "category", "verdict", "best single model"}


def show(report: dict[str, Any], out: Console, strengths: bool) -> None:
    """The tables; strengths: those by category too, which are long."""
    sizes = report["held_out"]
    title = f"{sizes['votes']:,} votes on {sizes['prompts']:,} prompts ({report['checkpoint']['dtype']})"
    if "value_figures" in report:
        table = _table(title, "figure", "value")
        for name, value in report["value_figures"].items():
            table.add_row(name.replace("_", " "), f"{value:.4f}")
        out.print(table)
        return
    overall = report["votes"]["overall"]
    table = _table(f"{title}; 95% intervals over prompts", "figure", *overall)
    for figure in overall["p2l"]:
        cells = (_interval(of.get(figure), "{:.4f} ({:.3f} to {:.3f})") for of in overall.values())
        table.add_row(figure.replace("_", " "), *cells)
    out.print(table)
    if "routing" in report:
        _routing(report["routing"], out)
    if strengths and "strengths" in report:
        _strengths(report["strengths"], out)
    for swap in report.get("replacements", []):
        table = _table(f"{swap['new']} in place of {swap['old']}", "category", "prompts", "preferred to the old one", "verdict")
        for entry in (swap["overall"], *swap["categories"]):
            rate = f"{entry['win_rate']:.1%} ({entry['low']:.1%} to {entry['high']:.1%})"
            table.add_row(Text(entry["category"]), str(entry["prompts"]), rate, entry["verdict"])
        out.print(table)


def _routing(routing: dict[str, Any], out: Console) -> None:
    table = _table("mean true score of the chosen model", "choice", "mean score", "points over the best single model", "s.e.")
    for name, entry in sorted(routing["choices"].items(), key=lambda item: item[1]["mean_score"]):
        points, error = f"{entry['points_over_best_single']:+.2f}", f"{entry['standard_error_points']:.2f}"
        table.add_row(name.replace("_", " "), f"{entry['mean_score']:.4f}", points, error)
    out.print(table)
    rows = routing.get("budgets", {}).get("rows", [])
    if not rows:
        return
    unit = routing["budgets"]["unit"]
    others = [name for name in rows[0] if name not in ("budget", "best_single")]
    title = f"mean true score (mean cost) under a budget{f', in {unit}' if unit else ''}"
    table = _table(title, "budget", "best single model", *(name.replace("_", " ") for name in others))
    for row in rows:
        single = row["best_single"]
        cells = (f"{row[name]['mean_score']:.4f} ({row[name]['mean_cost']:.3g})" for name in others)
        table.add_row(f"{row['budget']:g}", Text(f"{single['model']} {single['mean_score']:.4f}"), *cells)
    out.print(table)


def _strengths(strengths: dict[str, Any], out: Console) -> None:
    kinds = {"win_rate": f"win rate against {strengths['reference']}", "reliability": "reliability: sigmoid of the coefficient"}
    for kind, title in kinds.items():
        of = {name: entry for name, entry in strengths["categories"].items() if kind in entry}
        if not of:
            continue
        models = next(iter(of.values()))[kind]
        table = _table(f"{title}; 95% intervals over prompts", "category", "prompts", *models)
        for name, entry in of.items():
            cells = (_interval(entry[kind][model], "{:.0%} ({:.0%} to {:.0%})") for model in models)
            table.add_row(Text(name), str(entry["prompts"]), *cells)
        out.print(table)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=Text(title), title_justify="left")
    for name in columns:
        table.add_column(Text(name), justify="left" if name in LEFT else "right")
    return table


def _interval(figure: dict[str, float] | None, form: str) -> str:
    return "" if figure is None else form.format(figure["value"], figure["low"], figure["high"])

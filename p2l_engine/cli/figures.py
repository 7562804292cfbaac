"""What ``p2l-engine eval`` and ``p2l-engine strengths`` print of a report."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

LEFT = {"verdict", "best single model"}  # as is every first column


def show(report: dict[str, Any], out: Console, strengths: bool) -> None:
    """The tables of an evaluation; strengths: those by category too, which are long."""
    sizes = report["held_out"]
    title = f"{sizes['votes']:,} votes on {sizes['prompts']:,} prompts ({report['checkpoint']['dtype']})"
    overall = report["value_figures" if "value_figures" in report else "votes"]["overall"]
    table = _table(f"{title}; 95% intervals over prompts", "figure", *overall)
    for figure in overall["p2l"]:
        cells = (_interval(of.get(figure), "{:.4f} ({:.3f} to {:.3f})") for of in overall.values())
        table.add_row(figure.replace("_", " "), *cells)
    out.print(table)
    if "routing" in report:
        _routing(report["routing"], out)
    show_strengths(report, out, by_category=strengths)


def show_strengths(report: dict[str, Any], out: Console, by_category: bool = True) -> None:
    """Strengths by category, and what each replacement makes better and worse."""
    if by_category and "strengths" in report:
        _strengths(report["strengths"], out)
    for swap in report.get("replacements", []):
        table = _table(f"{swap['new']} in place of {swap['old']}", "category", "prompts", "preferred to the old one", "verdict")
        for entry in (swap["overall"], *swap["categories"]):
            rate = f"{entry['win_rate']:.1%} ({entry['low']:.1%} to {entry['high']:.1%})"
            table.add_row(Text(entry["category"]), str(entry["prompts"]), rate, entry["verdict"])
        out.print(table)


def _routing(routing: dict[str, Any], out: Console) -> None:
    from p2l_engine.evaluation.routed import BESIDE  # wants the extra "train", which other commands do not

    table = _table("mean true score of the chosen model", "choice", "mean score", "points over the best single model", "s.e.")
    for name, entry in sorted(routing["choices"].items(), key=lambda item: item[1]["mean_score"]):
        points, error = f"{entry['points_over_best_single']:+.2f}", f"{entry['standard_error_points']:.2f}"
        table.add_row(name.replace("_", " "), f"{entry['mean_score']:.4f}", points, error)
    out.print(table)
    rows = routing.get("budgets", {}).get("rows", [])
    if not rows:
        return
    unit = routing["budgets"]["unit"]
    others = [name for name in rows[0] if name not in BESIDE]
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
        cells = {
            name: {m: _interval(entry[kind][m], "{:.0%} ({:.0%} to {:.0%})") for m in models} for name, entry in of.items()
        }
        title = f"{title}; 95% intervals over prompts"
        if len(models) <= len(of):
            table = _table(title, "category", "prompts", *models)
            for name, entry in of.items():
                table.add_row(Text(name), str(entry["prompts"]), *cells[name].values())
        else:  # what there is more of goes down the page
            table = _table(title, "model", *(f"{name} ({entry['prompts']})" for name, entry in of.items()))
            for model in models:
                table.add_row(Text(model), *(row[model] for row in cells.values()))
        out.print(table)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=Text(title), title_justify="left")
    for i, name in enumerate(columns):
        table.add_column(Text(name), justify="left" if i == 0 or name in LEFT else "right")
    return table


def _interval(figure: dict[str, float] | None, form: str) -> str:
    return "" if figure is None else form.format(figure["value"], figure["low"], figure["high"])

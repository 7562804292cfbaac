"""The tables that ``p2l-engine eval`` and ``p2l-engine strengths`` print. They fit a terminal of 80 columns: rows are models or
figures, few have intervals (``--json`` and ``--html`` have all), and wide tables are printed in blocks of columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from p2l_engine.cli.top import cut
from p2l_engine.reports import Evaluation, Figure, Figures, Replacement, Report, RoutingFigures, Strengths

NAME = 23  # characters of a name: two of them, three numbers and the space between fit 80 columns
NARROW = 4  # characters for a percentage under a category's number, and the space before it


def show(report: Evaluation, out: Console, strengths: bool, top: int | None) -> None:
    """The tables of an evaluation; strengths: also those by category. top: models in a table, None: all."""
    held_out, values = report.held_out, report.value_figures
    overall = report.votes.overall if report.votes is not None else values.overall if values is not None else {}
    title = f"{held_out.votes:,} votes on {held_out.prompts:,} prompts ({report.checkpoint.dtype})"
    _overall(f"{title}; 95% intervals over prompts", overall, out)
    if report.routing is not None:
        _routing(report.routing, out)
    if strengths:
        show_strengths(report, out, top)
    show_replacements(report.replacements or (), out)


def show_strengths(report: Report, out: Console, top: int | None) -> None:
    """Win rates, and for grounded models reliability, by category."""
    of = report.strengths
    if of is None:
        return
    wins = {name: entry.win_rate for name, entry in of.categories.items()}
    reliability = {name: entry.reliability for name, entry in of.categories.items() if entry.reliability is not None}
    models = report.ranked(next(iter(wins.values())))
    shown = models[:top]
    note = f"{cut(len(shown), len(models))}; intervals: --json, --html"
    numbered = not _names_fit(of, shown, out.width)
    if numbered:
        _legend(of, out)
    _by_category(f"win rate against {of.reference}, %{note}", wins, shown, of, numbered, out)
    if reliability:
        _by_category(f"reliability: sigmoid of the coefficient, %{note}", reliability, shown, of, numbered, out)


def show_replacements(swaps: Sequence[Replacement], out: Console) -> None:
    """What each replacement makes better and worse."""
    for swap in swaps:
        table = _table("category", "prompts", "preferred, %", "interval", "verdict")
        for entry in (swap.overall, *swap.categories):
            rate, interval = f"{100 * entry.win_rate:.1f}", f"{100 * entry.low:.1f} to {100 * entry.high:.1f}"
            table.add_row(_name(entry.category), str(entry.prompts), rate, interval, entry.verdict)
        _print(f"{swap.new} in place of {swap.old}: how often it is preferred", table, out)


def _overall(title: str, overall: Mapping[str, Figures], out: Console) -> None:
    names = ("p2l", *(name for name in overall if name != "p2l"))
    table = _table("figure", "p2l", "interval", *names[1:])
    for figure, of_p2l in overall["p2l"].items():
        rest = (_value(overall[name].get(figure)) for name in names[1:])
        table.add_row(figure.replace("_", " "), _value(of_p2l), f"{of_p2l.low:.3f} to {of_p2l.high:.3f}", *rest)
    _print(title, table, out)


def _routing(routing: RoutingFigures, out: Console) -> None:
    table = _table("choice", "mean score", "gain", "s.e.")
    for name, entry in sorted(routing.choices.items(), key=lambda item: item[1].mean_score):
        gain, error = f"{entry.points_over_best_single:+.2f}", f"{entry.standard_error_points:.2f}"
        table.add_row(name.replace("_", " "), f"{entry.mean_score:.4f}", gain, error)
    _print(f"mean true score of the chosen model; gain: points over {routing.best_single_model}", table, out)
    if routing.budgets is None or not routing.budgets.rows:
        return
    rows, unit = routing.budgets.rows, routing.budgets.unit
    title = f"mean true score under a budget{f', in {unit}' if unit else ''} (single: the best model within it)"
    table = _table("budget", *rows[0].routers, "single", "model", dense=True)
    for row in rows:
        scores = (f"{of.mean_score:.3f}" for of in row.routers.values())
        single = row.best_single
        table.add_row(f"{row.budget:g}", *scores, f"{single.mean_score:.3f}", _name(single.model))
    _print(title, table, out)


def _legend(of: Strengths, out: Console) -> None:
    table = _table("no.", "category", "prompts", "best model", "wins, %")
    for number, (name, entry) in enumerate(of.categories.items(), 1):
        best = max(entry.win_rate, key=lambda model: entry.win_rate[model].value)
        wins = f"{100 * entry.win_rate[best].value:.0f}"
        table.add_row(str(number), _name(name), str(entry.prompts), _name(best), wins)
    _print(f"categories, and how often the best model wins against {of.reference}", table, out)


def _by_category(
    title: str, figures: Mapping[str, Figures], models: Sequence[str], of: Strengths, numbered: bool, out: Console
) -> None:
    headings = {
        name: str(i) if numbered else f"{name} ({entry.prompts})" for i, (name, entry) in enumerate(of.categories.items(), 1)
    }
    out.print(Text(title))
    for block in _blocks(list(figures), max((out.width - NAME - 4) // NARROW, 1) if numbered else len(figures)):
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 0) if numbered else (0, 1))
        table.add_column("model", no_wrap=True)
        for name in block:
            table.add_column(Text(headings[name]), justify="right", no_wrap=True, min_width=NARROW - 1)
        for model in models:
            table.add_row(_name(model), *(f"{100 * figures[name][model].value:.0f}" for name in block))
        out.print(table)


def _names_fit(of: Strengths, models: Sequence[str], width: int) -> bool:
    """Whether one table has room for the names of all categories."""
    first = max(min(len(model), NAME) for model in models)
    return first + 4 + sum(len(f"{name} ({entry.prompts})") + 3 for name, entry in of.categories.items()) <= width


def _blocks(names: Sequence[str], most: int) -> Iterator[Sequence[str]]:
    """Blocks of at most so many names, of nearly equal sizes."""
    count = -(-len(names) // most)
    size = -(-len(names) // count)
    for first in range(0, len(names), size):
        yield names[first : first + size]


def _table(*columns: str, dense: bool = False) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0) if dense else (0, 1))
    for i, name in enumerate(columns):
        left = i == 0 or name in ("verdict", "model", "category", "best model")
        table.add_column(Text(name), justify="left" if left else "right", no_wrap=True)
    return table


def _print(title: str, table: Table, out: Console) -> None:
    out.print(Text(title))  # a table's own title wraps at the table's width
    out.print(table)


def _name(name: str) -> Text:
    """A name of at most NAME characters: its middle is left out, as versions and sizes stand at the end."""
    flat, half = " ".join(name.split()), NAME // 2
    return Text(flat if len(flat) <= NAME else f"{flat[:half]}…{flat[half + 1 - NAME :]}")


def _value(figure: Figure | None) -> str:
    return "" if figure is None else f"{figure.value:.4f}"

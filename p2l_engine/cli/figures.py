"""The tables that ``p2l-engine eval`` and ``p2l-engine strengths`` print. They fit a terminal of 80 columns: rows are models or
figures, few have intervals (``--json`` and ``--html`` have all), and wide tables are printed in blocks of columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from p2l_engine.cli.inputs import flat
from p2l_engine.cli.table import LEAST, print_table, shortened
from p2l_engine.cli.top import cut
from p2l_engine.reports import (
    BaseReport,
    CategoryStrengths,
    DtypeFigures,
    Evaluation,
    Figure,
    Figures,
    Replacement,
    RoutingFigures,
    Strengths,
)
from p2l_engine.reports.dtypes import too_much

NARROW = 4  # characters for a percentage under a category's number, and the space before it


def show(report: Evaluation, out: Console, strengths: bool, top: int | None) -> None:
    """The tables of an evaluation; strengths: also those by category. top: models in a table, None: all."""
    held_out, values = report.held_out, report.value_figures
    overall = report.votes.overall if report.votes is not None else values.overall if values is not None else {}
    title = f"{held_out.votes:,} votes on {held_out.prompts:,} prompts ({report.checkpoint.dtype})"
    _overall(f"{title}; 95% intervals over prompts", overall, out)
    if report.routing is not None:
        _routing(report.routing, out)
    if report.dtypes:
        _dtypes(report.dtypes, out)
    if strengths:
        show_strengths(report, out, top)
    show_replacements(report.replacements or (), out)


def show_strengths(report: BaseReport, out: Console, top: int | None) -> None:
    """Win rates, and for grounded models reliability, by category."""
    of = report.strengths
    if of is None:
        return
    wins = {name: entry.win_rate for name, entry in of.categories.items()}
    reliability = {name: entry.reliability for name, entry in of.categories.items() if entry.reliability is not None}
    models = report.ranked(next(iter(wins.values())))
    shown = models[:top]
    note = f"{cut(len(shown), len(models))}; intervals: --json, --html"
    layout = _layout(of, shown, out.width)
    if layout.numbered:
        _legend(of, out)
    _by_category(f"win rate against {of.reference}, %{note}", wins, shown, of, layout, out)
    if reliability:
        _by_category(f"reliability: sigmoid of the coefficient, %{note}", reliability, shown, of, layout, out)


def show_replacements(swaps: Sequence[Replacement], out: Console) -> None:
    """What each replacement makes better and worse."""
    for swap in swaps:
        rows = []
        for entry in (swap.overall, *swap.categories):
            rate, interval = f"{100 * entry.win_rate:.1f}", f"{100 * entry.low:.1f} to {100 * entry.high:.1f}"
            rows.append((entry.category, str(entry.prompts), rate, interval, entry.verdict))
        title = f"{swap.new} in place of {swap.old}: how often it is preferred"
        print_table(title, ("category", "prompts", "preferred, %", "interval", "verdict"), rows, out)


def _overall(title: str, overall: Mapping[str, Figures], out: Console) -> None:
    names = ("p2l", *(name for name in overall if name != "p2l"))
    rows = []
    for figure, of_p2l in overall["p2l"].items():
        rest = (_value(overall[name].get(figure)) for name in names[1:])
        rows.append((figure.replace("_", " "), _value(of_p2l), f"{of_p2l.low:.3f} to {of_p2l.high:.3f}", *rest))
    print_table(title, ("figure", "p2l", "interval", *names[1:]), rows, out)


def _routing(routing: RoutingFigures, out: Console) -> None:
    choices = []
    for name, entry in sorted(routing.choices.items(), key=lambda item: item[1].mean_score):
        gain, error = f"{entry.points_over_best_single:+.2f}", f"{entry.standard_error_points:.2f}"
        choices.append((name.replace("_", " "), f"{entry.mean_score:.4f}", gain, error))
    title = f"mean true score of the chosen model; gain: points over {routing.best_single_model}"
    print_table(title, ("choice", "mean score", "gain", "s.e."), choices, out)
    if routing.budgets is None or not routing.budgets.rows:
        return
    unit, rows = routing.budgets.unit, []
    title = f"mean true score under a budget{f', in {unit}' if unit else ''} (single: the best model within it)"
    for row in routing.budgets.rows:
        scores = (f"{of.mean_score:.3f}" for of in row.routers.values())
        rows.append((f"{row.budget:g}", *scores, f"{row.best_single.mean_score:.3f}", row.best_single.model))
    print_table(title, ("budget", *routing.budgets.rows[0].routers, "single", "model"), rows, out, dense=True)


def _dtypes(of: Sequence[DtypeFigures], out: Console) -> None:
    rows = []
    for each in of:
        other = "" if each.other_choice is None else f"{each.other_choice:.1%}"
        rest = (_number(number) for number in (each.deviation, each.largest, each.log_loss, each.mean_score))
        rows.append((each.dtype, *rest, other, _number(each.win_rate_lost, 3)))
    title = "what a dtype costs: theta beside float32's; points of win rate that another choice costs"
    print_table(title, ("dtype", "rms", "largest", "log-loss", "score", "other", "points"), rows, out)
    for each in of[1:]:
        problems = too_much(each, of[0])
        out.print(Text(f"{each.dtype}: {'; '.join(problems) if problems else 'within the limits'}"))


def _number(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _legend(of: Strengths, out: Console) -> None:
    rows = []
    for number, (name, entry) in enumerate(of.categories.items(), 1):
        best = max(entry.win_rate, key=lambda model: entry.win_rate[model].value)
        wins = f"{100 * entry.win_rate[best].value:.0f}"
        rows.append((str(number), name, str(entry.prompts), best, wins))
    title = f"categories, and how often the best model wins against {of.reference}"
    print_table(title, ("no.", "category", "prompts", "best model", "wins, %"), rows, out)


class _Layout(NamedTuple):
    """Of tables by category. width: characters of a model's name; numbered: whether the headings are numbers instead of the
    categories' names; in_block: categories of one table."""

    width: int
    numbered: bool
    in_block: int


def _layout(of: Strengths, models: Sequence[str], width: int) -> _Layout:
    """For a terminal of ``width`` columns."""
    longest, in_block = max(len(flat(model)) for model in models), len(of.categories)
    rest = 4 + sum(len(_heading(name, entry)) + 3 for name, entry in of.categories.items())
    numbered = rest + min(longest, LEAST) > width
    if numbered:
        most = max((width - 4 - min(longest, LEAST)) // NARROW, 1)
        in_block = -(-in_block // -(-in_block // most))  # blocks of nearly equal sizes
        rest = 4 + NARROW * in_block
    return _Layout(min(longest, max(width - rest, LEAST)), numbered, in_block)


def _by_category(
    title: str, figures: Mapping[str, Figures], models: Sequence[str], of: Strengths, layout: _Layout, out: Console
) -> None:
    width, numbered, in_block = layout
    headings = {name: str(i) if numbered else _heading(name, of.categories[name]) for i, name in enumerate(of.categories, 1)}
    out.print(Text(title))
    for first in range(0, len(figures), in_block):
        block = list(figures)[first : first + in_block]
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 0) if numbered else (0, 1))
        table.add_column("model", no_wrap=True)
        for name in block:
            table.add_column(Text(headings[name]), justify="right", no_wrap=True, min_width=NARROW - 1)
        for model in models:
            table.add_row(Text(shortened(model, width)), *(f"{100 * figures[name][model].value:.0f}" for name in block))
        out.print(table)


def _heading(name: str, entry: CategoryStrengths) -> str:
    return f"{name} ({entry.prompts})"


def _value(figure: Figure | None) -> str:
    return "" if figure is None else f"{figure.value:.4f}"

"""What a batch run says at its end, and its exit status."""

from __future__ import annotations

from typing import TYPE_CHECKING

from p2l_engine.cli.terminal import note, out

if TYPE_CHECKING:
    from p2l_engine.batch import Report

ALL_ROUTED, SOME_ERRORS, NONE_ROUTED = 0, 3, 4  # exit status
SHOWN = 3  # reasons


def status_of(report: Report) -> int:
    """The exit status: whether all rows were routed (also where there are none), some, or none."""
    if report.routed == report.rows:
        return ALL_ROUTED
    return SOME_ERRORS if report.routed else NONE_ROUTED


def print_summary(report: Report, unit: str, output: str, split: bool = False) -> None:
    """A table on stdout; on stderr what was used of an earlier run, and why rows were not routed. unit: of costs. output: the
    folder. split: whether rows with an error have files of their own."""
    from rich.filesize import decimal
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(output), title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("rows", f"{report.rows:,}")
    table.add_row("routed", f"{report.routed:,}")
    table.add_row("with an error", f"{report.rows - report.routed:,}")
    table.add_row("same prompt as an earlier row", f"{report.repeated:,}")
    if report.resumed:
        table.add_row("prompts computed by an earlier run", f"{report.resumed:,}")
    table.add_row(f"sum of expected costs ({unit})", f"{report.spend:,.6g}")
    for row, price in report.prices.items():
        table.add_row(Text(f"dual price of {row}: win rate per unit"), f"{price:.4g}")
    table.add_row("coefficients kept for other decisions", decimal(report.kept) if report.kept else "none")
    if report.seconds:
        table.add_row("seconds", f"{report.seconds['all']:,.1f}")
    if report.changed:
        passes = f"{report.computed:,} were computed" if report.computed else "no forward pass"
        note(f"decided again ({'; '.join(report.changed)}) from the coefficients of {report.resumed:,} prompts; {passes}")
    out().print(table)
    if report.routed < report.rows:
        count = "no row was" if not report.routed else f"{report.rows - report.routed:,} of {report.rows:,} rows were not"
        said = "the files errors-* say" if split else "the column error says"
        note(f"{count} routed, as {said}; {_commonest(report)}:", warning=True)
        for reason in report.reasons[:SHOWN]:
            note(f"  {reason.rows:,}: {reason.why} (first in {reason.where})", warning=True)


def _commonest(report: Report) -> str:
    count = len(report.reasons)
    return "the reasons" if count <= SHOWN else f"the {SHOWN} commonest of {count} reasons"

"""Tables on the terminal. Names in them are shortened only where it is too narrow."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from p2l_engine.cli.inputs import flat
from p2l_engine.cli.terminal import ellipsis, encodable

LEAST = 23  # characters of a name: two of them, three numbers and the space between fit 80 columns
NAMES = ("model", "policy", "category", "best model", "one model for all")  # headings of columns of names


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], out: Console, dense: bool = False) -> None:
    """A table under its title. All columns are aligned to the right but the first, those in ``NAMES``, and verdicts."""
    rows = [[encodable(cell) for cell in row] for row in rows]
    names = [i for i, column in enumerate(columns) if column in NAMES]
    width = max((len(flat(row[i])) for row in rows for i in names), default=LEAST)
    unbounded = out.options.update(width=sys.maxsize)
    table = _table(columns, rows, width, dense)
    while (excess := out.measure(table, options=unbounded).maximum - out.width) > 0 and width > LEAST:
        width = max(width - -(-excess // len(names)), LEAST)
        table = _table(columns, rows, width, dense)
    out.print(Text(encodable(title)))  # a table's own title wraps at the table's width
    out.print(table)


def shortened(name: str, width: int) -> str:
    """A name on one line of at most ``width`` characters: its middle is left out, as versions and sizes are at the end."""
    name, dots = encodable(flat(name)), ellipsis()
    half = (width - len(dots) + 1) // 2
    return name if len(name) <= width else f"{name[:half]}{dots}{name[half + len(dots) - width :]}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int, dense: bool) -> Table:
    """width: characters of a name at most."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0) if dense else (0, 1))
    for i, name in enumerate(columns):
        left = i == 0 or name in (*NAMES, "verdict")
        table.add_column(Text(name), justify="left" if left else "right", no_wrap=True)
    for row in rows:
        cells = (shortened(cell, width) if name in NAMES else cell for name, cell in zip(columns, row, strict=True))
        table.add_row(*map(Text, cells))
    return table

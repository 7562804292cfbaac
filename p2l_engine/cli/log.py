"""p2l-engine log."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from p2l_engine.cli.terminal import note, out, status

if TYPE_CHECKING:
    from p2l_engine.decision_log.record import Record
    from p2l_engine.decision_log.store import LogStore

Store = Annotated[
    str,
    typer.Option("--store", help="The log: an SQLite file, or the URL of a PostgreSQL database.", show_default=False),
]
Key = Annotated[str | None, typer.Option("--key", help="Only decisions of the key with this id.", show_default=False)]


def export(
    store: Store,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write; an earlier export in it is replaced.", show_default=False)
    ],
    since: Annotated[
        str | None,
        typer.Option(help="Only decisions from this time on, ISO 8601, UTC where it has no zone.", show_default=False),
    ] = None,
    until: Annotated[
        str | None, typer.Option(help="Only decisions before this time, written in the same way.", show_default=False)
    ] = None,
    key: Key = None,
) -> None:
    """Write the log's decisions, feedback, votes and scores as parquet files."""
    from p2l_engine.decision_log.export import export as write
    from p2l_engine.decision_log.store import Selection

    which = Selection(_seconds(since, "--since"), _seconds(until, "--until"), key)
    with _opened(store) as log, status("reading the log"):
        found = write(log, output, which)
    for name, rows in found.rows.items():
        out().print(f"{rows:9,}  {output / name}", markup=False, highlight=False, soft_wrap=True)
    _print_reasons(found.votes, "preferences that are no votes")
    _print_reasons(found.scores, "scores that were left out")


def delete(
    store: Store,
    key: Key = None,
    before: Annotated[
        str | None,
        typer.Option(help="Only decisions before this time, ISO 8601, UTC where it has no zone.", show_default=False),
    ] = None,
) -> None:
    """Delete the decisions of a key, or before a time, with their feedback. Asks nothing."""
    from p2l_engine.decision_log.log import BUSY
    from p2l_engine.decision_log.store import Selection

    if key is None and before is None:
        raise typer.BadParameter("expected one of them, or both", param_hint="--key, --before")
    which = Selection(None, _seconds(before, "--before"), key)
    with _opened(store) as log, status("deleting"):
        found, purged = log.delete(which), log.purge()
    out().print(f"deleted: {found.decisions:,} decisions, {found.feedback:,} pieces of feedback", highlight=False)
    if not purged:
        note(BUSY, warning=True)


def show(
    store: Store,
    n: Annotated[int, typer.Option("-n", min=1, help="How many.")] = 20,
) -> None:
    """Show the last decisions, the newest first."""
    from p2l_engine.cli.table import print_table

    with _opened(store) as log:
        records = log.recent(n)
    if not records:
        note("the log is empty")
        return
    columns = ("time (UTC)", "dec_", "model", "win", "USD", "ms", "outcome")
    print_table("the last decisions", columns, [_row(record) for record in records], out(), dense=True)


def _row(record: Record) -> tuple[str, ...]:
    cost = record.expected_cost if record.cost is None else record.cost
    about = "~" if record.cost is None or record.estimated else ""
    total = record.latency.get("total")
    return (
        f"{datetime.fromtimestamp(record.time, UTC):%m-%d %H:%M:%S}",
        record.id[4:12],
        record.model,
        "" if record.win_rate is None else f"{record.win_rate:.2f}",
        f"{about}{cost:.2g}",
        "" if total is None else f"{total:.0f}",
        record.outcome if record.status == 200 else f"{record.outcome} {record.status}",
    )


@contextmanager
def _opened(store: str) -> Iterator[LogStore]:
    """The log, which must be there. The database's errors are raised as OSError."""
    from sqlalchemy.exc import DBAPIError, SQLAlchemyError

    from p2l_engine.decision_log.store import LogStore

    try:
        log = LogStore(store, create=False)
        try:
            yield log
        finally:
            log.close()
    except SQLAlchemyError as error:
        why = str(error.orig) if isinstance(error, DBAPIError) else str(error)
        raise OSError(f"--store: {re.sub(r'//[^@/]*@', '//', why)}") from error


def _seconds(text: str | None, option: str) -> float | None:
    """Since 1970. Raises typer.BadParameter."""
    if text is None:
        return None
    try:
        time = datetime.fromisoformat(text)
        return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise typer.BadParameter(
            f"expected a time as 2026-01-31 or 2026-01-31T12:00Z, got {text!r}", param_hint=option
        ) from None


def _print_reasons(reasons: Counter[str], what: str) -> None:
    if reasons:
        note(f"{what}: {reasons.total():,}", warning=True)
    for reason, count in reasons.most_common():
        note(f"{count:9,}  {reason}", warning=True)

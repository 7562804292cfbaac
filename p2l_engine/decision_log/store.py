"""The log's store: decisions and feedback in SQLite or PostgreSQL. Its calls wait for the database."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import MetaData, Select, make_url, select, tuple_

from p2l_engine.decision_log import tables as sql
from p2l_engine.decision_log.record import Feedback, Record
from p2l_engine.decision_log.rows import escaped, feedback_of, feedback_row, record_of
from p2l_engine.spending.database import Database

PAGE = 200  # decisions that one transaction reads or deletes: others wait for it


@dataclass(frozen=True, slots=True)
class Selection:
    """Some decisions: since and until in seconds since 1970, of which the second is excluded; a key's id. None: all."""

    since: float | None = None
    until: float | None = None
    key: str | None = None


class Deleted(NamedTuple):
    """How many rows were deleted."""

    decisions: int
    feedback: int


class Said(NamedTuple):
    """Feedback and its number, which rises in the order in which an SQLite file took it."""

    number: int
    feedback: Feedback


class LogStore:
    """store: a path, or a URL of PostgreSQL. create: whether to make a log where there is none. timeout: seconds to wait for a
    lock.

    Raises ValueError where there is no log and none is to be made, and for tables of another program or version; every call
    raises SQLAlchemyError where the database fails.
    """

    def __init__(self, store: str | Path, create: bool = True, timeout: float = 5.0) -> None:
        if not create:
            _check_there(store)
        self._database = Database(store, sql.TABLES if create else MetaData(), fsync=False, timeout=timeout)
        with self._database.begin() as connection:
            if not sql.check_layout(connection):
                self._database.close()
                raise ValueError("store: expected a log of decisions, found none")
            self._insert = sql.InsertMissing(connection.dialect)

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Inserts rows of ``rows.row_of`` in one transaction, without those whose id is there."""
        with self._database.begin() as connection:
            self._insert(connection, rows)

    def get(self, ids: Sequence[str]) -> dict[str, Record]:
        """The decisions of these ids that there are."""
        with self._database.begin() as connection:
            rows = connection.execute(sql.BY_ID, {"ids": list(ids)}).mappings().all()
        return {row["id"]: record_of(row) for row in rows}

    def recent(self, n: int) -> list[Record]:
        """The last n decisions, the newest first."""
        with self._database.begin() as connection:
            rows = connection.execute(sql.RECENT, {"n": n}).mappings().all()
        return [record_of(row) for row in rows]

    def pages(self, which: Selection) -> Iterator[list[Record]]:
        """The decisions, oldest first, some at a time; each page is a transaction of its own, so that writers need not wait."""
        for rows in self._pages(select(sql.DECISION), which):
            yield [record_of(row) for row in rows]

    def latencies(self, which: Selection) -> Iterator[str]:
        """The JSON of each decision's latency."""
        for rows in self._pages(select(*sql.ORDER, sql.DECISION.c.latency), which):
            yield from (row["latency"] for row in rows)

    def feedback_on(self, ids: Sequence[str]) -> list[Feedback]:
        """What was said about these decisions, oldest first."""
        with self._database.begin() as connection:
            rows = connection.execute(sql.FEEDBACK_ON, {"ids": list(ids)}).mappings().all()
        return [feedback_of(row) for row in rows]

    def feedback_after(self, number: int, n: int) -> list[Said]:
        """The next ``n`` of a higher number at most, in order."""
        return self._said(sql.NUMBERED, {"number": number, "n": n})

    def said_of(self, ids: Sequence[str]) -> list[Said]:
        """What was said about these decisions, in order."""
        return self._said(sql.SAID_OF, {"ids": list(ids)})

    def waiting(self, number: int) -> tuple[int, float | None]:
        """How much feedback has a higher number, and the time of the oldest of it."""
        with self._database.begin() as connection:
            count, oldest = connection.execute(sql.WAITING, {"number": number}).one()
        return int(count), oldest

    def last_number(self) -> int:
        """The highest number that an SQLite file has given to feedback, of deleted ones too."""
        with self._database.begin() as connection:
            found = connection.exec_driver_sql("SELECT seq FROM sqlite_sequence WHERE name = 'log_feedback'").scalar()
        return int(found or 0)

    def scores_on(self, turns_hash: str, number: int, n: int) -> list[tuple[Feedback, Record]]:
        """The scores of a lower number on prompts of this hash, the newest first, ``n`` at most; with their decisions."""
        with self._database.begin() as connection:
            values = {"turns": escaped(turns_hash), "number": number, "n": n}
            rows = connection.execute(sql.SCORES_ON, values).mappings().all()
        names = [column.name for column in sql.FEEDBACK.c if column.name != "number"]
        return [(feedback_of({name: row[f"said_{name}"] for name in names}), record_of(row)) for row in rows]

    def _said(self, statement: Select[Any], values: dict[str, Any]) -> list[Said]:
        with self._database.begin() as connection:
            rows = connection.execute(statement, values).mappings().all()
        named = [{name: value for name, value in row.items() if name != "number"} for row in rows]
        return [Said(row["number"], feedback_of(values)) for row, values in zip(rows, named, strict=True)]

    def add_feedback(self, feedback: Feedback, key: str | None) -> None:
        """Raises LookupError where a decision is not there, or, for a key, is another's."""
        ids = [id for id in (feedback.decision, feedback.against) if id is not None]
        with self._database.begin() as connection:
            owners = {row.id: row.key for row in connection.execute(sql.OWNERS, {"ids": ids})}
            for name, id in zip(("id", "against"), ids, strict=False):
                if id not in owners or (key is not None and owners[id] != escaped(key)):
                    raise LookupError(f"{name}: no decision{'' if key is None else ' of this key'} has this id")
            connection.execute(sql.ADD_FEEDBACK, feedback_row(feedback))

    def delete(self, which: Selection) -> Deleted:
        """Deletes decisions, with all feedback that names them. Call ``purge`` afterwards."""
        total = Deleted(0, 0)
        while True:
            found = self.delete_page(which)
            total = Deleted(total.decisions + found.decisions, total.feedback + found.feedback)
            if found.decisions < PAGE:
                return total

    def delete_page(self, which: Selection) -> Deleted:
        """Deletes the oldest, ``PAGE`` of them at most, in one transaction."""
        oldest = _where(select(sql.DECISION.c.id), which).order_by(*sql.ORDER).limit(PAGE).with_for_update()
        with self._database.begin() as connection:
            if self._database.is_sqlite:
                connection.exec_driver_sql("PRAGMA secure_delete=ON")  # prompts must not stay in free pages
            ids = {"ids": list(connection.scalars(oldest))}
            if not ids["ids"]:
                return Deleted(0, 0)
            feedback = connection.execute(sql.DELETE_FEEDBACK, ids).rowcount
            return Deleted(connection.execute(sql.DELETE, ids).rowcount, feedback)

    def purge(self) -> bool:
        """Removes what was deleted from an SQLite file and its write-ahead log; False where others keep them busy."""
        return self._database.empty_log()

    def close(self) -> None:
        """Closes the connections."""
        self._database.close()

    def _pages(self, columns: Select[Any], which: Selection) -> Iterator[Sequence[Any]]:
        page = _where(columns, which).order_by(*sql.ORDER).limit(PAGE)
        last: tuple[float, str] | None = None
        while True:
            following = page if last is None else page.where(tuple_(*sql.ORDER) > last)
            with self._database.begin() as connection:
                rows = connection.execute(following).mappings().all()
            if rows:
                last = rows[-1]["time"], rows[-1]["id"]
                yield rows
            if len(rows) < PAGE:
                return


def _where(statement: Select[Any], which: Selection) -> Select[Any]:
    if which.since is not None:
        statement = statement.where(sql.DECISION.c.time >= which.since)
    if which.until is not None:
        statement = statement.where(sql.DECISION.c.time < which.until)
    return statement if which.key is None else statement.where(sql.DECISION.c.key == escaped(which.key))


def _check_there(store: str | Path) -> None:
    """Raises ValueError for a file that is missing, which SQLite would make."""
    path: str | Path | None = store
    if "://" in str(store):
        url = make_url(str(store))
        path = url.database or "" if url.get_backend_name() == "sqlite" else None
    if path is not None and not Path(path).is_file():
        raise ValueError(f"store: expected a log of decisions, {path} is no file")

"""The tables of the log and the statements on them. Texts hold no NUL and valid Unicode only: see ``rows``."""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    BindParameter,
    Boolean,
    Column,
    Connection,
    Dialect,
    Double,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    bindparam,
    delete,
    event,
    func,
    insert,
    inspect,
    or_,
    select,
)
from sqlalchemy.dialects import postgresql, sqlite

VERSION = 2  # of the tables; one more whenever a column changes
TABLES = MetaData()
LAYOUT = Table("log_layout", TABLES, Column("version", Integer, primary_key=True))
# A record's fields. turns, policy, candidates, attempts and latency are JSON.
DECISION = Table(
    "log_decision",
    TABLES,
    Column("id", Text, primary_key=True),
    Column("time", Double, nullable=False),
    Column("key", Text),
    Column("session", Text, nullable=False),
    Column("turns_hash", Text, nullable=False),
    Column("turns", Text),
    Column("api", Text, nullable=False),
    Column("asked", Text, nullable=False),
    Column("chosen", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("policy", Text, nullable=False),
    Column("propensity", Double, nullable=False),
    Column("propensity_error", Double, nullable=False),
    Column("candidates", Text, nullable=False),
    Column("win_rate", Double),
    Column("score", Double),
    Column("budget", Double),
    Column("expected_cost", Double, nullable=False),
    Column("cost", Double),
    Column("estimated", Boolean, nullable=False),
    Column("tokens_in", BigInteger),
    Column("tokens_cached", BigInteger),
    Column("tokens_out", BigInteger),
    Column("streamed", Boolean, nullable=False),
    Column("status", BigInteger, nullable=False),
    Column("outcome", Text, nullable=False),
    Column("attempts", Text, nullable=False),
    Column("latency", Text, nullable=False),
    Index("log_decision_time", "time", "id"),
    Index("log_decision_key", "key", "time", "id"),
    Index("log_decision_turns", "turns_hash"),
)
FEEDBACK = Table(
    "log_feedback",
    TABLES,
    Column("number", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("decision", Text, nullable=False),
    Column("time", Double, nullable=False),
    Column("score", Double),
    Column("against", Text),
    Column("preference", Text),
    Column("label", Text),
    Index("log_feedback_decision", "decision"),
    Index("log_feedback_against", "against"),
    sqlite_autoincrement=True,  # numbers of deleted rows are not used again
)


class InsertMissing:
    """Inserts the decisions whose id is not there yet. The statement goes to the driver as text: SQLAlchemy takes longer to
    look at each value than the database to write it."""

    def __init__(self, dialect: Dialect) -> None:
        made = sqlite.insert(DECISION) if dialect.name == "sqlite" else postgresql.insert(DECISION)
        compiled: Any = made.on_conflict_do_nothing().compile(dialect=dialect)
        self._text, self._order = str(compiled), compiled.positiontup  # None where the driver takes values by name

    def __call__(self, connection: Connection, rows: list[dict[str, Any]]) -> None:
        values: Any = rows if self._order is None else [tuple(row[name] for name in self._order) for row in rows]
        connection.exec_driver_sql(self._text, values)


# Every transaction locks rows in this order, so that none waits for another in a circle.
ORDER = (DECISION.c.time, DECISION.c.id)
AMONG: BindParameter[Any] = bindparam("ids", expanding=True)
BY_ID = select(DECISION).where(DECISION.c.id.in_(AMONG))
OWNERS = select(DECISION.c.id, DECISION.c.key).where(DECISION.c.id.in_(AMONG)).order_by(*ORDER).with_for_update(read=True)
RECENT = select(DECISION).order_by(DECISION.c.time.desc(), DECISION.c.id.desc()).limit(bindparam("n"))
ADD_FEEDBACK = insert(FEEDBACK)
FEEDBACK_ON = (
    select(*(column for column in FEEDBACK.c if column.name != "number"))
    .where(FEEDBACK.c.decision.in_(AMONG))
    .order_by(FEEDBACK.c.time, FEEDBACK.c.number)
)
NUMBERED = select(FEEDBACK).where(FEEDBACK.c.number > bindparam("number")).order_by(FEEDBACK.c.number).limit(bindparam("n"))
WAITING = select(func.count(), func.min(FEEDBACK.c.time)).where(FEEDBACK.c.number > bindparam("number"))
SAID_OF = select(FEEDBACK).where(FEEDBACK.c.decision.in_(AMONG)).order_by(FEEDBACK.c.number)
SCORES_ON = (
    select(*(column.label(f"said_{column.name}") for column in FEEDBACK.c), DECISION)
    .join(DECISION, DECISION.c.id == FEEDBACK.c.decision)
    .where(DECISION.c.turns_hash == bindparam("turns"), FEEDBACK.c.score.is_not(None), FEEDBACK.c.number < bindparam("number"))
    .order_by(FEEDBACK.c.number.desc())
    .limit(bindparam("n"))
)
DELETE = delete(DECISION).where(DECISION.c.id.in_(AMONG))
# Also what was said about other decisions against these: a preference needs both.
DELETE_FEEDBACK = delete(FEEDBACK).where(or_(FEEDBACK.c.decision.in_(AMONG), FEEDBACK.c.against.in_(AMONG)))


def check_layout(connection: Connection) -> bool:
    """Whether the store holds a log. Raises ValueError where its tables are another program's, or another version's."""
    inspector = inspect(connection)
    there = [table.name for table in TABLES.sorted_tables if inspector.has_table(table.name)]
    if not there:
        return False
    columns = {name: {column["name"] for column in inspector.get_columns(name)} for name in there}
    if columns.get(LAYOUT.name) == {"version"}:
        versions = connection.scalars(select(LAYOUT.c.version)).all()
        if versions != [VERSION]:
            got = " and ".join(map(str, versions)) or "none"
            raise ValueError(
                f"store: expected a log of layout {VERSION}, got {got}, which another version of p2l-engine wrote: "
                "export it with that version, and name another file"
            )
    if columns != {table.name: set(table.columns.keys()) for table in TABLES.sorted_tables}:
        raise ValueError(f"store: expected a log, got other tables of these names: {', '.join(there)}; name another file")
    return True


@event.listens_for(TABLES, "before_create")
def _check_first(_: MetaData, connection: Connection, **rest: Any) -> None:
    check_layout(connection)


@event.listens_for(TABLES, "after_create")
def _write_version(_: MetaData, connection: Connection, **rest: Any) -> None:
    if connection.scalar(select(LAYOUT.c.version)) is None:
        connection.execute(insert(LAYOUT), {"version": VERSION})

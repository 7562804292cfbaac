"""The tables of spend limits, and the statements on them."""

from __future__ import annotations

from typing import NamedTuple

from sqlalchemy import (
    JSON,
    BigInteger,
    BindParameter,
    Boolean,
    Column,
    Index,
    MetaData,
    Table,
    Text,
    Update,
    bindparam,
    cast,
    delete,
    func,
    insert,
    select,
    union_all,
    update,
)

TABLES = MetaData()
# The current window of each limit, or of each of its keys. seen: the latest time so far; due: when something next leaves it by
# itself, or earlier (NULL: nothing will); notices: {level: when it was announced}.
ACCOUNT = Table(
    "spend_account",
    TABLES,
    Column("name", Text, primary_key=True),
    Column("span", Text, nullable=False),
    Column("start", BigInteger, nullable=False),
    Column("seen", BigInteger, nullable=False),
    Column("spent", BigInteger, nullable=False),
    Column("held", BigInteger, nullable=False),
    Column("due", BigInteger),
    Column("notices", JSON, nullable=False),
)
# A reservation in one account. start: of its window; leaves: when it stops counting (NULL: never by itself, or it has).
HOLD = Table(
    "spend_hold",
    TABLES,
    Column("token", Text, primary_key=True),
    Column("account", Text, primary_key=True),
    Column("start", BigInteger, nullable=False),
    Column("made", BigInteger, nullable=False),
    Column("worst", BigInteger, nullable=False),
    Column("leaves", BigInteger),
    Column("expired", Boolean, nullable=False),
    Index("spend_hold_leaves", "account", "leaves"),
)
# What a rolling window's settled requests cost, by the time at which it leaves the window.
STEP = Table(
    "spend_step",
    TABLES,
    Column("account", Text, primary_key=True),
    Column("leaves", BigInteger, primary_key=True),
    Column("amount", BigInteger, nullable=False),
)
# What was spent in calendar windows that are over.
PAST = Table(
    "spend_past",
    TABLES,
    Column("account", Text, primary_key=True),
    Column("start", BigInteger, primary_key=True),
    Column("amount", BigInteger, nullable=False),
)

# Statements, built once: SQLAlchemy takes longer to build one than SQLite to run it. Except in SAVE, no parameter of
# an update has a column's name: it would set that column.
ONE: BindParameter[str] = bindparam("of")
LOCKED = select(ACCOUNT).order_by(ACCOUNT.c.name).with_for_update()
OF_TOKENS = HOLD.c.token.in_(bindparam("tokens", expanding=True))
NAMED = ACCOUNT.c.name.in_(bindparam("names", expanding=True))
HOLDING = ACCOUNT.c.name.in_(select(HOLD.c.account).where(OF_TOKENS))
BY_NAME, BY_TOKEN, BY_BOTH = LOCKED.where(NAMED), LOCKED.where(HOLDING), LOCKED.where(NAMED | HOLDING)
SERVER_TIME = cast(func.extract("epoch", func.clock_timestamp()) * 1_000_000, BigInteger)
SAVE = update(ACCOUNT).where(ACCOUNT.c.name == bindparam("of"))
RESERVE = insert(HOLD)
HOLDS = select(HOLD).where(OF_TOKENS)
CLOSE = delete(HOLD).where(HOLD.c.token == bindparam("of"))
GONE = (HOLD.c.account == ONE) & (HOLD.c.leaves <= bindparam("now"))
EXPIRED = select(HOLD.c.start, HOLD.c.worst).where(GONE)
EXPIRE = update(HOLD).where(GONE).values(leaves=None, expired=True)
OLD = (STEP.c.account == ONE) & (STEP.c.leaves <= bindparam("now"))
OLD_STEPS = select(func.sum(STEP.c.amount)).where(OLD)
DROP_STEPS = delete(STEP).where(OLD)
# What leaves an account by itself: the sum up to each time.
LEAVING = union_all(
    select(HOLD.c.leaves, HOLD.c.worst.label("amount"), HOLD.c.start).where(HOLD.c.account == ONE, HOLD.c.leaves.is_not(None)),
    select(STEP.c.leaves, STEP.c.amount, bindparam("began", type_=BigInteger)).where(STEP.c.account == ONE),
).subquery()
DUE = select(func.min(LEAVING.c.leaves))
SUMS = (
    select(LEAVING.c.leaves, func.sum(LEAVING.c.amount).over(order_by=LEAVING.c.leaves).label("total"))
    .where(LEAVING.c.start == bindparam("began", type_=BigInteger))
    .subquery()
)
FREES = select(func.min(SUMS.c.leaves)).where(SUMS.c.total >= bindparam("needed"))
OPEN = select(HOLD).order_by(HOLD.c.made, HOLD.c.token, HOLD.c.account)


class Sums(NamedTuple):
    """A table of sums of each account. by: the column that tells them apart; add: adds ``more`` to the sum of ``at``."""

    table: Table
    by: str
    add: Update


def _sums(table: Table, by: str) -> Sums:
    which = (table.c.account == ONE, table.c[by] == bindparam("at"))
    return Sums(table, by, update(table).where(*which).values(amount=table.c.amount + bindparam("more")))


PAST_SUMS, STEP_SUMS = _sums(PAST, "start"), _sums(STEP, "leaves")

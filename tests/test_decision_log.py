"""The log of decisions, on SQLite and on PostgreSQL."""

from __future__ import annotations

import json
import logging
import math
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import hypothesis
import pyarrow.parquet as pq
import pytest
from hypothesis import strategies as st
from sqlalchemy import create_engine, text
from sqlalchemy.exc import SQLAlchemyError

from p2l_engine.decision_log import log as logs
from p2l_engine.decision_log import store as log_store
from p2l_engine.decision_log.export import export
from p2l_engine.decision_log.log import DecisionLog
from p2l_engine.decision_log.record import Attempt, Record
from p2l_engine.decision_log.rows import escaped, record_of, row_of, unescaped
from p2l_engine.decision_log.store import Deleted, LogStore, Selection
from p2l_engine.feedback.models import feedback_model
from p2l_engine.votes import read
from tests.support import postgres, tiny
from tests.support.command import p2l_engine
from tests.support.records import START, new_id, record
from tests.support.training import largest_file, settings, weights

pytestmark = pytest.mark.slow  # many cases: all together take longer than the fast tests may

ALL = Selection()

texts = st.text(st.characters(exclude_categories=()), max_size=12)  # NUL and halves of surrogate pairs too
numbers = st.floats(allow_nan=False)
whole = st.integers(-(2**63), 2**63 - 1)
attempts = st.builds(Attempt, texts, texts, st.none() | st.integers(-1, 10**6), st.none() | texts, numbers)
records = st.builds(
    Record,
    id=st.uuids().map(lambda found: f"dec_{found.hex}"),
    time=st.floats(0, 2e11),
    key=st.none() | texts,
    session=texts,
    turns_hash=texts,
    turns=st.none() | st.lists(texts, max_size=3).map(tuple),
    policy=st.dictionaries(texts, numbers, max_size=3),
    propensity=numbers,
    propensity_error=numbers,
    candidates=st.lists(texts, max_size=3).map(tuple),
    win_rate=st.none() | numbers,
    score=st.none() | numbers | st.sampled_from([math.inf, -math.inf]),
    budget=st.none() | numbers,
    expected_cost=numbers,
    cost=st.none() | numbers,
    **{name: st.none() | whole for name in ("tokens_in", "tokens_cached", "tokens_out")},
    status=whole,
    attempts=st.lists(attempts, max_size=3).map(tuple),
    latency=st.dictionaries(texts, numbers, max_size=3),
    **{name: texts for name in ("api", "asked", "chosen", "model", "outcome")},
    **{name: st.booleans() for name in ("estimated", "streamed")},
)


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=[pytest.mark.store, pytest.mark.xdist_group("postgres")])])
def store(request, tmp_path):
    """An empty store."""
    if request.param == "sqlite":
        yield str(tmp_path / "serve.sqlite")
        return
    url = request.getfixturevalue("postgres_url")
    yield url
    postgres.empty(url)


@pytest.fixture
def sqlite(tmp_path):
    return str(tmp_path / "serve.sqlite")


def execute(store, *statements):
    """Runs SQL on the store, as another program would."""
    engine = create_engine(store if "://" in store else f"sqlite:///{store}")
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(text(statement))
    engine.dispose()


@contextmanager
def failing(store):
    """Within the block the store takes no records."""
    execute(store, "ALTER TABLE log_decision RENAME TO elsewhere")
    try:
        yield
    finally:
        execute(store, "ALTER TABLE elsewhere RENAME TO log_decision")


def stored(store):
    """All records of a store that is not open, oldest first."""
    opened = LogStore(store, create=False)
    found = [each for page in opened.pages(ALL) for each in page]
    opened.close()
    return found


def whole_pairs(value):
    """The value with two halves of a surrogate pair that meet as the character that they are halves of, as JSON has it."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
    if isinstance(value, tuple):
        return tuple(map(whole_pairs, value))
    if isinstance(value, dict):
        return {whole_pairs(name): each for name, each in value.items()}
    if isinstance(value, Attempt):
        return Attempt(*(whole_pairs(getattr(value, each.name)) for each in fields(value)))
    return value


def as_kept(given):
    return replace(
        given, **{n: whole_pairs(getattr(given, n)) for n in ("turns", "policy", "candidates", "attempts", "latency")}
    )


@hypothesis.given(records)
def test_a_record_is_the_same_after_its_row(given):
    row = row_of(given)
    for value in row.values():
        if isinstance(value, str):
            assert "\0" not in value
            value.encode()
    assert record_of(row) == as_kept(given)


@hypothesis.given(texts)
def test_an_escaped_text_comes_back(given):
    assert unescaped(escaped(given)) == given


@hypothesis.settings(max_examples=30)
@hypothesis.given(given=st.lists(records, max_size=5))
def test_hostile_records_come_back(store, given):
    given = [replace(each, id=new_id()) for each in given]  # examples share the store
    opened = LogStore(store)
    for each in given:
        opened.add([row_of(each)])
    found = opened.get([each.id for each in given])
    opened.close()
    assert found == {each.id: as_kept(each) for each in given}


def test_records_come_back(store):
    odd = record(
        2, turns=("a\0b", "日本 😀", ""), score=math.inf, attempts=(), policy={}, candidates=(), latency={}, key="\0\\u0000"
    )
    given = [record(1), odd, record(3, turns=(), time=0.0)]
    with DecisionLog(store) as log:
        for each in given:
            log.add(each)
        assert log.flush()
        assert [log.get(each.id) for each in given] == given
        assert log.recent(2) == [given[1], given[0]]
        assert log.get(new_id(9)) is None
        assert log.dropped == 0


def test_a_restart_continues_the_same_log(store):
    for number in range(3):
        with DecisionLog(store) as log:
            log.add(record(number))
    assert stored(store) == [record(number) for number in range(3)]


def test_a_record_that_is_still_in_memory_is_found(sqlite, monkeypatch):
    monkeypatch.setattr(logs, "PAUSE", 60.0)
    with DecisionLog(sqlite) as log:
        log.add(record(1))
        assert log.get(new_id(1)) == record(1)
        log.add(record(2))
        log.feedback(new_id(2), None, score=1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("win_rate", math.nan),
        ("tokens_in", 2**63),
        ("tokens_out", 1.5),
        ("time", -1.0),
        ("time", math.inf),
        ("id", "secret"),
        ("key", "secret" * 50),
        ("model", None),
        ("model", b"secret"),
        ("policy", {"a": "secret"} | {"b": object()}),
        ("latency", {"total": object()}),
    ],
)
def test_what_cannot_be_stored_is_counted_and_others_are_written(field, value, sqlite, caplog):
    with DecisionLog(sqlite) as log:
        log.add(record(1))
        log.add(replace(record(2), **{field: value}))
        log.add(record(3))
        assert log.flush()
        assert log.dropped == 1
    assert stored(sqlite) == [record(1), record(3)]
    assert [line.message.split(":")[1].strip() for line in caplog.records] == [field]
    assert "secret" not in caplog.text


def test_numbers_of_numpy_are_numbers(sqlite):
    import numpy as np

    given = record(
        1, win_rate=np.float32(0.5), policy={"alpha": np.float32(0.5)}, tokens_in=np.int64(7), estimated=np.bool_(True)
    )
    assert record_of(row_of(given)) == record(1, win_rate=0.5, policy={"alpha": 0.5}, tokens_in=7, estimated=True)


def test_many_threads(store):
    threads, each = 8, 150
    with DecisionLog(store) as log:

        def work(thread):
            for i in range(each):
                log.add(record(thread * each + i))
            log.feedback(new_id(thread * each + each - 1), None, label=f"of thread {thread}")

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, range(threads)))
        assert log.flush()
        assert log.dropped == 0
        last = [new_id(thread * each + each - 1) for thread in range(threads)]
        assert sorted(found.label for found in log._store.feedback_on(last)) == [f"of thread {i}" for i in range(threads)]
    assert stored(store) == [record(number) for number in range(threads * each)]


def test_a_store_that_fails_and_comes_back(store, caplog, monkeypatch):
    monkeypatch.setattr(logs, "RECORDS", 20)
    monkeypatch.setattr(logs, "LONGEST_PAUSE", 0.1)
    secret = ("a secret prompt",)
    with DecisionLog(store) as log:
        log.add(record(0, turns=secret))
        assert log.flush()
        with failing(store):
            log.add(record(1, turns=secret))
            assert not log.flush(0.3)  # taken from the queue
            for number in range(2, 50):
                log.add(record(number, turns=secret))
            assert not log.flush(0.3)
            assert log.dropped > 0
        assert log.flush()
        dropped = log.dropped
        log.add(record(60))
        assert log.flush()
        assert log.dropped == dropped
    found = stored(store)
    assert len(found) + dropped == 51
    assert found[:20] == [record(number, turns=secret) for number in range(20)]
    assert found[-1] == record(60)
    lines = [line.message for line in caplog.records if line.name.startswith("p2l_engine")]
    assert len(lines) == 3
    assert "store fails" in lines[0]
    assert "records are dropped" in lines[1]
    assert f"{dropped} records were dropped" in lines[2]
    assert secret[0] not in caplog.text


def test_a_second_failure_is_reported_again(sqlite, caplog, monkeypatch):
    monkeypatch.setattr(logs, "LONGEST_PAUSE", 0.1)
    with DecisionLog(sqlite) as log:
        for number in range(2):
            with failing(sqlite):
                log.add(record(number))
                assert not log.flush(0.3)
            assert log.flush()
    assert [("fails" in line.message) for line in caplog.records] == [True, False] * 2


def test_a_retention_that_fails_is_reported_once(sqlite, caplog, monkeypatch):
    monkeypatch.setattr(logs, "LONGEST_PAUSE", 0.02)
    calls = []

    def delete_page(self, which):
        calls.append(which)
        if len(calls) < 5:
            raise SQLAlchemyError("a secret")
        return Deleted(0, 0)

    monkeypatch.setattr(LogStore, "delete_page", delete_page)
    with DecisionLog(sqlite, retention=timedelta(days=1)) as log:
        _wait(lambda: len(calls) > 2)
        assert log.flush()
        _wait(lambda: len(calls) > 4)
        assert log.flush()
    assert [("store fails (SQLAlchemyError)" in line.message) for line in caplog.records] == [True, False]


def test_a_full_disk(sqlite, caplog, monkeypatch):
    monkeypatch.setattr(logs, "LONGEST_PAUSE", 0.1)
    with DecisionLog(sqlite) as log:
        log.add(record(0))
        assert log.flush()
        with largest_file(Path(f"{sqlite}-wal").stat().st_size):
            for number in range(1, 9):
                log.add(record(number, turns=("x" * 5000,)))
            assert not log.flush(0.5)
        assert log.flush()
        assert log.dropped == 0
    assert [each.id for each in stored(sqlite)] == [new_id(number) for number in range(9)]
    assert "the log's store fails (OperationalError: " in caplog.records[0].message


def test_a_store_that_another_program_locks(sqlite):
    with DecisionLog(sqlite) as log:
        other = sqlite3.connect(sqlite, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        log.add(record(1))
        assert not log.flush(0.2)
        other.execute("COMMIT")
        assert log.flush()
        other.close()
    assert stored(sqlite) == [record(1)]


@pytest.mark.store
@pytest.mark.xdist_group("postgres")
def test_connections_that_a_server_ends_are_made_again(postgres_url, monkeypatch):
    monkeypatch.setattr(logs, "LONGEST_PAUSE", 0.1)
    with DecisionLog(postgres_url) as log:
        log.add(record(1))
        assert log.flush()
        execute(postgres_url, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
        log.add(record(2))
        assert log.flush()
    assert stored(postgres_url) == [record(1), record(2)]
    postgres.empty(postgres_url)


def test_long_prompts_fill_the_queue(sqlite, monkeypatch):
    monkeypatch.setattr(logs, "CHARACTERS", 1000)
    monkeypatch.setattr(logs, "LONGEST_PAUSE", 0.1)
    with DecisionLog(sqlite) as log:
        with failing(sqlite):
            log.add(record(0))
            assert not log.flush(0.3)
            for number in range(1, 10):
                log.add(record(number, turns=("x" * 300,)))
        assert log.flush()
        log.add(record(20, turns=("x" * 300,)))
        assert log.flush()
        assert 4 <= 10 - log.dropped < 10
    assert stored(sqlite)[-1].id == new_id(20)


def test_closing_has_a_deadline(sqlite, caplog):
    log = DecisionLog(sqlite)
    with failing(sqlite):
        log.add(record(1))
        log.add(record(2))
        start = time.monotonic()
        log.close(0.3)
        assert time.monotonic() - start < 5
        assert log.dropped == 2
        assert "closed before 2 records were written" in caplog.text
        assert not log.flush(0.0)
        log._writer.join(10)
    assert stored(sqlite) == []


def test_a_closed_log_takes_nothing(sqlite, caplog):
    with DecisionLog(sqlite) as log:
        log.add(record(1))
    log.add(record(2))
    log.add(record(3))
    assert log.dropped == 2
    assert [line.message for line in caplog.records] == ["the log's queue is closed; records are dropped"]
    assert log.flush()
    log.close()
    assert stored(sqlite) == [record(1)]


@pytest.mark.slow
def test_what_was_written_survives_kill(store):
    for _ in range(2):  # the second process continues the file
        process = subprocess.Popen([sys.executable, "-m", "tests.support.records", store], stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            written = int(line)
            if written > 500:
                process.kill()
                break
        process.wait()
        with DecisionLog(store) as log:
            log.add(record(10**9))
        found = stored(store)
        assert found[:written] == [record(number) for number in range(written)]
        assert found[-1] == record(10**9)


def test_a_log_of_another_version_is_refused(store):
    DecisionLog(store).close()
    execute(store, "UPDATE log_layout SET version = 1")
    for create in (True, False):
        with pytest.raises(ValueError, match="expected a log of layout 2, got 1, which another version of p2l-engine wrote"):
            LogStore(store, create)


@pytest.mark.parametrize(
    "statements",
    [
        ["CREATE TABLE log_decision (id TEXT, prompt TEXT)"],
        ["CREATE TABLE log_layout (version INTEGER, name TEXT)"],
        ["CREATE TABLE log_layout (version INTEGER)", "INSERT INTO log_layout VALUES (2)"],
        ["CREATE TABLE log_layout (version INTEGER)"],
    ],
)
def test_tables_of_other_programs_are_refused_and_left_alone(store, statements):
    execute(store, *statements)
    with pytest.raises(ValueError, match="expected a log"):
        DecisionLog(store)
    with pytest.raises(ValueError, match="expected a log"):
        LogStore(store, create=False)
    if "://" not in store:
        tables = sqlite3.connect(store).execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        assert len(tables) == 1


def test_other_tables_may_be_in_the_store(store):
    execute(store, "CREATE TABLE other (id INTEGER)")
    DecisionLog(store).close()
    assert stored(store) == []


def test_reading_makes_no_log(tmp_path):
    for name in ("none.sqlite", "sqlite:///" + str(tmp_path / "none.sqlite")):
        with pytest.raises(ValueError, match="is no file"):
            LogStore(name if "://" in name else tmp_path / name, create=False)
    assert not list(tmp_path.iterdir())
    execute(str(tmp_path / "other.sqlite"), "CREATE TABLE other (id INTEGER)")
    with pytest.raises(ValueError, match="expected a log of decisions, found none"):
        LogStore(tmp_path / "other.sqlite", create=False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "expected one of score, label, or preference with against"),
        ({"score": 1, "label": "good"}, "expected one of"),
        ({"score": 1.01}, "score: expected a number in"),
        ({"score": math.nan}, "score: expected a number in"),
        ({"score": True}, "score: expected a number in"),
        ({"score": "secret"}, "score: expected a number in"),
        ({"label": ""}, "label: expected a text of 1 to 200"),
        ({"label": "secret" * 40}, "label: expected a text of 1 to 200"),
        ({"label": 3}, "label: expected a text of 1 to 200"),
        ({"preference": "this"}, "against: expected the id of a decision"),
        ({"against": new_id(2)}, "preference: expected one of this, other, tie, both_bad"),
        ({"preference": "secret", "against": new_id(2)}, "preference: expected one of"),
        ({"preference": ["this"], "against": new_id(2)}, "preference: expected one of"),
        ({"preference": "this", "against": new_id(1)}, "against: expected the id of another decision"),
        ({"preference": "this", "against": "secret"}, "against: expected the id of a decision, 'dec_'"),
    ],
)
def test_feedback_is_checked(given, message, sqlite):
    with DecisionLog(sqlite) as log:
        log.add(record(1))
        with pytest.raises(ValueError, match=message) as refused:
            log.feedback(new_id(1), None, **given)
        assert "secret" not in str(refused.value)
        assert log._store.feedback_on([new_id(1)]) == []


@pytest.mark.parametrize(
    "id", ["", "dec_", "dec_" + "g" * 32, "dec_" + "0" * 33, "dec_" + "0" * 32 + "\n", "' OR 1=1 --", None, 7]
)
def test_what_is_no_id_is_refused(id, sqlite):
    with DecisionLog(sqlite) as log:
        for call in (lambda: log.get(id), lambda: log.feedback(id, None, score=1)):
            with pytest.raises(ValueError, match="id: expected the id of a decision, 'dec_' and 32 hex digits"):
                call()


def test_feedback_is_kept(store):
    with DecisionLog(store) as log:
        for number in range(3):
            log.add(record(number, key="a" if number < 2 else "b"))
        before = time.time()
        made = [
            log.feedback(new_id(0), "a", score=0.25),
            log.feedback(new_id(0), "a", score=1),
            log.feedback(new_id(0), "a", label="too long\0 \ud800 日本"),
            log.feedback(new_id(0), "a", against=new_id(1), preference="both_bad"),
            log.feedback(new_id(0), None, against=new_id(2), preference="tie"),  # a server without keys
        ]
        assert log._store.feedback_on([new_id(0)]) == made
        assert all(before <= each.time <= time.time() for each in made)
        for id, against in ((new_id(2), None), (new_id(7), None), (new_id(0), new_id(2)), (new_id(0), new_id(7))):
            given = {"score": 1} if against is None else {"against": against, "preference": "this"}
            with pytest.raises(
                LookupError, match=f"{'id' if against is None else 'against'}: no decision of this key has this id"
            ):
                log.feedback(id, "a", **given)
        with pytest.raises(LookupError, match="id: no decision has this id"):
            log.feedback(new_id(7), None, score=1)
        assert len(log._store.feedback_on([new_id(number) for number in range(8)])) == len(made)


def test_deletion_takes_the_feedback_along(store, monkeypatch):
    monkeypatch.setattr(log_store, "PAGE", 3)
    with DecisionLog(store) as log:
        for number in range(20):
            log.add(record(number, key="ab"[number % 2]))
        for number in range(0, 18, 2):
            log.feedback(new_id(number), None, score=1)
            log.feedback(new_id(number), None, against=new_id(number + 1), preference="tie")
        log.feedback(new_id(18), None, label="stays")
        assert log.delete(key="b", before=datetime.fromtimestamp(START + 4, UTC)) == (2, 2)
        assert log.delete(key="b") == (8, 7)
        assert log.delete(key="b") == (0, 0)
        assert log.delete(before=datetime.fromtimestamp(START + 18, UTC).replace(tzinfo=None)) == (9, 9)
        assert [found.label for found in log._store.feedback_on([new_id(18)])] == ["stays"]
        with pytest.raises(ValueError, match="expected a key, a time before, or both"):
            log.delete()
        log.add(record(30, key="c"))
        assert log.delete(key="c") == (1, 0)  # from memory too
    assert stored(store) == [record(18, key="a")]


def test_nothing_of_a_deleted_prompt_is_left_in_the_file(tmp_path):
    with DecisionLog(tmp_path / "serve.sqlite") as log:
        for number in range(50):
            log.add(record(number, turns=("a secret prompt" * 100,)))
        log.delete(key="unknown")
        assert any(b"a secret prompt" in file.read_bytes() for file in tmp_path.iterdir())
        log.delete(before=datetime.now(UTC) + timedelta(days=3650))
    assert not any(b"a secret prompt" in file.read_bytes() for file in tmp_path.iterdir())


@pytest.mark.parametrize("how", ["another process", "this log", "retention"])
def test_nothing_of_a_deleted_prompt_is_left_beside_a_server_that_runs(how, tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "HOUR", 0.05)

    def left():
        return [file.name for file in tmp_path.iterdir() if b"a secret prompt" in file.read_bytes()]

    path, retention = tmp_path / "serve.sqlite", timedelta(days=1) if how == "retention" else None
    with DecisionLog(path) as running, DecisionLog(path, retention=retention) as log:
        for number in range(2_000):  # more than SQLite leaves in the write-ahead log
            log.add(record(number, key="team-a", time=time.time() - 2 * 86_400, turns=("a secret prompt" * 20,)))
        log.flush()
        if how == "another process":
            ended = p2l_engine("log", "delete", "--store", str(path), "--key", "team-a")
            assert (ended.status, ended.err) == (0, "")
        elif how == "this log":
            log.delete(key="team-a")
        _wait(lambda: not left() if how == "retention" else True)
        assert left() == []
        assert running.recent(9) == []


def test_a_file_that_others_read_keeps_its_write_ahead_log(tmp_path):
    path = tmp_path / "serve.sqlite"
    store = LogStore(path, timeout=0.1)
    store.add([row_of(record(0, turns=("a secret prompt",)))])
    with sqlite3.connect(path) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM log_decision").fetchall()
        assert store.delete(ALL).decisions == 1
        assert not store.purge()
        reader.execute("COMMIT")
    assert store.purge()
    assert not any(b"a secret prompt" in file.read_bytes() for file in tmp_path.iterdir())
    store.close()


def test_nothing_waits_for_a_purge_that_waits_for_others(tmp_path):
    path = tmp_path / "serve.sqlite"
    store = LogStore(path, timeout=60.0)
    store.add([row_of(record(0))])
    with sqlite3.connect(path) as reader, ThreadPoolExecutor(1) as threads:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM log_decision").fetchall()
        store.delete(ALL)
        purged = threads.submit(store.purge)
        for number in range(1, 20):
            store.add([row_of(record(number))])
        assert not purged.done()
        reader.execute("COMMIT")
        assert purged.result()
    store.close()


def test_a_file_that_is_read_all_the_time_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(log_store.Database, "empty_log", lambda *_: False)
    path = tmp_path / "serve.sqlite"
    with DecisionLog(path) as log:
        log.add(record(0, key="team-a"))
        assert log.delete(key="team-a").decisions == 1
    assert caplog.messages == [logs.BUSY]
    ended = p2l_engine("log", "delete", "--store", str(path), "--key", "team-a")
    assert ended.status == 0
    assert logs.BUSY in " ".join(ended.err.split())


def test_retention_is_at_the_start_and_again(store, monkeypatch):
    now = time.time()
    monkeypatch.setattr(log_store, "PAGE", 4)
    with DecisionLog(store) as log:
        for number in range(10):
            log.add(record(number, time=now - 100))
        log.add(record(10, time=now))
        log.feedback(new_id(3), None, score=1)
    monkeypatch.setattr(logs, "PAGE", 4)
    monkeypatch.setattr(logs, "HOUR", 0.1)
    with DecisionLog(store, retention=timedelta(seconds=50)) as log:
        for number in (11, 12):
            _wait(lambda: len(log.recent(99)) == 1)
            assert log._store.feedback_on([new_id(3)]) == []
            log.add(record(number, time=now - 100))
            log.flush()
    with DecisionLog(store, retention=timedelta(days=1)) as log:
        log.add(record(13, time=now - 100))
    assert {each.id for each in stored(store)} >= {new_id(10), new_id(13)}


def _wait(until):
    for _ in range(1000):
        if until():
            return
        time.sleep(0.02)
    raise AssertionError("it did not happen")


def test_retention_is_positive(sqlite):
    with pytest.raises(ValueError, match="retention: expected a positive time"):
        DecisionLog(sqlite, retention=timedelta(0))


def compare(log, number, this, other, preference, turns=("which is better?",), **changes):
    """Two decisions on the same prompt, and a preference."""
    for i, model in enumerate((this, other)):
        turns_hash = str(hash(turns))
        log.add(record(number + i, model=model, turns=turns, turns_hash=turns_hash, **changes))
    log.feedback(new_id(number), changes.get("key"), against=new_id(number + 1), preference=preference)


def exported(store, folder, which=ALL):
    opened = LogStore(store, create=False)
    found = export(opened, folder, which)
    opened.close()
    return found


@pytest.fixture
def judged(store):
    """A store with preferences that are votes, and others that are none; scores of both kinds."""
    with DecisionLog(store) as log:
        compare(log, 0, "alpha", "beta", "this", ("sum\0 1", "日本"))
        compare(log, 2, "gamma", "beta", "other", ('["x", null]',))
        compare(log, 4, "alpha", "beta", "tie", key="a")
        compare(log, 6, "alpha", "beta", "both_bad")
        compare(log, 10, "alpha", "alpha", "tie")
        compare(log, 12, "alpha", "beta", "tie", None)
        compare(log, 14, "alpha", "beta", "tie", (" ",))
        compare(log, 16, "alpha", "beta", "tie", ("half \ud83d",))
        compare(log, 18, "alpha", "beta", "tie", outcome="failed")
        log.feedback(new_id(0), None, against=new_id(2), preference="this")
        log.feedback(new_id(0), None, score=0.25)
        log.feedback(new_id(1), None, score=1)
        log.feedback(new_id(12), None, score=1)
        log.feedback(new_id(1), None, label="good\ud83d")
        log.add(record(20, latency={"total": 5.0, "cache": 1.5}, score=math.inf, attempts=()))
    return store


def test_an_export_has_every_decision(judged, tmp_path):
    found = exported(judged, tmp_path / "log")
    assert found.rows == {"decisions.parquet": 19, "feedback.parquet": 14, "votes.parquet": 4, "scores.parquet": 2}
    table = pq.read_table(tmp_path / "log" / "decisions.parquet")
    rows = table.to_pylist()
    expected = stored(judged)
    assert [row["id"] for row in rows] == [each.id for each in expected]
    for row, each in zip(rows, expected, strict=True):
        for name in (
            "key",
            "session",
            "asked",
            "model",
            "propensity",
            "propensity_error",
            "score",
            "cost",
            "estimated",
            "tokens_in",
            "status",
        ):
            assert row[name] == getattr(each, name)
        assert row["time"].timestamp() == each.time
        assert {pair["model"]: pair["probability"] for pair in row["policy"]} == each.policy
        assert tuple(Attempt(**fields) for fields in row["attempts"]) == each.attempts
        assert row["prompt"] == (None if each.turns is None else [turn.replace("\ud83d", "?") for turn in each.turns])
    assert (rows[-1]["latency_total"], rows[-1]["latency_cache"], rows[-1]["latency_parse"]) == (5.0, 1.5, None)
    assert str(table.schema.field("time").type) == "timestamp[us, tz=UTC]"
    feedback = pq.read_table(tmp_path / "log" / "feedback.parquet").to_pylist()
    assert [row["label"] for row in feedback if row["label"]] == ["good?"]


def test_preferences_become_votes_that_the_reader_takes(judged, tmp_path):
    found = exported(judged, tmp_path / "log")
    assert found.votes == {
        "both answers are of the same model": 1,
        "the text of the prompt was not logged": 1,
        "the prompt is empty": 1,
        "the prompt is no valid Unicode": 1,
        "there was no answer": 1,
        "the two decisions have different prompts": 1,
    }
    votes, dropped = read(tmp_path / "log" / "votes.parquet")
    assert len(dropped) == 0
    a, b = ([votes.models[i] for i in column] for column in (votes.a, votes.b))
    shown = [(votes.prompts[p], x, y, int(o)) for p, x, y, o in zip(votes.prompt, a, b, votes.outcome, strict=True)]
    same = ("which is better?",)
    assert sorted(shown) == sorted(
        [
            (("sum\0 1", "日本"), "alpha", "beta", 0),
            (('["x", null]',), "gamma", "beta", 1),
            (same, "alpha", "beta", 2),
            (same, "alpha", "beta", 3),
        ]
    )


def test_a_preference_that_is_repeated_is_one_vote_and_of_decisions_alone_the_chosen_model_counts(sqlite, tmp_path):
    with DecisionLog(sqlite) as log:
        compare(log, 0, "alpha", "beta", "this")
        for preference in ("this", "other", "this"):  # a retry, another opinion, a retry
            log.feedback(new_id(0), None, against=new_id(1), preference=preference)
        for preference in ("other", "this", "tie"):  # both again, of the other decision; a third opinion
            log.feedback(new_id(1), None, against=new_id(0), preference=preference)
        for i, name in ((2, "alpha"), (3, "gamma")):
            log.add(record(i, model="", chosen=name, outcome="decision", turns=("which?",)))
        log.feedback(new_id(2), None, against=new_id(3), preference="this")
    found = exported(sqlite, tmp_path / "log")
    assert found.votes == {"the same was said before": 4}
    rows = pq.read_table(tmp_path / "log" / "votes.parquet").to_pylist()
    assert [(row["model_a"], row["model_b"], row["winner"]) for row in rows] == [
        ("alpha", "beta", "model_a"), ("alpha", "beta", "model_b"), ("beta", "alpha", "tie"), ("alpha", "gamma", "model_a"),
    ]  # fmt: skip


def test_numbers_of_deleted_feedback_are_not_used_again(sqlite):
    with DecisionLog(sqlite) as log:
        log.add(record(0, key="a"))
        log.add(record(1))
        for i in (1, 0):
            log.feedback(new_id(i), None, score=1)
        log.delete(key="a")
        log.feedback(new_id(1), None, score=0)
    numbers = sqlite3.connect(sqlite).execute("SELECT number FROM log_feedback").fetchall()
    assert sorted(numbers) == [(1,), (3,)]


def test_scores_are_read_by_models_of_values(judged, tmp_path):
    found = exported(judged, tmp_path / "log")
    assert found.scores == {"the text of the prompt was not logged": 1}
    votes, _ = read(tmp_path / "log" / "scores.parquet", feedback=feedback_model("ols"))
    assert sorted(votes.outcome.tolist()) == [0.25, 1.0]
    assert votes.prompts == (("sum\0 1", "日本"),)


def test_an_export_of_a_part(judged, tmp_path, monkeypatch):
    monkeypatch.setattr(log_store, "PAGE", 2)
    assert exported(judged, tmp_path / "log", Selection(key="a")).rows["votes.parquet"] == 1
    part = exported(judged, tmp_path / "log", Selection(since=START + 2, until=START + 5))
    assert part.rows == {"decisions.parquet": 3, "feedback.parquet": 2, "votes.parquet": 2, "scores.parquet": 0}
    assert exported(judged, tmp_path / "log").rows["votes.parquet"] == 4
    exported(judged, tmp_path / "log", Selection(since=START + 20))
    with pytest.raises(ValueError, match="the table is empty"):
        read(tmp_path / "log" / "votes.parquet")


def test_an_export_replaces_only_an_export(judged, tmp_path):
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="expected no folder, an empty one or an earlier export"):
        exported(judged, tmp_path / "log")
    assert (tmp_path / "log" / "thesis.txt").read_text() == "years of work"


def test_writers_need_not_wait_for_an_export(sqlite, monkeypatch):
    monkeypatch.setattr(log_store, "PAGE", 2)
    with DecisionLog(sqlite) as log:
        for number in range(6):
            log.add(record(number))
        log.flush()
        pages = log._store.pages(ALL)
        seen = next(pages)
        log.add(record(9))
        assert log.flush()
        assert [*seen, *(each for page in pages for each in page)] == [record(number) for number in (*range(6), 9)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tiny.write(tmp_path_factory.mktemp("log") / "p2l")
    costs = "".join(f"  {name}: {{cost: {i + 1}}}\n" for i, name in enumerate(tiny.MODELS))
    (folder / "catalog.yaml").write_text(f"models:\n{costs}")
    return str(folder)


@pytest.mark.slow
def test_commands_read_the_export(sqlite, tmp_path, checkpoint):
    with DecisionLog(sqlite) as log:
        for number in range(0, 40, 2):
            compare(log, number, "alpha", "beta", ("this", "other")[number % 4 // 2], ("sum", f"of {number}"), api="route")
    folder = tmp_path / "log"
    ended = p2l_engine("log", "export", "--store", sqlite, "-o", str(folder))
    assert ended.status == 0, ended.err
    assert [line.split()[0] for line in ended.out.splitlines()] == ["40", "20", "20", "0"]
    decisions = str(folder / "decisions.parquet")
    ended = p2l_engine("batch", decisions, "-o", str(tmp_path / "again"), "--keep", "id", "--checkpoint", checkpoint)
    assert ended.status == 0, ended.err
    rows = pq.read_table(next((tmp_path / "again").glob("*.parquet"))).to_pylist()
    assert [row["id"] for row in rows] == [new_id(number) for number in range(40)]
    assert all(row["error"] is None and row["model"] in tiny.MODELS for row in rows)
    ended = p2l_engine("route", "--file", decisions, "--json", "--checkpoint", checkpoint)
    assert ended.status == 0, ended.err
    assert [json.loads(line)["model"] for line in ended.out.splitlines()] == [row["model"] for row in rows]
    votes = str(folder / "votes.parquet")
    ended = p2l_engine("eval", "--votes", votes, "--bootstrap", "5", "--checkpoint", checkpoint)
    assert ended.status == 0, ended.err


@pytest.mark.slow
def test_train_reads_the_export(sqlite, tmp_path):
    with DecisionLog(sqlite) as log:
        for number in range(0, 64, 2):
            compare(log, number, "alpha", "beta", ("this", "other", "tie", "both_bad")[number // 2 % 4], (f"prompt {number}",))
            log.feedback(new_id(number), None, score=number / 64)
            log.feedback(new_id(number + 1), None, score=0.5)
    exported(sqlite, tmp_path / "log")
    votes, scores = (str(tmp_path / "log" / name) for name in ("votes.parquet", "scores.parquet"))
    assert weights(settings(tmp_path, train_data_path=votes), 2)
    assert weights(settings(tmp_path, train_data_path=scores, head_type="bt", loss_type="ols"), 2)


def test_a_log_on_the_terminal(sqlite):
    with DecisionLog(sqlite) as log:
        for number in range(25):
            log.add(record(number, key="a"))
        name = "a-model-of-a-long-name-with-a-date-2026-01-31"
        log.add(record(25, model=name, cost=None, status=402, outcome="refused", latency={}))
        log.feedback(new_id(3), "a", score=1)
    ended = p2l_engine("log", "show", "--store", sqlite)
    assert ended.status == 0, ended.err
    lines = ended.out.splitlines()
    assert len(lines) == 25  # 20 decisions
    assert "refused 402" in lines[4]
    assert "~0.002" in lines[4]
    ended = p2l_engine("log", "delete", "--store", sqlite, "--key", "a", "--before", "2027-01-15T08:00:10Z")
    assert ended.out == "deleted: 10 decisions, 1 pieces of feedback\n"
    ended = p2l_engine("log", "delete", "--store", sqlite, "--before", "2100-01-01")
    assert ended.out == "deleted: 16 decisions, 0 pieces of feedback\n"
    assert p2l_engine("log", "show", "--store", sqlite).message == "the log is empty"


def test_a_log_fits_80_columns(sqlite, monkeypatch):
    from rich.console import Console

    from p2l_engine.cli import log as command

    with DecisionLog(sqlite) as log:
        name = "a-model-of-a-long-name-with-a-date-2026-01-31"
        log.add(
            record(25, model=name, expected_cost=0.00123, cost=None, status=402, outcome="refused", latency={"total": 12345})
        )
    console = Console(width=80, record=True)
    monkeypatch.setattr(command, "out", lambda: console)
    command.show(sqlite)
    (line,) = [line for line in console.export_text().splitlines() if "refused" in line]
    assert len(line.rstrip()) <= 80
    assert all(part in line for part in ("01-15 08:00:25", "00000000", "0.60", "~0.0012", "12345", "refused 402", "01-31"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("show --store nowhere.sqlite", "nowhere.sqlite is no file"),
        ("show --store text.txt", "file is not a database"),
        ("show --store postgresql+psycopg://me:secret@127.0.0.1:1/x", "connection failed"),
        ("show --store mysql://me:secret@127.0.0.1:1/x", "store: expected a path"),
        ("delete --store serve.sqlite", "expected one of them, or both"),
        (
            "delete --store serve.sqlite --before yesterday",
            "expected a time as 2026-01-31 or 2026-01-31T12:00Z, got 'yesterday'",
        ),
        ("export --store serve.sqlite -o out --since 1", "--since"),
        ("export --store serve.sqlite -o text.txt", "expected no folder"),
        ("export --store serve.sqlite", "Missing option '--output'"),
    ],
)
def test_errors_are_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("no database, but a text that is longer than the header of one" * 10)
    DecisionLog("serve.sqlite").close()
    ended = p2l_engine("log", *arguments.split())
    assert ended.status == 2
    assert message in ended.message
    assert "Traceback" not in ended.err
    assert "secret" not in ended.err


def test_every_option_of_the_log_has_a_help_text():
    import typer.main

    from p2l_engine.cli.app import app

    commands = typer.main.get_command(app).commands["log"].commands
    assert list(commands) == ["show", "export", "delete"]
    assert all(param.help for command in commands.values() for param in command.params)


def test_a_slow_store_stops_no_decision(sqlite, monkeypatch):
    """add returns while the writer is within a transaction."""
    entered, leave = threading.Event(), threading.Event()
    with DecisionLog(sqlite) as log:
        insert = log._store.add

        def slow(rows):
            entered.set()
            assert leave.wait(30)
            insert(rows)

        monkeypatch.setattr(log._store, "add", slow)
        log.add(record(0))
        assert entered.wait(30)
        for number in range(1, 300):
            log.add(record(number))
        leave.set()
        assert log.flush()
    assert len(stored(sqlite)) == 300


def test_log_lines_name_no_key(sqlite, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(logs, "LONGEST_PAUSE", 0.1)
    with DecisionLog(sqlite, retention=timedelta(days=1)) as log:
        with failing(sqlite):
            log.add(record(1, key="secret", turns=("secret",)))
            assert not log.flush(0.3)
        assert log.flush()
        with pytest.raises(LookupError) as refused:
            log.feedback(new_id(2), "secret", score=1)
    assert "secret" not in caplog.text + str(refused.value)

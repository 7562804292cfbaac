"""Types of kept columns: every value that comes out equals the one that went in, or its row or file is refused by name."""

from __future__ import annotations

import datetime
import decimal
import json
import math
import re
import time
from fractions import Fraction

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from p2l_engine.batch import BatchConfig, run
from p2l_engine.batch.blocks import blocks
from p2l_engine.batch.deduplicator import Deduplicator
from p2l_engine.tables.chunked import kept_schema, read_rows
from p2l_engine.tables.common_types import common_type
from p2l_engine.tables.find import find
from p2l_engine.tables.typed import typed_table
from p2l_engine.tables.whole import read_table
from p2l_engine.votes import read
from tests.support.batch_files import output

US = datetime.timedelta(microseconds=1)


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def kept(*paths, keep=None):
    """The kept columns as Python values, and the problems by row."""
    chunks = list(read_rows(find(map(str, paths)), "prompt", keep))
    rows, problems = [], {}
    for chunk in chunks:
        problems |= {len(rows) + i: problem for i, problem in chunk.problems.items()}
        rows += chunk.kept.to_pylist() or [{} for _ in chunk.prompts]
    return rows, problems


def same(went_in, came_out):
    """Whether two values are equal as JSON: an absent key is a null, 1 is 1.0 and true is no number."""
    if isinstance(went_in, dict) and isinstance(came_out, dict):
        names = {**went_in, **came_out}
        return all(same(went_in.get(name), came_out.get(name)) for name in names)
    if isinstance(went_in, list) and isinstance(came_out, list):
        return len(went_in) == len(came_out) and all(map(same, went_in, came_out))
    if isinstance(went_in, float) and isinstance(came_out, float):
        bits = (math.copysign(1, value) for value in (went_in, came_out))
        return (went_in != went_in and came_out != came_out) or (went_in == came_out and len(set(bits)) == 1)
    return isinstance(went_in, bool) == isinstance(came_out, bool) and went_in == came_out


LATER = {
    "null": (None, 5),
    "missing": ({}, 5),
    "list": ([], [1, 2]),
    "list of lists": ([[]], [[], [None, "a"]]),
    "list of objects": ([], [{"a": [], "b": 1}, {"b": 2}]),
    "object": ({"a": None}, {"a": {"b": [1.5]}}),
    "object of lists": ({"a": []}, {"a": [{"k": True}]}),
    "late key": ({"a": 1}, {"a": 1, "b": "x"}),
    "late float": (1, 2.5),
    "late float in a list": ([1], [2, 3.5]),
    "unsigned": (1, 2**64 - 1),
}


@pytest.mark.parametrize("name", LATER)
@pytest.mark.parametrize("files", [1, 2])
def test_values_that_are_typed_later_are_kept(name, files, tmp_path):
    early, later = LATER[name]
    rows = [{"prompt": "p", "m": early} if name != "missing" else {"prompt": "p"} for _ in range(1100)]
    rows[1:1] = [{"prompt": "p"}] * 2
    rows += [{"prompt": "p", "m": later}]
    cut = len(rows) - 1 if files == 2 and name != "unsigned" else len(rows)
    paths = [lines(tmp_path / "a.jsonl", rows[:cut]), *([lines(tmp_path / "b.jsonl", rows[cut:])] if cut < len(rows) else [])]
    for order in (paths, paths[::-1]):
        given = rows if order == paths else rows[cut:] + rows[:cut]
        found, problems = kept(*order)
        assert not problems
        assert all(same(row.get("m"), out["m"]) for row, out in zip(given, found, strict=True))


ODD = {
    "false beside numbers": ([0.5, 1.5], False),
    "true beside integers": ([2, 3], True),
    "a number beside booleans": ([True, False], 1),
    "a number beside texts": (["1", "2"], 1),
    "a text beside numbers": ([1, 2], "1"),
    "an integer that is no float": ([0.5, 1.5], 2**53 + 1),
    "an integer beyond 64 bits": ([1, 2], 2**64),
    "an integer below 64 bits": ([1, 2], -(2**63) - 1),
    "a list": ([1, 2], [1]),
    "an object": (["a", "b"], {"a": 1}),
    "half a surrogate pair": (["a", "b"], "\ud800"),
    "half a surrogate pair in a key": ([{"a": 1}, {"a": 2}], {"a": 1, "\ud800": 1}),
    "a text in a list": ([[1], [2]], [1, "2"]),
    "false in an object": ([{"a": 0.5}, {"a": 1}], {"a": False}),
    "too deep": ([[], [[]]], eval("[" * 60 + "1" + "]" * 60)),
    "far too deep": ([[], [[]]], json.loads("[" * 900 + "]" * 900)),
}


WITHIN = {"a text in a list": "m[]", "false in an object": "m.a", "too deep": "m" + "[]" * 48, "far too deep": "m" + "[]" * 48}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("place", [0, 1, 2, 600])
def test_one_odd_cell_costs_its_row(name, place, tmp_path):
    usual, odd = ODD[name]
    rows = [{"prompt": "p", "m": usual[i % 2], "id": i} for i in range(place + 100)]
    rows[place]["m"] = odd
    found, problems = kept(lines(tmp_path / "in.jsonl", rows))
    assert list(problems) == [place]
    assert f"in the column '{WITHIN.get(name, 'm')}': got " in problems[place]
    assert problems[place].endswith("; leave the column out with --keep")
    assert found[place] == {"m": None, "id": place}
    assert all(same(row["m"], out["m"]) for i, (row, out) in enumerate(zip(rows, found, strict=True)) if i != place)
    assert kept(tmp_path / "in.jsonl", keep=["id"]) == ([{"id": i} for i in range(place + 100)], {})


def test_a_number_that_no_float_holds_costs_its_row(tmp_path):
    texts = ["1e400", "-1e400", "Infinity", "-Infinity", "NaN", "-0.0", "1e308"]
    (tmp_path / "in.jsonl").write_text("".join(f'{{"prompt": "p", "m": {text}, "l": [{text}]}}\n' for text in texts))
    rows, problems = kept(tmp_path / "in.jsonl")
    assert list(problems) == [0, 1]
    assert [row["m"] for row in rows[2:4]] == [math.inf, -math.inf]
    assert [row["l"] for row in rows[2:4]] == [[math.inf], [-math.inf]]
    assert all(same(float(text), row["m"]) for text, row in zip(texts[2:], rows[2:], strict=True))


def test_an_odd_cell_is_an_error_of_its_row_and_no_reason_to_stop(router, tmp_path, caplog):
    rows = [{"prompt": f"p{i % 3}", "id": i} for i in range(900)]
    rows += [{"prompt": "p0", "id": "later text"}, {"prompt": "p0", "id": "another"}]
    given = lines(tmp_path / "in.jsonl", rows)
    report = run(router, BatchConfig([given], str(tmp_path / "out")))
    assert (report.rows, report.routed, report.computed) == (902, 900, 3)
    assert [(reason.rows, reason.where) for reason in report.reasons] == [(2, f"{given}: row 900")]
    last = output(tmp_path / "out").to_pylist()[-2]
    assert (last["id"], last["model"]) == (None, None)
    assert last["error"] == "expected int64 in the column 'id': got 'later text'; leave the column out with --keep"
    assert [record.message for record in caplog.records if record.name.startswith("p2l_engine.tables")] == [
        f"{given}: values of several kinds; a row whose value is not of the most common one will have an error, unless its "
        "column is left out with --keep: id: number (900), text (2)"
    ]
    with pytest.raises(ValueError, match=r"in.jsonl: row 900: expected int64 in the column 'id': got 'later text'"):
        run(router, BatchConfig([given], str(tmp_path / "strict"), strict=True))
    assert run(router, BatchConfig([given], str(tmp_path / "none"), keep=[], strict=True)).routed == 902


@pytest.mark.parametrize("scope", ["prompt", "batch"])
def test_odd_cells_change_no_other_rows_decision(scope, router, tmp_path):
    """Nor the coefficients: the row's prompt is that of later rows."""
    rows = [{"prompt": f"p{i % 5}", "id": "odd" if i in (0, 7, 20) else i} for i in range(40)]
    given = lines(tmp_path / "in.jsonl", rows)
    fine = lines(tmp_path / "fine.jsonl", [row for row in rows if row["id"] != "odd"])
    options = {"budget": 1.5, "budget_scope": scope, "rows_per_part": 8, "source": False}
    report = run(router, BatchConfig([given], str(tmp_path / "out"), **options))
    run(router, BatchConfig([fine], str(tmp_path / "alone"), **options))
    found = output(tmp_path / "out").to_pylist()
    assert (report.rows, report.routed, report.computed) == (40, 37, 5)
    assert [i for i, row in enumerate(found) if row["error"]] == [0, 7, 20]
    routed, alone = [row for row in found if not row["error"]], output(tmp_path / "alone").to_pylist()
    assert [(row["id"], row["model"]) for row in routed] == [(row["id"], row["model"]) for row in alone]
    np.testing.assert_allclose([row["win_rate"] for row in routed], [row["win_rate"] for row in alone], atol=1e-6)
    of_all, of_none = (
        [each.new_prompts for each in map(Deduplicator().add, blocks(find([given]), "prompt", keep, rows=8))]
        for keep in (None, [])
    )
    assert of_all == of_none


def test_a_finished_run_reads_no_rows_for_their_types(router, tmp_path, monkeypatch):
    config = BatchConfig([lines(tmp_path / "in.jsonl", [{"prompt": "p", "id": 1}])], str(tmp_path / "out"))
    run(router, config)
    with monkeypatch.context() as patch:
        patch.setattr("p2l_engine.batch.job.kept_schema", lambda *_: pytest.fail("read again"))
        assert run(router, config).rows == 1
    (tmp_path / "out" / "part-000000.parquet").unlink()
    assert run(router, config).rows == len(output(tmp_path / "out")) == 1


@pytest.mark.slow
def test_a_column_that_cannot_be_stored_is_refused(router, tmp_path):
    for rows, message in (
        ([{"prompt": "p", "m": {}}], "a column cannot be written to parquet: .*'m'.*; leave it out with --keep"),
        ([{"prompt": "p", "m": 2**70}] * 2, "column 'm': not one value can be stored; leave the column out with --keep"),
        (
            [{"prompt": "p", "m": {f"k{i}_{j}": 1 for j in range(100)}} for i in range(101)],
            "at most 10,000 different keys.*'m'",
        ),
    ):
        given = lines(tmp_path / "in.jsonl", rows)
        with pytest.raises(ValueError, match=rf"in.jsonl: .*{message}"):
            run(router, BatchConfig([given], str(tmp_path / "out")))
        assert run(router, BatchConfig([given], str(tmp_path / "kept"), keep=[]), restart=True).routed == len(rows)


@pytest.mark.slow
def test_objects_of_many_keys_take_no_longer_than_others(tmp_path):
    keys = 20_000  # of as many objects: their product would take minutes
    rows = [{"prompt": "p", "logprobs": [{f"token {i}": -0.5} for i in range(keys)]}]
    listed = lines(tmp_path / "listed.jsonl", rows)
    rows = [{"prompt": "p"} | {f"{i} {j}": 1 for j in range(keys // 500)} for i in range(500)]
    beside = lines(tmp_path / "beside.jsonl", rows)
    members = ", ".join(f'"{i}": 1' for i in [*range(keys), keys - 1])
    (tmp_path / "twice.jsonl").write_text(f'{{"prompt": "p", {members}}}\n{{"prompt": "q"}}\n')
    wide = tmp_path / "wide.csv"
    names = ["prompt", *map(str, range(keys // 5))]
    wide.write_text(f"{','.join(names)}\n{','.join(names)}\n")
    start = time.process_time()
    for path in (listed, beside):
        with pytest.raises(ValueError, match="at most 10,000 different keys"):
            kept_schema(find([path]), "prompt")
    (row,) = read_table(tmp_path / "twice.jsonl", ["prompt"]).invalid.values()
    assert row.detail == f"got '{keys - 1}' twice"
    pq.write_table(pa.table([["p"] for _ in names], names), tmp_path / "wide.parquet")
    for path in (wide, tmp_path / "wide.parquet"):
        for keep in (None, names[1:]):
            assert [list(row) for row in kept(path, keep=keep)[0]] == [names[1:]]
    assert time.process_time() - start < 5


def test_only_kept_columns_can_fail_a_run(tmp_path):
    pq.write_table(pa.table([["p"], [1], [2], [3]], names=["prompt", "id", "x", "x"]), tmp_path / "a.parquet")
    (tmp_path / "b.csv").write_text("prompt,id,x,x\nq,7,8,9\n")
    assert kept(tmp_path / "a.parquet", keep=["id"]) == ([{"id": 1}], {})
    assert kept(tmp_path / "b.csv", keep=["id"]) == ([{"id": "7"}], {})
    for name in ("a.parquet", "b.csv"):
        with pytest.raises(ValueError, match=f"{name}: expected columns of different names, got x twice"):
            kept(tmp_path / name)
    with pytest.raises(ValueError, match="b.csv: column 'id' is string, in .*a.parquet int64"):
        kept(tmp_path / "a.parquet", tmp_path / "b.csv", keep=["id"])
    assert kept(tmp_path / "a.parquet", tmp_path / "b.csv", keep=[]) == ([{}, {}], {})


def test_columns_that_some_files_lack_are_null_there(tmp_path, caplog):
    pq.write_table(pa.table({"prompt": ["p"], "id": pa.array([None], pa.null()), "n": [1]}), tmp_path / "a.parquet")
    (tmp_path / "b.csv").write_text("other,prompt,id\nx,y,7\n")
    lines(tmp_path / "c.jsonl", [{"prompt": "p", "late": [], "n": 2.5}])
    expected = [
        {"id": None, "n": 1.0, "other": None, "late": None},
        {"id": "7", "n": None, "other": "x", "late": None},
        {"id": None, "n": 2.5, "other": None, "late": []},
    ]
    assert kept(tmp_path) == (expected, {})
    assert caplog.messages == [
        "columns that are missing and so null in the rows of some files: "
        f"id in {tmp_path}/c.jsonl; n in {tmp_path}/b.csv; other in {tmp_path}/a.parquet and 1 more; "
        f"late in {tmp_path}/a.parquet and 1 more"
    ]
    assert kept(tmp_path, keep=["late", "id"])[0] == [{name: row[name] for name in ("late", "id")} for row in expected]
    with pytest.raises(ValueError, match=r"a.parquet: expected the columns nothing; it has prompt, id, n"):
        kept(tmp_path, keep=["nothing"])


def test_files_without_rows_have_no_say(tmp_path, caplog):
    pq.write_table(pa.table({"prompt": ["p"], "id": [1]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"prompt": pa.array([], pa.string()), "id": pa.array([], pa.string())}), tmp_path / "a.parquet")
    pq.write_table(pa.table({}), tmp_path / "c.parquet")
    (tmp_path / "d.csv").write_text("text,id\n")
    (tmp_path / "e.jsonl").write_text("\n \n\r\n")
    pq.ParquetWriter(tmp_path / "f.parquet", pa.schema([("prompt", pa.string()), ("id", pa.int64())])).close()  # no row groups
    assert kept(tmp_path) == ([{"id": 1}], {})
    assert caplog.messages == [
        f"skipped, without rows and with other columns than the other files: {tmp_path}/{name}"
        for name in ("c.parquet and 1 more", "a.parquet and 1 more")
    ]
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "d.csv").write_text("text,id\n")
    with pytest.raises(ValueError, match=r"d.csv: expected the columns prompt; it has text, id"):
        kept(tmp_path / "alone")


UNIFIED = [
    (pa.int32(), pa.int64(), pa.int64()), (pa.uint8(), pa.int8(), pa.int16()), (pa.uint32(), pa.int64(), pa.int64()),
    (pa.uint64(), pa.int8(), pa.uint64()), (pa.int64(), pa.float32(), pa.float64()), (pa.float16(), pa.float32(), pa.float32()),
    (pa.string(), pa.large_string(), pa.large_string()),
    (pa.string(), pa.string_view(), pa.large_string()), (pa.null(), pa.date32(), pa.date32()),
    (pa.dictionary(pa.int8(), pa.string()), pa.dictionary(pa.int32(), pa.large_string()), pa.large_string()),
    (pa.dictionary(pa.int8(), pa.string()), pa.string(), pa.string()),
    (pa.decimal128(10, 2), pa.decimal128(10, 4), pa.decimal128(12, 4)),
    (pa.decimal128(38, 0), pa.decimal128(38, 10), None), (pa.decimal256(40, 0), pa.decimal128(38, 10), pa.decimal256(50, 10)),
    (pa.decimal256(76, 0), pa.decimal128(38, 10), None), (pa.decimal128(10, 2), pa.int32(), pa.decimal128(12, 2)),
    (pa.decimal128(10, 2), pa.float64(), None), (pa.timestamp("us"), pa.timestamp("ms"), pa.timestamp("us")),
    (pa.timestamp("us", "UTC"), pa.timestamp("us"), None),
    (pa.timestamp("us", "UTC"), pa.timestamp("us", "Europe/Paris"), None),
    (pa.timestamp("s", "+00:00"), pa.timestamp("us", "Etc/UTC"), pa.timestamp("us", "UTC")),
    (pa.timestamp("us"), pa.date32(), None),
    (pa.time32("s"), pa.time64("us"), pa.time64("us")), (pa.duration("s"), pa.duration("ms"), pa.duration("ms")),
    (pa.bool_(), pa.int8(), None), (pa.bool_(), pa.string(), None), (pa.string(), pa.int64(), None),
    (pa.string(), pa.binary(), None), (pa.binary(4), pa.binary(), pa.binary()),
    (pa.list_(pa.null()), pa.large_list(pa.int8()), pa.large_list(pa.int8())),
    (pa.list_(pa.int8(), 2), pa.list_(pa.int8()), pa.list_(pa.int8())), (pa.list_(pa.int8()), pa.int8(), None),
    (pa.list_(pa.struct([("a", pa.int8())])), pa.list_(pa.struct([("b", pa.bool_()), ("a", pa.int16())])),
     pa.list_(pa.struct([("a", pa.int16()), ("b", pa.bool_())]))),
    (pa.struct([("a", pa.int8())]), pa.struct([("a", pa.string())]), None),
    (pa.map_(pa.string(), pa.int8()), pa.map_(pa.large_string(), pa.int16()), pa.map_(pa.large_string(), pa.int16())),
    (pa.map_(pa.string(), pa.field("value", pa.list_(pa.null()), nullable=False)), pa.map_(pa.string(), pa.list_(pa.bool_())),
     pa.map_(pa.string(), pa.list_(pa.bool_()))),
    (pa.map_(pa.string(), pa.int8()), pa.map_(pa.string(), pa.bool_()), None),
    (pa.map_(pa.string(), pa.int8()), pa.map_(pa.int8(), pa.int8()), None),
    (pa.map_(pa.string(), pa.int8()), pa.struct([("a", pa.int8())]), None),
    (pa.struct([pa.field("a", pa.int8(), nullable=False)]), pa.struct([("a", pa.int8())]), pa.struct([("a", pa.int8())])),
]  # fmt: skip


@pytest.mark.parametrize(("one", "two", "common"), UNIFIED, ids=str)
def test_the_common_type_of_two(one, two, common):
    for found in (common_type(one, two), common_type(two, one)):
        assert (found is None) == (common is None)
        assert found is None or found.equals(common) or (found.id == common.id and pa.types.is_nested(found))
    assert common_type(one, one).equals(one) or pa.types.is_nested(one)


def test_files_of_other_types_are_unified_where_nothing_is_lost(tmp_path):
    day = datetime.datetime(2024, 2, 29, 1, 2, 3)
    one = {"i": pa.array([1], pa.int32()), "s": pa.array(["a"]), "c": pa.array(["x"]).dictionary_encode(),
           "t": pa.array([day], pa.timestamp("ms")), "d": pa.array([decimal.Decimal("1.5")], pa.decimal128(4, 1)),
           "f": pa.array([2**53], pa.int64()), "o": pa.array([{"a": 1, "l": []}])}  # fmt: skip
    two = {"o": pa.array([{"l": ["z"], "b": 2.5}]), "f": pa.array([0.5]), "i": pa.array([2**40]),
           "t": pa.array([day + US], pa.timestamp("us")), "s": pa.array(["b"], pa.large_string()),
           "c": pa.array(["y"], pa.large_string()), "d": pa.array([decimal.Decimal("2.25")], pa.decimal128(12, 2))}  # fmt: skip
    for name, columns in (("a", one), ("b", two)):
        arrays = [pa.array(["p"]), *columns.values()]
        fields = [
            pa.field(n, a.type, nullable=n != "s" or name != "a") for n, a in zip(["prompt", *columns], arrays, strict=True)
        ]
        pq.write_table(pa.table(arrays, schema=pa.schema(fields)), tmp_path / f"{name}.parquet")
    rows, problems = kept(tmp_path)
    assert not problems
    assert rows == [
        {"i": 1, "s": "a", "c": "x", "t": day, "d": decimal.Decimal("1.50"), "f": 2.0**53,
         "o": {"a": 1, "l": [], "b": None}},
        {"i": 2**40, "s": "b", "c": "y", "t": day + US, "d": decimal.Decimal("2.25"), "f": 0.5,
         "o": {"a": None, "l": ["z"], "b": 2.5}},
    ]  # fmt: skip
    assert [list(row) for row in rows] == [list(one)] * 2  # the first file's order


@pytest.mark.parametrize("kind", [pa.list_, pa.large_list, lambda inner: pa.list_(inner, 1)])
def test_a_value_that_is_not_exact_costs_its_row_alone(kind, tmp_path):
    lists = pa.array([[1], None, [2**53 + 1], [2]], kind(pa.int64()))
    table, problems = typed_table(pa.table({"m": lists}), pa.schema([("m", kind(pa.float64()))]))
    assert list(problems) == [2]
    assert table.column("m").to_pylist() == [[1], None, None, [2]]


@pytest.mark.parametrize(
    ("one", "two", "message"),
    [
        (pa.array([2**53 + 1]), pa.array([0.5]), "a.parquet: row 600: expected double in the column 'm': got 9007199254740993"),
        (pa.array([-1]), pa.array([2**63], pa.uint64()), "a.parquet: row 600: expected uint64 in the column 'm': got -1"),
        (
            pa.array([2**40], pa.timestamp("s")),
            pa.array([1], pa.timestamp("ns")),
            r"a.parquet: row 600: expected timestamp\[ns\]",
        ),
        (
            pa.array([1]),
            pa.array(["1"]),
            "b.parquet: column 'm' is string, in .*a.parquet int64: no type holds the values of both",
        ),
        (pa.array([True]), pa.array([1]), "b.parquet: column 'm' is int64, in .*a.parquet bool"),
        (
            pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
            pa.array([[("k", "1")]], pa.map_(pa.string(), pa.string())),
            "b.parquet: column 'm.value' is string, in .*a.parquet int64: no type",
        ),
        (
            pa.array([[("k", 2**53 + 1)]], pa.map_(pa.string(), pa.int64())),
            pa.array([[("k", 0.5)]], pa.map_(pa.string(), pa.float64())),
            "a.parquet: row 600: expected map<string, double.*> in the column 'm': got",
        ),
        *(
            (pa.array([[2**53 + 1]], kind(pa.int64())), pa.array([[0.5]]), "a.parquet: row 600: expected .* got")
            for kind in (pa.list_, pa.large_list, lambda inner: pa.list_(inner, 1))
        ),
        (pa.array([[1]]), pa.array([["1"]]), r"b.parquet: column 'm\[\]' is string, in .*a.parquet int64: no type"),
        (
            pa.array([{"a": [{"b": 1}]}]),
            pa.array([{"c": 1, "a": [{"b": "x"}]}]),
            r"column 'm.a\[\].b' is string, in .* int64: no",
        ),
    ],
)
def test_files_of_types_with_no_common_one_are_refused(one, two, message, tmp_path):
    usual = pa.nulls(600, one.type)
    pq.write_table(pa.table({"prompt": ["p"] * 601, "m": pa.concat_arrays([usual, one])}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"prompt": ["p"], "m": two}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=rf"{message}.*; leave the column out with --keep"):
        kept_schema(find([str(tmp_path)]), "prompt")
    assert len(kept(tmp_path, keep=[])[0]) == 602


@pytest.mark.parametrize("place", ["m", "m.inner", "m[]", "rows"])
def test_objects_of_very_many_keys_of_which_each_has_few_are_refused(place, tmp_path, monkeypatch):
    """Stored, each would have all."""
    monkeypatch.setattr("p2l_engine.tables.shapes.MAX_SPARSE", 100)
    within = {"m": lambda m: {"m": m}, "m.inner": lambda m: {"m": {"inner": m}}, "m[]": lambda m: {"m": [m]}, "rows": dict}

    def given_(keys_of):
        rows = [within[place](dict.fromkeys(map(str, keys_of(i)), 1)) for i in range(60)]
        return lines(tmp_path / "in.jsonl", [{"prompt": "p", **row} for row in rows])

    few = given_(lambda i: range(2 * i, 2 * i + 2))
    said = rf"in.jsonl: .* got {re.escape(place)} \(120 different keys, 2 in the mean object\): write objects .* --keep"
    with pytest.raises(ValueError, match=said):
        kept(few)
    assert kept(few, keep=[])[1] == {}
    assert place != "rows" or kept(few, keep=[str(i) for i in range(120)])[1] == {}
    assert kept(given_(lambda i: range(i, i + 2)))[1] == {}  # 61 keys
    assert kept(given_(lambda i: range(i % 10, 120, 10)))[1] == {}  # 120, a tenth of them in each


def test_text_that_is_not_utf_8_costs_its_row(tmp_path):
    (tmp_path / "in.csv").write_bytes(b"id,prompt\n" + b"1,a\n" * 600 + b"\xe9,c\nbad\n2,d")
    odd = pa.array([b"1", b"\xe9", None]).view(pa.string())
    nested = pa.ListArray.from_arrays([0, 1, 1, 3], pa.array([b"1", b"a", b"\xe9"]).view(pa.string()))
    pq.write_table(pa.table({"prompt": ["a"] * 3, "id": odd, "l": nested}), tmp_path / "in.parquet")
    rows, problems = kept(tmp_path / "in.csv")
    assert [row["id"] for row in rows] == [*["1"] * 600, None, None, "2"]
    assert list(problems) == [600]
    assert problems[600].startswith("expected string in the column 'id': got text that is not UTF-8: ")
    rows, problems = kept(tmp_path / "in.parquet")
    assert rows == [{"id": "1", "l": ["1"]}, {"id": None, "l": []}, {"id": None, "l": None}]
    assert list(problems) == [1, 2]


TIMES = [datetime.datetime(9999, 12, 31, 23, 59, 59, 999999), datetime.datetime(1, 1, 1), datetime.datetime(2024, 1, 1), None]


def test_times_as_spark_stores_them_are_right_or_refused(tmp_path):
    """INT96; 9999-12-31 is 1816-03-29 in nanoseconds."""
    table = pa.table({"prompt": ["p"] * 4, "model_a": "xxxx", "t": pa.array(TIMES, pa.timestamp("us")),
                      "o": [{"l": [time]} for time in TIMES]} | {"model_a": ["x"] * 4, "model_b": ["y"] * 4,
                                                                   "winner": ["tie"] * 4})  # fmt: skip
    pq.write_table(table, tmp_path / "in.parquet", use_deprecated_int96_timestamps=True, row_group_size=3)
    rows, problems = kept(tmp_path / "in.parquet", keep=["t", "o"])
    assert not problems
    assert [row["t"] for row in rows] == [row["o"]["l"][0] for row in rows] == TIMES
    assert read_table(tmp_path / "in.parquet", ["t"]).columns["t"] == TIMES
    votes, _ = read(tmp_path / "in.parquet", leave_out={"t": [TIMES[0]]})
    assert len(votes) == 3
    ticks = pa.array([1577836800000000001, 1577836800000000000, -1], pa.timestamp("ns"))
    pq.write_table(pa.table({"prompt": ["p"] * 3, "t": ticks}), tmp_path / "fine.parquet", use_deprecated_int96_timestamps=True)
    (chunk,) = read_rows(find([str(tmp_path / "fine.parquet")]), "prompt")
    assert not chunk.problems
    assert chunk.kept.column("t").combine_chunks().equals(ticks)
    table = read_table(tmp_path / "fine.parquet", ["t"])
    assert not table.invalid
    assert [pd.Timestamp(time).value for time in table.columns["t"]] == ticks.cast("int64").to_pylist()


@given(
    names=st.lists(st.sampled_from(["t", "t.at", "t.at.x", "a", "a.t", ".", "é"]), min_size=2, max_size=4, unique=True),
    kinds=st.lists(st.sampled_from(["time", "object", "list", "map"]), min_size=4, max_size=4),
    ticks=st.lists(st.sampled_from([None, 0, 1000, 1001, -1]), min_size=4, max_size=4),
    far=st.booleans(),
)
@example(names=["t.at", "t"], kinds=["time"] * 4, ticks=[1001, 0, 0, 0], far=True)
@example(names=["t.at", "t"], kinds=["object", "list"] * 2, ticks=[1001, -1, 0, 0], far=False)
@settings(deadline=None, max_examples=40)
@pytest.mark.slow
def test_times_in_nanoseconds_are_right_unless_others_are_beyond_them(names, kinds, ticks, far, tmp_path):
    def columns(unit, ticks):
        time = pa.timestamp(unit)
        make = {
            "time": lambda tick: pa.array([tick], time),
            "object": lambda tick: pa.array([{"at": tick}], pa.struct([("at", time)])),
            "list": lambda tick: pa.array([[tick, None]], pa.list_(time)),
            "map": lambda tick: pa.array([[("t", tick)]], pa.map_(pa.string(), time)),
        }
        return {name: make[kind](tick) for name, kind, tick in zip(names, kinds, ticks, strict=False)}

    stored, years = columns("ns", ticks), columns("us", [253370764800000000] * 4)
    given_ = [tmp_path / "in.parquet", *([tmp_path / "far.parquet"] if far else [])]
    for path, some in zip(given_, (stored, years), strict=False):
        pq.write_table(pa.table({"prompt": ["p"], **some}), path, use_deprecated_int96_timestamps=True)
    odd = [name for name, tick in zip(names, ticks, strict=False) if tick is not None and tick % 1000]
    assert not read_table(tmp_path / "in.parquet", names).invalid
    chunks = list(read_rows(find(map(str, given_)), "prompt"))
    assert [any(f"column {name!r}: " in chunks[0].problems.get(0, "") for name in odd)] == [bool(odd) and far]
    assert [dict(chunk.problems) for chunk in chunks[1:]] == [{}] * far
    for name in names:
        assert chunks[0].kept.column(name).null_count == ((name in odd and far) or stored[name].null_count)
        if far:
            assert chunks[1].kept.column(name).combine_chunks().equals(years[name])
        elif name in odd:
            assert chunks[0].kept.column(name).combine_chunks().equals(stored[name])


@pytest.mark.slow
@given(
    days=st.lists(
        st.datetimes(datetime.datetime(1, 1, 1), datetime.datetime(9999, 12, 31, 23, 59, 59, 999999)), min_size=1, max_size=20
    )
)
@settings(deadline=None, max_examples=40)
def test_any_time_of_spark_is_right(days, tmp_path):
    pq.write_table(
        pa.table({"prompt": ["p"] * len(days), "t": days}), tmp_path / "in.parquet", use_deprecated_int96_timestamps=True
    )
    assert (
        [row["t"] for row in kept(tmp_path / "in.parquet")[0]]
        == days
        == read_table(tmp_path / "in.parquet", ["t"]).columns["t"]
    )


def test_times_that_python_does_not_know_cost_their_row(tmp_path):
    far = pa.array([2**62, 0, None], pa.int64()).view(pa.timestamp("us"))
    pq.write_table(pa.table({"prompt": far, "t": far}), tmp_path / "in.parquet")
    (chunk,) = read_rows(find([str(tmp_path / "in.parquet")]), "prompt")
    assert "expected a value that Python can hold" in chunk.prompts[0].why
    assert chunk.kept.column("t").combine_chunks().equals(far)
    assert list(read_table(tmp_path / "in.parquet", ["t"]).invalid) == [0]


def test_prompts_of_other_types_are_errors_of_their_rows(router, tmp_path):
    values = [datetime.datetime(2024, 1, 1), datetime.date(2024, 1, 1), decimal.Decimal("1.5"), b"b", 1.5, True, {"a": 1}, [1]]
    cells = [pa.array([value]) for value in (*values, datetime.timedelta(1))]
    cells.append(pa.array([2**62], pa.int64()).view(pa.timestamp("us")))
    for i, cell in enumerate(cells):
        pq.write_table(pa.table({"prompt": cell}), tmp_path / f"{i}.parquet")
    run(router, BatchConfig([str(tmp_path)], str(tmp_path.parent / f"{tmp_path.name}-out")))
    errors = output(tmp_path.parent / f"{tmp_path.name}-out").column("error").to_pylist()
    assert len(errors) == len(cells)
    for error, got in zip(
        errors, ["datetime", "date", "Decimal", "bytes", "float", "bool", "dict", "int", "timedelta", "hold"], strict=True
    ):
        assert got in error


json_values = st.recursive(
    st.none() | st.booleans() | st.text(max_size=3) | st.floats() | st.integers(-(2**65), 2**65) | st.integers(-3, 3)
    | st.sampled_from([2**53, 2**53 + 1, -0.0, 0.5, "1", "\ud800"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b", "c"]), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
alike = st.sampled_from(
    [
        st.none() | st.integers(-(2**62), 2**62), st.floats() | st.integers(-5, 5),
        st.lists(st.none() | st.integers(0, 9), max_size=2),
        st.fixed_dictionaries({}, optional={"a": st.integers(0, 3) | st.none(), "b": st.lists(st.text(max_size=1))}),
    ]
)  # fmt: skip
columns = st.one_of(
    st.lists(json_values, min_size=1, max_size=8), alike.flatmap(lambda each: st.lists(each, min_size=1, max_size=8))
)


@pytest.mark.slow
@given(files=st.lists(columns, min_size=1, max_size=3))
@example(files=[[0.5, False]])
@example(files=[[1], [0.5], [2**53 + 1]])
@example(files=[[2**64 - 1], [1]])
@example(files=[[2**64 - 1], [-1]])
@example(files=[[[]], [[1]], [[None, 2.5]]])
@example(files=[[{"a": []}], [{"a": [{"b": 1}]}], [{"b": None}]])
@settings(deadline=None, max_examples=120)
def test_any_json_comes_out_as_it_went_in_or_is_refused(files, tmp_path):
    paths = [
        lines(tmp_path / f"{i}.jsonl", [{"prompt": "p", "m": value} for value in values]) for i, values in enumerate(files)
    ]
    check(paths, [value for values in files for value in values])


def check(paths, went_in):
    try:
        rows, problems = kept(*paths)
    except ValueError as error:
        assert any(path in str(error) for path in paths)
        assert str(error).endswith("--keep") or "; leave the column out with --keep" in str(error)
        return
    assert len(rows) == len(went_in)
    for i, (value, row) in enumerate(zip(went_in, rows, strict=True)):
        if i in problems:
            assert row["m"] is None
            assert re.search("in the column 'm['.[]", problems[i])
        else:
            assert same(value, row["m"])


@pytest.mark.slow
@given(
    files=st.lists(columns, min_size=1, max_size=3),
    kinds=st.lists(st.sampled_from(["jsonl", "parquet"]), min_size=3, max_size=3),
)
@settings(deadline=None, max_examples=80)
def test_any_values_of_jsonl_and_parquet_come_out_as_they_went_in_or_are_refused(files, kinds, tmp_path):
    paths, went_in = [], []
    for i, (values, kind) in enumerate(zip(files, kinds, strict=False)):
        path = tmp_path / f"{i}.{kind}"
        if kind == "parquet":
            try:
                array = pa.array(values)
                pq.write_table(pa.table({"prompt": ["p"] * len(values), "m": array}), path)
            except (pa.ArrowException, OverflowError, UnicodeEncodeError):
                continue
            values = array.to_pylist()  # what the file holds: Arrow has changed some itself
        else:
            lines(path, [{"prompt": "p", "m": value} for value in values])
        paths.append(str(path))
        went_in += values
    if paths:
        check(paths, went_in)


def sized(kind):
    """Values of an integer type, its bounds among them."""
    low, high = (0, 2**kind.bit_width) if "u" in str(kind) else (-(2 ** (kind.bit_width - 1)), 2 ** (kind.bit_width - 1))
    return st.integers(low, high - 1) | st.sampled_from([low, high - 1, 0, 1])


LEAVES = {
    **{kind: sized(kind) for kind in (pa.int8(), pa.int32(), pa.int64(), pa.uint8(), pa.uint32(), pa.uint64())},
    pa.float16(): st.floats(width=16), pa.float32(): st.floats(width=32), pa.float64(): st.floats(), pa.bool_(): st.booleans(),
    pa.string(): st.text(max_size=3), pa.large_string(): st.text(max_size=3),
    pa.dictionary(pa.int8(), pa.string()): st.text(max_size=1), pa.binary(): st.binary(max_size=2),
    pa.binary(2): st.binary(min_size=2, max_size=2), pa.large_binary(): st.binary(max_size=2),
    pa.decimal128(5, 2): st.decimals(-999, 999, places=2), pa.decimal128(38, 10): st.decimals(-9999, 9999, places=10),
    pa.decimal256(50, 0): st.integers(-(10**49), 10**49).map(decimal.Decimal),
    **{pa.timestamp(unit): st.integers(-(2**62), 2**62) for unit in ("ms", "us", "ns")},
    pa.timestamp("s"): st.integers(-(2**50), 2**50),  # stored as milliseconds
    pa.timestamp("us", "UTC"): st.integers(0, 2**40), pa.date32(): st.integers(-5, 5), pa.null(): st.none(),
    pa.time32("s"): st.integers(0, 86399), pa.time64("us"): st.integers(0, 10**10), pa.duration("ms"): st.integers(0, 2**40),
}  # fmt: skip


def pairs(values):
    return list(values.items())


def nest(inner):
    """A list or an object of such values, and its type."""
    kind, values = inner
    lists = st.lists(st.none() | values, max_size=2)
    return st.sampled_from(
        [
            (pa.list_(kind), lists), (pa.large_list(kind), lists),
            (pa.struct([("a", kind), ("b", pa.int8())]), st.fixed_dictionaries({"a": st.none() | values, "b": st.just(1)})),
            (pa.struct([("a", kind)]), st.fixed_dictionaries({"a": st.none() | values})),
            (pa.map_(pa.string(), kind), st.dictionaries(st.text(max_size=1), st.none() | values, max_size=2).map(pairs)),
        ]
    )  # fmt: skip


typed_values = st.recursive(st.sampled_from(list(LEAVES.items())), lambda inner: inner.flatmap(nest), max_leaves=3)
typed_files = typed_values.flatmap(
    lambda each: st.tuples(st.just(each[0]), st.lists(st.none() | each[1], min_size=1, max_size=4))
)
alike_files = st.sampled_from(
    [
        [pa.int8(), pa.int32(), pa.int64(), pa.uint8(), pa.float64(), pa.float32(), pa.decimal128(38, 10), pa.null()],
        [pa.timestamp("s"), pa.timestamp("us"), pa.timestamp("ns")], [pa.uint64(), pa.uint8(), pa.int8(), pa.float64()],
        [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())], [pa.binary(), pa.binary(2), pa.large_binary()],
    ]
).flatmap(
    lambda kinds: st.lists(
        st.sampled_from(kinds).flatmap(
            lambda kind: st.tuples(st.just(kind), st.lists(st.none() | LEAVES[kind], min_size=1, max_size=4))
        ),
        min_size=2, max_size=3,
    )
)  # fmt: skip


@pytest.mark.slow
@given(files=alike_files | st.lists(typed_files, min_size=1, max_size=3))
@settings(deadline=None, max_examples=80)
def test_any_types_of_parquet_keep_their_values_or_are_refused(files, tmp_path):
    paths, went_in = [], []
    for i, (kind, values) in enumerate(files):
        array = pa.array(values, kind)
        paths.append(str(tmp_path / f"{i}.parquet"))
        pq.write_table(pa.table({"prompt": ["p"] * len(values), "m": array}), paths[-1])
        went_in += map(scalar, array)
    try:
        chunks = list(read_rows(find(paths), "prompt"))
    except ValueError as error:
        assert "leave the column out with --keep" in str(error)
        return
    came_out = [scalar(each) for chunk in chunks for each in chunk.kept.column("m")]
    assert all(not chunk.problems for chunk in chunks)
    assert len(came_out) == len(went_in)
    assert all(map(same, went_in, came_out))


def scalar(value):
    """As Python's, times of any year and unit as a fraction of seconds."""
    if not value.is_valid:
        return None
    kind = value.type
    if pa.types.is_temporal(kind) and not pa.types.is_date(kind):
        return Fraction(value.value, {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[kind.unit])
    if pa.types.is_struct(kind):
        return {name: scalar(item) for name, item in value.items()}
    if pa.types.is_map(kind):
        return [[key, scalar(each)] for key, each in zip(value.keys(), value.values.field(1), strict=True)]
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return list(map(scalar, value))
    return value.as_py()


def test_files_of_several_tools_are_one_table(tmp_path):
    """The same columns as pandas, polars, duckdb and pyarrow store them: text and large text, floats for integers with nulls,
    not null, categories, other order."""
    day = datetime.datetime(2024, 2, 29, 1, 2, 3)
    row = {"prompt": "p", "id": 7, "score": 0.5, "tag": "x", "day": day, "tags": ["a", "b"], "about": {"k": 1, "l": [1.5]}}
    frame = pd.DataFrame([row, row | {"id": None, "score": None, "tag": None}])
    frame.astype({"tag": "category"}).to_parquet(tmp_path / "a.parquet")
    pl.DataFrame([row], schema_overrides={"tag": pl.Categorical, "id": pl.Int32}).write_parquet(tmp_path / "b.parquet")
    duckdb.sql(
        "copy (select {'k': 1, 'l': [1.5::double]} about, 'p' prompt, 'x' tag, 7::utinyint id, 0.5::float score, "
        f"timestamp '2024-02-29 01:02:03' \"day\", ['a', 'b'] tags) to '{tmp_path}/c.parquet'"
    )
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "d.parquet")
    lines(tmp_path / "e.jsonl", [row | {"day": None}])
    frame.iloc[:0].drop(columns="id").assign(id="").to_parquet(tmp_path / "f.parquet")
    rows, problems = kept(tmp_path)
    assert not problems
    expected = {name: value for name, value in row.items() if name != "prompt"}
    assert [list(found) for found in rows] == [list(expected)] * 6
    for found, wanted in zip(rows, [expected, expected | {"score": None, "tag": None}, *[expected] * 4], strict=True):
        assert {**found, "id": 7, "day": day} == wanted | {"score": found["score"]}
    assert [found["id"] for found in rows if found["id"] is not None and found["id"] == found["id"]] == [7.0] * 5
    assert [found["day"] for found in rows] == [day] * 5 + [None]


@pytest.mark.parametrize("frames", [(pd.DataFrame({"id": [1, 2]}), pd.DataFrame({"id": [1.0, None]}))])
def test_what_pandas_makes_of_integers_and_nulls(frames, tmp_path):
    for i, frame in enumerate(frames):
        frame.assign(prompt="p").to_parquet(tmp_path / f"{i}.parquet")
    rows, problems = kept(tmp_path)
    assert not problems
    assert [row["id"] for row in rows[:3]] == [1, 2, 1]
    assert rows[3]["id"] is None or np.isnan(rows[3]["id"])


def test_intervals_are_refused_where_they_are_kept(router, tmp_path):
    path = tmp_path / "in.parquet"
    what = "'p' || i as prompt, interval 1 month as gap, {'of': [interval (i) day]} as within, uuid() as id, 'x' as \"gap.x\""
    duckdb.sql(f"copy (select {what} from range(3) t(i)) to '{path}' (format parquet)")
    for name in ("gap", "within"):
        with pytest.raises(ValueError, match=rf"in.parquet: column '{name}': it has parquet's INTERVAL.*--keep"):
            run(router, BatchConfig([str(path)], str(tmp_path / "out"), keep=[name]))
    config = BatchConfig([str(path)], str(tmp_path / "out"), keep=["id", "gap.x"], format="jsonl")
    assert run(router, config, restart=True).routed == 3

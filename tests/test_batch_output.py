"""How decided rows become files: formats that other tools open as they are, and where each row comes from."""

from __future__ import annotations

import csv
import datetime
import decimal
import io
import json
import math

import duckdb
import fsspec
import hypothesis.strategies as st
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from hypothesis import given

from p2l_engine.batch import BatchConfig, run
from p2l_engine.batch.blocks import blocks
from p2l_engine.batch.output import FORMATS, check_format
from p2l_engine.batch.sources import source_columns, source_names
from p2l_engine.tables.find import find
from p2l_engine.tables.whole import read_table
from tests.support.batch_files import PROMPTS, contents, output, write
from tests.support.cases import slow_but

OWN = ["source_file", "source_row", "model", "policy", "expected_cost", "win_rate", "score", "theta", "eta", "error"]


@pytest.fixture
def options(tmp_path):
    """Options of a run of two files in a folder: 150 rows, of which row 1 of each file has no prompt."""
    (tmp_path / "in" / "day").mkdir(parents=True)
    for i, name in enumerate(("a.jsonl", "day/b.jsonl")):
        prompts = [*PROMPTS[75 * i : 75 * i + 1], None, *PROMPTS[75 * i + 2 : 75 * i + 75]]
        write(tmp_path / "in" / name, prompts, n=list(range(75)), tags=[[{"a": k / 4}] for k in range(75)])
    return {"inputs": [str(tmp_path / "in")], "rows_per_part": 40, "coefficients": "float16"}


def expected(found):
    """What every reader must find in the columns that name rows."""
    files = ["a.jsonl"] * 75 + ["day/b.jsonl"] * 75
    assert [row["source_file"] for row in found] == files
    assert [row["source_row"] for row in found] == [*range(75), *range(75)]
    assert [row["n"] for row in found] == [*range(75), *range(75)]
    assert [i % 75 for i, row in enumerate(found) if row["error"]] == [1, 1]
    assert all((row["model"] is None) == (row["error"] is not None) for row in found)


@pytest.mark.slow
def test_the_folder_opens_in_polars_duckdb_pandas_and_pyarrow(router, options, tmp_path):
    out = tmp_path / "out"
    run(router, BatchConfig(output=str(out), **options))
    rows = output(out).to_pylist()
    expected(rows)
    assert list(rows[0])[3:] == OWN
    assert pl.read_parquet(f"{out}/").to_dicts() == rows
    assert duckdb.sql(f"select * from '{out}/*.parquet'").to_arrow_table().to_pylist() == rows
    assert pa.dataset.dataset(out).to_table().to_pylist() == rows
    frame = pd.read_parquet(out)
    assert frame["source_row"].tolist() == [row["source_row"] for row in rows]
    assert frame["theta"].map(lambda each: None if each is None else list(each)).tolist() == [row["theta"] for row in rows]


@pytest.mark.slow
def test_jsonl_and_csv_say_what_parquet_says(router, options, tmp_path):
    for name in FORMATS:
        run(router, BatchConfig(output=str(tmp_path / name), format=name, **options))
    rows = output(tmp_path / "parquet").to_pylist()
    lines = [line for part in sorted((tmp_path / "jsonl").glob("part-*.jsonl")) for line in part.read_text().splitlines()]
    assert [json.loads(line) for line in lines] == rows
    assert len(list((tmp_path / "jsonl").glob("part-*.jsonl"))) == len(list((tmp_path / "parquet").glob("part-*")))
    found = duckdb.sql(f"from '{tmp_path}/jsonl/*.jsonl' order by source_file, source_row").to_arrow_table().to_pylist()
    assert [row["model"] for row in found] == [row["model"] for row in rows]
    assert pl.read_ndjson(sorted((tmp_path / "jsonl").glob("part-*.jsonl"))).to_dicts() == rows
    frame = pl.read_csv(f"{tmp_path}/csv/part-*.csv")
    expected(frame.to_dicts())
    for name in ("policy", "tags", "theta"):
        assert [None if text is None else json.loads(text) for text in frame[name]] == [row[name] for row in rows]
    for name in ("win_rate", "expected_cost", "score"):
        assert frame[name].to_list() == [row[name] for row in rows]


@pytest.mark.parametrize("name", slow_but(("csv",), FORMATS))
def test_a_resumed_run_has_the_same_bytes_in_every_format(name, router, options, tmp_path):
    options |= {"format": name, "split_by": "model"}
    run(router, BatchConfig(output=str(tmp_path / "whole"), **options))

    def stop(report):
        if report.rows >= 80:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run(router, BatchConfig(output=str(tmp_path / "out"), **options), progress=stop)
    run(router, BatchConfig(output=str(tmp_path / "out"), **options))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_each_models_rows_have_files_of_their_own(router, options, tmp_path):
    run(router, BatchConfig(output=str(tmp_path / "one"), **options))
    report = run(router, BatchConfig(output=str(tmp_path / "out"), format="jsonl", split_by="model", **options))
    rows = output(tmp_path / "one").to_pylist()
    files = {path.name: [json.loads(line) for line in path.open()] for path in sorted((tmp_path / "out").glob("*.jsonl"))}
    assert len(files) == report.parts
    for name, found in files.items():
        stem, number = name.removesuffix(".jsonl").rsplit("-", 1)
        models = {row["model"] for row in found}
        assert models == ({None} if stem == "errors" else {stem.removeprefix("part-")})
        assert found == [row for row in rows[40 * int(number) : 40 * int(number) + 40] if row["model"] in models]
    assert sum(map(len, files.values())) == 150


def test_source_columns_can_be_left_out_and_names_of_the_outputs_own_are_refused(router, tmp_path):
    given = write(tmp_path / "in.parquet", source_row=list(range(150)))
    with pytest.raises(ValueError, match=r"own named source_row: .*--keep ''.*--no-source leaves out"):
        run(router, BatchConfig([given], str(tmp_path / "out")))
    run(router, BatchConfig([given], str(tmp_path / "out"), source=False))
    assert output(tmp_path / "out").column_names[:3] == ["id", "source_row", "model"]
    given = write(tmp_path / "capital.parquet", Model=list(range(150)))  # DuckDB would rename ours, Spark reads neither
    with pytest.raises(ValueError, match="own named Model: name the ones to keep"):
        run(router, BatchConfig([given], str(tmp_path / "capital"), source=False))


def test_names_that_differ_in_capital_letters_alone_are_named(router, tmp_path, caplog):
    """Also of the keys of objects, in lists and maps, and of a folder; DuckDB renames them."""
    objects = pa.array([{"a": 1, "b": 2, "B": [{"ß": 3, "SS": 4}]}] * 150)
    maps = pa.array([[("k", {"x": 1, "X": 2})]] * 150, pa.map_(pa.string(), pa.struct([("x", pa.int64()), ("X", pa.int64())])))
    (tmp_path / "ID=7").mkdir()
    given = write(tmp_path / "ID=7" / "in.parquet", o=objects, m=maps)
    run(router, BatchConfig([str(tmp_path / "ID=7")], str(tmp_path / "none"), keep=["id"]))
    run(router, BatchConfig([given], str(tmp_path / "requests"), split_by="model", write_as="openai-batch"))
    assert "capital letters" not in caplog.text
    run(router, BatchConfig([str(tmp_path / "ID=*")], str(tmp_path / "out"), keep=["id", "ID", "o", "m"]))
    said = "and DuckDB renames: id and ID, m.value.x and m.value.X, o.B.ß and o.B.SS, o.b and o.B"
    assert f"{said}; --keep names the columns to keep" in caplog.text
    columns = duckdb.sql(f"select * from '{tmp_path}/out/*.parquet'").columns
    assert columns[:2] == ["id", "ID_1"]


def test_files_are_named_as_the_user_would(tmp_path, monkeypatch):
    for name in ("in/a.csv", "in/day/b.csv", "other/a.csv", "in/day/c.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("prompt\nx\n")
    monkeypatch.chdir(tmp_path)

    def names(*inputs):
        return list(source_names(find(inputs)).values())

    assert names("in") == names(f"{tmp_path}/in/") == names("./in/../in") == ["a.csv", "day/b.csv", "day/c.csv"]
    assert names("in/day/b.csv") == ["b.csv"]
    assert names("in/*/*.csv") == ["day/b.csv", "day/c.csv"]
    (tmp_path / "x[1]").mkdir()
    (tmp_path / "x[1]" / "a?.csv").write_text("prompt\nx\n")
    assert names("x[1]") == names("x[1]/a?.csv") == names("x[1]/*.csv") == names("x[1]/[a]*") == ["a?.csv"]
    monkeypatch.chdir(tmp_path / "x[1]")
    assert names("*.csv") == names("../x[1]/*") == names(".") == ["a?.csv"]
    monkeypatch.chdir(tmp_path)
    assert names("in/a*", "in/day") == ["a.csv", "b.csv", "c.csv"]
    assert names("in/day/b.csv", "in/a.csv") == ["b.csv", "a.csv"]
    assert names("other", "in") == ["other/a.csv", "in/a.csv", "in/day/b.csv", "in/day/c.csv"]  # else two would be a.csv
    store = fsspec.filesystem("memory")
    for name in ("one/a.csv", "two/a.csv"):
        store.pipe(f"/names/{name}", b"prompt\nx\n")
    assert names("memory://names/one", "memory://names/two") == ["one/a.csv", "two/a.csv"]
    assert names("memory://names/two", "in/a.csv") == ["memory:///names/two/a.csv", f"{tmp_path}/in/a.csv"]
    assert names(f"file://{tmp_path}/in") == ["a.csv", "day/b.csv", "day/c.csv"]


@pytest.mark.slow
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=4).filter(any), st.integers(1, 25), st.sampled_from(["parquet", "jsonl"])
)
def test_every_row_says_where_it_comes_from_whatever_the_blocks(tmp_path_factory, sizes, rows, kind):
    folder = tmp_path_factory.mktemp("sources")
    expected = []
    for i, size in enumerate(sizes):
        table = pa.table({"k": pa.array(range(size), pa.int64()), "prompt": [f"{i} {k}" for k in range(size)]})
        path = folder / f"{i}.{kind}"
        if kind == "parquet":
            pq.write_table(table, path, row_group_size=7)
        else:
            path.write_text("".join(json.dumps(row) + "\n\n" for row in table.to_pylist()))  # empty lines are no rows
        expected += [(path.name, k, (f"{i} {k}",)) for k in range(size)]
    names, found = source_names(find([folder])), []
    for block in blocks(find([folder]), "prompt", rows=rows):
        columns = source_columns(block.sources, names)
        found += zip(columns["source_file"].to_pylist(), columns["source_row"].to_pylist(), block.prompts, strict=True)
        assert block.kept["k"].to_pylist() == columns["source_row"].to_pylist()
        for i in range(len(block.prompts)):
            assert block.where(i) == f"{folder}/{columns['source_file'][i]}: row {columns['source_row'][i]}"
    assert found == expected


TEXTS = st.text(st.characters(blacklist_categories=("Cs",)), max_size=6)
VALUES = (
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    TEXTS,
    st.lists(st.none() | TEXTS, max_size=2),
    st.fixed_dictionaries({"a": st.none() | st.floats(), "b": st.lists(st.integers(0, 9), max_size=2)}),
    st.dates(),
    st.datetimes(),
    st.decimals(-1000, 1000, places=3),
)
COLUMNS = st.one_of([st.lists(st.none() | values, min_size=3, max_size=3) for values in VALUES])


def as_json(value):
    """A value as JSON has it: null for NaN and infinity, texts for times and decimals."""
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [as_json(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, datetime.datetime):
        return value.isoformat(" ", "microseconds")
    return str(value) if isinstance(value, datetime.date | decimal.Decimal) else value


def from_csv(text, value):
    """Whether this is the text of a value's cell."""
    if isinstance(value, list | dict):
        return json.loads(text) == as_json(value)
    if isinstance(value, float):
        return float(text) == value or (math.isnan(value) and math.isnan(float(text)))
    written = "" if value is None else str(as_json(value))
    return text == (written.lower() if isinstance(value, bool) else written)


@pytest.mark.slow
@given(st.lists(COLUMNS, min_size=1, max_size=4), TEXTS)
def test_every_value_comes_back_from_jsonl_and_csv(columns, name):
    table = pa.table([pa.array(column) for column in columns], [f"{name}{i}" for i in range(len(columns))])
    lines = bytes(FORMATS["jsonl"](table, {})).decode().split("\n")
    assert lines.pop() == ""
    assert [json.loads(line, parse_constant=pytest.fail) for line in lines] == as_json(table.to_pylist())
    written = bytes(FORMATS["csv"](table, {})).decode()
    header, *records = csv.reader(io.StringIO(written, newline=""))
    assert header == table.column_names
    for texts, values in zip(records, zip(*columns, strict=True), strict=True) if len(columns) > 1 else ():
        assert all(map(from_csv, texts, values))


@pytest.mark.slow
@given(st.lists(st.tuples(st.none() | TEXTS, TEXTS), min_size=1, max_size=4), st.sampled_from(list(FORMATS)))
def test_texts_and_nulls_come_back_through_the_projects_own_reader(tmp_path_factory, rows, name):
    path = tmp_path_factory.mktemp("own") / f"part-000000.{name}"
    table = pa.table({"text": pa.array([row[0] for row in rows], pa.string()), "prompt": [row[1] for row in rows]})
    path.write_bytes(FORMATS[name](table, {}))
    assert read_table(path, ("text", "prompt")).columns == {
        "text": table["text"].to_pylist(),
        "prompt": table["prompt"].to_pylist(),
    }


def test_parts_of_parquet_hold_no_float16_which_spark_cannot_read():
    half = pa.array([1.5, None, 65504.0], pa.float16())
    maps = pa.array([[("a", 0.5)], None, []], pa.map_(pa.string(), pa.float16()))
    lists = pa.FixedSizeListArray.from_arrays(half, 3)
    nested = pa.StructArray.from_arrays([half, pa.array([[1.0], None, []], pa.list_(pa.float16()))], ["a", "b"])
    for column in (half, lists, nested, pa.array([[0.1], None], pa.large_list(pa.float16())), maps):
        read = pq.read_table(pa.BufferReader(FORMATS["parquet"](pa.table({"x": column}), {"key": "value"})))
        assert "half" not in str(read.schema.field("x").type)
        assert read["x"].to_pylist() == column.to_pylist()
        assert read.schema.metadata[b"key"] == b"value"


def test_kept_columns_of_rare_types_stay_as_they_are(router, tmp_path):
    columns = {
        "uuid": pa.array([b"0" * 16, None], pa.uuid()),
        "json": pa.ExtensionArray.from_storage(pa.json_(), pa.array(["{}", None])),
        "map": pa.array([[("a", 1)], None], pa.map_(pa.string(), pa.int64())),
        "view": pa.array(["a", None], pa.string_view()),
        "dictionary": pa.array(["a", None]).dictionary_encode(),
        "small": pa.array([decimal.Decimal("1.5"), None], pa.decimal128(5, 1)),
    }
    pq.write_table(pa.table({"prompt": ["x", "y"], **columns}), tmp_path / "in.parquet")
    run(router, BatchConfig([str(tmp_path / "in.parquet")], str(tmp_path / "out"), coefficients="float16"))
    found, before = output(tmp_path / "out"), pq.read_table(tmp_path / "in.parquet")
    for name in columns:
        assert found[name].to_pylist() == before[name].to_pylist()


def test_kept_columns_that_spark_cannot_read_are_named(router, tmp_path, caplog):
    table = pa.table({"prompt": ["x"], "fine": pa.array([1], pa.timestamp("us")), "at": pa.array([1], pa.timestamp("ns"))})
    table = table.append_column("deep", pa.array([[{"t": None}]], pa.list_(pa.struct([("t", pa.time32("s"))]))))
    pq.write_table(table, tmp_path / "in.parquet")
    for name in ("parquet", "jsonl"):
        with caplog.at_level("INFO"):
            run(router, BatchConfig([str(tmp_path / "in.parquet")], str(tmp_path / name), format=name))
        said = "Spark reads from no parquet, with --format jsonl as text: at (timestamp[ns]), deep (list<" in caplog.text
        assert said == (name == "parquet")
        caplog.clear()


@pytest.mark.parametrize("scope", ["prompt", "batch"])
@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("split", [None, "model"])
def test_a_run_of_no_rows_has_a_file_with_its_columns(split, name, scope, router, tmp_path):
    """Readers of a folder without files fail, so that a pipeline would on the first day without rows."""
    pq.write_table(pa.table({"id": pa.array([], pa.int64()), "prompt": pa.array([], pa.string())}), tmp_path / "in.parquet")
    options = {"format": name, "split_by": split, "coefficients": "float32", "budget": 1.5, "budget_scope": scope}
    config = BatchConfig([str(tmp_path / "in.parquet")], str(tmp_path / "out"), **options)
    report = run(router, config)
    assert (report.rows, report.routed, report.parts) == (0, 0, 1)
    (part,) = (tmp_path / "out").glob("part-*")
    if name == "jsonl":
        assert part.read_bytes() == b""
    else:
        found = pl.read_csv(part) if name == "csv" else pl.read_parquet(f"{tmp_path}/out/")
        assert (found.columns, len(found)) == (["id", *OWN], 0)
    assert run(router, config).parts == 1


def test_kept_columns_that_a_format_cannot_hold_are_refused_by_name():
    for kind in (pa.binary(), pa.map_(pa.string(), pa.int64()), pa.duration("s"), pa.list_(pa.struct([("x", pa.binary())]))):
        schema = pa.schema([("fine", pa.int64()), ("odd", kind)])
        check_format("parquet", schema)
        for name in ("jsonl", "csv"):
            with pytest.raises(
                ValueError, match=rf"column 'odd': the type .* cannot be written as {name}: .*--keep, or --format parquet"
            ):
                check_format(name, schema)
    twice = pa.schema([("odd", pa.struct([("a", pa.int64()), ("a", pa.int64())]))])
    with pytest.raises(ValueError, match="an object that names a key twice"):
        check_format("jsonl", twice)


def test_uuids_and_json_that_duckdb_writes_are_texts_in_json_and_csv(tmp_path):
    texts = ["00000000-0000-0000-0000-000000000001", None, "ffffffff-ffff-ffff-ffff-ffffffffffff"]
    rows = ", ".join(f"({'null' if text is None else repr(text)}::uuid)" for text in texts)
    what = "u, [u, null] as us, {'a': {'b': u}, 't': date '1970-01-02', 'j': '[1]'::json} as o"
    duckdb.sql(f"copy (select {what} from (values {rows}) t(u)) to '{tmp_path}/in.parquet' (format parquet)")
    table = pq.read_table(tmp_path / "in.parquet").slice(1)
    check_format("jsonl", table.schema)
    found = [json.loads(line) for line in bytes(FORMATS["jsonl"](table, {})).splitlines()]
    assert found == [{"u": u, "us": [u, None], "o": {"a": {"b": u}, "t": "1970-01-02", "j": "[1]"}} for u in texts[1:]]
    lines = list(csv.reader(io.StringIO(bytes(FORMATS["csv"](table, {})).decode())))
    assert [line[0] for line in lines] == ["u", "", texts[2]]
    assert [json.loads(cell) for cell in lines[2][1:]] == [found[1]["us"], found[1]["o"]]

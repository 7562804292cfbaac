"""Hive partitions: names of folders that are columns."""

from __future__ import annotations

import datetime
import json
from decimal import Decimal

import duckdb
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from p2l_engine.batch import BatchConfig, run
from p2l_engine.cli.prompts import PromptFile
from p2l_engine.replay.columns import column_names, read_columns
from p2l_engine.tables.chunked import read_rows
from p2l_engine.tables.find import find
from p2l_engine.tables.partitions import NULL, partitions_of
from p2l_engine.tables.whole import read_table
from p2l_engine.votes import read
from tests.support.batch_files import output


def kept(inputs, keep=None, column="prompt"):
    """The kept columns of all rows."""
    files = find([str(each) for each in inputs])
    return pa.concat_tables([rows.kept for rows in read_rows(files, column, keep)])


def put(path, **columns):
    """The columns as the format that the ending says, in a folder that is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    else:
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        lines = (",".join(columns), *(",".join(map(str, row.values())) for row in rows))
        path.write_text("\n".join(lines if path.suffix == ".csv" else map(json.dumps, rows)) + "\n")


@pytest.mark.parametrize("ending", ["parquet", "csv", "jsonl"])
def test_folders_become_columns(ending, tmp_path):
    put(tmp_path / f"lang=en/day=2024-01-01/a.{ending}", prompt=["a", "b"], id=["1", "2"])
    put(tmp_path / f"lang=zh%3AHans/day={NULL}/a.{ending}", prompt=["c"], id=["3"])
    rows = [{"id": "1", "lang": "en", "day": "2024-01-01"}, {"id": "2", "lang": "en", "day": "2024-01-01"},
            {"id": "3", "lang": "zh:Hans", "day": None}]  # fmt: skip
    assert kept([tmp_path]).to_pylist() == rows
    assert kept([f"{tmp_path}/*/*/*.{ending}"]).to_pylist() == rows
    assert kept([tmp_path], ["lang", "id"]).to_pylist() == [{"lang": row["lang"], "id": row["id"]} for row in rows]
    assert kept([tmp_path / "lang=en"]).column_names == ["id", "day"]  # below what was named
    assert kept([f"{tmp_path}/lang=en/*/*"]).column_names == ["id", "day"]
    assert kept([tmp_path / f"lang=en/day=2024-01-01/a.{ending}"]).column_names == ["id"]
    table = read_table(tmp_path, ["prompt", "lang", "day"])
    assert table.columns == {"prompt": ["a", "b", "c"], "lang": ["en", "en", "zh:Hans"], "day": ["2024-01-01"] * 2 + [None]}
    assert set(table.names) == {"prompt", "id", "lang", "day"}
    assert PromptFile.read(tmp_path, "lang").prompts == ["en", "en", "zh:Hans"]


def test_partitions_are_columns_of_votes_and_of_bare_lines(tmp_path):
    for model in ("x", "z"):
        put(tmp_path / f"votes/model_b=y%20/model_a={model}/a.csv", prompt=["a", "b"], winner=["model_a", "tie"])
    votes, dropped = read(tmp_path / "votes")
    assert (votes.models, len(votes), len(dropped)) == (("x", "y ", "z"), 4, 0)
    (tmp_path / "bare" / "category=math").mkdir(parents=True)
    (tmp_path / "bare" / "category=math" / "a.jsonl").write_text('"one"\n{"prompt": "two"}\n')
    assert PromptFile.read(tmp_path / "bare").categories() == ["math", "math"]


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_a_column_that_a_folder_names_too_has_its_value_or_is_refused(ending, tmp_path):
    put(tmp_path / f"year=2024/half=0.5/on=true/a.{ending}", prompt=["a"], year=[2024], half=[0.5], on=[True])
    assert kept([tmp_path]).to_pylist() == [{"year": 2024, "half": 0.5, "on": True}]
    assert read_table(tmp_path, ["prompt", "year"]).columns == {"prompt": ["a"], "year": [2024]}
    put(
        tmp_path / f"year=2023/half=0.5/on=true/b.{ending}", prompt=["a", "b"], year=[2023, 2022], half=[0.5] * 2, on=[True] * 2
    )
    refused = rf"b.{ending}: row 1: column 'year': expected '2023', as its folder says, got 2022; --no-partitions"
    for read_all in (lambda: kept([tmp_path]), lambda: read_table(tmp_path, ["year"])):
        with pytest.raises(ValueError, match=refused):
            read_all()
    assert kept([tmp_path], ["half"]).to_pylist() == [{"half": 0.5}] * 3  # a column that is not kept fails nothing
    assert read_table(tmp_path, ["prompt"]).columns == {"prompt": ["a", "b", "a"]}


def test_the_prompts_may_be_named_by_a_folder_that_agrees(tmp_path):
    put(tmp_path / "prompt=a/a.csv", prompt=["a"], n=["1"])
    assert kept([tmp_path]).to_pylist() == [{"n": "1"}]
    put(tmp_path / "prompt=b/a.csv", prompt=["b", "c"], n=["1", "2"])
    with pytest.raises(ValueError, match=r"prompt=b/a.csv: row 1: column 'prompt': expected 'b', as its folder says, got 'c'"):
        kept([tmp_path])


def test_csv_rows_that_cannot_be_read_disagree_with_no_folder(tmp_path):
    put(tmp_path / "n=1/a.csv", prompt=["a"], n=["1"])
    (tmp_path / "n=1" / "a.csv").write_text("prompt,n\na,1\nb\nc,1\n")
    assert kept([tmp_path]).to_pylist() == [{"n": "1"}] * 3


def test_files_of_other_partitions_are_refused(tmp_path):
    put(tmp_path / "lang=en/a.csv", prompt=["a"])
    put(tmp_path / "region=eu/b.csv", prompt=["b"])
    with pytest.raises(ValueError, match=r"b.csv: expected the partitions of .*a.csv, lang; got region; --no-partitions"):
        kept([tmp_path])
    put(tmp_path / "c.csv", prompt=["c"])
    with pytest.raises(ValueError, match=r"lang=en/a.csv: expected the partitions of .*c.csv, none; got lang"):
        kept([tmp_path])
    assert len(kept([tmp_path], [])) == 0  # no columns
    assert read_table(tmp_path, ["lang", "region"]).columns == {"lang": [None, "en", None], "region": [None, None, "eu"]}


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("a=1/a=2", "the folder a=2: expected one value of a, got 1 above it"),
        ("a=%ff", "the folder a=%ff: expected UTF-8 after"),
    ],
)
def test_folders_that_say_no_value_are_named(folder, message, tmp_path):
    put(tmp_path / folder / "a.csv", prompt=["a"])
    with pytest.raises(ValueError, match=rf"a.csv: {message}.*--no-partitions"):
        find([tmp_path])


def test_a_run_keeps_partitions_or_leaves_them_out(router, tmp_path):
    for lang in ("en", "fr"):
        put(
            tmp_path / f"in/lang={lang}/a.parquet",
            prompt=[f"hello {lang}", "same"],
            lang=["x", "x"] if lang == "fr" else [lang] * 2,
        )
    with pytest.raises(ValueError, match=r"row 0: column 'lang': expected 'fr', as its folder says, got 'x'; --no-partitions"):
        run(router, BatchConfig([tmp_path / "in"], tmp_path / "out"))
    run(router, BatchConfig([tmp_path / "in"], tmp_path / "none", partitions=False))
    assert output(tmp_path / "none")["lang"].to_pylist() == ["en", "en", "x", "x"]
    put(tmp_path / "in/lang=fr/a.parquet", prompt=["hello fr", "same"])
    run(router, BatchConfig([tmp_path / "in"], tmp_path / "again"))
    assert output(tmp_path / "again")["lang"].to_pylist() == ["en", "en", "fr", "fr"]


def test_a_folder_that_was_renamed_is_another_input_of_a_run(router, tmp_path):
    """Its file is the same, its rows are not."""
    put(tmp_path / "in/lang=en/a.parquet", prompt=["hello"])
    options = {"source": False}
    run(router, BatchConfig([tmp_path / "in"], tmp_path / "out", **options))
    (tmp_path / "in" / "lang=en").rename(tmp_path / "in" / "lang=de")
    try:
        run(router, BatchConfig([tmp_path / "in"], tmp_path / "out", **options))
    except ValueError as refused:
        assert "partitions" in str(refused) or "inputs" in str(refused)
    else:
        assert output(tmp_path / "out")["lang"].to_pylist() == ["de"]


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_folders_are_columns_of_logs_to_replay(ending, tmp_path):
    for model in ("x", "y"):
        put(tmp_path / f"model={model}/a.{ending}", prompt=["a"], score=[0.5])
    assert set(column_names(tmp_path)) == {"prompt", "score", "model"}
    assert read_columns(tmp_path, ["prompt", "model"]).to_pylist() == [
        {"prompt": "a", "model": "x"},
        {"prompt": "a", "model": "y"},
    ]


def test_other_folders_say_nothing(tmp_path):
    assert partitions_of(["x", "=1", "a=", "b==c", "a=", "%20=+"]) == (("a", ""), ("b", "=c"), (" ", "+"))
    put(tmp_path / "_day=3/a.csv", prompt=["a"])  # Spark reads it, too
    put(tmp_path / "_x/a.csv", prompt=["a"])
    assert kept([tmp_path]).to_pylist() == [{"_day": "3"}]


def by_pyarrow(table, folder):
    pq.write_to_dataset(table, folder, partition_cols=["k 1", "é"])


def by_pandas(table, folder):
    table.to_pandas().to_parquet(folder, partition_cols=["k 1", "é"])


def by_polars(table, folder):
    polars.from_arrow(table).write_parquet(polars.PartitionBy(folder, key=["k 1", "é"]), mkdir=True)


def by_duckdb(table, folder):
    duckdb.from_arrow(table).write_csv(str(folder), partition_by=["k 1", "é"], header=True)


value = (
    st.none()
    | st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=12)
    | st.text("%/=+.:_é \\", max_size=4)
)


@pytest.mark.parametrize("tool", [by_pyarrow, by_pandas, by_polars, by_duckdb])
@given(values=st.lists(st.tuples(value, value), min_size=1, max_size=4, unique=True))
@example(values=[(None, ""), ("", None), (".hidden", "_day"), ("a/b", "x=y"), ("100%", "%41"), ("é", "*")])
@settings(deadline=None, max_examples=15)
def test_what_tools_partition_is_read(tool, values, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lake") / "out"
    schema = pa.schema([(name, pa.string()) for name in ("prompt", "k 1", "é")])
    rows = [(f"p{i}", *row) for i, row in enumerate(values)]
    table = pa.table([list(column) for column in zip(*rows, strict=True)], schema=schema)
    tool(table, folder)
    found = read_table(folder, ["prompt", "k 1", "é"]).columns
    assert sorted(zip(found["prompt"], found["k 1"], found["é"], strict=True)) == [
        (f"p{i}", *row) for i, row in enumerate(values)
    ]


@pytest.mark.parametrize("kind", [pa.null(), pa.string(), pa.dictionary(pa.int8(), pa.string()), pa.large_string()], ids=str)
def test_the_folder_says_what_a_column_of_nulls_does_not(kind, tmp_path):
    put(tmp_path / "lang=en/a.parquet", prompt=["a", "b"], lang=pa.array([None, None], kind))
    put(tmp_path / "lang=de/a.parquet", prompt=["c"], lang=pa.array(["de"], pa.string() if kind == pa.null() else kind))
    assert kept([tmp_path]).to_pylist() == [{"lang": "de"}, {"lang": "en"}, {"lang": "en"}]
    assert kept([tmp_path / "*=en"]).to_pylist() == [{"lang": "en"}] * 2


FOLDERS = {
    "int": ("01", [1, None], 1),
    "float": ("0.5", [0.5, None], 0.5),
    "bool": ("true", [True, None], True),
    "date": ("2024-02-29", [datetime.date(2024, 2, 29), None], datetime.date(2024, 2, 29)),
    "decimal": ("1.50", [Decimal("1.50")], Decimal("1.5")),
    "text": ("01", ["01"], "01"),
}


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.parametrize("order", [0, 1])
def test_folders_have_the_type_that_other_files_have(name, order, tmp_path):
    """Some tools store the column of a partition in the files, some leave it out."""
    folder, values, value = FOLDERS[name]
    put(tmp_path / f"k={folder}" / "ab"[order] / "x.parquet", prompt=["p"] * len(values), k=values)
    put(tmp_path / f"k={folder}" / "ba"[order] / "x.jsonl", prompt=["p"])
    assert kept([tmp_path]).column("k").to_pylist() == [value] * (len(values) + 1)


@pytest.mark.parametrize(
    ("folder", "values"), [("x", [1]), ("1.5", [1]), ("0.1", pa.array([0.1], pa.float32())), ("b", [{"a": 1}])]
)
def test_folders_that_the_type_of_other_files_does_not_hold_are_refused(folder, values, tmp_path):
    put(tmp_path / "k=__HIVE_DEFAULT_PARTITION__" / "x.parquet", prompt=["p"], k=pa.nulls(1, pa.array(values).type))
    put(tmp_path / f"k={folder}" / "x.jsonl", prompt=["p"])
    with pytest.raises(ValueError, match=rf"k={folder}/x.jsonl: column 'k' is .*, its folder says '{folder}'; --no-partitions"):
        kept([tmp_path])

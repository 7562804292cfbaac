r"""Csv files whose quotes are escaped by a backslash, as Spark writes them, and the message where that was not said."""

from __future__ import annotations

import csv
import gzip

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from p2l_engine.batch import BatchConfig, run
from p2l_engine.cli.prompts import PromptFile
from p2l_engine.tables import csv as tables_csv
from p2l_engine.tables import quotes
from p2l_engine.tables.chunked import read_rows
from p2l_engine.tables.find import find
from p2l_engine.tables.whole import read_table
from p2l_engine.train import data
from p2l_engine.train.config import TrainConfig
from p2l_engine.votes import read
from tests.support.batch_files import output

HEADER = "prompt,n\n"


def spark_cell(text):
    """A cell as Spark writes it; its own tests hold this against Spark."""
    if text is None:
        return ""
    if text and not any(sign in text for sign in '",\n\r'):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def prompts(path, escape="\\"):
    return [cell for rows in read_rows(find([str(path)], csv_escape=escape), "prompt") for cell in rows.prompts]


def test_runs_votes_and_prompts_of_commands_are_read_alike(router, tmp_path):
    rows = [(f'say "{i}", \\', "x", "y", "model_a") for i in range(3)]
    lines = ["prompt,model_a,model_b,winner", *(",".join(map(spark_cell, row)) for row in rows)]
    (tmp_path / "in.csv").write_text("\n".join(lines))
    turns = [prompt for prompt, *_ in rows]
    run(router, BatchConfig([tmp_path / "in.csv"], tmp_path / "out", csv_escape="\\"))
    assert output(tmp_path / "out")["error"].to_pylist() == [None] * 3
    assert PromptFile.read(tmp_path / "in.csv", csv_escape="\\").prompts == turns
    votes, dropped = read(tmp_path / "in.csv", csv_escape="\\")
    assert (list(votes.prompts), len(dropped)) == ([(text,) for text in turns], 0)
    config = {
        "proj_name": "p",
        "pretrain_model_name": "x",
        "head_type": "bt",
        "loss_type": "bt",
        "train_data_path": str(tmp_path / "in.csv"),
    }
    config |= {"learning_rate": 1e-3, "num_train_epochs": 1, "batch_size": 1, "csv_escape": "\\"}
    parts = data.load(TrainConfig.model_validate(config))
    assert list(parts.training.prompts) == [(text,) for text in turns]
    with pytest.raises(ValueError, match="--csv-escape"):
        run(router, BatchConfig([tmp_path / "in.csv"], tmp_path / "never"))
    with pytest.raises(ValueError, match="csv_escape: expected one character"):
        BatchConfig([tmp_path / "in.csv"], tmp_path / "never", csv_escape="no")


cell = st.none() | st.text('"\\,\n\ra ', max_size=8)


def test_values_as_spark_writes_them(tmp_path):
    texts = [
        'a "b"',
        '"',
        "\\",
        "a\\",
        'a\\"',
        "C:\\new",
        "C:\\\\x",
        "x,\\",
        'x,\\"y',
        "",
        None,
        "two\nlines",
        'q"\n"',
        '",',
        'é "',
    ]
    (tmp_path / "in.csv").write_text(HEADER + "".join(f"{spark_cell(text)},z\n" for text in texts), encoding="utf-8")
    assert prompts(tmp_path / "in.csv") == texts
    (tmp_path / "in.csv.gz").write_bytes(gzip.compress((tmp_path / "in.csv").read_bytes()))
    table = read_table(tmp_path / "in.csv.gz", ["prompt", "n"], csv_escape="\\")
    assert table.columns == {"prompt": texts, "n": ["z"] * len(texts)}


@pytest.mark.slow
@given(rows=st.lists(st.tuples(cell, cell), min_size=1, max_size=8), piece=st.integers(24, 80))
@example(rows=[('",', ","), ("\\", '"\nb')], piece=24)
@settings(deadline=None, max_examples=100)
def test_every_value_comes_out_as_it_went_in(rows, piece, tmp_path):
    text = HEADER + "".join(f"{spark_cell(a)},{spark_cell(b)}\n" for a, b in rows)
    (tmp_path / "in.csv").write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quotes, "PIECE", piece)  # bytes
        patch.setattr(tables_csv, "PIECE", piece)
        table = read_table(tmp_path / "in.csv", ["prompt", "n"], csv_escape="\\")
    assert list(zip(table.columns["prompt"], table.columns["n"], strict=True)) == rows
    assert not table.invalid


@pytest.mark.slow
@given(rows=st.lists(st.tuples(st.text('"\\,\n\ra ', max_size=8)), min_size=1, max_size=8))
@settings(deadline=None, max_examples=100)
def test_what_pythons_csv_escapes_is_read(rows, tmp_path):
    """As pandas writes with escapechar and quoting=csv.QUOTE_ALL."""
    with (tmp_path / "in.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL, doublequote=False, escapechar="\\")
        writer.writerows([("prompt",), *rows])
    assert [(text,) for text in prompts(tmp_path / "in.csv")] == rows


@pytest.mark.slow
@given(rows=st.lists(st.tuples(cell, st.sampled_from(["x", "y z", 'a "b"', None])), min_size=1, max_size=6))
@example(rows=[('"\nb', "x")])
@example(rows=[('",', ","), (None, None)])
@settings(deadline=None, max_examples=150)
def test_without_the_option_nothing_is_misread(rows, tmp_path):
    r"""Wherever \" was written: the values of a file that is not refused, and has no invalid row, are those that went in."""
    (tmp_path / "in.csv").write_bytes((HEADER + "".join(f"{spark_cell(a)},{spark_cell(b)}\n" for a, b in rows)).encode())
    try:
        table = read_table(tmp_path / "in.csv", ["prompt", "n"])
    except ValueError as refused:
        assert "--csv-escape '\\'" in str(refused) or "a quote is not closed" in str(refused)
        return
    if not table.invalid and any('"' in (text or "") for row in rows for text in row):
        assert list(zip(table.columns["prompt"], table.columns["n"], strict=True)) == rows


@pytest.mark.slow
@given(rows=st.lists(st.tuples(st.text('"\\,\n\ra', max_size=8), st.text('"\\a', max_size=3)), min_size=1, max_size=8))
@settings(deadline=None, max_examples=100)
def test_doubled_quotes_beside_backslashes_are_standard(rows, tmp_path):
    with (tmp_path / "in.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("prompt", "n"), *rows])
    for escape in (None, '"'):
        table = read_table(tmp_path / "in.csv", ["prompt", "n"], csv_escape=escape)
        found = [tuple(text or "" for text in row) for row in zip(table.columns["prompt"], table.columns["n"], strict=True)]
        assert found == rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ('a,1\n"say \\"hi\\"",2\n', "row 1: more after a value's closing quote: \"say"),
        ('\n\na,1\nsay \\"hi\\",2\n', "row 1: a quote within a value without quotes: say"),
        ('"a\\"",1\nb,2\n', "row 0: a quote is not closed by the end of the file: \"a"),
        ('"' + "x\n" * 1000 + '\\" y",1\n', "row 0: more after a value's closing quote: \"x"),
    ],
)  # fmt: skip
def test_a_file_with_escaped_quotes_says_so(rows, message, tmp_path):
    (tmp_path / "in.csv").write_text(HEADER + rows)
    remedy = "it has \\\" in it: use --csv-escape '\\' if a backslash escapes quotes"
    for read_it in (lambda: prompts(tmp_path / "in.csv", None), lambda: read_table(tmp_path / "in.csv", ["prompt"])):
        with pytest.raises(ValueError) as refused:  # noqa: PT011
            read_it()
        assert f"in.csv: {message}" in str(refused.value)
        assert remedy in str(refused.value)


def test_backslashes_in_standard_files_are_kept_where_quotes_are_said_to_be_doubled(tmp_path):
    (tmp_path / "in.csv").write_text(HEADER + '"C:\\",1\n5" pipe,2\n')
    with pytest.raises(ValueError, match="row 1: a quote within a value without quotes: 5.*or --csv-escape '\"'"):
        prompts(tmp_path / "in.csv", None)
    assert prompts(tmp_path / "in.csv", '"') == ["C:\\", '5" pipe']
    (tmp_path / "json.csv").write_text(HEADER + '"{""a"": ""x \\""y\\""""}",1\n')
    assert prompts(tmp_path / "json.csv", None) == ['{"a": "x \\"y\\""}']


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ('a,1\n"b""c",2\n', "row 1: more after a value's closing quote"),
        ('a,1\nb"c,2\n', "row 1: a quote within a value without quotes"),
        ('a,1\n"b\\",2\n', "row 1: a quote is not closed by the end of the file"),
        ('"p","n\\"', "the column names: a quote is not closed"),
    ],
)  # fmt: skip
def test_quotes_that_spark_does_not_write_are_refused(rows, message, tmp_path):
    text = HEADER + rows if rows[0] == "a" else rows
    (tmp_path / "in.csv").write_text(text)
    with pytest.raises(ValueError, match=f"in.csv: {message}"):
        prompts(tmp_path / "in.csv")


@pytest.mark.parametrize("escape", ["", "\\\\", ",", "\n", "é"])
def test_an_escape_is_one_sign(escape):
    with pytest.raises(ValueError, match="csv_escape: expected one character such as"):
        find(["in.csv"], csv_escape=escape)


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\r"])
def test_byte_order_marks_and_line_ends_are_no_values(end, tmp_path):
    text = (
        end.join(["\ufeff" + '"prompt",n', '"a \\"b\\"",1', "", '"c",2']) if end else '\ufeff"prompt",n\n"a \\"b\\"",1\n"c",2'
    )
    (tmp_path / "in.csv").write_bytes((text + end).encode())
    assert prompts(tmp_path / "in.csv") == ['a "b"', "c"]


@pytest.mark.slow
def test_a_long_value_is_read_in_bounded_time(tmp_path):
    long = '"\\\n,' * 2_000_000
    (tmp_path / "in.csv").write_text(HEADER + f"a,1\n{spark_cell(long)},2\nb,3\n")
    assert prompts(tmp_path / "in.csv") == ["a", long, "b"]

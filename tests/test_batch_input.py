"""Inputs and options that a batch run refuses: each is named, with file and row."""

from __future__ import annotations

import os

import numpy as np
import pytest

from p2l_engine.batch import BatchConfig, run
from p2l_engine.tables.find import find
from tests.support.batch_files import manifest, output, write
from tests.support.tiny import MODELS


@pytest.mark.slow
def test_inputs_and_folders_that_cannot_be_used_are_named(router, tmp_path):
    given = write(tmp_path / "in.parquet")
    out = str(tmp_path / "out")
    with pytest.raises(ValueError, match=r"in.parquet: expected the columns question; it has id, prompt"):
        run(router, BatchConfig([given], out, column="question"))
    for name in ("in.txt", "none.parquet"):
        (tmp_path / "in.txt").touch()
        with pytest.raises(ValueError, match=f"{name}: "):
            run(router, BatchConfig([str(tmp_path / name)], out))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: expected files in this folder"):
        run(router, BatchConfig([str(tmp_path / "empty")], out))
    with pytest.raises(ValueError, match="matching files"):
        run(router, BatchConfig([str(tmp_path / "*.csv")], out))
    for inputs, more, message in (
        ("", {}, "expected a path or a URI, got ''"),
        (f"file://{tmp_path}/?.csv", {}, "expected %3F for a question mark"),
        (given, {"keep": ["id", "id"]}, "keep: expected names of columns, each once"),
        (given, {"keep": ["", "id"]}, "keep: expected names of columns, each once"),
    ):
        with pytest.raises(ValueError, match=message):
            run(router, BatchConfig([inputs], out, **more))
    for more in ({"output": ""}, {"state": ""}):
        with pytest.raises(ValueError, match=f"{next(iter(more))}: expected a folder, got ''"):
            BatchConfig(**{"inputs": [given], "output": out} | more)
    with pytest.raises(ValueError, match="inputs: expected a list of at least one path"):
        BatchConfig(tmp_path, out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    for restart in (False, True):
        with pytest.raises(ValueError, match=r"mine: expected an empty folder or the output .*, found thesis.txt"):
            run(router, BatchConfig([given], str(tmp_path / "mine")), restart=restart)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    assert not (tmp_path / "mine.run").exists()
    with pytest.raises(ValueError, match="columns of its own named model, score"):
        run(router, BatchConfig([write(tmp_path / "taken.csv", model=["m"] * 150, score=[1] * 150)], str(tmp_path / "taken")))
    for text, message in (
        ('[\n{"prompt": "a"}', None),
        ("[\n1\n]", "expected a JSON object on each line, got one document over many lines; write an object a line"),
        ("1\n[", "no line of its first 2 is a JSON object: row 0: expected a JSON object: got int"),
        ('{"text": "a"}', "expected the columns prompt; it has text"),
    ):
        (tmp_path / "odd.jsonl").write_text(text)
        for name, inputs in (("alone", []), ("second", [write(tmp_path / "good.jsonl")])):
            config = BatchConfig([*inputs, str(tmp_path / "odd.jsonl")], str(tmp_path / name))
            if message is None:
                assert run(router, config, restart=True).routed % 150 == 1
                continue
            with pytest.raises(ValueError, match=f"odd.jsonl: {message}"):
                run(router, config, restart=True)
    ragged = ["id,prompt", *(f'{i},"a\nb"' for i in range(40_000)), '7,"a\nb",c']
    (tmp_path / "ragged.csv").write_text("\n".join(ragged))
    with pytest.raises(ValueError, match=r"ragged.csv: row 40000: expected 2 values.* got 3; is a quote not closed\? 7,"):
        run(router, BatchConfig([str(tmp_path / "ragged.csv")], str(tmp_path / "ragged")))
    for inputs, where in (
        (str(tmp_path), "out"),
        (f"{tmp_path}/**/*.parquet", "."),
        (given, "in.parquet"),
        (str(tmp_path), "."),
    ):
        with pytest.raises(ValueError, match="expected neither within the other"):
            run(router, BatchConfig([inputs], str(tmp_path / where)))
    # What cannot be is refused before anything is written.
    for more, message in (
        ({"budget": 0.5}, "budget 0.5 is infeasible"),
        ({"budget": 0.5, "budget_scope": "batch"}, "budget 0.5 is infeasible"),
        ({"max_share": {"unknown": 0.5}}, "max_share: expected models of the catalog, got unknown"),
        ({"max_share": {name: 0.1 for name in MODELS}}, "cannot hold"),
    ):
        with pytest.raises(ValueError, match=message):
            run(router, BatchConfig([given], str(tmp_path / "never"), **more))
    for name, text in (
        ("last.csv", b"text\nx\n"),
        ("last.csv.gz", b"\x1f\x8b"),
        ("last.parquet", b"PAR1"),
        ("last.jsonl", b"{}"),
    ):
        (tmp_path / name).write_bytes(text)
        with pytest.raises(ValueError, match=f"{name}: "):
            run(router, BatchConfig([given, str(tmp_path / name)], str(tmp_path / "never")))
    assert not (tmp_path / "never").exists()


def test_folders_are_read_whole_and_what_is_left_out_is_named(tmp_path, caplog, monkeypatch):
    for name in ("a.csv", "inner/b.parquet", "inner.parquet/c.parquet", "inner/_SUCCESS", ".hidden/d.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def found(*inputs):
        return [os.path.relpath(file.location.path, tmp_path) for file in find([str(tmp_path / given) for given in inputs])]

    assert found(".") == found("**") == ["a.csv", "inner.parquet/c.parquet", "inner/b.parquet"]
    assert found("inn*") == found("*.parquet", "inner") == ["inner.parquet/c.parquet", "inner/b.parquet"]
    assert not caplog.records
    (tmp_path / "A.CSV").touch()
    (tmp_path / "also.txt").touch()
    (tmp_path / "notes.md").touch()
    assert found(".") == ["A.CSV", "a.csv", "inner.parquet/c.parquet", "inner/b.parquet"]
    (tmp_path / "_b[1]").mkdir()
    (tmp_path / "_b[1]" / "e.csv").touch()
    assert found("_b[1]") == ["_b[1]/e.csv"]
    monkeypatch.chdir(tmp_path / "_b[1]")
    assert [file.location.path for file in find(["*.csv"])] == [str(tmp_path / "_b[1]" / "e.csv")]
    assert "skipped, expected files that end in .parquet, .csv" in caplog.text
    assert caplog.text.strip().endswith(": also.txt and 1 more")
    (tmp_path / "inner" / os.fsdecode(b"z\xff.csv")).touch()
    with pytest.raises(ValueError, match="inner': expected names of files in UTF-8: .*; rename those"):
        find([str(tmp_path / "inner")])


def test_csv_files_that_are_not_what_they_seem_are_named(router, tmp_path):
    for text, message in (
        (b'id,prompt\n1,a\n2,"b\n3,c\n4,d\n', "row 1: a quote is not closed by the end of the file: 2,b"),
        (b'id,prompt\n1,a\n2,"b\nhalf of th', "row 1: a quote is not closed"),
        (b'"id,prompt\n' + b"1,a\n" * 100_000, "expected column names within 131,072 bytes: is a quote not closed"),
        (b'"id,prompt\n' + b"1,a\n" * 1000, "a quote in the column names is not closed by the end of the file"),
        (b"n\xe9,prompt\n1,a", "expected column names in UTF-8, got n.,prompt; write the file in UTF-8"),
        (b"id;prompt\n1;a", "expected the columns prompt; it has id;prompt; if its values are separated by ';', write them"),
        ("prompt\n".encode("utf-16"), "expected column names in UTF-8"),
    ):
        (tmp_path / "odd.csv").write_bytes(text)
        with pytest.raises(ValueError, match=rf"odd.csv: (cannot be read: )?{message}") as refused:
            run(router, BatchConfig([str(tmp_path / "odd.csv")], str(tmp_path / "out"), rows_per_part=32))
        assert len(str(refused.value)) < 2000
    for text, count in ((b'id,prompt\n1,5" pipe\n2,"a ""b"""\n', 2), (b"id,prompt", 0), (b"\n\nid,prompt\r\n", 0)):
        (tmp_path / "fine.csv").write_bytes(text)
        assert run(router, BatchConfig([str(tmp_path / "fine.csv")], str(tmp_path / "fine")), restart=True).rows == count
    write(tmp_path / "typed.parquet", id=list(range(150)))
    (tmp_path / "text.csv").write_text("id,prompt\n007,a\n")
    message = r"text.csv: column 'id' is string, in .*typed.parquet int64: no type holds the values of both; leave .* --keep"
    with pytest.raises(ValueError, match=message):
        run(router, BatchConfig([str(tmp_path / "typed.parquet"), str(tmp_path / "text.csv")], str(tmp_path / "never")))
    assert not (tmp_path / "never").exists()


def test_csv_rows_of_too_many_or_too_few_values_are_errors_of_their_rows(router, tmp_path):
    for name, rows in (("in.csv", ["p0,0", "p1", "p2,2,x", "p3,3", ",,,"]), ("none.csv", ["p5", "p6"])):
        (tmp_path / name).write_text("\n".join(["prompt,id", *rows]))
    inputs = [tmp_path / name for name in ("in.csv", "none.csv")]
    report = run(router, BatchConfig(inputs, tmp_path / "out", state=tmp_path / "state", rows_per_part=2))
    assert (report.rows, report.routed) == (7, 2)
    found = output(tmp_path / "out").to_pylist()
    assert [row["id"] for row in found] == ["0", None, None, "3", None, None, None]
    assert [row["error"] for row in found] == [
        None if got is None else f"expected a value for each column: expected 2, got {got}"
        for got in (None, 1, 3, None, 4, 1, 1)
    ]
    with pytest.raises(ValueError, match=r"in.csv: row 1: expected a value for each column: expected 2, got 1"):
        run(router, BatchConfig(inputs, tmp_path / "strict", strict=True))


@pytest.mark.parametrize("kind", [".parquet", ".jsonl.gz", ".jsonl.zst", ".csv.gz", ".csv.zst"])
def test_files_that_are_cut_short_or_mixed_are_named(kind, router, tmp_path):
    rng = np.random.default_rng(0)
    given = tmp_path / f"in{kind}"
    write(given, [" ".join(map(str, rng.integers(1e9, size=9))) for _ in range(3000)])
    given.write_bytes(given.read_bytes()[:-4000])
    (tmp_path / f"nothing{kind}").touch()
    with pytest.raises(ValueError, match=rf"nothing{kind}: cannot be read: "):
        run(router, BatchConfig([str(tmp_path / f"nothing{kind}")], str(tmp_path / "nothing")))
    with pytest.raises(ValueError, match=rf"in{kind}: cannot be read( after row \d+)?: "):
        run(router, BatchConfig([str(given)], str(tmp_path / "out"), rows_per_part=500))
    begun = manifest(tmp_path / "out")
    assert begun is None or not begun["complete"]

"""The one reader: every format gives the same turns to batch, votes and commands, and refuses the same files."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from hypothesis import example, given, settings
from hypothesis import strategies as st

from p2l_engine.batch.blocks import Unroutable, blocks
from p2l_engine.cli.prompts import PromptFile
from p2l_engine.tables import csv as tables_csv
from p2l_engine.tables.chunked import kept_schema, read_rows
from p2l_engine.tables.find import find
from p2l_engine.tables.formats import FORMATS
from p2l_engine.tables.whole import read_table
from p2l_engine.votes import read, score_matrix

ENDINGS = (
    ".csv", ".CSV", ".csv.gz", ".csv.zst", ".jsonl", ".JSONL", ".ndjson", ".json", ".jsonl.gz", ".ndjson.zst", ".parquet",
    ".PARQUET",
)  # fmt: skip


def by_zstd(data):
    return pa.compress(data, "zstd", asbytes=True)


def write(path, rows):
    """Rows (dicts of text or None) as the format that the path's ending says, by Python's own modules."""
    names, ending = list(rows[0]), path.name.lower().partition(".")[2]
    if ending == "parquet":
        pq.write_table(pa.table({name: pa.array([row[name] for row in rows], pa.string()) for name in names}), path)
        return str(path)
    text = io.StringIO(newline="")
    if ending.startswith("csv"):
        # Nothing for None; "" is quoted.
        cells = [["" if row[name] is None else '"' + row[name].replace('"', '""') + '"' for name in names] for row in rows]
        text.write("\r\n".join(map(",".join, [names, *cells])))
    else:
        text.write("\n".join(json.dumps(row) for row in rows))
    squeeze = {"gz": gzip.compress, "zst": by_zstd}
    path.write_bytes(squeeze.get(ending.rsplit(".", 1)[-1], bytes)(text.getvalue().encode()))
    return str(path)


def by_batch(path):
    files = find([path])
    kept_schema(files, "prompt")
    turns = [turns for block in blocks(files, "prompt") for turns in block.prompts]
    if bad := next((turn for turn in turns if isinstance(turn, Unroutable)), None):
        raise ValueError(bad.why)
    return turns


def by_votes(path):
    return list(read(path, max_dropped=0)[0].prompts)


def by_scores(path):
    return list(score_matrix(path)[0])


def by_commands(path):
    return [(prompt,) if isinstance(prompt, str) else tuple(prompt) for prompt in PromptFile.read(path).prompts]


VOTE = {"model_a": "x", "model_b": "y", "winner": "tie"}
READERS = {by_batch: [VOTE], by_votes: [VOTE], by_commands: [VOTE],
           by_scores: [{"model": "x", "score": "1"}, {"model": "y", "score": "0"}]}  # fmt: skip
by_each = pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)


def rows_for(reader, *prompts):
    return [{"prompt": prompt} | more for prompt in prompts for more in READERS[reader]]


@by_each
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_cell_is_the_same_turns_everywhere(reader, ending, tmp_path):
    prompts = {
        '["What is 17 * 23?"]': ("What is 17 * 23?",),
        '[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}, {"role": "user", "content": "bye"}]': (
            "hi", "bye",
        ),
        "[1] is a citation": ("[1] is a citation",),
        " two\r\nlines, \"quoted\" ": (" two\r\nlines, \"quoted\" ",),
    }  # fmt: skip
    path = write(tmp_path / f"in{ending}", rows_for(reader, *prompts))
    assert set(reader(path)) == set(prompts.values())


@by_each
@pytest.mark.parametrize("ending", [".csv", ".csv.gz"])
def test_an_open_quote_is_refused_everywhere(reader, ending, tmp_path):
    names = list(rows_for(reader, "a")[0])
    good = [",".join(row.values()) for row in rows_for(reader, "a", "b")]
    squeeze = gzip.compress if ending.endswith("gz") else bytes
    for column in range(len(names)):  # each in turn, the last too
        cells = ["c", *good[0].split(",")[1:]]
        cells[column] = f'"{cells[column]}'
        for end in ("", "\n", "\r\n", "\n" + good[1], "\n" + good[1] + "\n"):
            (tmp_path / f"in{ending}").write_bytes(squeeze("\n".join([",".join(names), *good, ",".join(cells) + end]).encode()))
            with pytest.raises(ValueError, match=rf"in.csv\S*: row {len(good)}: a quote is not closed by the end of the file"):
                reader(str(tmp_path / f"in{ending}"))


@by_each
def test_quotes_that_are_closed_or_within_a_cell_are_read(reader, tmp_path):
    names = ",".join(rows_for(reader, "a")[0])
    for last, prompt in (('"a ""b"""', 'a "b"'), ('5" pipe', '5" pipe'), ('"a\n\n"', "a\n\n"), ('""""', '"')):
        rows = [",".join([last, *list(row.values())[1:]]) for row in rows_for(reader, "")]
        for end in ("", "\n", "\n\n"):
            (tmp_path / "in.csv").write_text("\n".join([names, *rows]) + end)
            assert reader(str(tmp_path / "in.csv")) in ([(prompt,)], [(prompt,)] * len(rows))


@by_each
def test_hidden_and_half_written_files_are_read_nowhere(reader, tmp_path):
    write(tmp_path / "v.csv", rows_for(reader, "a"))
    for name in (".ipynb_checkpoints/v.csv", "_temporary/0/v.jsonl", "._v.csv", "_SUCCESS.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"\x00\x05\x16\x07 none of our business")
    assert set(reader(str(tmp_path))) == {("a",)}
    assert set(reader(str(tmp_path / "*.csv"))) == {("a",)}
    assert set(reader(f"file://{tmp_path}/v.csv")) == {("a",)}


@by_each
def test_an_empty_csv_cell_is_no_prompt(reader, tmp_path):
    rows = rows_for(reader, "a", None)
    for name in ("in.csv", "in.jsonl", "in.parquet"):
        with pytest.raises(ValueError, match="prompt: expected a prompt, got nothing"):
            reader(write(tmp_path / name, rows))


@by_each
def test_files_that_are_no_tables_are_named(reader, tmp_path):
    for name, data, message in (
        ("in.csv", b"", "in.csv: cannot be read: expected a line of column names, got nothing"),
        ("in.parquet", b"PAR1", "in.parquet: cannot be read: "),
        ("in.csv.gz", b"\x1f\x8b", "in.csv.gz: cannot be read: "),
        ("in.csv", b"prompt,prompt\na,b\n", "in.csv: expected columns of different names, got prompt twice"),
        ("in.csv", b"text,n\na,b\n", "in.csv: expected the columns "),
        ("in.csv", b'prompt,"n\na,b\n', "in.csv: cannot be read: a quote in the column names is not closed"),
        ("in.csv", b'prompt,"n', "in.csv: cannot be read: a quote in the column names is not closed"),
        ("none.csv", None, "none.csv: no such file or folder"),
    ):
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=message):
            reader(str(tmp_path / name))


odd_text = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=20),
    st.text("\",\n\r\\[]{}' \t;\ufeff\u2028\x00é漢🙂a1", max_size=12),
    st.lists(st.text('",\n[] a', max_size=5), max_size=3).map(json.dumps),
    st.sampled_from(
        ["", " ", "NA", "null", "nan", "007", "1e3", "true", "[]", "[1]", '["a", 1]', '["a"', "2024-01-01", "\x1c"]
    ),
    st.lists(st.none() | st.text("a1", max_size=2), min_size=1, max_size=3).map(json.dumps),
)


def oracle(text):
    """The turns of a cell of text, by Python's json; None for no prompt."""
    try:
        found = json.loads(text) if text.startswith("[") else text
    except ValueError:
        return (text,)
    if isinstance(found, list) and all(isinstance(turn, str | None) for turn in found):
        return None if not found or None in found else tuple(found)
    return (text,)


@pytest.mark.slow
@given(texts=st.lists(odd_text, min_size=1, max_size=8), more=st.lists(odd_text, min_size=8, max_size=8))
@example(texts=['"', '""', 'a"', ',"\n', "\r", "\r\n", "\n\n"], more=['"'] * 8)
@settings(deadline=None, max_examples=60)
def test_all_formats_agree_with_pythons_own_modules(texts, more, tmp_path):
    rows = [{"n": other, "prompt": text, "z": other} for text, other in zip(texts, more, strict=False)]
    for ending in (".csv", ".jsonl", ".parquet"):
        path = write(tmp_path / f"in{ending}", rows)
        if ending == ".csv":  # Python's csv reads back what was written
            with open(path, newline="", encoding="utf-8") as file:
                assert list(csv.DictReader(file)) == rows
        table = read_table(path, ("prompt", "z"))
        assert table.columns == {"prompt": texts, "z": [row["z"] for row in rows]}
        assert table.names == ("n", "prompt", "z")
        assert not table.invalid
        chunks = list(read_rows(find([path]), "prompt"))
        assert [cell for chunk in chunks for cell in chunk.prompts] == texts
        kept = pa.concat_tables([chunk.kept for chunk in chunks]).to_pylist()
        assert kept == [{"n": row["n"], "z": row["z"]} for row in rows]
        found = [turns for block in blocks(find([path]), "prompt") for turns in block.prompts]
        assert [None if isinstance(turns, Unroutable) else turns for turns in found] == [oracle(text) for text in texts]
        if None not in map(oracle, texts):
            assert by_commands(path) == [oracle(text) for text in texts]


@pytest.mark.slow
@given(texts=st.lists(st.text('",\r\n ab', max_size=6), min_size=1, max_size=6), quoting=st.sampled_from([0, 1]))
@settings(deadline=None, max_examples=60)
def test_what_pythons_csv_writes_is_read(texts, quoting, tmp_path):
    with open(tmp_path / "in.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=quoting).writerows([("prompt", "n"), *((text, "x") for text in texts)])
    empty = "" if quoting else None  # "" is text, nothing is missing
    assert read_table(str(tmp_path / "in.csv"), ["prompt"]).columns["prompt"] == [text or empty for text in texts]


def test_lines_of_jsonl_are_prompts_for_commands(tmp_path):
    lines = ["a", ["b", "b2"], [{"role": "user", "content": "c"}], {"prompt": "d", "weight": 2}, '["e", "e2"]']
    for name in ("in.jsonl", "in.NDJSON", "in.json"):
        (tmp_path / name).write_text("\ufeff" + "\n\n".join(map(json.dumps, lines)), encoding="utf-8")
        assert PromptFile.read(tmp_path / name).prompts == ["a", ("b", "b2"), "c", "d", ("e", "e2")]
    assert PromptFile.read(tmp_path / "in.json").columns["weight"] == [None, None, None, 2, None]
    for line, message in (
        ("{", "row 1: expected a line of JSON: "),
        ('{"text": "b"}', "row 1: prompt: expected a prompt, got nothing"),
        ("7", "row 1: prompt: expected a string, a list of user turns or a list of messages, got int"),
        ('"\\ud800"', "row 1: prompt: invalid Unicode"),
        ("null", "row 1: prompt: expected a prompt, got nothing"),
    ):
        (tmp_path / "odd.jsonl").write_text(f'"a"\n\n{line}\n')
        with pytest.raises(ValueError, match=f"odd.jsonl: {message}"):
            PromptFile.read(tmp_path / "odd.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(typer.BadParameter, match="empty.jsonl holds no prompt"):
        PromptFile.read(tmp_path / "empty.jsonl")


TWICE = "expected each key of an object once"


@by_each
@pytest.mark.parametrize(
    ("prompt", "key"),
    [
        ('"a", "prompt": "b"', "prompt"),
        ('"a", "other": 1, "other": 1', "other"),
        ('"a", "oth\\u0065r": 1, "other": 2', "other"),  # the same key, written otherwise
        ('[{"role": "user", "role": "assistant", "content": "a"}]', "role"),
        ('"[{\\"role\\": \\"user\\", \\"content\\": \\"a\\", \\"content\\": \\"b\\"}]"', "content"),
    ],
)
def test_an_object_that_names_a_key_twice_is_an_invalid_row(reader, prompt, key, tmp_path):
    rows = rows_for(reader, "fine")
    line = json.dumps({"prompt": "PROMPT"} | {name: value for name, value in rows[0].items() if name != "prompt"})
    file = tmp_path / "in.jsonl"
    file.write_text("\n".join([*map(json.dumps, rows), line.replace('"PROMPT"', prompt)]))
    with pytest.raises(ValueError, match=TWICE if reader is by_votes else f"{TWICE}[:,] got '{key}' twice"):  # votes count
        reader(str(file))


@given(
    prompts=st.lists(
        st.sampled_from(['"a"', '"a", "prompt": "a"', '"a", "x": {"k": 1, "k": 2}', '"a:", "x": {"k": {"k": 1}}']), min_size=1
    )
)
@settings(deadline=None, max_examples=30)
def test_rows_that_name_a_key_twice_are_counted_by_reason(prompts, tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(f'{{"prompt": {prompt}, "model_a": "x"}}\n' for prompt in ['"a"', *prompts]))
    table = read_table(str(tmp_path / "in.jsonl"), ("prompt", "model_a"))
    twice = [i for i, prompt in enumerate(prompts, 1) if prompt.count('"k": 1, "k"') or prompt.count('"prompt"')]
    assert [row for row, invalid in table.invalid.items() if invalid.reason == TWICE] == twice == list(table.invalid)


def test_text_and_jsonl_files_need_no_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "in.txt").write_text('\ufeffone\r\n \n["two"]\n', encoding="utf-8")
    (tmp_path / "in.jsonl").write_text('{"prompt": "one"}')
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert PromptFile.read(tmp_path / "in.txt").prompts == ["one", '["two"]']
    assert PromptFile.read(tmp_path / "in.jsonl").prompts == ["one"]


def test_json_documents_among_tables_are_skipped_and_named(tmp_path, caplog):
    write(tmp_path / "a.csv", [{"prompt": "a"}])
    (tmp_path / "dataset_info.json").write_text('{\n "features": {}\n}')
    (tmp_path / "state.json").write_text('{"split": "train"}')
    write(tmp_path / "b.json", [{"prompt": "b"}, {"prompt": "c"}])
    assert [file.location.path[-6:] for file in find([str(tmp_path)])] == ["/a.csv", "b.json"]
    assert "skipped, beside other tables and not an object on each line: dataset_info.json and 1 more" in caplog.text
    assert "that end in" not in caplog.text
    (tmp_path / "only").mkdir()
    write(tmp_path / "only" / "a.json", [{"prompt": "a"}])
    assert by_commands(str(tmp_path / "only")) == by_batch(str(tmp_path / "only")) == [("a",)]


@by_each
@pytest.mark.parametrize("indent", [0, 1, "\t"])
@pytest.mark.parametrize("ending", ["json", "jsonl", "json.gz"])
def test_one_document_over_many_lines_is_refused(reader, indent, ending, tmp_path):
    rows, squeeze = rows_for(reader, "a", "b", "c"), gzip.compress if ending.endswith("gz") else bytes
    listed = json.dumps(rows, indent=indent)
    for text in (
        listed,
        f"\n\ufeff{listed}",
        json.dumps(rows).replace("}, {", "},\n{"),
        json.dumps({"all": rows}, indent=indent),
    ):
        (tmp_path / f"in.{ending}").write_bytes(squeeze(text.encode()))
        with pytest.raises(
            ValueError, match=rf"in.{ending}: expected a JSON object on each line, .*; write an object a line: "
        ):
            reader(str(tmp_path / f"in.{ending}"))


def test_a_list_of_objects_on_one_line_is_refused_with_a_remedy(tmp_path):
    (tmp_path / "in.json").write_text(json.dumps([{"prompt": "a"}, {"prompt": "b"}]))
    with pytest.raises(
        ValueError, match=r"in.json: .* row 0: expected a JSON object: got list; write an object a line: with jq"
    ):
        by_batch(str(tmp_path / "in.json"))


@by_each
def test_files_of_nothing_beside_others_have_no_rows(reader, tmp_path):
    write(tmp_path / "m.jsonl", rows_for(reader, "a"))
    for name in ("a.csv", "n.jsonl", "z.csv.gz", "z.jsonl.gz", "z.csv.zst"):
        for data in (b"", b"\n\n", b"\r\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"):
            squeeze = gzip.compress if name.endswith("gz") else by_zstd if name.endswith("zst") else bytes
            (tmp_path / name).write_bytes(squeeze(data))
            assert set(reader(str(tmp_path))) == {("a",)}, (name, data)


def test_rows_of_several_files_are_named(tmp_path):
    write(tmp_path / "a.csv", [{"prompt": "a"} | VOTE] * 3)
    write(tmp_path / "b.jsonl", [{"prompt": "b"} | VOTE, {"prompt": "b"} | VOTE | {"winner": "neither"}])
    _, dropped = read([str(tmp_path / "a.csv"), str(tmp_path / "b.jsonl")], max_dropped=0.5)
    assert "(the first is " + str(tmp_path / "b.jsonl") + ": row 1: got 'neither')" in dropped.lines()[0]
    write(tmp_path / "b.jsonl", [{"prompt": "b"}, {"prompt": None}])
    with pytest.raises(ValueError, match=r"b.jsonl: row 1: prompt: expected a prompt"):
        PromptFile.read(tmp_path)


def test_votes_of_files_whose_types_differ(tmp_path):
    pq.write_table(
        pa.table({"prompt": ["p"], "model_a": [7], "model_b": [8.0], "winner": ["tie"], "day": [3]}), tmp_path / "a.parquet"
    )
    (tmp_path / "b.csv").write_text("prompt,model_a,model_b,winner,day\nq,7,8,tie,3\nr,7,8,tie,\n")
    (tmp_path / "c.jsonl").write_text(
        json.dumps({"prompt": ["q", "q2"], "model_a": "7", "model_b": 8, "winner": "tie", "day": "x"})
    )
    paths = [str(tmp_path / name) for name in ("a.parquet", "b.csv", "c.jsonl")]
    votes, dropped = read(paths)
    assert (votes.models, len(votes), len(dropped)) == (("7", "8"), 4, 0)
    assert votes.prompts == (("p",), ("q",), ("r",), ("q", "q2"))
    assert read(paths, leave_out={"day": [3]})[0].prompts == (("r",), ("q", "q2"))
    assert read(paths, leave_out={"day": [""]})[0].prompts == (("p",), ("q",), ("q", "q2"))


@by_each
def test_a_file_that_is_named_twice_is_read_once(reader, tmp_path):
    write(tmp_path / "a.csv", rows_for(reader, "a"))
    write(tmp_path / "b.jsonl", rows_for(reader, "b"))
    (tmp_path / "link.csv").symlink_to("a.csv")
    assert sorted(reader(str(tmp_path))) == sorted(reader(tmp_path)) == [("a",), ("b",)]


@pytest.mark.parametrize(
    "read_all",
    [
        lambda paths: len(read(paths)[0]),
        lambda paths: len(read_table(paths, ["prompt"])),
        lambda paths: sum(len(chunk.prompts) for chunk in read_rows(find(paths), "prompt")),
    ],
)
def test_inputs_that_overlap_are_read_once(read_all, tmp_path):
    for name in ("a", "b"):
        write(tmp_path / f"{name}.csv", rows_for(by_votes, name))
    (tmp_path / "link.csv").symlink_to("a.csv")
    a = tmp_path / "a.csv"
    for paths, count in (
        ([a, a], 1), ([a, f"{tmp_path}/./a.csv"], 1), ([a, f"file://{a}"], 1), ([a, f"{tmp_path}/*.csv"], 2),
        ([tmp_path, a], 2),
        ([f"{tmp_path}/[ab].csv", f"{tmp_path}/*b.csv", tmp_path / "link.csv"], 2),
    ):  # fmt: skip
        assert read_all(list(map(str, paths))) == count


def test_a_csv_file_of_invalid_rows_alone_keeps_their_numbers(tmp_path):
    (tmp_path / "in.csv").write_text("prompt,n\na\n\nb,1,2\nc,1\n,,\n" + "d,1\n" * 3 + "e")
    table = read_table(str(tmp_path / "in.csv"), ["prompt"])
    assert table.columns["prompt"] == [None, None, "c", None, "d", "d", "d", None]
    assert {index: row.text for index, row in table.invalid.items()} == {0: "a", 1: "b,1,2", 3: ",,", 7: "e"}
    (tmp_path / "none.csv").write_text("prompt,n\na\nb")
    assert list(read_table(str(tmp_path / "none.csv"), ["prompt"]).invalid) == [0, 1]


@pytest.mark.slow
@given(
    lengths=st.lists(st.sampled_from([1, 2, 2, 3]), min_size=1, max_size=30), batch=st.integers(1, 5), piece=st.integers(16, 64)
)
@example(lengths=[1, 3], batch=1, piece=16)
@settings(max_examples=40)
def test_rows_keep_their_numbers_among_invalid_ones(lengths, batch, piece, tmp_path):
    rows = [",".join([f"p{i}", f"n{i}", "z"][:length]) for i, length in enumerate(lengths)]
    (tmp_path / "in.csv").write_text("\n".join(["prompt,n", *rows]))
    path = str(tmp_path / "in.csv")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables_csv, "AT_ONCE", batch)
        patch.setattr(tables_csv, "PIECE", piece)  # bytes: the file is read again and again
        table, chunks = read_table(path, ["prompt"]), list(read_rows(find([path]), "prompt"))
    assert table.columns["prompt"] == [f"p{i}" if length == 2 else None for i, length in enumerate(lengths)]
    assert {i: row.text for i, row in table.invalid.items()} == {i: rows[i] for i, length in enumerate(lengths) if length != 2}
    prompts = [cell if isinstance(cell, str) else cell.text for chunk in chunks for cell in chunk.prompts]
    assert prompts == [f"p{i}" if length == 2 else rows[i] for i, length in enumerate(lengths)]
    kept = [value for chunk in chunks for value in chunk.kept.column("n").to_pylist()]
    assert kept == [f"n{i}" if length == 2 else None for i, length in enumerate(lengths)]
    assert [chunk.first for chunk in chunks] == [sum(len(c.prompts) for c in chunks[:i]) for i in range(len(chunks))]


@pytest.mark.parametrize("offset", [0, 1])
def test_line_breaks_at_the_end_of_a_piece_are_kept(offset, tmp_path):
    """Wherever Arrow's pieces of a megabyte end, between "\\r" and "\\n" as well."""
    prompt = "a" * offset + "\r\n" * 600_000 + "\r"
    path = write(tmp_path / "in.csv", [{"prompt": prompt, "n": "1"}] * 2)
    assert read_table(path, ["prompt"]).columns["prompt"] == [prompt] * 2
    assert [cell for chunk in read_rows(find([path]), "prompt") for cell in chunk.prompts] == [prompt] * 2


@pytest.mark.slow
@given(texts=st.lists(st.text('\r\n"a', min_size=1, max_size=60), min_size=1, max_size=8), piece=st.integers(24, 64))
@example(texts=["\r\n" * 40] * 2, piece=24)
@example(texts=["\r\n" * 40] * 2, piece=25)
@settings(max_examples=60)
def test_pieces_of_any_size_give_the_same_values(texts, piece, tmp_path):
    path = write(tmp_path / "in.csv", [{"prompt": text, "n": text} for text in texts])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables_csv, "PIECE", piece)
        assert read_table(path, ["prompt", "n"]).columns == {"prompt": texts, "n": texts}


@pytest.mark.slow
def test_a_long_row_after_invalid_ones(tmp_path):
    """The file is read again in larger pieces, and rows keep their numbers."""
    long = "x" * (5 << 20)
    rows = ["prompt,n", "a,1", "bad", *["b,2"] * 300_000, f'"{long}",3', "worse", "c,4"]
    (tmp_path / "in.csv").write_text("\n".join(rows))
    table = read_table(str(tmp_path / "in.csv"), ["prompt"])
    assert len(table) == len(rows) - 1
    assert list(table.invalid) == [1, 300_003]
    assert [table.columns["prompt"][i] for i in (0, 2, 300_001, 300_002, 300_004)] == ["a", "b", "b", long, "c"]


def test_text_that_is_not_utf_8_is_named(tmp_path):
    (tmp_path / "in.csv").write_bytes(b"prompt,n\nbad\na,1\nb,\xe9\n")
    with pytest.raises(ValueError, match=r"in.csv: row 2: column 'n': expected UTF-8 text: "):
        read_table(str(tmp_path / "in.csv"), ["prompt", "n"])
    assert read_table(str(tmp_path / "in.csv"), ["prompt"]).columns["prompt"] == [None, "a", "b"]


@pytest.mark.parametrize("reader", [by_votes, by_scores, by_commands], ids=lambda reader: reader.__name__)
@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_columns_that_are_not_read_can_fail_nothing(reader, ending, tmp_path):
    rows = rows_for(reader, "a", "b")
    names, cells = list(rows[0]), [list(row.values()) for row in rows]
    if ending == "parquet":
        odd = pa.array([b"\xe9"] * len(rows)).view(pa.string())
        columns = [pa.array(column) for column in zip(*cells, strict=True)]
        pq.write_table(pa.table([*columns, odd, odd], [*names, "x", "x"]), tmp_path / "in.parquet")
    else:
        lines = [",".join([*row, "\xe9", "\xe9"]) for row in cells]
        (tmp_path / "in.csv").write_bytes("\n".join([",".join([*names, "x", "x"]), *lines]).encode("latin-1"))
    assert set(reader(str(tmp_path / f"in.{ending}"))) == {("a",), ("b",)}


@by_each
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Arrow's, where it decodes the row
@pytest.mark.parametrize("before", [0, 3, 600])
def test_a_row_of_other_cells_that_is_not_utf_8_is_named(reader, before, tmp_path):
    names, row = (",".join(each) for each in (rows_for(reader, "a")[0], rows_for(reader, "a")[0].values()))
    columns = names.count(",") + 1
    (tmp_path / "in.csv").write_bytes("\n".join([names, *[row] * before, f"caf\xe9,{row}", row, ""]).encode("latin-1"))
    message = (
        rf"in.csv: row {before}: expected {columns} values, one for each column, got {columns + 1}, in text that is not UTF-8; "
    )
    with pytest.raises(ValueError, match=message):
        reader(str(tmp_path / "in.csv"))


@pytest.mark.slow
def test_threads_read_csv_and_pythons_own_limit_stays(tmp_path):
    paths = [write(tmp_path / f"{i}.csv", [{"prompt": f"{i}" * 200_000}, {"prompt": "b"}] * 20) for i in range(8)]
    (tmp_path / "open.csv").write_text('prompt,n\n"' + "x" * 200_000)
    limit = csv.field_size_limit()

    def each(path):
        with pytest.raises(ValueError, match="row 0: a quote is not closed"):
            read_table(str(tmp_path / "open.csv"), ["prompt"])
        begun = read_rows(find([path]), "prompt")
        first = next(begun).prompts
        assert csv.field_size_limit() == limit
        return [*first, *(cell for chunk in begun for cell in chunk.prompts)]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(each, paths * 2))
    assert found == [[f"{i}" * 200_000, "b"] * 20 for i in range(8)] * 2
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize("name", ["/nowhere/votes", "./votes", "../votes", "a/b/c", "~/no-votes", "nowhere*", "nowhere.csv"])
def test_paths_are_not_looked_up_on_the_hub(name, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("looked up on the hub"))
    with pytest.raises(ValueError, match="no such file or folder|expected matching files"):
        read_table(name, ["prompt"])


@pytest.mark.parametrize("name", ["squad", "lmarena-ai/arena-human-preference-55k", "org/votes-v1.5"])
def test_names_of_the_hub_are_looked_up(name, monkeypatch):
    table = pa.table({"prompt": ["a", "b"], "n": [1, 2]})
    monkeypatch.setattr("datasets.load_dataset", lambda path, split: mock.Mock(data=mock.Mock(table=table)))
    assert read_table([name, name], ["prompt"]).columns == {"prompt": ["a", "b"]}  # once


def test_each_format_has_a_reader():
    for each in FORMATS.values():
        assert all(callable(getattr(each.reader, name)) for name in ("schema", "rows", "values"))


@pytest.mark.parametrize(
    ("name", "data", "refused"),
    [
        ("in.csv", b"prompt\na\nb\n", None),
        ("in.csv", b'prompt,note\nhi,"open', "not closed"),
        ("in.csv.gz", gzip.compress(b"prompt\n" + b"a\n" * 200_000, mtime=0)[:-4], "ended before"),
    ],
)
def test_a_csv_file_is_not_read_any_more_once_its_reader_has_ended(name, data, refused, tmp_path, monkeypatch):
    """Arrow reads ahead in a thread; a process that ends while that thread waits for Python aborts with status 134."""
    handles = []

    class Handle(tables_csv._Handle):
        def __init__(self, read):
            def slowly(size):
                time.sleep(0.02)
                return read(size)

            super().__init__(slowly)
            handles.append(weakref.ref(self))

    monkeypatch.setattr(tables_csv, "_Handle", Handle)
    (tmp_path / name).write_bytes(data)
    try:
        read_table(str(tmp_path / name), ["prompt"])
    except (ValueError, EOFError) as error:
        assert refused in str(error)
        assert handles[0]() is None
    assert len(handles) == 1
    assert handles[0]() is None

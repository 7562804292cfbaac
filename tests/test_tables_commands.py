"""The same prompts as csv, jsonl and parquet give the same results from every command; nothing is refused by every command."""

from __future__ import annotations

import csv
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer

from p2l_engine.cli.prompts import PromptFile
from p2l_engine.tables import storage
from p2l_engine.tables.find import find
from p2l_engine.tables.whole import read_table
from tests.support import tiny
from tests.support.batch_files import output
from tests.support.cases import slow_but
from tests.support.command import p2l_engine
from tests.support.layouts import TALKS, TURNS, chat, openai_chat, write_jsonl

FORMATS = ("csv", "jsonl", "parquet", "csv.gz", "NDJSON")
ODD = [
    "What is 17 * 23?", '["What is 17 * 23?"]', '["two", "turns"]', 'a "quoted" word, and a comma', "two\nlines\r\n",
    " spaces ",
    "[1] says so", '{"prompt": "no"}', "NA", "null", "007", "2024-01-01", "漢字 🙂 é", "\u2028 odd\x85 line ends\x0b",
    "'", '"', '""', "back\\slash \\n", "tab\there", "<script>&amp;",
    '[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x"}]',
]  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tiny.write(tmp_path_factory.mktemp("commands") / "p2l")
    catalog = "models:\n" + "".join(f"  {name}: {{cost: {i + 1}}}\n" for i, name in enumerate(tiny.MODELS))
    (folder / "catalog.yaml").write_text(catalog)
    return folder


def run(*arguments, checkpoint, text=""):
    options = ["--checkpoint", str(checkpoint), "--device", "cpu", "--dtype", "float32"]
    return p2l_engine(*map(str, arguments), *options, text=text)


def printed(*arguments, checkpoint):
    done = run(*arguments, checkpoint=checkpoint)
    assert done.status == 0, done.err
    return done.out


def write(folder, prompts):
    """The same rows in every format, with weights and categories."""
    rows = [{"prompt": prompt, "weight": 1 + i % 3, "category": f"c{i % 2}"} for i, prompt in enumerate(prompts)]
    with (folder / "in.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (folder / "in.csv.gz").write_bytes(pa.compress((folder / "in.csv").read_bytes(), "gzip", asbytes=True))
    for name in ("in.jsonl", "in.NDJSON"):
        (folder / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), folder / "in.parquet", row_group_size=7)


def check_same(folder, prompts, checkpoint):
    """Every command's result for every format is the one for csv."""
    write(folder, prompts)
    found = {}
    for ending in FORMATS:
        file = folder / f"in.{ending}"
        budget = ("--budget", "2.5")
        results = {
            "route": printed("route", "--json", "--file", file, *budget, checkpoint=checkpoint),
            "frontier": printed("frontier", file, "--json", checkpoint=checkpoint),
            "leaderboard": printed("leaderboard", "--prompts", file, "--json", "--bootstrap", 5, checkpoint=checkpoint),
        }
        unnamed = ("--output", folder / f"out-{ending}", "--keep", "", "--no-source")  # the files have different names
        printed("batch", file, *unnamed, *budget, checkpoint=checkpoint)
        results["batch"] = output(folder / f"out-{ending}").to_pylist()
        report = folder / f"{ending}.report"
        printed("strengths", file, "--json", report, "--bootstrap", 5, checkpoint=checkpoint)
        results["strengths"] = json.loads(report.read_text(encoding="utf-8"))
        found[ending] = results
    for ending in FORMATS[1:]:
        for command, result in found["csv"].items():
            assert found[ending][command] == result, (ending, command)
    routed = [json.loads(line) for line in found["csv"]["route"].splitlines()]
    assert [row["model"] for row in routed] == [row["model"] for row in found["csv"]["batch"]]
    assert len(routed) == len(prompts)
    return routed


@pytest.mark.slow
def test_commands_agree_on_thirty_odd_prompts(checkpoint, tmp_path):
    prompts = [*ODD, *(f"question {i}, and so on" for i in range(30 - len(ODD)))]
    routed = check_same(tmp_path, prompts, checkpoint)
    assert [row["prompt"] for row in routed[:4]] == [ODD[0], ODD[0], ["two", "turns"], ODD[3]]


@pytest.mark.slow
def test_commands_agree_on_thirty_real_prompts(checkpoint, data, tmp_path):
    prompts = pq.read_table(data / "votes_human.parquet", columns=["prompt"]).column("prompt").unique().to_pylist()[:30]
    check_same(tmp_path, [prompt if isinstance(prompt, str) else json.dumps(prompt) for prompt in prompts], checkpoint)


@pytest.mark.parametrize("text", ["", "\n", " \r\n\n", "\ufeff"])
@pytest.mark.parametrize("command", ["route", "leaderboard"])
def test_nothing_on_standard_input_is_refused(command, text, checkpoint):
    done = run(command, checkpoint=checkpoint, text=text)
    assert done.status == 2
    assert "standard input holds no prompt" in done.message


def test_messages_show_no_keys_of_stores(monkeypatch):
    local = storage.Location
    uri = "foo://KEY:SECRET@bucket/v.csv?token=SECRET"
    assert storage.shown(uri) == "foo://bucket/v.csv"
    monkeypatch.setattr(storage.Location, "of", classmethod(lambda cls, given: local("/nowhere/v.csv", storage.shown(given))))
    for read in (lambda: PromptFile.read(uri), lambda: read_table([uri, "other.csv"], ("prompt",))):
        with pytest.raises((ValueError, OSError)) as refused:
            read()
        assert "SECRET" not in str(refused.value)


def test_uris_of_folders_hold_tables():
    import fsspec

    system = fsspec.filesystem("memory")
    system.pipe("/prompts/a.csv", b"prompt\nfirst\n")
    system.pipe("/prompts/b.csv", b"prompt\nsecond\n")
    assert PromptFile.read("memory://prompts").prompts == ["first", "second"]
    system.rm("/prompts", recursive=True)


@pytest.mark.slow
def test_an_empty_name_of_a_file_is_refused(checkpoint, tmp_path):
    (tmp_path / "in.csv").write_text("prompt\na\n")
    for command in (["route", "--file", ""], ["route", "hello", "--file", ""], ["frontier", ""], ["leaderboard", "--file", ""]):
        done = run(*command, checkpoint=checkpoint, text="from standard input")
        assert done.status == 2
    assert "expected a path or a URI" in done.message
    done = run("frontier", tmp_path / "in.csv", "--column", "", checkpoint=checkpoint)
    assert "expected the columns ''; it has prompt" in done.message


def test_every_command_that_reads_tables_has_the_same_options():
    from p2l_engine.cli.app import app

    by_prompt = {"route", "batch", "frontier", "leaderboard", "strengths"}
    readers = by_prompt | {"eval", "adapt", "calibrate", "lengths", "replay", "shrink"}
    commands = typer.main.get_group(app).commands
    for option in ("--column", "--csv-escape"):
        assert {name for name, command in commands.items() if any(option in of.opts for of in command.params)} == readers


def test_an_empty_device_is_refused(checkpoint):
    done = p2l_engine("route", "hello", "--checkpoint", str(checkpoint), "--device", "")
    assert (done.status, done.message) == (2, "error: device: expected cpu, cuda or cuda:N, got ''")


def test_one_prompt_is_read_from_a_uri(checkpoint, tmp_path):
    (tmp_path / "prompt.txt").write_text("one prompt\nof two lines\n")
    boards = [
        printed("leaderboard", "--json", "--file", name, checkpoint=checkpoint)
        for name in (tmp_path / "prompt.txt", f"file://{tmp_path}/prompt.txt")
    ]
    assert boards[0] == boards[1]


@pytest.mark.parametrize("command", [["route", "hello"], ["route"], ["leaderboard", "hello"], ["frontier", "plain.txt"]])
def test_a_column_without_a_table_is_refused(command, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.txt").write_text("a prompt")
    done = run(*command, "--column", "text", checkpoint=checkpoint, text="hello")
    assert done.status == 2
    assert "expected a table of prompts" in done.message


def test_a_working_folder_that_looks_like_a_glob(tmp_path, monkeypatch):
    (tmp_path / "da[1]ta").mkdir()
    monkeypatch.chdir(tmp_path / "da[1]ta")
    with pytest.raises(ValueError, match="missing.csv: no such file or folder"):
        find(["missing.csv"])


@pytest.mark.parametrize("command", slow_but(("route",), ["route", "frontier", "leaderboard", "strengths", "batch"]))
def test_every_command_refuses_the_same_files(command, checkpoint, tmp_path):
    options = {"route": ["route", "--file"], "leaderboard": ["leaderboard", "--prompts"]}.get(command, [command])
    more = ["--output", tmp_path / "out"] if command == "batch" else []
    for name, text, message in (
        ("open.csv", 'prompt,n\na,1\nb,"2\n', "open.csv: row 1: a quote is not closed by the end of the file"),
        ("ragged.csv", "prompt,n\na,1\nb\n", "ragged.csv: row 1: expected"),
        ("void.csv", "", "void.csv: cannot be read: expected a line of column names, got nothing"),
        ("other.jsonl", '{"text": "a"}', "other.jsonl: expected the columns prompt; it has text"),
        ("none.parquet", None, "none.parquet: no such file or folder"),
        ("none", None, "none: no such file or folder"),
    ):
        if text is not None:
            (tmp_path / name).write_text(text)
        strict = ["--strict"] if command == "batch" and name == "ragged.csv" else []  # else an error of that row
        done = run(*options, tmp_path / name, *more, *strict, checkpoint=checkpoint)
        assert done.status == 2
        assert message in done.message


@pytest.mark.parametrize("command", slow_but(("batch",), ["route", "frontier", "leaderboard", "strengths", "batch"]))
def test_commands_read_quotes_that_a_backslash_escapes(command, checkpoint, tmp_path):
    options = {"route": ["route", "--file"], "leaderboard": ["leaderboard", "--prompts"]}.get(command, [command])
    more = ["--output", tmp_path / "out"] if command == "batch" else []
    more += ["--bootstrap", 2] if command in ("leaderboard", "strengths") else []
    (tmp_path / "a.csv").write_text('prompt,n\n"say \\"hi\\", C:\\\\",1\nb,2\n')
    assert run(*options, tmp_path / "a.csv", *more, "--csv-escape", "\\", checkpoint=checkpoint).status == 0
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    shutil.rmtree(tmp_path / "out.run", ignore_errors=True)
    done = run(*options, tmp_path / "a.csv", *more, checkpoint=checkpoint)
    assert (done.status, "a.csv: row 0: more after a value's closing quote" in done.message) == (2, True)
    assert "use --csv-escape '\\' if a backslash escapes quotes" in done.message
    done = run(*options, "az://container/a.csv", *more, checkpoint=checkpoint)
    assert (done.status, len(done.err.splitlines())) == (2, 1)
    assert done.message.startswith("error: az://container/a.csv: ")


@pytest.mark.parametrize("command", slow_but(("route",), ["route", "frontier", "leaderboard", "strengths"]))
def test_commands_read_uris_folders_and_globs(command, checkpoint, tmp_path):
    options = {"route": ["route", "--file"], "leaderboard": ["leaderboard", "--prompts"]}.get(command, [command])
    more = ["--bootstrap", 2] if command in ("leaderboard", "strengths") else []
    (tmp_path / "a.csv").write_text("prompt\nfirst\n")
    (tmp_path / "b.jsonl").write_text('"second"\n')
    (tmp_path / "c.txt").write_text("third\n")
    for given in (tmp_path, f"{tmp_path}/*", f"file://{tmp_path}/a.csv", f"file://{tmp_path}/c.txt"):
        assert run(*options, given, *more, checkpoint=checkpoint).status == 0
    assert "no such file or folder" in run(*options, f"{tmp_path}/none.csv", checkpoint=checkpoint).message


@pytest.mark.parametrize("command", slow_but(("batch",), ["route", "frontier", "leaderboard", "strengths", "batch"]))
def test_commands_recognise_a_batch_file(command, checkpoint, tmp_path, caplog):
    """One line says what is read; results are those of the prompts alone."""
    options = {"route": ["--json", "--file"], "leaderboard": ["--json", "--prompts"]}.get(command, [])
    more = ["--bootstrap", 2] if command in ("leaderboard", "strengths") else []
    rows = [openai_chat(talk, i) for i, talk in enumerate(TALKS)]
    found = []
    for name, column, given in (
        ("plain", (), [{"prompt": list(turns)} for turns in TURNS]),
        ("recognised", (), rows),
        ("named", ("--column", "body.messages"), rows),
    ):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "in.jsonl", given)
        if command == "batch":
            more = ["--keep", "", "--output", tmp_path / name / "out"]
        caplog.clear()
        done = run(command, *options, tmp_path / name / "in.jsonl", *more, *column, checkpoint=checkpoint)
        assert done.status == 0, done.err
        said = "in.jsonl: reading the user turns of body.messages (an OpenAI batch file)"
        assert [record.getMessage().endswith(said) for record in caplog.records] == [True] * (name == "recognised")
        found.append(output(tmp_path / name / "out").to_pylist() if command == "batch" else done.out)
    assert found[0] == found[1] == found[2]


@pytest.mark.slow
def test_leaderboards_over_time_recognise_messages(checkpoint, tmp_path, caplog):
    rows = [{"time": f"2026-01-0{1 + i}T00:00:00", "messages": chat(talk)} for i, talk in enumerate(TALKS)]
    write_jsonl(tmp_path / "log.jsonl", rows)
    more = ("--prompts", tmp_path / "log.jsonl", "--period", "month", "--json", "--bootstrap", 5)
    said = printed("leaderboard", *more, checkpoint=checkpoint)
    assert "log.jsonl: reading the user turns of messages (lists of messages)" in caplog.text
    assert said == printed("leaderboard", *more, "--column", "messages", checkpoint=checkpoint)

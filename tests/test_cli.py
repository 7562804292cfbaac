"""The commands: tables, JSON lines, plots, files of prompts, and errors in one line."""

from __future__ import annotations

import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer

from p2l_engine.cli.inputs import swaps_of
from p2l_engine.prompts import user_turns
from tests.support import tiny
from tests.support.cases import slow_but
from tests.support.command import p2l_engine

CATALOG = "models:\n" + "".join(f"  {name}: {{cost: {i + 1}}}\n" for i, name in enumerate(tiny.MODELS))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tiny.write(tmp_path_factory.mktemp("cli") / "p2l")
    (folder / "catalog.yaml").write_text(CATALOG)
    return folder


def run(*arguments, text="", checkpoint=None):
    more = () if checkpoint is None else ("--checkpoint", str(checkpoint), "--device", "cpu", "--dtype", "float32")
    return p2l_engine(*arguments, *more, text=text)


def test_route_prints_a_table_and_json_lines(checkpoint):
    status, out, err = run("route", "hello", "and [bold]you", "--budget", "2.5", checkpoint=checkpoint)
    assert status == 0, err
    assert "hello" in out
    assert "and [bold]you" in out
    assert "mean expected cost" in out
    status, out, err = run("route", "--json", text="one\n\ntwo\n", checkpoint=checkpoint)
    assert status == 0, err
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["prompt"] for line in lines] == ["one", "two"]
    fields = {"prompt", "model", "policy", "expected_cost", "win_rate", "score", "why", "propensity", "propensity_error"}
    assert set(lines[0]) == {*fields, "kept", "expected_tokens", "expected_seconds"}


def test_route_reads_jsonl(checkpoint, tmp_path):
    file = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "c"}]
    file.write_text("\n".join(json.dumps(p) for p in ("a", ["b", "b2"], messages, {"prompt": "d"})))
    status, out, err = run("route", "--json", "--file", str(file), checkpoint=checkpoint)
    assert status == 0, err
    assert len(out.splitlines()) == 4


def test_markup_and_odd_line_ends_are_text(checkpoint, tmp_path):
    status, out, err = run("route", r"\[/a] [/b]", checkpoint=checkpoint)
    assert status == 0, err
    assert r"\[/a] [/b]" in out
    file = tmp_path / "prompts.jsonl"
    file.write_text('\ufeff"one\u2028line"\r\n\n["bad", 3]\n', encoding="utf-8")
    status, _, err = run("route", "--file", str(file), checkpoint=checkpoint)
    assert status == 2
    assert "row 1: prompt: message 1" in " ".join(err.split())


@pytest.mark.slow
def test_leaderboard_and_its_plot(checkpoint, tmp_path):
    plot = tmp_path / "out.png"
    status, out, err = run("leaderboard", r"Simplify $\frac$ [/a]", "--plot", str(plot), checkpoint=checkpoint)
    assert status == 0, err
    assert all(name in out for name in tiny.MODELS)
    assert plot.read_bytes().startswith(b"\x89PNG")
    status, out, _ = run("leaderboard", "--json", text="hello", checkpoint=checkpoint)
    places = [json.loads(line) for line in out.splitlines()]
    assert [place["rank"] for place in places] == [1, 2, 3, 4, 5]
    assert places[0]["coefficient"] >= places[-1]["coefficient"]


def test_info(checkpoint):
    status, out, err = run("info", checkpoint=checkpoint)
    assert status == 0, err
    for word in ("packed llama", "grk", "epsilon", "float32", "native core"):
        assert word in out


@pytest.mark.parametrize(
    ("arguments", "text", "message"),
    [
        (["route", "hi", "--budget", "0.1"], "", "the cheapest policy costs 1.0"),
        (["route", "hi", "--budget", "nan"], "", "budget: expected a number"),
        (["route", "hi", "--catalog", "nowhere.yaml"], "", "nowhere.yaml"),
        (["route"], "", "holds no prompt"),
        (["route"], b"\xff\xfe", "expected UTF-8"),
        (["route", "--file", "nowhere.txt"], "", "nowhere.txt"),
        (["leaderboard", b"bad \xed\xa0\x80"], "", "invalid Unicode"),
        (["route", "hi", "--frobnicate"], "", "frobnicate"),
        (["leaderboard", "hi", "--file", "p.txt"], "", "--file: give a prompt or a file, not both"),
        (["leaderboard", "hi", "--bootstrap", "7"], "", "--bootstrap: needs --prompts"),
    ],
)
def test_errors_have_no_traceback(arguments, text, message, checkpoint):
    status, _, err = run(*arguments, text=text, checkpoint=checkpoint)
    assert status == 2
    assert message in " ".join(err.split())
    assert "Traceback" not in err


def test_replacements_of_names_with_colons():
    names = ["a", "a:b", "b:c", "c", "d"]
    assert swaps_of(["a:d", "a:b:d", "d:b:c"], names) == [("a", "d"), ("a:b", "d"), ("d", "b:c")]
    for wrong, message in (("a:b:c", "expected one reading"), ("a", "expected OLD:NEW"), ("a:a", "expected OLD:NEW")):
        with pytest.raises(typer.BadParameter, match=message):
            swaps_of([wrong], names)


def test_an_error_is_one_line(checkpoint, tmp_path):
    (tmp_path / "catalog.yaml").write_text("models: [\n")
    ended = p2l_engine("route", "hi", "--checkpoint", str(checkpoint), "--catalog", str(tmp_path / "catalog.yaml"))
    assert ended.status == 2
    assert ended.err.startswith(f"error: catalog {tmp_path}/catalog.yaml: expected YAML: while parsing a flow node")
    assert len(ended.err.splitlines()) == 1


@pytest.mark.parametrize("device", ["meta", "cuda:99"])
def test_an_absent_device_is_an_error(device, checkpoint):
    status, _, err = run("info", "--checkpoint", str(checkpoint), "--device", device)
    assert status == 2
    assert "error: device: " in err
    assert "Traceback" not in err


def test_a_missing_checkpoint_is_an_error():
    status, _, err = run("info", "--checkpoint", "nowhere")
    assert status == 2
    assert "expected a folder, a hub name" in err


def test_help_lists_the_commands():
    status, out, _ = run("--help")
    assert status == 0
    assert all(word in out for word in ("route", "leaderboard", "info"))


@pytest.mark.slow
def test_frontier_shows_the_curve_and_plots_it(checkpoint, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(f"prompt {i}" for i in range(12)))
    status, out, err = run("frontier", str(file), "--plot", str(tmp_path / "curve.png"), checkpoint=checkpoint)
    assert status == 0, err
    assert "12 prompts" in out
    assert all(name in out for name in tiny.MODELS)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    status, out, err = run("frontier", str(file), "--json", "--budgets", "3", checkpoint=checkpoint)
    assert status == 0, err
    lines = [json.loads(line) for line in out.splitlines()]
    assert len(lines) == 3 + len(tiny.MODELS)
    assert all(line["win_rate"] >= line["win_rate_per_prompt_budget"] - 1e-12 for line in lines[:3])


@pytest.mark.slow
def test_route_takes_shares(checkpoint):
    prompts = [f"prompt {i}" for i in range(10)]
    top = json.loads(run("route", "--json", prompts[0], checkpoint=checkpoint)[1])["model"]
    shares = ["--max-share", f"{top}=0.2", "--budget-scope", "batch"]
    status, out, err = run("route", "--json", *prompts, *shares, checkpoint=checkpoint)
    assert status == 0, err
    assert sum(json.loads(line)["policy"].get(top, 0.0) for line in out.splitlines()) <= 2 + 1e-9
    status, _, err = run("route", "hello", "--max-share", "alpha", checkpoint=checkpoint)
    assert status == 2
    assert "expected NAME=NUMBER" in err


@pytest.mark.slow
def test_batch_routes_a_file_and_prints_a_report(checkpoint, tmp_path):
    prompts, output = tmp_path / "prompts.csv", tmp_path / "out"
    prompts.write_text("prompt,model,id\nHello,somebody,1\n,somebody,2\n")
    arguments = ["batch", str(prompts), "--output", str(output)]
    code, _, stderr = run(*arguments, checkpoint=checkpoint)
    assert code == 2
    assert "has columns of its own named model" in stderr
    for keep, kept in ((["--keep", "id"], ["id"]), (["--keep", "", "--restart"], [])):
        code, stdout, stderr = run(*arguments, *keep, checkpoint=checkpoint)
        assert code == 3, stderr  # one row has an error
        said = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in stdout.splitlines() if "│" in line}
        assert (said["rows"], said["routed"], said["with an error"]) == ("2", "1", "1")
        found = pq.read_table(output / "part-000000.parquet")
        sources = ["source_file", "source_row"]
        assert found.column_names == [*kept, *sources, "model", "policy", "expected_cost", "win_rate", "score", "error"]
        assert [error is None for error in found["error"].to_pylist()] == [True, False]


@pytest.mark.slow
def test_a_leaderboard_over_a_file_of_prompts(checkpoint, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("one\ntwo\nthree\n")
    status, out, err = run(
        "leaderboard", "--prompts", str(file), "--bootstrap", "20", "--plot", str(tmp_path / "b.png"), checkpoint=checkpoint
    )
    assert status == 0, err
    assert "3 prompts of prompts.txt" in out
    assert "95% interval" in out
    assert (tmp_path / "b.png").stat().st_size > 1000
    status, out, err = run("leaderboard", "--prompts", str(file), "--json", "--bootstrap", "0", checkpoint=checkpoint)
    assert status == 0, err
    assert set(json.loads(out.splitlines()[0])) == {"rank", "model", "coefficient", "win_rate"}
    status, _, err = run("leaderboard", "hello", "--prompts", str(file), checkpoint=checkpoint)
    assert status == 2
    assert "not both" in err


@pytest.mark.slow
def test_export_writes_a_folder_that_routes(checkpoint, tmp_path):
    status, _, err = run("export", str(tmp_path / "out"), "--checkpoint", str(checkpoint))
    assert status == 0, err
    status, _, err = run("route", "hello", "--json", checkpoint=tmp_path / "out")
    assert status == 0, err
    status, _, err = run("export", str(tmp_path / "out"), "--checkpoint", str(checkpoint))
    assert status == 2
    assert "expected a folder that does not exist yet" in " ".join(err.split())


@pytest.mark.slow
def test_a_checkpoint_of_values_does_not_route(tmp_path):
    folder = tiny.write(tmp_path / "values", loss_type="ols", head_type="bt")
    (folder / "catalog.yaml").write_text(CATALOG)
    status, _, err = run("leaderboard", "hello", checkpoint=folder)
    assert status == 0, err
    status, _, err = run("route", "hello", checkpoint=folder)
    assert status == 2
    assert "whose coefficients give no win rates" in " ".join(err.split())


@pytest.mark.slow
def test_prompts_and_weights_of_tables(checkpoint, tmp_path):
    pq.write_table(pa.table({"prompt": ["sum", '["two", "turns"]'], "weight": [3.0, 0.0]}), tmp_path / "p.parquet")
    (tmp_path / "p.csv").write_text('prompt,weight\nsum,3\n"[""two"", ""turns""]",0\n')
    (tmp_path / "p.jsonl").write_text('{"prompt": "sum", "weight": 3}\n{"prompt": ["two", "turns"], "weight": 0}\n')
    (tmp_path / "one.jsonl").write_text('"sum"\n')
    boards = []
    for name in ("p.parquet", "p.csv", "p.jsonl", "one.jsonl"):
        file = ["leaderboard", "--prompts", str(tmp_path / name), "--json", "--bootstrap", "0"]
        status, out, err = run(*file, checkpoint=checkpoint)
        assert status == 0, err
        boards.append([json.loads(line)["coefficient"] for line in out.splitlines()])
    for board in boards[:3]:  # the second prompt weighs nothing
        assert board == pytest.approx(boards[3], abs=1e-3)
    for odd in ('"b"', '"b", "weight": true', '"b", "weight": 1e400'):
        (tmp_path / "p.jsonl").write_text(f'{{"prompt": "sum", "weight": 3}}\n{{"prompt": {odd}}}\n')
        status, _, err = run("leaderboard", "--prompts", str(tmp_path / "p.jsonl"), checkpoint=checkpoint)
        assert status == 2
        assert "row 1: weight: expected a finite number >= 0 for every prompt, or for none" in " ".join(err.split())
    pq.write_table(pa.table({"text": ["sum"]}), tmp_path / "p.parquet")
    status, _, err = run("leaderboard", "--prompts", str(tmp_path / "p.parquet"), checkpoint=checkpoint)
    assert status == 2
    assert "expected the columns prompt; it has text" in " ".join(err.split())
    (tmp_path / "p.csv").write_text("prompt,weight\nsum,1\nsum\n")
    status, _, err = run("leaderboard", "--prompts", str(tmp_path / "p.csv"), checkpoint=checkpoint)
    assert status == 2
    assert "row 1: expected a value for each column: expected 2, got 1: sum" in " ".join(err.split())
    for plot, message in (("a.xyz", "ends in .png, .svg, .pdf"), ("nowhere/a.png", "cannot be written")):
        status, _, err = run("leaderboard", "hi", "--plot", str(tmp_path / plot), checkpoint=checkpoint)
        assert status == 2
        assert message in " ".join(err.replace("│", " ").split())


@pytest.mark.slow
def test_text_files_of_prompts_need_no_extra(checkpoint, tmp_path):
    """After ``pip install .[cli]``: without the packages of the extra ``train``."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "sum", "weight": 3}\n')
    (tmp_path / "p.txt").write_text("sum\n")
    (tmp_path / "p.csv").write_text("prompt\nsum\n")
    script = (
        "import sys\n"
        "sys.modules |= dict.fromkeys(('pyarrow', 'pandas', 'scipy', 'sklearn', 'datasets', 'peft'))\n"
        "from p2l_engine.cli import run\n"
        "command = ['leaderboard', '--bootstrap', '0', '--checkpoint', sys.argv[1], '--prompts']\n"
        "print([run([*command, file]) for file in sys.argv[2:]])\n"
    )
    files = [str(tmp_path / name) for name in ("p.jsonl", "p.txt", "p.csv")]
    command = [sys.executable, "-c", script, str(checkpoint), *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "[0, 0, 2]", done.stderr
    assert "this command needs the extra 'batch': pip install 'p2l-engine[batch]'" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kind", slow_but(("csv",), ["csv", "parquet", "jsonl"]))
def test_prompts_are_read_from_the_column_that_is_named(kind, checkpoint, tmp_path):
    file, rows = tmp_path / f"questions.{kind}", [{"prompt": 7 * i, "question": f"prompt {i}"} for i in range(3)]
    if kind == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "csv":
        file.write_text("prompt,question\n" + "".join(f"{row['prompt']},{row['question']}\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), file)
    found = run("route", "--json", "--file", str(file), "--column", "question", checkpoint=checkpoint)
    turns = [list(user_turns(json.loads(line)["prompt"])) for line in found.out.splitlines()]
    assert turns == [[f"prompt {i}"] for i in range(3)], found.err
    for command in (
        ["frontier", str(file)],
        ["leaderboard", "--bootstrap", "0", "--prompts", str(file)],
        ["strengths", "--bootstrap", "2", str(file)],
    ):
        found = run(*command, "--column", "question", checkpoint=checkpoint)
        assert found.status == 0, found.err
        found = run(*command, "--column", "answer", checkpoint=checkpoint)
        assert found.status == 2
        assert "expected the columns answer; it has prompt, question" in found.message


@pytest.mark.slow
def test_dtypes_have_the_names_that_pytorch_users_write(checkpoint):
    for name, shown in (("fp32", "float32"), ("bf16", "bfloat16"), ("torch.bfloat16", "bfloat16")):
        found = p2l_engine("info", "--checkpoint", str(checkpoint), "--device", "cpu", "--dtype", name)
        (row,) = (line for line in found.out.splitlines() if "dtype" in line)
        assert row.strip("│ ").split()[-1] == shown
    found = p2l_engine("info", "--checkpoint", str(checkpoint), "--dtype", "float8")
    assert found.status == 2
    assert "'float8'" in found.message

"""The command line's manners: its start, help, progress, encodings, missing packages, Ctrl-C, and docs/cli.md."""

from __future__ import annotations

import importlib.metadata
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from p2l_engine import __version__
from p2l_engine.cli import extras, progress, terminal
from tests.support import tiny
from tests.support.command import p2l_engine

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("route", "batch", "leaderboard", "strengths", "frontier", "eval", "train", "adapt", "export", "info", "log")
CATALOG = "models:\n" + "".join(f"  {name}: {{cost: {i + 1}}}\n" for i, name in enumerate(tiny.MODELS))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tiny.write(tmp_path_factory.mktemp("command-line") / "p2l")
    (folder / "catalog.yaml").write_text(CATALOG)
    return str(folder)


@pytest.mark.slow
def test_help_and_typos_load_no_heavy_library():
    heavy = ("torch", "numpy", "transformers", "rich", "yaml", "pyarrow", "matplotlib", "scipy", "huggingface_hub")
    script = (
        "import sys\n"
        "from p2l_engine.cli import run\n"
        "print([run([]), run(['--help']), run(['--version']), run(['batch', '--help']), run(['route', '--bugdet', '1'])])\n"
        f"print([name for name in {heavy} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == ["[2, 0, 0, 0, 2]", "[]"]
    assert "No such option: --bugdet" in done.stderr


@pytest.mark.slow
def test_the_console_script_prints_the_version():
    script = Path(sys.executable).with_name("p2l-engine")
    command = [str(script)] if script.is_file() else [sys.executable, "-m", "p2l_engine"]
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"p2l-engine {__version__}\n"


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_help_is_plain_text(command):
    """No emoji for ":NEW:", no style for "[name]", nothing that an ASCII terminal lacks; a text for every option."""
    found = p2l_engine(*command, "--help")
    assert found.status == 0, found.err
    assert found.out.isascii()
    if command in (("eval",), ("strengths",)):
        assert "OLD:NEW" in found.out
    if not command:
        assert all(f"\n  {name} " in found.out for name in COMMANDS)
        assert "--install-completion" in found.out


def test_every_argument_and_option_has_a_help_text():
    import typer.main

    from p2l_engine.cli.app import app

    for name, command in typer.main.get_command(app).commands.items():
        for param in command.params:
            assert getattr(param, "help", None), f"{name}: {param.name}"


def test_options_of_batch_have_headings():
    lines = p2l_engine("batch", "--help").out.splitlines()
    headings = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert headings[:2] == ["Arguments:", "Options:"]
    assert "Checkpoint and device:" in headings
    assert len(headings) == len(set(headings)) >= 6


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_characters_that_the_encoding_lacks_are_escaped(encoding, checkpoint, tmp_path):
    found = p2l_engine("route", "日本 é", "--checkpoint", checkpoint, encoding=encoding)
    assert found.status == 0, found.err
    assert r"\u65e5\u672c" in found.out
    assert "mean expected cost" in found.out
    found = p2l_engine("route", "日本 " * 20, "é", "--checkpoint", checkpoint, encoding=encoding)
    lines = [line for line in found.out.splitlines() if line.startswith(("|", "+"))]
    assert "..." in found.out
    assert len({len(line) for line in lines}) == 1  # columns are aligned
    found = p2l_engine("route", "--file", str(tmp_path / "日本.txt"), "--checkpoint", checkpoint, encoding=encoding)
    assert found.status == 2
    assert r"\u65e5\u672c.txt" in found.err


@pytest.mark.slow
def test_an_ascii_terminal_is_enough():
    """In a process of its own, as Python sets the streams up: without the command, print would raise UnicodeEncodeError."""
    script = "from p2l_engine.cli import run; run(['--version']); print('日本')"
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=environment, check=True)
    assert done.stdout.splitlines()[-1] == rb"\u65e5\u672c"


@pytest.mark.parametrize(
    "command",
    [
        "route --file",
        pytest.param("leaderboard --bootstrap 2 --prompts", marks=pytest.mark.slow),
        "frontier",
        pytest.param("strengths --bootstrap 2", marks=pytest.mark.slow),
        "batch -o out",
    ],
)
def test_progress_is_lines_where_stderr_is_no_terminal(command, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    Path("p.csv").write_text("prompt\n" + "".join(f"prompt {i}\n" for i in range(12)))
    found = p2l_engine(*command.split(), "p.csv", "--checkpoint", checkpoint)
    assert found.status == 0, found.err
    lines = [line for line in found.err.splitlines() if "%: " in line]
    assert lines[0].startswith("0%: 0 of 12 prompts, 0 s" if "batch" not in command else "100%: hashing inputs, 0 s")
    assert lines[-1].startswith("100%: 12 of 12 prompts" if "batch" not in command else "100%: 12 rows, 1 parts")


def test_lines_of_progress_come_every_few_seconds(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.progress(1000) as advance:
        for _ in range(10):
            now[0] += 2.0
            advance(100)
    terminal.err.cache_clear()
    assert capsys.readouterr().err.splitlines() == [
        "30%: 300 of 1,000 prompts, 6 s, about 14 s left",
        "60%: 600 of 1,000 prompts, 12 s, about 8 s left",
        "90%: 900 of 1,000 prompts, 18 s, about 2 s left",
        "100%: 1,000 of 1,000 prompts, 20 s",
    ]


def test_short_work_shows_no_lines(capsys):
    with progress.progress(3) as advance:
        advance(3)
    assert capsys.readouterr().err == ""


def test_progress_is_a_bar_on_a_terminal(monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "err", lambda: Console(file=stream, force_terminal=True, width=100))
    with progress.progress(4) as advance:
        advance(4)
    assert "4 of 4 prompts" in stream.getvalue()
    assert "100%" in stream.getvalue()


@pytest.fixture
def requirements(monkeypatch):
    lines = [
        "torch>=2", 'triton; platform_system == "Linux"', 'pyarrow>=20; extra == "train"', 'PyYAML; extra == "train"',
        'pyarrow>=20; extra == "batch"', 'scikit-learn; python_version > "3" and extra == "train"', 'pyarrow; extra == "test"',
    ]  # fmt: skip
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: lines)


@pytest.mark.parametrize(
    ("module", "found"),
    [
        ("pyarrow.parquet", ["batch", "train"]),
        ("yaml", ["train"]),
        ("sklearn.linear_model", ["train"]),
        ("torch", []),
        ("", []),
    ],
)
def test_a_missing_module_belongs_to_extras(module, found, requirements):
    assert extras.extras_of(module) == found


@pytest.mark.parametrize(
    ("package", "importers", "command", "extra"),
    [
        ("pyarrow", "p2l_engine.tables p2l_engine.cli.prompts", "leaderboard --prompts p.csv", "'batch'"),
        ("matplotlib", "matplotlib.figure p2l_engine.cli.plots", "leaderboard hello --plot p.png", "'cli'"),
        ("matplotlib", "matplotlib.figure p2l_engine.cli.plots", "frontier p.csv --plot p.png", "'cli'"),
        ("matplotlib", "matplotlib.figure p2l_engine.evaluation.plots", "strengths p.csv --plot p.png", "'cli'"),
        (
            "matplotlib",
            "matplotlib.figure p2l_engine.evaluation.plots p2l_engine.evaluation.html",
            "eval --html p.html",
            "'cli'",
        ),
        ("pydantic", "p2l_engine.train.config", "train --config p.yaml", "'train'"),
        ("ray", "p2l_engine.batch.ray", "batch p.csv -o out --ray local", "'ray'"),
        ("typer", "p2l_engine.cli.app", "info", "'cli'"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(package, importers, command, extra, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("p.csv").write_text("prompt\nhello\n")
    for name in [name for name in sys.modules if name.startswith(tuple(importers.split()))]:
        parent, _, last = name.rpartition(".")
        if hasattr(sys.modules.get(parent), last):  # "from parent import last" would find it here
            monkeypatch.delattr(sys.modules[parent], last)
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    if package == "matplotlib":  # before the work is done
        monkeypatch.setattr("p2l_engine.engine.Engine.from_pretrained", lambda *_: pytest.fail("the engine is loaded"))
    found = p2l_engine(*command.split(), *(() if "train" in command else ("--checkpoint", checkpoint)))
    assert found.status == 2
    assert f"this command needs the extra {extra}" in found.message
    assert "Traceback" not in found.err


@pytest.mark.parametrize(
    ("interrupted", "command", "line"),
    [
        ("p2l_engine.router.Router.route_batch", "route hello", "interrupted"),
        ("p2l_engine.batch.run", "batch p.csv -o out", "interrupted; the same command continues the run"),
        ("p2l_engine.train.config.TrainConfig.load", "train --config p.yaml", "interrupted; --resume continues from"),
    ],
)
def test_an_interrupted_command_ends_in_one_line(interrupted, command, line, checkpoint, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    Path("p.csv").write_text("prompt\nhello\n")
    monkeypatch.setattr(interrupted, interrupt)
    found = p2l_engine(*command.split(), *(() if "train" in command else ("--checkpoint", checkpoint)))
    assert found.status == 130
    assert found.err.startswith(line)
    assert len(found.err.splitlines()) == 1


ENDS = """
import atexit, sys, threading, time
from p2l_engine import cli

def run():
    import torch
    atexit.register(print, "a handler of a library")
    a, busy = torch.ones(300, 300), threading.Event()
    def compute():
        while True:
            torch.mm(a, a)
            busy.set()
    threading.Thread(target=compute, daemon=True).start()
    busy.wait()
    threading.Timer(0.2, print, ["a thread that is waited for"]).start()
    sys.stdout.write("output without an end of line; ")
    {last}

cli.run = run
cli.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("last", "status"), [("return 3", 3), ("return 0", 0)])
def test_a_command_ends_with_its_status_whatever_threads_do(last, status):
    ended = subprocess.run([sys.executable, "-c", ENDS.replace("{last}", last)], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (status, "")
    assert ended.stdout == "output without an end of line; a thread that is waited for\na handler of a library\n"


@pytest.mark.slow
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_commands_run_where_streams_are_closed(closed, checkpoint, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "hello"}\n')
    given = f"--checkpoint {checkpoint} --device cpu --dtype float32 --catalog {checkpoint}/catalog.yaml"
    command = f"{sys.executable} -m p2l_engine batch {tmp_path}/in.jsonl -o {tmp_path}/out {given} {closed}"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, shell=True, env=environment, cwd=tmp_path, capture_output=True).returncode == 0
    assert (tmp_path / "out" / "_SUCCESS").is_file()


def test_train_takes_one_of_resume_and_restart():
    found = p2l_engine("train", "--config", "c.yaml", "--resume", "--restart")
    assert found.status == 2
    assert "cannot be combined with --resume" in found.message
    found = p2l_engine("train", "--config", "nowhere.yaml")
    assert found.status == 2
    assert "nowhere.yaml" in found.message


@pytest.mark.slow
def test_the_kernels_folder_is_hidden_from_transformers():
    code = (
        "import p2l_engine, importlib.util as u; print(u.find_spec('kernels')); import transformers; import p2l_engine.kernels"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"


@pytest.mark.slow
def test_the_page_of_commands_is_current():
    command = ["-m", "typer", "p2l_engine.cli.app", "utils", "docs", "--name", "p2l-engine"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert page.strip() == done.stdout.strip(), f"write it again: python {' '.join(command)} --output docs/cli.md"

"""The docs: links resolve, the README stays short, and examples in the docs and in examples/ run."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from p2l_engine import Engine
from tests.support.command import p2l_engine

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")])
OWN_CHECKPOINT = ("route", "service", "files", "strengths")  # scripts that load the default checkpoint


def blocks(page, language="python"):
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)


def anchors(page):
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", head).strip().lower().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), f"{page.name}: {target}"
        if anchor and place.suffix == ".md":
            assert anchor in anchors(place), f"{page.name}: {target}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_examples_on_budgets_run(capsys):
    names = {}
    for block in blocks(ROOT / "docs" / "budgets.md"):
        exec(compile(block, "docs/budgets.md", "exec"), names)
    assert names["p"].gap <= 1e-9
    assert names["pacer"].count == 200
    assert "dual" in capsys.readouterr().out


@pytest.mark.slow
def test_the_examples_in_python_run(default_engine, capsys):
    names = {}
    for block in blocks(ROOT / "docs" / "python.md"):
        exec(compile(block, "docs/python.md", "exec"), names)
    assert names["c"].theta.shape[0] == 2
    assert names["decision"].model in names["engine"].models
    assert names["chats"].prefix_cache.hits == 2
    assert len(capsys.readouterr().out.splitlines()) == 6


@pytest.mark.slow
def test_the_readme_prints_what_it_says(default_engine, capsys):
    (code,) = blocks(ROOT / "README.md")
    exec(compile(code, "README.md", "exec"), {})
    model, *rest = capsys.readouterr().out.split()
    said = blocks(ROOT / "README.md", "text")[1].split()
    assert model == said[0]
    assert abs(float(rest[-1]) - float(said[-1])) < 0.02  # bfloat16 or float32


@pytest.mark.slow
def test_a_model_joins_as_the_readme_says(default_engine, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("p2l_engine.learning.hidden.cache_folder", lambda: tmp_path / "cache")
    for line in blocks(ROOT / "README.md", "sh")[1].splitlines():
        if line.startswith("p2l-engine"):
            done = p2l_engine(*shlex.split(line)[1:])
            assert done.status == 0, done.err
        else:
            subprocess.run(["sh", "-c", line], check=True)
    assert "new-model" in (tmp_path / "adapted" / "model_list.json").read_text()
    assert "win rate" in done.out


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "examples").glob("*.py") if path.stem != "make_votes"))
@pytest.mark.slow
def test_scripts_run(name, request, capsys, monkeypatch, tmp_path):
    if name in OWN_CHECKPOINT:
        request.getfixturevalue("default_engine")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().out.strip()


@pytest.mark.slow
def test_the_training_page_runs(default_engine, monkeypatch, tmp_path):
    """All commands of docs/training.md."""
    (tmp_path / "examples").mkdir()
    for name in ("make_votes.py", "train.yaml"):
        shutil.copy(ROOT / "examples" / name, tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    runpy.run_path("examples/make_votes.py", run_name="__main__")
    (commands,) = blocks(ROOT / "docs" / "training.md", "sh")
    lines = [shlex.split(line.partition("#")[0]) for line in commands.splitlines() if line.startswith("p2l-engine")]
    assert [line[1] for line in lines] == ["train", "eval", "leaderboard", "export"]
    for command in lines:
        ended = p2l_engine(*command[1:])
        assert ended.status == 0, ended.err
    engine = Engine.from_pretrained("my-checkpoint", device="cpu")
    theta = engine.coefficients(["What is the sum of 17 and 23?", "Write a poem about the number 7, in 4 lines."]).theta
    assert [engine.models[best] for best in theta.argmax(1)] == ["calculator", "poet"]

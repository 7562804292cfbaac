"""p2l-engine adapt, calibrate and shrink on scores of several sources, of which two may have the same prompt."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from p2l_engine import checkpoint
from p2l_engine.engine import Engine
from p2l_engine.feedback import feedback_model
from p2l_engine.votes import read
from p2l_engine.votes.by_source import read_by_source, read_within
from tests.support import tiny
from tests.support.command import p2l_engine

MODELS = {"one": tiny.MODELS, "two": tiny.MODELS[2:]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, and scores of two sources, which share half of their prompts."""
    folder = tmp_path_factory.mktemp("sources")
    plain = tiny.write(folder / "plain", loss_type="bt", head_type="bt")
    prompts = {"one": [f"a{i} b{i}" for i in range(160)], "two": [f"a{i} b{i}" for i in range(80, 240)]}
    rng = np.random.default_rng(0)
    rows = []
    for source, of in prompts.items():
        theta = Engine.from_pretrained(plain, "cpu", "float32").coefficients(of).theta
        rows += [
            (prompt, model, 1 / (1 + np.exp(-theta[i, tiny.MODELS.index(model)])) * rng.uniform(0.6, 1), source)
            for i, prompt in enumerate(of)
            for model in MODELS[source]
        ]
    with (folder / "scores.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("prompt", "model", "score", "source"), *rows])
    with (folder / "spelled.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("prompt", "model", "score", "source"), *((p.upper(), *rest) for p, *rest in rows)])
    with (folder / "others.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("prompt", "model", "score", "source"), *((f"c {p} d", *rest) for p, *rest in rows)])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", ["adapt", "calibrate", "shrink"])
def test_scores_compare_within_a_source(folder, tmp_path, monkeypatch, command):
    monkeypatch.setenv("P2L_ENGINE_CACHE", str(tmp_path / "cache"))
    arguments = {
        "adapt": ("adapt", folder / "plain", "--votes", folder / "scores.csv"),
        "calibrate": ("calibrate", folder / "plain", "--votes", folder / "scores.csv", "--bootstrap", "20"),
        "shrink": ("shrink", folder / "plain", "--trained-on", folder / "scores.csv", "--votes", folder / "others.csv"),
    }[command]
    more = ("--by", "source") if command == "shrink" else ()
    refused = p2l_engine(*arguments, *more, "-o", tmp_path / "new", "--device", "cpu")
    assert refused.status == 2
    assert "on the same prompt: expected one; where there are several sources of scores, name the column" in refused.message
    done = p2l_engine(*arguments, *more, "--sources", "source", "-o", tmp_path / "new", "--device", "cpu")
    if command == "shrink":  # 1: no shrinkage makes the votes likelier
        assert done.status in (0, 1), done.err
        assert (tmp_path / "new").exists() == (done.status == 0)
        assert "log-loss of 2,080 votes" in " ".join(done.out.split())
        return
    assert done.status == 0, done.err
    assert checkpoint.load(tmp_path / "new").models == checkpoint.load(folder / "plain").models


def test_votes_of_sources_are_read_with_and_without_their_column(folder, tmp_path):
    feedback = feedback_model("bt")
    votes, dropped = read_within(folder / "scores.csv", "source", feedback, answers_once=True)
    expected, _, _ = read_by_source(folder / "scores.csv", "source", feedback, answers_once=True)
    assert votes.prompts == expected.prompts
    np.testing.assert_array_equal(votes.outcome, expected.outcome)
    np.testing.assert_array_equal(votes.weight, expected.weight)
    assert not len(dropped)
    lines = (folder / "scores.csv").read_text().splitlines()
    (tmp_path / "one.csv").write_text("\n".join([lines[0], *(line for line in lines if line.endswith(",one"))]))
    alone, _ = read_within(tmp_path / "one.csv", None, feedback, complete=True)
    np.testing.assert_array_equal(alone.outcome, read(tmp_path / "one.csv", None, feedback)[0].outcome)


@pytest.mark.slow
def test_prompts_in_another_spelling_are_left_out_of_what_was_trained_on(folder, tmp_path, monkeypatch):
    """So that none is left to measure distances from."""
    monkeypatch.setenv("P2L_ENGINE_CACHE", str(tmp_path / "cache"))
    done = p2l_engine(
        "shrink", folder / "plain", "--trained-on", folder / "scores.csv", "--sources", "source",
        "--votes", folder / "spelled.csv", "--by", "source", "-o", tmp_path / "new", "--device", "cpu",
    )  # fmt: skip
    assert done.status == 2
    assert "left 240 prompts out of --trained-on: --votes has them too" in done.message
    assert "training: expected at least 100 prompts for a shrinkage, got 0" in done.message

"""learning/source_curves.py, votes/by_source.py and ``eval --adapt --by``: sources of votes that are left out in turn."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from p2l_engine.feedback import feedback_model
from p2l_engine.learning.source_curves import leave_one_source_out
from p2l_engine.votes import Votes
from p2l_engine.votes.by_source import balanced, read_by_source
from tests.support import tiny
from tests.support.command import p2l_engine
from tests.support.simulate import Simulator, head_of, words_in

HEADER = ("prompt", "model_a", "model_b", "winner", "team")


def table(path, rows, header=HEADER):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


def curves(world, known, votes, source, **options):
    hidden = words_in([turns[0] for turns in votes.prompts])
    found = leave_one_source_out(head_of(world, known), world.models[:known], world.feedback, votes, source, hidden, **options)
    return {(point.source, point.votes): point for point in found}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grk", "bt-tie"])
def test_votes_of_a_source_and_of_others_both_help(name):
    """Five models of which three are known, in two sources whose prompts and models are alike."""
    world = Simulator.of(name, 5, seed=1)
    prompts = world.prompts(160, 1)
    votes = world.votes(prompts, 4)
    source = np.where(votes.prompt % 2 == 0, "even", "odd")
    found = curves(world, 3, votes, source, sizes=(0, 10, 150, 10**6), draws=3)
    assert list(found) == [("even", 0), ("even", 10), ("even", 150), ("odd", 0), ("odd", 10), ("odd", 150)]
    for label in ("even", "odd"):
        none, some, many = (found[label, n] for n in (0, 10, 150))
        assert (none.gain, none.gain_error, none.new, none.prompts) == (0.0, 0.0, 0, 26)
        assert none.help > 2 * none.help_error > 0  # the other source's votes say what the two new models are
        assert none.help > many.help
        assert many.loss < none.loss + 0.05
        assert some.loss_error > 0
        assert many.loss + many.gain == pytest.approx(none.loss)


@pytest.mark.slow
def test_models_of_one_source_alone_are_new_there():
    world = Simulator.of("grk", 5, seed=2)
    votes = world.votes(world.prompts(90, 1), 4)
    last = (votes.a == 4) | (votes.b == 4)
    found = curves(world, 4, votes, np.where(last, "new", "old"), sizes=(0, 60), draws=2)
    assert found["new", 0].new == 1
    assert found["old", 0].new == 0
    assert found["new", 60].gain > 0


def test_the_held_out_prompts_of_a_source_are_not_learned_from():
    """Where every prompt has votes of both sources, votes of the other source on held-out prompts change nothing."""
    world = Simulator.of("bt-tie", 4, seed=3)
    votes = world.votes(world.prompts(30, 1), 6)
    source = np.where(np.arange(len(votes)) % 2 == 0, "a", "b")
    first = curves(world, 4, votes, source, sizes=(0,))
    point = first["a", 0]
    rng = np.random.default_rng([0, 0])
    held = rng.permutation(np.unique(votes.prompt[source == "a"]))[: point.prompts]
    outcome = votes.outcome.copy()
    of = np.isin(votes.prompt, held) & (source == "b")
    outcome[of] = np.where(outcome[of] == 0, 1, 0)
    changed = Votes.make(votes.prompts, votes.models, votes.prompt, votes.a, votes.b, outcome)
    assert curves(world, 4, changed, source, sizes=(0,))["a", 0] == point
    outcome = votes.outcome.copy()
    of = ~np.isin(votes.prompt, held) & (source == "b")
    outcome[of] = np.where(outcome[of] == 0, 1, 0)
    changed = Votes.make(votes.prompts, votes.models, votes.prompt, votes.a, votes.b, outcome)
    assert curves(world, 4, changed, source, sizes=(0,))["a", 0].loss != point.loss


def test_sources_that_say_nothing_are_named():
    world = Simulator.of("grk", 3)
    votes = world.votes(world.prompts(6, 1), 2)
    one = ["a"] * len(votes)
    with pytest.raises(ValueError, match="source: expected two at least, got a"):
        curves(world, 3, votes, one)
    with pytest.raises(ValueError, match="source: expected one for each of the"):
        curves(world, 3, votes, one[1:])
    with pytest.raises(ValueError, match="source: b: expected votes on two prompts at least, got 1"):
        curves(world, 3, votes, np.where(votes.prompt == 0, "b", "a"))


def test_votes_are_read_with_the_source_of_each(tmp_path):
    rows = [
        ("q", "x", "y", "model_a", "blue"),
        ("p", "x", "y", "model_b", "red"),
        ("q", "y", "z", "tie", "red"),
        ("p", "x", "", "model_b", "red"),
    ]
    path = table(tmp_path / "v.csv", rows)
    votes, source, dropped = read_by_source(path, "team", feedback_model("grk"), max_dropped=0.5)
    found = {
        (votes.prompts[p][0], votes.models[a], votes.models[b], int(outcome), str(of))
        for p, a, b, outcome, of in zip(votes.prompt, votes.a, votes.b, votes.outcome, source, strict=True)
    }
    assert found == {("q", "x", "y", 0, "blue"), ("p", "x", "y", 1, "red"), ("q", "y", "z", 2, "red")}
    assert len(set(votes.prompts)) == len(votes.prompts) == 2
    assert (dropped.rows, len(dropped)) == (4, 1)
    with pytest.raises(ValueError, match=r"by: expected 'file' or one of prompt, .*got 'tram'"):
        read_by_source(path, "tram", feedback_model("grk"))
    with pytest.raises(ValueError, match="team red: 1 of 3 rows cannot be used"):
        read_by_source(path, "team", feedback_model("grk"), max_dropped=0.1)
    with pytest.raises(ValueError, match="two sources at least, got v"):
        read_by_source(table(tmp_path / "w.csv", [(*row[:4], "v") for row in rows[:2]]), "team", feedback_model("grk"))


def test_a_file_is_a_source_and_scores_become_votes_within_it(tmp_path):
    header = ("prompt", "model", "score")
    table(tmp_path / "one.csv", [("p", "a", 1), ("p", "b", 0), ("q", "b", 0.4), ("q", "c", 0.2)], header)
    table(tmp_path / "two.csv", [("p", "b", 1), ("p", "d", 1)], header)
    votes, source, _ = read_by_source(str(tmp_path / "*.csv"), "file", feedback_model("grk"))
    assert votes.models == ("a", "b", "c", "d")
    assert len(votes) == 3
    assert sorted(label.rpartition("/")[2] for label in source) == ["one.csv", "one.csv", "two.csv"]
    assert len(votes.prompts) == 2


def test_values_have_sources_too(tmp_path):
    rows = [(f"p{i}", "m", str(i), "ab"[i % 2]) for i in range(6)]
    path = table(tmp_path / "v.csv", rows, ("prompt", "model", "value", "team"))
    votes, source, _ = read_by_source(path, "team", feedback_model("ols"))
    assert votes.are_values
    assert [("ab"[int(v) % 2]) for v in votes.outcome] == source.tolist()


@pytest.mark.slow
def test_eval_shows_draws_and_writes_curves_by_source(tmp_path, monkeypatch):
    monkeypatch.setenv("P2L_ENGINE_CACHE", str(tmp_path / "cache"))
    folder = tiny.write(tmp_path / "source")
    rows = [(f"prompt {i}", tiny.MODELS[i % 5], "zeta", "model_a", "red" if i % 3 else "blue") for i in range(36)]
    path = table(tmp_path / "v.csv", rows)
    given = ("eval", "--votes", path, "--checkpoint", str(folder), "--adapt", "--by", "team")
    files = ("--plot", str(tmp_path / "c.svg"), "--json", str(tmp_path / "c.json"))
    ended = p2l_engine(*given, *files)
    assert ended.status == 0, ended.err
    assert "team blue, learned after the others: 0 new models" in " ".join(ended.out.split())
    points = json.loads((tmp_path / "c.json").read_text())["points"]
    assert [(p["source"], p["votes"]) for p in points] == [("blue", 0), ("red", 0), ("red", 10)]
    assert "<svg" in (tmp_path / "c.svg").read_text()
    assert "needs --adapt and --votes" in p2l_engine("eval", "--votes", path, "--by", "team").message
    assert "needs --by" in p2l_engine("eval", "--votes", path, "--plot", str(tmp_path / "d.svg")).message
    assert "learning curves alone" in p2l_engine(*given, "--card").message


def test_sources_are_balanced_by_their_weight(tmp_path):
    header = ("prompt", "model", "score", "task", "team")
    rows = [
        (f"p{i}", model, score, f"t{i}", "ab"[i > 2]) for i in range(4) for model, score in zip("xyz", (1, 0, 0), strict=True)
    ]
    path = table(tmp_path / "v.csv", rows, header)
    votes, source, _ = read_by_source(path, "team", feedback_model("grk"), answers_once=True)
    assert votes.category == ("t0", "t1", "t2", "t3")
    assert votes.weight.tolist() == [0.5] * 12  # three answers to a prompt: each in two votes
    for balance, ratio in ((1.0, 3.0), (0.5, 3**0.5), (0.0, 1.0)):
        weight = balanced(votes, source, balance).weight
        assert weight.sum() == pytest.approx(votes.weight.sum())
        assert weight[source == "a"].sum() / weight[source == "b"].sum() == pytest.approx(ratio)

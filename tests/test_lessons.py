"""Votes that a learning server makes of scores weigh what they weigh in a table of scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from p2l_engine.decision_log.log import DecisionLog
from p2l_engine.feedback import feedback_model
from p2l_engine.serve.lessons import as_votes, lessons
from p2l_engine.votes.scores import from_scores
from tests.support.records import new_id, record

MODELS = ("alpha", "beta", "gamma", "delta", "epsilon")


def learned(folder: Path, answers: list[tuple[str, float]], models: tuple[str, ...] = MODELS) -> list[tuple[str, str, float]]:
    """The votes that scores of answers on one prompt make, with their weights."""
    log = DecisionLog(f"sqlite:///{folder}/log.sqlite")
    for i, (model, _) in enumerate(answers):
        log.add(record(i, model=model, chosen=model, candidates=(model,)))
    assert log.flush()
    for i, (_, score) in enumerate(answers):
        log.feedback(new_id(i), None, score=score)
    found, _ = lessons(log, log.feedback_after(0, 1000), models, feedback_model("grk"))
    log.close()
    votes, prompts = as_votes(found, MODELS)
    assert len(prompts) <= 1
    return [(MODELS[a], MODELS[b], w) for a, b, w in zip(votes.a, votes.b, votes.weight, strict=True)]


@pytest.mark.parametrize("count", range(2, 6))
def test_answers_that_are_scored_weigh_as_much_as_in_a_table(count, tmp_path, rng):
    scores = rng.random(count)
    table = from_scores((("a prompt",),), MODELS[:count], scores[None], answers_once=True)
    pairs = np.stack([table.a, table.b], 1)
    found = learned(tmp_path, [(MODELS[i], float(scores[i])) for i in rng.permutation(count)])
    assert {frozenset(vote[:2]) for vote in found} == {frozenset((MODELS[a], MODELS[b])) for a, b in pairs}
    np.testing.assert_allclose(sum(weight for *_, weight in found), table.weight.sum())
    np.testing.assert_allclose(table.weight.sum(), count / 2)


@pytest.mark.parametrize(
    ("answers", "weights"),
    [
        ("ab", [1]),
        ("abg", [1, 0.25, 0.25]),
        ("aba", [1, 0.5]),  # one answer more of the same model
        ("aab", [1]),  # only the newest one is compared
        ("axb", [1]),  # answers of a model that is not learned bring nothing
        ("xab", [1]),
        ("abxg", [1, 0.25, 0.25]),
        ("xx", []),
    ],
)
def test_each_answer_brings_half_a_vote(answers, weights, tmp_path):
    named = {model[0]: model for model in MODELS} | {"x": "unknown"}
    found = learned(tmp_path, [(named[letter], i / 10) for i, letter in enumerate(answers)])
    assert [weight for *_, weight in found] == weights

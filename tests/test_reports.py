"""Reports and their JSON: the same keys as the files that were written before, and the errors of a broken file."""

from __future__ import annotations

import json
from typing import Any

import pytest

from p2l_engine import checkpoint
from p2l_engine.checkpoint import card
from p2l_engine.jsonable import from_json, to_json
from p2l_engine.reports import (
    Counts,
    Evaluation,
    Figure,
    Leaderboards,
    Standing,
    Subject,
    Survey,
    ValueFigures,
)

BOARDS = Leaderboards((Standing(1, "x", 0.5, None), Standing(2, "y", -0.5, None)))
SUBJECT = Subject(("x", "y"), "ols", "float32", "abc")


@pytest.fixture
def written() -> dict[str, Any]:
    """The evaluation.json of builtin/llmrouter-9, which an earlier version wrote."""
    return json.loads((checkpoint.find("builtin/llmrouter-9") / "evaluation.json").read_text(encoding="utf-8"))


def test_an_earlier_versions_figures_are_read(written):
    report = from_json(Evaluation, written)
    assert to_json(report) == written
    assert report.held_out == Counts(498, 17928)
    assert report.votes.overall["p2l"]["log_loss"].value == written["votes"]["overall"]["p2l"]["log_loss"]["value"]
    assert report.leaderboards.middle == report.strengths.reference == "qwen2.5-7b-instruct"
    routers = [name for name in written["routing"]["budgets"]["rows"][0] if name not in ("budget", "best_single", "tasks")]
    assert list(report.routing.budgets.rows[0].routers) == routers


def test_what_was_not_computed_has_no_key():
    survey = Survey(checkpoint=SUBJECT, bootstrap=5, leaderboards=BOARDS, prompts=3, weighted=False)
    found = to_json(survey)
    assert set(found) == {"checkpoint", "bootstrap", "leaderboards", "prompts", "weighted"}
    assert set(found["leaderboards"]) == {"aggregated"}
    assert found["leaderboards"]["aggregated"][0] == {
        "rank": 1, "model": "x", "coefficient": 0.5, "win_rate": None, "low": None, "high": None,
    }  # fmt: skip
    assert from_json(Survey, json.loads(json.dumps(found))) == survey
    marginal = to_json(Leaderboards(BOARDS.aggregated, marginal=BOARDS.aggregated))
    assert marginal["kendall"] is None
    assert marginal["spearman"] is None


def test_keys_of_later_versions_are_ignored(written):
    assert from_json(Evaluation, written | {"later": 1}) == from_json(Evaluation, written)


@pytest.mark.parametrize(
    ("path", "value", "error", "message"),
    [
        (("held_out", "votes"), None, KeyError, "held_out.votes"),
        (("votes", "overall", "p2l", "log_loss", "low"), None, KeyError, "votes.overall.p2l.log_loss.low"),
        (("bootstrap",), "200", TypeError, "bootstrap: expected int, got '200'"),
        (("held_out", "prompts"), True, TypeError, "held_out.prompts: expected int, got True"),
        (("leaderboards", "aggregated"), {}, TypeError, "leaderboards.aggregated: expected"),
        (("leaderboards",), 3, TypeError, "leaderboards: expected an object, got 3"),
    ],
)
def test_errors_in_a_file_name_the_place(written, path, value, error, message):
    inner = written
    for name in path[:-1]:
        inner = inner[name]
    if value is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    with pytest.raises(error) as raised:
        from_json(Evaluation, written)
    assert message in str(raised.value)


def test_a_card_has_figures_of_values_for_each_predictor():
    figure = {"squared_error": Figure(1.5, 1.0, 2.0)}
    values = ValueFigures({"p2l": figure, "marginal": figure, "constant": {}})
    report = Evaluation(checkpoint=SUBJECT, bootstrap=5, leaderboards=BOARDS, held_out=Counts(3, 9), value_figures=values)
    text = card.text(["x", "y"], {"loss_type": "ols"}, report)
    assert "| figure | **this checkpoint** | one regression for all prompts | constant |" in text
    assert "| squared error | 1.500 (1.000 to 2.000) | 1.500 (1.000 to 2.000) |  |" in text

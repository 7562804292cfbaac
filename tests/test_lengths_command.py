"""p2l-engine lengths: what is read of tables and logs, what is refused, the figures, and the checkpoint that is written."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from p2l_engine import Engine, checkpoint
from p2l_engine.backbone.lengths import FILE
from p2l_engine.decision_log.export import export
from p2l_engine.decision_log.record import Attempt
from p2l_engine.decision_log.rows import row_of
from p2l_engine.decision_log.store import LogStore, Selection
from p2l_engine.learning.answers import read_answers
from p2l_engine.learning.length_report import fitted, length_report
from p2l_engine.learning.lengths import fit_lengths
from tests.support import tiny
from tests.support.command import p2l_engine
from tests.support.records import record

MODELS = tuple(tiny.MODELS)
LEVELS = {"alpha": 50, "beta": 200, "delta": 10}
HEADER = ("prompt", "model", "completion_tokens", "latency_s")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("P2L_ENGINE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tiny.write(tmp_path_factory.mktemp("lengths") / "source")
    (folder / "catalog.yaml").write_text("models: {" + ", ".join(f"{name}: {{cost: 1}}" for name in MODELS) + "}\n")
    return folder


def answers(rng, prompts=50):
    """Long prompts get three times as long answers."""
    rows = []
    for i in range(prompts):
        long = bool(rng.random() < 0.5)
        prompt = ("word " * 20 if long else "a") + str(i)
        for name, level in LEVELS.items():
            tokens = level * (3 if long else 1) * rng.gamma(8, 1 / 8)
            rows.append((prompt, name, round(tokens) + 1, 0.02 * tokens))
    return rows


def table(path, rows, header=HEADER):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


@pytest.mark.slow
def test_a_checkpoint_learns_how_long_answers_are(source, rng, tmp_path):
    rows = [*answers(rng), ("hello", "other", 7, 1)]
    new, figures = tmp_path / "new", tmp_path / "figures.json"
    log = table(tmp_path / "log.csv", rows)
    ended = p2l_engine("lengths", str(source), "--log", log, "-o", str(new), "--json", str(figures), "--bootstrap", "50")
    assert ended.status == 0, ended.err
    assert "skipped 1 answers of models that the checkpoint does not know: other" in ended.message
    assert "no answers of gamma, epsilon: expected to be as long as the others' on average" in ended.message
    assert "catalog.yaml has no prices for tokens" in ended.message
    report = json.loads(figures.read_text())
    assert report["tokens"]["after"]["absolute_error"]["value"] < 0.7 * report["tokens"]["before"]["absolute_error"]["value"]
    assert report["tokens"]["gain"]["deviance"]["low"] > 0
    assert report["tokens"]["models"]["beta"]["answers"] == report["seconds"]["models"]["beta"]["answers"] == 50
    assert "Poisson deviance" in ended.out
    old, loaded = checkpoint.load(source), checkpoint.load(new)
    assert loaded.lengths.tokens.models == loaded.lengths.seconds.models == ("alpha", "beta", "delta")
    assert json.loads((new / "training_config.json").read_text())["lengths"] == {"answers": 150, "prompts": 50}
    engine, before = (Engine(each, device="cpu", dtype="float32") for each in (loaded, old))
    found = engine.coefficients(["a99", "word " * 20 + "99"])
    np.testing.assert_array_equal(found.theta, before.coefficients(["a99", "word " * 20 + "99"]).theta)
    np.testing.assert_allclose(found.usage.tokens_out[:, 0], [50, 150], rtol=0.4)
    np.testing.assert_allclose(found.usage.seconds[:, 1], [4, 12], rtol=0.4)
    again = p2l_engine("lengths", str(new), "--log", log, "-o", str(tmp_path / "again"), "--bootstrap", "2")
    assert again.status == 0, again.err
    assert (tmp_path / "again" / FILE).read_bytes() == (new / FILE).read_bytes()  # learned anew, from the log alone


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        ([("p", "alpha", 0, 1)], HEADER, "completion_tokens: expected a finite number above 0 (the first is row 0: got '0')"),
        ([("p", "alpha", -3, 1)], HEADER, "completion_tokens: expected a finite number above 0 (the first is row 0: got '-3')"),
        ([("p", "alpha", "nan", 1)], HEADER, "completion_tokens: expected a finite number above 0"),
        ([("p", "alpha", "inf", 1)], HEADER, "completion_tokens: expected a finite number above 0"),
        ([("p", "alpha", "many", 1)], HEADER, "completion_tokens: expected a finite number above 0"),
        ([("p", "alpha", 5, -1)], HEADER, "latency_s: expected a finite number above 0 (the first is row 0: got '-1')"),
        ([("p", "alpha", None, None)], HEADER, "completion_tokens: expected a number above 0, got none"),
        ([(" ", "alpha", 5, 1)], HEADER, "prompt: empty"),
        ([("p", None, 5, 1)], HEADER, "model: expected a name"),
        ([("p", "Alpha", 5, 1), ("p", "x", 5, 1)], HEADER, "2 of models that the checkpoint does not know (Alpha, x)"),
        ([], HEADER, "the table is empty"),
        ([("p", 5)], ("prompt", "tokens_out"), "expected the columns model; it has prompt, tokens_out"),
        ([("p", "alpha", 5)], ("prompt", "model", "score"), "expected the columns completion_tokens; it has prompt,"),
        ([("p", "alpha", 5, 1)] * 99, HEADER, "tokens: expected at least 100 answers, to at least 20 prompts"),
        ([("p", "alpha", 5, 1)] * 200, HEADER, "got 200 to 1"),
    ],
)  # fmt: skip
def test_answers_that_cannot_be_used_are_refused_by_name(source, rows, header, message, tmp_path):
    log = table(tmp_path / "log.csv", rows, header)
    ended = p2l_engine("lengths", str(source), "--log", log, "-o", str(tmp_path / "new"))
    assert ended.status == 2
    assert message in ended.message
    assert not (tmp_path / "new").exists()


def test_a_few_invalid_rows_are_dropped_and_counted(rng, tmp_path):
    rows = [*answers(rng), ("p", "alpha", 0, 1), ("p", "alpha", 3, -1)]
    found, left = read_answers(table(tmp_path / "log.csv", rows), MODELS, max_dropped=0.05)
    assert len(found) == 150
    assert sorted(left.dropped.counts.values()) == [1, 1]
    with pytest.raises(ValueError, match="2 of 152 rows cannot be used, more than the share max_dropped = 0.01"):
        read_answers(tmp_path / "log.csv", MODELS)


@pytest.mark.parametrize("tokens", ["completion_tokens", "output_tokens", "tokens_out"])
@pytest.mark.parametrize("seconds", ["latency_s", "seconds", "latency", None])
def test_tables_name_their_columns_in_several_ways(tokens, seconds, tmp_path):
    header = ("question", "model", tokens, *([seconds] if seconds else []))
    rows = [(json.dumps(["one", "two"]), "beta", 12, 3.5), ("p", "alpha", "7", None)]
    found, _ = read_answers(table(tmp_path / "t.csv", [row[: len(header)] for row in rows], header), MODELS, "question")
    assert found.prompts == (("one", "two"), ("p",))
    assert [found.models[k] for k in found.model] == ["beta", "alpha"]
    np.testing.assert_array_equal(found.tokens, [12, 7])
    np.testing.assert_array_equal(found.seconds, [3.5 if seconds else np.nan, np.nan])
    assert found.observed("seconds").outcome.tolist() == ([3.5] if seconds else [])
    assert found.without({0}).prompts == (("p",),)


def test_a_servers_log_says_what_answers_took(tmp_path):
    latency = {"parse": 1.0, "reserve": 100.0, "first_byte": 300.0, "total": 2100.0}
    once = (Attempt("alpha", "alpha", 200, None, 0.2),)
    twice = (Attempt("beta", "beta", 500, "http", 0.1), *once)
    common = {"turns": ("one", "two"), "tokens_out": 40, "estimated": False, "latency": latency, "attempts": once}
    records = [
        record(1, **common | {"outcome": "answered"}),
        record(2, **common | {"outcome": "answered", "attempts": twice, "model": "beta"}),
        record(3, **common | {"outcome": "answered", "turns": None}),
        record(4, **common | {"outcome": "answered", "estimated": True}),
        record(5, **common | {"outcome": "answered", "tokens_out": None}),
        record(6, **common | {"outcome": "answered", "tokens_out": 0}),
        record(7, **common | {"outcome": "cached"}),
        record(8, **common | {"outcome": "decision", "tokens_out": None, "model": ""}),
        record(9, **common | {"outcome": "answered", "model": "unknown"}),
    ]
    store = LogStore(str(tmp_path / "log.sqlite"))
    store.add([row_of(each) for each in records])
    export(store, tmp_path / "log", Selection(None, None, None))
    store.close()
    found, left = read_answers(tmp_path / "log", MODELS)
    assert found.prompts == (("one", "two"),)
    assert [found.models[k] for k in found.model] == ["alpha", "beta"]
    np.testing.assert_array_equal(found.tokens, [40, 40])
    np.testing.assert_array_equal(found.seconds, [2.0, np.nan])  # what failed before took its time too
    assert left.skipped == {
        "prompts that were not logged": 1,
        "answers whose provider has not reported tokens": 2,
        "answers without output": 1,
        "decisions with the outcome cached": 1,
        "decisions with the outcome decision": 1,
    }
    assert left.unknown == {"unknown": 1}
    assert not left.dropped.counts


def observed(rng, tmp_path, rows):
    found, _ = read_answers(table(tmp_path / "log.csv", rows), MODELS)
    places = {turns: i for i, turns in enumerate(found.prompts)}
    hidden = rng.normal(size=(len(places), 8)).astype(np.float32)
    hidden[:, 0] = [len(turns[0]) / 100 for turns in found.prompts]
    return hidden, found.observed("tokens")


def test_repeated_answers_all_count(rng, tmp_path):
    """The fit is that of a matrix with a row for each repetition, in any order of the rows."""
    rows = [(f"p{i % 7}", name, int(rng.integers(1, 90)), 1) for i in range(60) for name in rng.permutation(list(LEVELS))[:2]]
    hidden, votes = observed(rng, tmp_path, rows)
    found = fitted(hidden, votes)
    # An oracle: one row of the matrix for each answer.
    y = np.full((len(votes), 3), np.nan)
    seen = sorted(set(votes.a.tolist()))
    y[np.arange(len(votes)), [seen.index(k) for k in votes.a.tolist()]] = votes.outcome
    expected = fit_lengths(hidden[votes.prompt], y, [MODELS[k] for k in seen])
    assert found.models == expected.models
    assert found.observations == expected.observations
    assert np.exp(hidden @ found.weight.T + found.bias)[votes.prompt, [seen.index(k) for k in votes.a]].sum() == pytest.approx(
        votes.outcome.sum(), rel=0.02
    )


def test_figures_of_each_models_mean_are_right(rng, tmp_path):
    """Where prompts say nothing, nothing is gained, and nothing much is lost."""
    rows = [(f"{i}p", name, int(rng.integers(50, 150)), 1) for i in range(120) for name in ("alpha", "beta")]
    hidden, votes = observed(rng, tmp_path, rows)
    report = length_report("tokens", hidden, votes, bootstrap=100)
    assert report.after["absolute_error"].value == pytest.approx(report.before["absolute_error"].value, rel=0.05)
    assert report.gain["deviance"].low < 0 < report.before["deviance"].low
    for each in (report.before, report.after):
        assert each["ratio"].low < 1 < each["ratio"].high
    spread = np.abs(votes.outcome - votes.outcome.mean()).mean()
    assert report.before["absolute_error"].value == pytest.approx(spread, rel=0.05)
    assert (report.answers, report.prompts, report.conversations) == (240, 120, 120)
    assert report.models["alpha"].mean == pytest.approx(votes.outcome[votes.a == 0].mean())
    again = length_report("tokens", hidden, votes, bootstrap=100)
    assert again == report


PRICED = "models: {" + ", ".join(
    f"{name}: {{usd_per_m_in: 1, usd_per_m_out: {price}, tokens_in: 9, tokens_out: 9}}"
    for name, price in zip(MODELS, (1, 4, 1, 8, 2), strict=True)
) + "}\n"  # fmt: skip


@pytest.mark.slow
def test_a_budget_that_is_kept_is_said(source, rng, tmp_path):
    (catalog := tmp_path / "catalog.yaml").write_text(PRICED)
    log, figures = table(tmp_path / "log.csv", [*answers(rng), ("hello", "alpha", 7, 1)]), tmp_path / "figures.json"
    given = ("lengths", str(source), "--log", log, "--budget", "0.0002", "--catalog", str(catalog), "--bootstrap", "2")
    ended = p2l_engine(*given, "-o", str(tmp_path / "new"), "--json", str(figures))
    assert ended.status == 0, ended.err
    found = json.loads(figures.read_text())["budget"]
    assert (found["prompts"], found["models"]) == (50, ["alpha", "beta", "delta"])  # all answered
    assert found["holds"] == pytest.approx(0.0002 / found["factor"])
    assert "a budget of 0.0002 over a batch is kept" in ended.message


def test_a_budget_that_cannot_be_judged_is_refused_before_the_work(source, rng, tmp_path):
    (catalog := tmp_path / "catalog.yaml").write_text(PRICED)
    log = table(tmp_path / "log.csv", answers(rng))
    apart = table(tmp_path / "apart.csv", [(f"{name} {row}", name, *more) for row, name, *more in answers(rng)])
    for options, message in (
        (("--log", log, "--budget", "0"), "--budget: expected a number above 0"),
        (("--log", log, "--catalog", str(catalog)), "expected --budget, which it is for"),
        (("--log", log, "--budget", "1"), "catalog: expected prices for tokens"),
        (("--log", apart, "--budget", "1", "--catalog", str(catalog)), "got 0 of alpha, beta, delta"),
    ):
        ended = p2l_engine("lengths", str(source), *options, "-o", str(tmp_path / "new"))
        assert (ended.status, message in ended.message) == (2, True), ended.message
        assert not (tmp_path / "new").exists()

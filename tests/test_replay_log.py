"""What replay reads: exports of a log, batch runs with scores, tables and matrices; and what it refuses to read."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from p2l_engine.decision_log.export import export
from p2l_engine.decision_log.record import Feedback
from p2l_engine.decision_log.rows import row_of
from p2l_engine.decision_log.store import LogStore, Selection
from p2l_engine.replay.compare import replay
from p2l_engine.replay.logged import LoggedDecisions, ScoreMatrix
from p2l_engine.replay.policies import PolicySpec, read_policies
from p2l_engine.replay.read import read_log
from p2l_engine.routing import win_rates
from tests.support.command import p2l_engine
from tests.support.log_tables import entries, table
from tests.support.records import START, new_id, record

POLICY = {"alpha": 0.75, "beta": 0.25}


def exported(folder, records, feedback=()):
    store = LogStore(str(folder / "log.sqlite"))
    store.add([row_of(record) for record in records])
    for said in feedback:
        store.add_feedback(said, None)
    export(store, folder / "log", Selection(None, None, None))
    store.close()
    return folder / "log"


def policies(folder, **entries):
    path = folder / "policies.yaml"
    path.write_text(yaml.safe_dump({"policies": entries}))
    return path


def two_models(n, rng):
    """Choices between alpha and beta, 0.75 to 0.25, and scores."""
    model = np.where(rng.random(n) < 0.75, "alpha", "beta")
    return model.tolist(), np.where(model == "alpha", 0.75, 0.25).tolist(), (rng.random(n) < 0.5).astype(float).tolist()


def test_an_export_of_the_servers_log_is_read(tmp_path):
    records = [
        record(0, turns=("a",), turns_hash="x", session="s"),
        record(1, turns=("b",), turns_hash="y", session="s", chosen="beta", model="alpha", propensity=0.25, cost=None),
        record(2, turns_hash="y", asked="beta", chosen="beta", propensity=1.0, policy={"beta": 1.0}),
        record(3, chosen="", model="", outcome="refused", policy={}, propensity=1.0),
        record(4, turns_hash="z", session="t", chosen="beta", model="beta", policy={"beta": 1.0}, propensity=1.0, cost=None),
    ]
    said = [
        Feedback(new_id(0), START + 9, score=0.2),
        Feedback(new_id(0), START + 5, score=0.9),
        Feedback(new_id(1), START + 6, score=1.0),
        Feedback(new_id(2), START + 6, score=1.0),
        Feedback(new_id(1), START + 7, label="good"),
        Feedback(new_id(0), START + 8, against=new_id(4), preference="this"),
    ]
    log = read_log(exported(tmp_path, records, said))
    assert isinstance(log, LoggedDecisions)
    assert log.models == ("alpha", "beta")
    assert log.chosen.tolist() == [0, 1, 1]  # what was drawn, not what answered
    assert log.propensity.tolist() == [0.75, 0.25, 1.0]
    assert log.known.all()
    assert log.logged.of(np.zeros(3, int)).tolist() == [0.75, 0.75, 0.0]
    np.testing.assert_array_equal(log.reward, [0.2, 1.0, np.nan])  # the newest counts
    np.testing.assert_array_equal(log.cost, [0.0015, np.nan, 0.002])  # a mixed policy's expected cost is of no one model
    assert log.real.tolist() == [True, False, False]
    assert log.texts == [("a",), ("b",), None]
    assert log.session.tolist() == [0, 0, 1]
    assert log.left_out == {
        "rows without a chosen model": 1,
        "rows on which the caller named the model": 1,
        "scores that a newer one of the same decision replaces": 1,
        "labels": 1,
        "feedback of the kind preference": 1,
        "feedback on decisions that were left out": 1,
    }


def test_preferences_are_win_rates_against_the_logs_choices(tmp_path):
    names = ["beta", "alpha"] * 4
    records = [
        record(i, turns_hash="x" if i < 6 else "y", chosen=name, propensity=POLICY[name]) for i, name in enumerate(names)
    ]
    records.append(record(8, turns_hash="y", asked="beta", chosen="beta", propensity=1.0, policy={"beta": 1.0}))
    said = [
        Feedback(new_id(0), START, against=new_id(1), preference="this"),
        Feedback(new_id(0), START, against=new_id(3), preference="other"),
        Feedback(new_id(2), START, against=new_id(3), preference="tie"),
        Feedback(new_id(4), START, against=new_id(5), preference="both_bad"),
        Feedback(new_id(4), START, against=new_id(7), preference="this"),  # different prompts
        Feedback(new_id(6), START, against=new_id(8), preference="this"),
    ]
    log = read_log(exported(tmp_path, records, said))
    assert log.of == "preference"
    np.testing.assert_array_equal(log.reward, [0.5, 0.0, 0.5, 0.75, 0.5, 0.5, np.nan, np.nan])
    assert log.left_out["preferences between answers to different prompts"] == 1
    assert log.left_out["preferences against decisions that are not in the log, or were left out"] == 1


@pytest.mark.slow
def test_where_the_policy_is_not_that_of_the_draw_the_propensity_counts(tmp_path, rng):
    """A server that explores logs the policy under one draw of the coefficients, and the propensity over all of them."""
    draws = rng.random(400) < 0.7
    records = [
        record(
            i, turns_hash=str(i), session=str(i), chosen=name, policy={name: 1.0}, propensity=0.7 if alpha else 0.3, cost=0.5
        )
        for i, (name, alpha) in enumerate(("alpha" if alpha else "beta", alpha) for alpha in draws.tolist())
    ]
    said = [Feedback(new_id(i), START, score=float(alpha)) for i, alpha in enumerate(draws.tolist())]
    folder = exported(tmp_path, records, said)
    log = read_log(folder)
    assert not log.known.any()
    (found,) = replay(log, [PolicySpec("x", always="beta")]).policies
    assert (found.verdict, found.unsupported, found.reasons) == ("judged", {}, ())
    assert found.value["snips"].value == 0


@pytest.mark.slow
def test_errors_of_propensities_are_read_and_said(tmp_path, rng):
    """A policy of one draw says nothing about what else could have been chosen, though it gives the choice the same
    probability; propensities that are known roughly are named."""
    draws = (rng.random(400) < 0.7).tolist()
    for error, rough in ((0.01, False), (0.2, True)):
        records = [
            record(
                i,
                turns_hash=str(i),
                session=str(i),
                chosen="alpha" if a else "beta",
                policy={"alpha" if a else "beta": 0.7 if a else 0.3, "gamma": 0.3 if a else 0.7},
                propensity=0.7 if a else 0.3,
                propensity_error=error,
                cost=0.5,
            )
            for i, a in enumerate(draws)
        ]
        said = [Feedback(new_id(i), START, score=float(a)) for i, a in enumerate(draws)]
        (tmp_path / str(error)).mkdir()
        folder = exported(tmp_path / str(error), records, said)
        log = read_log(folder)
        assert set(log.error.tolist()) == {error}
        assert not log.known.any()
        report = replay(log, [PolicySpec("x", always="beta"), PolicySpec("was", logged=True)])
        assert report.estimated == 400
        assert [any("estimates, with a standard error" in line for line in of.warnings) for of in report.policies] == [
            rough,
            False,
        ]


@pytest.mark.parametrize("wrong", [-0.1, float("inf")])
def test_an_error_of_a_propensity_that_is_none_is_refused(wrong, tmp_path):
    path = table(tmp_path / "log.csv", model=["a", "b"], propensity=[0.5, 0.5], propensity_error=[0.0, wrong], reward=[0, 1])
    with pytest.raises(ValueError, match="row 1: propensity_error: expected a finite number >= 0"):
        read_log(path)


def test_an_export_without_feedback_is_said_to_have_none(tmp_path):
    log = exported(tmp_path, [record(0), record(1)])
    ended = p2l_engine("replay", str(log), "--policy", str(policies(tmp_path, was="logged")))
    assert ended.status == 2
    assert "the log's 2 decisions have no feedback" in ended.message


@pytest.mark.parametrize("ending", [".parquet", ".csv", ".jsonl"])
def test_a_table_of_choices_is_read_in_every_format(tmp_path, ending):
    columns = {
        "prompt": ["one", '["two", "turns"]', "one"],
        "model": ["alpha", "beta", "beta"],
        "propensity": [0.5, 0.25, 1.0],
        "reward": [1.0, 0.0, 0.5],
        "cost": [1.0, 2.0, 0.0],
        "policy": [entries(alpha=0.5, beta=0.5), entries(alpha=0.75, beta=0.25), entries(beta=1.0)],
        "candidates": [["alpha", "beta"], ["alpha", "beta"], ["beta"]],
    }
    log = read_log(table(tmp_path / f"log{ending}", **columns))
    assert (log.chosen.tolist(), log.propensity.tolist()) == ([0, 1, 1], [0.5, 0.25, 1.0])
    assert (log.reward.tolist(), log.cost.tolist(), log.real.all()) == ([1.0, 0.0, 0.5], [1.0, 2.0, 0.0], True)
    assert log.prompt.tolist() == [0, 1, 0]
    assert log.texts == [("one",), ("two", "turns")]
    assert log.allowed.tolist() == [[True, True], [True, True], [False, True]]
    assert log.logged.of(np.zeros(3, int)).tolist() == [0.5, 0.75, 0.0]


def test_a_policy_may_be_an_object_of_probabilities(tmp_path):
    log = read_log(table(tmp_path / "log.jsonl", model=["alpha", "beta"], policy=[POLICY, POLICY], reward=[1, 0.5]))
    assert log.propensity.tolist() == [0.75, 0.25]
    assert log.reward.tolist() == [1.0, 0.5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"propensity": [0.5, 0.0]}, r"row 1: propensity: expected a probability above 0 and up to 1, got 0 \(1 such rows\)"),
        ({"propensity": [0.5, 1.5]}, "row 1: propensity: .* got 1.5"),
        ({"propensity": [-0.5, 0.5]}, "row 0: propensity: .* got -0.5"),
        ({"propensity": [0.5, float("nan")]}, "row 1: propensity: .* got nan"),
        ({"propensity": [None, 0.5]}, "row 0 and 0 more have no propensity: how likely each choice was"),
        ({"propensity": ["half", "0.5"]}, "row 0: propensity: expected a number, got 'half'"),
        ({"id": ["x", "x"]}, "expected every id once, got 'x' 2 times"),
        ({"id": ["x", None]}, "row 1: id: expected text, got nothing"),
        ({"model": [None, ""]}, "expected decisions of a policy, found none: 2 rows without a chosen model"),
        ({"asked": ["alpha", "beta"]}, "found none: 2 rows on which the caller named the model"),
        ({"cost": [1.0, -1.0]}, "row 1: cost: expected a finite number >= 0, to 1e.50, got -1"),
        ({"reward": [1.0, float("inf")]}, "row 1: reward: expected a finite number, to 1e.50, got inf"),
        ({"policy": [entries(alpha=0.5)] * 2}, "row 0: policy: expected probabilities that sum to 1, got 0.5"),
        ({"policy": [entries(alpha=1.5)] * 2}, r"row 0: policy: expected a model and a probability in \[0, 1\]"),
    ],
)  # fmt: skip
def test_a_log_that_is_wrong_is_refused(tmp_path, changes, message):
    columns = {"model": ["alpha", "beta"], "propensity": [0.5, 0.5], "reward": [1.0, 0.0]} | changes
    with pytest.raises(ValueError, match=message):
        read_log(table(tmp_path / "log.parquet", **columns))


def test_a_log_without_propensities_is_refused(tmp_path):
    path = table(tmp_path / "log.csv", prompt=["a", "b"], chosen=["alpha", "beta"], score=[1, 0])
    with pytest.raises(
        ValueError, match=r"no propensities \(columns propensity or policy\): how likely .* log the probability"
    ):
        read_log(path)
    path = table(tmp_path / "scores.csv", prompt=["a", "b"], model=["alpha", "beta"], score=[1, 0])
    with pytest.raises(ValueError, match="2 are missing, such as that of beta on 'a', and the table has no propensities"):
        read_log(path)
    with pytest.raises(ValueError, match="expected a log's export, a batch run's output"):
        read_log(table(tmp_path / "other.csv", x=[1]))
    with pytest.raises(ValueError, match="has none"):
        read_log(table(tmp_path / "empty.parquet", model=pa.array([], pa.string()), propensity=pa.array([], pa.float64())))


def test_feedback_for_unknown_ids_is_counted_and_all_of_it_is_refused(tmp_path):
    log = table(tmp_path / "log.parquet", id=["x", "y"], model=["alpha", "beta"], propensity=[0.5, 0.5])
    found = read_log(log, table(tmp_path / "said.csv", decision=["x", "z"], score=[1, 0]))
    assert found.left_out == {"feedback on decisions that the log does not have": 1}
    np.testing.assert_array_equal(found.reward, [1.0, np.nan])
    with pytest.raises(ValueError, match="none of its 1 rows is feedback on a decision of the log"):
        read_log(log, table(tmp_path / "other.csv", decision=["z"], score=[1]))
    with pytest.raises(ValueError, match="preference: expected one of this, other, tie, both_bad, got 'that'"):
        read_log(log, table(tmp_path / "odd.jsonl", decision=["x"], against=["y"], preference=["that"]))
    with pytest.raises(ValueError, match="score of x: expected a finite number"):
        read_log(log, table(tmp_path / "nan.parquet", decision=["x"], score=[float("inf")]))


def test_the_newest_score_counts_however_its_time_is_written(tmp_path):
    log = table(tmp_path / "log.csv", id=["x"], model=["alpha"], propensity=[0.5])
    for times in (["9", "10"], [9, 10], ["2026-01-09", "2026-01-10"], [None, None]):
        said = table(tmp_path / "said.csv", decision=["x", "x"], score=[0, 1], time=times)
        assert read_log(log, said).reward.tolist() == [1.0]


def test_rewards_come_from_one_place(tmp_path):
    own = table(tmp_path / "own.csv", id=["x"], model=["alpha"], propensity=[0.5], reward=[1])
    other = table(tmp_path / "said.csv", decision=["x"], score=[1])
    matrix = table(tmp_path / "matrix.csv", prompt=["a"], model=["alpha"], score=[1])
    for log, changes, message in (
        (own, {"feedback": other}, "has rewards of its own"),
        (own, {"scores": other}, "has rewards of its own"),
        (own, {"reward": "score"}, "reward: expected a file of feedback"),
        (matrix, {"scores": other}, "a matrix of scores, which are its rewards"),
    ):
        with pytest.raises(ValueError, match=message):
            read_log(log, **changes)


def test_prompts_are_known_by_hash_or_text(tmp_path):
    columns = {"turns_hash": ["h", "h", None, None, ""], "prompt": [None, ["a"], ["b"], ["b"], None]}
    log = read_log(table(tmp_path / "log.parquet", model=["alpha"] * 5, propensity=[0.5] * 5, **columns))
    assert log.prompt.tolist() == [0, 0, 1, 1, 2]
    assert log.texts == [("a",), ("b",), None]


@pytest.mark.slow
def test_a_batch_run_is_joined_with_scores(tmp_path, router):
    from p2l_engine.batch import BatchConfig, run

    prompts = [f"prompt {i}" for i in range(12)]
    table(tmp_path / "prompts.jsonl", prompt=prompts)
    run(router, BatchConfig([tmp_path / "prompts.jsonl"], tmp_path / "out", keep=["prompt"], budget=2.5))
    names = list(router.names)
    scores = {"prompt": np.repeat(prompts, 5).tolist(), "model": names * 12, "score": np.arange(60) / 60}
    log = read_log(tmp_path / "out", scores=table(tmp_path / "scores.parquet", **scores))
    decided = router.route_batch(prompts, budget=2.5)
    assert [log.models[k] for k in log.chosen] == [one.model for one in decided]
    assert log.propensity.tolist() == pytest.approx([one.policy[one.model] for one in decided], abs=1e-6)
    assert log.reward.tolist() == [(5 * i + names.index(one.model)) / 60 for i, one in enumerate(decided)]
    mixed = [len(one.policy) > 1 for one in decided]
    assert np.isnan(log.cost).tolist() == mixed
    assert log.rates is None
    run(
        router,
        BatchConfig([tmp_path / "prompts.jsonl"], tmp_path / "theta", keep=["prompt"], budget=2.5, coefficients="float32"),
    )
    rates = read_log(tmp_path / "theta", scores=tmp_path / "scores.parquet").rates
    known = win_rates(router.engine.coefficients(prompts).theta, router.q)[
        :, [router.engine.models.index(m) for m in log.models]
    ]
    np.testing.assert_allclose(rates, known, atol=1e-6)
    run(router, BatchConfig([tmp_path / "prompts.jsonl"], tmp_path / "without", budget=2.5))
    with pytest.raises(ValueError, match="route with `batch --keep prompt`"):
        read_log(tmp_path / "without", scores=tmp_path / "scores.parquet")
    twice = table(tmp_path / "twice.csv", prompt=["prompt 1"] * 2, model=[decided[1].model] * 2, score=[1, 1])
    with pytest.raises(ValueError, match="row 1: a second score of the same model on the same prompt"):
        read_log(tmp_path / "out", scores=twice)


@pytest.mark.parametrize("kind", [pa.list_(pa.float16(), 3), pa.list_(pa.float32()), pa.large_list(pa.float64())], ids=str)
def test_theta_of_the_log_is_what_rewards_are_expected_by(tmp_path, rng, kind):
    """As if a policy's checkpoint had computed it; a row without it, or with another number of models, has none."""
    n, names = 600, ["alpha", "beta", "gamma"]
    theta = rng.normal(size=(n, 3)).astype(np.float16)
    chosen, good = rng.integers(0, 2, n), 1 / (1 + np.exp(-theta.astype(float)))
    cells = [None if i == 5 else row for i, row in enumerate(theta.astype(float).tolist())]
    columns = {"model": np.array(names)[chosen], "propensity": np.full(n, 0.5), "prompt": [f"p {i}" for i in range(n)],
               "reward": good[np.arange(n), chosen], "theta": pa.array(cells, pa.list_(pa.float64())).cast(kind)}  # fmt: skip
    written = pa.table(columns)
    pq.write_table(written.replace_schema_metadata({"p2l.models": "\n".join(names)}), tmp_path / "log.parquet")
    log = read_log(tmp_path / "log.parquet")
    expected = win_rates(theta.astype(np.float64), np.full(3, 1 / 3))[:, :2]
    expected[5] = np.nan
    np.testing.assert_allclose(log.rates, expected, atol=1e-6)
    pq.write_table(written, tmp_path / "nameless.parquet")
    assert read_log(tmp_path / "nameless.parquet").rates is None
    specs = [PolicySpec("one", always="beta")]
    with_theta, without = replay(log, specs).policies[0], replay(dataclasses.replace(log, rates=None), specs).policies[0]
    widths = [of.value["dr"].high - of.value["dr"].low for of in (with_theta, without)]
    assert widths[0] < widths[1]
    assert abs(with_theta.value["dr"].value - good[:, 1].mean()) < widths[0]


def test_theta_of_runs_of_other_models_is_not_used(tmp_path):
    for name, models in (("a", "alpha\nbeta"), ("b", "beta\nalpha")):
        part = pa.table({"model": ["alpha"], "propensity": [0.5], "reward": [1.0], "theta": [[1.0, 2.0]], "id": [name]})
        pq.write_table(part.replace_schema_metadata({"p2l.models": models}), tmp_path / f"{name}.parquet")
    assert read_log(tmp_path).rates is None
    assert read_log(tmp_path / "a.parquet").rates[0, 0] < 0.5


def test_matrices_are_read_long_and_wide(tmp_path):
    wide = {
        "prompt": ["p", "q"],
        "gpt|4": [0.5, 1.0],
        "gpt|4|total_cost": [1.0, 2.0],
        "b": [0.0, 1.0],
        "b|total_cost": [0.5, 0.5],
    }
    found = read_log(table(tmp_path / "wide.csv", sample_id=["0", "1"], **wide))
    assert isinstance(found, ScoreMatrix)
    assert found.models == ("gpt|4", "b")
    assert (found.scores.tolist(), found.costs.tolist()) == ([[0.5, 0.0], [1.0, 1.0]], [[1.0, 0.5], [2.0, 0.5]])
    long = {"prompt": ["p", "q", "q", "p"], "model": ["b", "b", "a", "a"], "score": [1, 2, 3, 4]}
    found = read_log(table(tmp_path / "long.jsonl", **long))
    assert (found.models, found.texts, found.costs) == (("a", "b"), [("p",), ("q",)], None)
    assert found.scores.tolist() == [[4.0, 1.0], [3.0, 2.0]]
    with pytest.raises(ValueError, match="expected one score of each model on each prompt, got 2 of b on 'p'"):
        read_log(table(tmp_path / "twice.csv", **{**long, "prompt": ["p", "p", "q", "p"]}))
    with pytest.raises(ValueError, match="prompt 1: score: expected a finite number for each model"):
        read_log(table(tmp_path / "nan.parquet", **{**wide, "b": [0.0, float("nan")]}))


def test_a_file_of_policies_is_read(tmp_path):
    found = read_policies(
        policies(
            tmp_path,
            was="logged",
            one={"always": "alpha"},
            routed={"budget": 0.5, "budget_scope": "batch", "max_share": {"alpha": 0.25}, "models": ["alpha", "beta"]},
            new={"catalog": "new.yaml", "checkpoint": "lmarena/p2l", "objective": "half-ties"},
            plain=None,
        )
    )
    assert found == (
        PolicySpec("new", catalog=tmp_path / "new.yaml", checkpoint="lmarena/p2l", objective="half-ties"),
        PolicySpec("one", always="alpha"),
        PolicySpec("plain"),
        PolicySpec("routed", budget=0.5, budget_scope="batch", models=("alpha", "beta"), max_share={"alpha": 0.25}),
        PolicySpec("was", logged=True),
    )


@pytest.mark.parametrize("budget", ["1e-3", "+2E-05", "1.e+2", ".5e0", "3e4", "0.001", "1.0e-3", "7"])
def test_budgets_in_any_notation_are_numbers(tmp_path, budget):
    (tmp_path / "policies.yaml").write_text(f"policies: {{a: &x {{budget: {budget}}}, b: *x}}")
    assert [spec.budget for spec in read_policies(tmp_path / "policies.yaml")] == [float(budget)] * 2


def test_the_policies_in_the_docs_are_read(tmp_path):
    page = (Path(__file__).resolve().parents[1] / "docs" / "replay.md").read_text(encoding="utf-8")
    (tmp_path / "policies.yaml").write_text(re.findall(r"^```yaml\n(.*?)^```$", page, re.M | re.S)[0])
    found = {spec.name: spec for spec in read_policies(tmp_path / "policies.yaml")}
    assert found["on average"].max_share == {"o1": 0.1}
    assert found["new"].objective == "half-ties"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"bugdet": 1}, "unknown key 'bugdet', expected .*; did you mean 'budget'"),
        ("loged", "expected 'logged' or a mapping, got 'loged'; did you mean 'logged'"),
        ({"always": "a", "budget": 1}, "expected 'always' alone or with 'catalog', got budget too"),
        ({"budget": -1}, "budget: expected a number >= 0, got -1"),
        ({"budget": True}, "budget: expected a number >= 0, got True"),
        ({"budget": 1, "budget_scope": "bach"}, "budget_scope: expected 'prompt' or 'batch', got 'bach'"),
        ({"budget_scope": "batch"}, "budget_scope: expected a budget beside it"),
        ({"objective": "half-tie"}, "objective: expected .* got 'half-tie'; did you mean 'half-ties'"),
        ({"models": "a"}, "models: expected a list of models, got 'a'"),
        ({"models": ["a", "a"]}, "expected every model once, got a more than once"),
        ({"max_share": {"a": 2}}, r"max_share.a: expected a share in \[0, 1\], got 2"),
        (["a"], "expected a mapping, got list"),
    ],
)
def test_a_policy_that_is_wrong_is_refused(tmp_path, entry, message):
    with pytest.raises(ValueError, match=message):
        read_policies(policies(tmp_path, x=entry))


def test_files_of_no_policies_are_refused(tmp_path):
    path = tmp_path / "policies.yaml"
    for text, message in (
        ("policies: {}", "expected at least one policy"),
        ("policy: {}", "unknown key 'policy', expected policies; did you mean 'policies'"),
        ("policies: {a: logged, a: logged}", "the key 'a' occurs twice"),
        ("[", "expected YAML"),
        ("policies: " + "[" * 500, "nested too deeply"),
        ("policies: {a: 2026-13-45}", "expected YAML: month must be in"),
        ("policies: {'': logged}", "expected keys of printable text, got ''"),
        ('policies: {"a\\nb": logged}', "expected keys of printable text"),
        ("policies: {a: &x {budget: 1}, b: {<<: *x}}", "expected YAML"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_policies(path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_policies(tmp_path / "none.yaml")


@pytest.mark.slow
def test_the_command_needs_no_engine_for_single_models(tmp_path, rng):
    model, propensity, reward = two_models(400, rng)
    log = table(tmp_path / "log.parquet", model=model, propensity=propensity, reward=reward, cost=[1.0] * 400)
    spec = policies(tmp_path, was="logged", small={"always": "beta"}, big={"always": "alpha"})
    ended = p2l_engine(
        "replay", str(log), "--policy", str(spec), "--json", str(tmp_path / "out.json"), "--csv", str(tmp_path / "out.csv"),
        "--plot", str(tmp_path / "out.svg"),
    )  # fmt: skip
    assert ended.status == 0, ended.err
    assert "400 decisions, 400 with feedback; value: mean score; ± 95% intervals" in ended.out
    assert "small" in ended.out
    report = json.loads((tmp_path / "out.json").read_text())
    assert [of["verdict"] for of in report["policies"]] == ["judged"] * 3
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert [(row["policy"], row["estimator"]) for row in rows] == [
        (p, e) for p in ("big", "small", "was") for e in ("dr", "snips", "ips")
    ]
    assert float(rows[-1]["value"]) == pytest.approx(np.mean(reward))
    assert "<svg" in (tmp_path / "out.svg").read_text()


@pytest.mark.slow
def test_the_command_names_what_it_refuses(tmp_path, rng):
    log = table(tmp_path / "log.csv", model=["alpha"] * 50 + ["beta"], propensity=[1.0] * 51, reward=[1.0] * 51)
    spec = policies(tmp_path, small={"always": "beta"})
    ended = p2l_engine(
        "replay", str(log), "--policy", str(spec), "--plot", str(tmp_path / "out.svg"), "--csv", str(tmp_path / "out.csv")
    )
    assert ended.status == 0
    (row,) = csv.DictReader((tmp_path / "out.csv").open())
    assert (row["verdict"], row["value"], row["shares"]) == ("refused", "", "beta=1")
    assert "small: refused: the weights' mean is 0.0196 where 1 is expected" in ended.message
    ended = p2l_engine("replay", str(log), "--policy", str(policies(tmp_path, small={"always": "betta"})))
    assert ended.status == 2
    assert "did you mean 'beta'?" in ended.message
    ended = p2l_engine("replay", str(log), "--policy", str(policies(tmp_path, routed={"budget": 1.0})))
    assert ended.status == 2
    assert "which 51 of 51 prompts lack" in ended.message


@pytest.mark.slow
def test_the_command_routes_with_a_checkpoint(tmp_path, engine, rng):
    from tests.support.catalogs import COSTS

    models = list(engine.models)
    catalog = tmp_path / "catalog.yaml"
    catalog.write_text(yaml.safe_dump({"models": {name: {"cost": c} for name, c in zip(models, COSTS, strict=True)}}))
    prompts = np.repeat([f"prompt {i}" for i in range(8)], 5).tolist()
    scores = table(tmp_path / "scores.parquet", prompt=prompts, model=models * 8, score=rng.random(40).tolist())
    spec = policies(tmp_path, small={"always": models[0]}, routed={"budget": 2.0}, all={})
    out = tmp_path / "out.json"
    ended = p2l_engine(
        "replay", str(scores), "--policy", str(spec), "--checkpoint", str(engine.folder), "--catalog", str(catalog),
        "--device", "cpu", "--json", str(out), "--plot", str(tmp_path / "out.png"),
    )  # fmt: skip
    assert ended.status == 0, ended.err
    found = {of["name"]: of for of in json.loads(out.read_text())["policies"]}
    assert {of["verdict"] for of in found.values()} == {"exact"}
    assert found["routed"]["expected_cost"] <= 2.0 + 1e-9
    assert found["small"]["shares"] == {models[0]: 1.0}
    assert (tmp_path / "out.png").stat().st_size > 1000

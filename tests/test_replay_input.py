"""What replay makes of hostile cells: each is a number, a name or a policy that it says, or is refused with its row."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime, timedelta, timezone

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from p2l_engine.replay.columns import read_columns
from p2l_engine.replay.read import read_log
from tests.support.log_tables import entries, table

ROWS = {"id": ["x", "y"], "model": ["alpha", "beta"], "propensity": [0.5, 0.25], "reward": [1.0, 0.0], "cost": [1.0, 2.0]}
LOOSE = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
NUMBERS = ("propensity", "reward", "cost", "expected_cost")


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("ending", ["jsonl", "parquet", "csv"])
@pytest.mark.parametrize("values", [[True, True], [False, True]])
def test_true_and_false_are_no_numbers(tmp_path, name, ending, values):
    with pytest.raises(ValueError, match=rf"row [01]: {name}: expected a number, got '?(True|False)"):
        read_log(table(tmp_path / f"log.{ending}", **ROWS | {name: values}))


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("values", [[0.5, True], [True, 0.5], [1, False], [False, 1]])
def test_true_and_false_are_no_numbers_beside_others(tmp_path, name, values):
    with pytest.raises(ValueError, match=rf"row {values.index(next(x for x in values if x is True or x is False))}: {name}: "):
        read_log(table(tmp_path / "log.jsonl", **ROWS | {name: values}))


@pytest.mark.slow
@LOOSE
@given(st.data())
def test_a_cell_is_the_number_that_it_says_or_is_refused(tmp_path, data):
    """Of jsonl, whose cells are any JSON: a double that the column may hold, or an error that names the column."""
    name = data.draw(st.sampled_from(NUMBERS))
    number = st.floats(allow_nan=False, width=64) | st.integers(-(10**400), 10**400) | st.floats(0, 1) | st.integers(-2, 2)
    text = number.map(repr) | number.map(lambda x: f" {x!r} ") | st.sampled_from(["", " ", "half", "1,5", "0x1", "1_0", "yes"])
    cells = data.draw(st.lists(number | text | st.booleans() | st.none() | st.just([0.5]) | st.just({"a": 1}), min_size=2,
                               max_size=2))  # fmt: skip
    path = table(tmp_path / "log.jsonl", **ROWS | {name: cells})

    def meant(cell):
        if cell is None or (isinstance(cell, str) and not cell.strip()):
            return math.nan
        if isinstance(cell, bool | list | dict) or cell in ("half", "1,5", "0x1", "1_0", "yes"):
            return None
        try:
            return float(cell)
        except OverflowError:
            return None

    found = [meant(cell) for cell in cells]
    least = {"reward": -1e50, "propensity": 1e-50}.get(name, 0.0)
    most = 1 + 1e-6 if name == "propensity" else 1e50
    fine = all(x is not None and (least <= x <= most or (math.isnan(x) and name != "propensity")) for x in found)
    if not fine:
        with pytest.raises(ValueError, match=name):
            read_log(path)
        return
    log = read_log(path)
    if name == "expected_cost":
        np.testing.assert_array_equal(log.cost, ROWS["cost"])
    else:
        held = {"propensity": log.propensity, "reward": log.reward, "cost": log.cost}[name]
        np.testing.assert_array_equal(held, np.minimum(found, 1.0) if name == "propensity" else found)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ([{"alpha": True}, {"beta": True}], "row 0: policy: expected neither true nor false"),
        ([{"alpha": 0.5, "beta": 0.5}, {"beta": True}], "row 1: policy: expected neither true nor false"),
        ([entries(alpha=1.0), entries(beta=True)], "row 1: policy: expected neither true nor false"),
        (['{"alpha": true}', '{"beta": 1}'], "row 0: policy: .*true and false are no numbers"),
        (['{"alpha": 0.5, "alpha": 0.5}', '{"beta": 1}'], "row 0: policy: .*got 'alpha' twice"),
        ([[{"model": "alpha", "probability": True}], None], "policy: .*neither true nor false"),
        ([entries(beta=1.0), entries(beta=1.0)], "row 0: policy: expected a probability above 0 of the chosen model.*'chosen'"),
        ([entries(alpha=1.0), entries(alpha=1.0, beta=0.0)], r"row 1: policy: .* the chosen model \(1 such rows\)"),
        ([1, 2], "row 0: policy: expected a list, got 1"),
        ([False, {"beta": 1.0}], "row 0: policy: expected neither true nor false"),
    ],
)  # fmt: skip
def test_policies_that_are_wrong_are_refused(tmp_path, policy, message):
    with pytest.raises(ValueError, match=message):
        read_log(table(tmp_path / "log.jsonl", **ROWS | {"policy": policy}))


def test_a_parquet_policy_of_booleans_is_refused(tmp_path):
    policy = pa.array([[{"model": "alpha", "probability": True}], [{"model": "beta", "probability": True}]])
    with pytest.raises(ValueError, match="policy: .*true and false"):
        read_log(table(tmp_path / "log.parquet", **ROWS | {"policy": policy}))


@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        ([["beta"], ["beta"]], r"row 0: candidates: .*'alpha' chosen from \['beta'\] \(1 such rows\)"),
        ([["alpha"], [None]], "row 1: candidates: expected the chosen model among them"),
        (['"alpha"', '["beta"]'], "row 0: candidates: expected a list"),
        (["alpha,beta", '["beta"]'], "row 0: candidates: expected a list"),
    ],
)
def test_candidates_hold_the_chosen_model(tmp_path, candidates, message):
    with pytest.raises(ValueError, match=message):
        read_log(table(tmp_path / "log.jsonl", **ROWS | {"candidates": candidates}))


@pytest.mark.slow
@LOOSE
@given(st.data())
def test_candidates_are_those_that_the_cells_name(tmp_path, data):
    names = st.sampled_from(["alpha", "beta", "gamma", None])
    cells = data.draw(st.lists(st.none() | st.lists(names, max_size=4), min_size=2, max_size=2))
    path = table(tmp_path / "log.parquet", **ROWS | {"candidates": pa.array(cells, pa.list_(pa.string()))})
    if any(cell and chosen not in cell for cell, chosen in zip(cells, ROWS["model"], strict=True)):
        with pytest.raises(ValueError, match="candidates: expected the chosen model among them"):
            read_log(path)
        return
    log = read_log(path)
    allowed = np.ones((2, len(log.models)), bool) if log.allowed is None else log.allowed
    for row, cell in enumerate(cells):
        assert [m for m, may in zip(log.models, allowed[row], strict=True) if may] == [
            m for m in log.models if not cell or m in cell
        ]


def test_columns_of_other_arrow_types_are_read(tmp_path):
    names, texts = pa.array(["alpha", "beta"]), pa.array(["p", "q"])
    plain = read_log(table(tmp_path / "plain.parquet", model=names, propensity=[0.5, 0.25], prompt=texts, session=texts))
    for other in (pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())):
        columns = {"model": names.cast(other), "prompt": texts.cast(other), "session": texts.cast(other)}
        log = read_log(table(tmp_path / "other.parquet", propensity=pa.array([0.5, 0.25]).cast(pa.decimal128(5, 3)), **columns))
        assert (log.models, log.texts, log.session.tolist()) == (plain.models, plain.texts, plain.session.tolist())
        assert log.propensity.tolist() == [0.5, 0.25]


def test_columns_of_one_name_are_refused(tmp_path):
    names = ["model", "propensity", "propensity"]
    pq.write_table(pa.table([["alpha"], [0.5], [0.1]], names=names), tmp_path / "log.parquet")
    with pytest.raises(ValueError, match="expected columns of different names, got propensity twice"):
        read_log(tmp_path / "log.parquet")


def test_answers_of_the_cache_are_no_decisions(tmp_path):
    columns = {"asked": ["auto", ""], "outcome": ["answered", "cached"]}
    log = read_log(table(tmp_path / "log.parquet", **ROWS | columns))
    assert (log.models, log.left_out) == (("alpha",), {"rows that an earlier answer served": 1})


@pytest.mark.parametrize(
    ("rows", "reward", "message"),
    [
        ([{"decision": "x", "score": True}], None, "row 0: score: expected a number, got True"),
        ([{"decision": "x", "score": 10**400}], None, "row 0: score: expected a smaller number, got one of 401 digits"),
        ([{"decision": "x", "score": 1e200}], None, "score of x: expected a finite number"),
        ([{"decision": "x", "score": 1, "time": True}], None, "row 0: time: expected seconds since 1970 or ISO 8601"),
        ([{"decision": "x", "score": 1, "time": [1]}], None, "row 0: time: expected seconds since 1970 or ISO 8601"),
        ([{"decision": "x", "score": 1, "time": "Feb 1 2026"}], None, "row 0: time: .* got 'Feb 1 2026'"),
        ([{"decision": "x", "against": "y", "preference": True}], "preference", "preference: expected text"),
    ],
)  # fmt: skip
def test_feedback_that_is_wrong_is_refused(tmp_path, rows, reward, message):
    log = table(tmp_path / "log.jsonl", **{name: ROWS[name] for name in ("id", "model", "propensity")})
    said = tmp_path / "said.jsonl"
    said.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=message):
        read_log(log, said, reward=reward)


def test_feedback_of_no_use_is_counted(tmp_path):
    log = table(tmp_path / "log.jsonl", **{name: ROWS[name] for name in ("id", "model", "propensity")})
    said = table(tmp_path / "said.jsonl", decision=["x", "x"], against=["x", None], preference=["this", None], score=[None, 1])
    found = read_log(log, said, reward="preference")
    assert found.left_out == {"preferences of a decision against itself": 1, "feedback of the kind score": 1}
    scores = table(tmp_path / "scores.jsonl", decision=["x"], score=[1])
    assert np.isnan(read_log(log, scores, reward="preference").reward).all()


@pytest.mark.slow
@LOOSE
@given(st.data())
def test_the_newest_score_counts_in_any_zone(tmp_path, data):
    """However times are written: seconds, or ISO 8601 of any zone; those without come first."""
    moments = data.draw(st.lists(st.none() | st.integers(1_700_000_000, 1_700_200_000), min_size=1, max_size=6, unique=True))

    def written(seconds):
        if seconds is None:
            return None
        zone = timezone(timedelta(hours=data.draw(st.integers(-12, 12))))
        text = datetime.fromtimestamp(seconds, zone).isoformat()
        naive = datetime.fromtimestamp(seconds, UTC).replace(tzinfo=None).isoformat()
        return data.draw(st.sampled_from([seconds, float(seconds), str(seconds), text, naive]))

    log = table(tmp_path / "log.jsonl", id=["x"], model=["alpha"], propensity=[0.5])
    said = table(tmp_path / "said.jsonl", decision=["x"] * len(moments), score=list(range(len(moments))),
                 time=[written(of) for of in moments])  # fmt: skip
    newest = max(range(len(moments)), key=lambda i: -1 if moments[i] is None else moments[i])
    assert read_log(log, said).reward.tolist() == [newest]


TURNS = pa.list_(pa.string())
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), TURNS, pa.large_list(pa.string()), MESSAGES], ids=str)
def test_prompts_of_any_arrow_type_are_joined(tmp_path, kind):
    """In logs, in scores and in matrices: a text, turns, or messages."""

    def cells(*names):
        said = [[{"role": "user", "content": name}] if kind == MESSAGES else [name] for name in names]
        return pa.array(list(names) if kind in (pa.string(), pa.large_string()) else said, kind)

    scores = {"prompt": cells("p", "p", "q", "q"), "model": ["alpha", "beta"] * 2, "score": [0.1, 0.2, 0.3, 0.4]}
    matrix = read_log(table(tmp_path / "matrix.parquet", **scores))
    assert (matrix.texts, matrix.scores.tolist()) == ([("p",), ("q",)], [[0.1, 0.2], [0.3, 0.4]])
    columns = {"model": ["beta", "alpha", "beta"], "propensity": [0.5] * 3, "prompt": cells("q", "p", "q")}
    log = read_log(table(tmp_path / "log.parquet", **columns), scores=tmp_path / "matrix.parquet")
    assert (log.prompt.tolist(), log.texts, log.reward.tolist()) == ([0, 1, 0], [("q",), ("p",)], [0.4, 0.1, 0.4])


def test_prompts_that_are_none_are_refused(tmp_path):
    prompts = {"prompt": [{"a": 1}, {"a": 2}]}
    with pytest.raises(ValueError, match="prompt: expected a string, a list of user turns or a list of messages, got dict"):
        read_log(table(tmp_path / "matrix.parquet", **prompts, model=["alpha", "alpha"], score=[0.1, 0.2]))
    with pytest.raises(ValueError, match="prompt: expected a string, a list of user turns or a list of messages, got dict"):
        read_log(table(tmp_path / "log.parquet", **ROWS | prompts))


def test_times_as_spark_stores_them(tmp_path):
    """INT96: 9999-12-31 is 1816-03-29 in nanoseconds."""
    times = [datetime(9999, 12, 31), datetime(2024, 1, 1, 0, 0, 0, 1), None]
    path = tmp_path / "log.parquet"
    pq.write_table(pa.table({"time": times, "id": [1, 2, 3]}), path, use_deprecated_int96_timestamps=True)
    assert read_columns(path, ["time"]).column("time").to_pylist() == times
    ticks = pa.array([0, 1], pa.timestamp("ns"))
    pq.write_table(pa.table({"time": ticks}), path, use_deprecated_int96_timestamps=True)
    assert read_columns(path, ["time"]).column("time").combine_chunks().equals(ticks)


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("column", ["text", "body.messages"])
def test_another_column_may_hold_the_prompts(tmp_path, ending, column):
    """Of logs, matrices and scores; a column named prompt is then another thing."""
    prompts = ["p", '["two", "turns"]', "p"]
    lists = [["p"], ["two", "turns"], ["p"]]
    said = [[{"role": "user", "content": turn} for turn in turns] for turns in lists]
    cells = prompts if column == "text" else [{"messages": messages} for messages in said]
    of_prompts = {column.split(".")[0]: cells, "prompt": ["another", "thing", "here"]}
    scores = {"model": ["alpha", "alpha", "beta"], "score": [0.1, 0.2, 0.3]}
    known = table(tmp_path / f"scores.{ending}", **of_prompts | scores)
    chosen = {"id": ["x", "y", "z"], "model": ["alpha", "alpha", "beta"], "propensity": [0.5] * 3}
    log = read_log(table(tmp_path / f"log.{ending}", **of_prompts | chosen), scores=known, column=column)
    assert ([log.texts[i] for i in log.prompt], log.reward.tolist()) == ([("p",), ("two", "turns"), ("p",)], [0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match=r"expected a score of each model on each prompt: 1 are missing, .* of beta on 'two'"):
        read_log(known, column=column)
    by_id = table(tmp_path / f"by_id.{ending}", decision=["y"], score=[0.7])
    found = read_log(tmp_path / f"log.{ending}", scores=by_id, column=column)
    assert np.array_equal(found.reward, [np.nan, 0.7, np.nan], equal_nan=True)
    with pytest.raises(ValueError, match="expected the columns 'none.such'; it has "):
        read_log(tmp_path / f"log.{ending}", column="none.such")


AS_TEXT = ['["a", null]', '[{"role": "user"}]', "[]"]
OTHERS = [[1, 2], ["a", 1], [["a"]], ["a", None], {"a": 1}, 7, True, []]


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_prompt_that_is_none_is_refused_with_its_row(tmp_path, ending):
    """As in every other command, also beside prompts that are fine."""
    rows = {"model": ["alpha", "beta"], "propensity": [0.5, 0.5], "reward": [1, 0]}
    for wrong in AS_TEXT + (OTHERS if ending == "jsonl" else []):
        for place, prompts in enumerate(([wrong, "fine"], ["fine", wrong])):
            path = table(tmp_path / f"log.{ending}", prompt=prompts, **rows)
            with pytest.raises(ValueError, match=rf"log.{ending}: row {place}: prompt: .*expected"):
                read_log(path)

"""Votes: every form that they come in, what is dropped and why, splits, and what a summary says."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy.special import logit

from p2l_engine.feedback import Outcome, feedback_model
from p2l_engine.votes import Summary, Votes, check_apart, from_scores, read, split
from p2l_engine.votes.marginal import marginal_fit, marginal_leaderboard, outcome_counts
from p2l_engine.votes.splits import folded
from tests.support.cases import slow_but

ROWS = [
    ("p1", "x", "y", "model_a"),
    ('["p2", "and more"]', "y", "z", "tie"),
    ("p1", "z", "x", "tie (bothbad)"),
    ('["p1"]', "y", "z", "model_b"),
]
NAMES = ("prompt", "model_a", "model_b", "winner")


def table(rows, names=NAMES, **more):
    return pa.table({key: [row[i] for row in rows] for i, key in enumerate(names)} | more)


def parquet(path, rows, names=NAMES, **more):
    pq.write_table(table(rows, names, **more), path)
    return str(path)


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "csv", "folder"])
def test_votes_are_grouped_by_prompt(kind, tmp_path):
    path = tmp_path / f"votes.{kind}"
    if kind == "parquet":
        parquet(path, ROWS)
    elif kind == "folder":
        path.mkdir()
        parquet(path / "0.parquet", ROWS[:2])
        parquet(path / "1.parquet", ROWS[2:])
    elif kind == "csv":
        pa.csv.write_csv(table(ROWS), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table(ROWS).to_pylist()))
    votes, dropped = read(str(path))
    assert votes.prompts == (("p1",), ("p2", "and more"))
    assert votes.models == ("x", "y", "z")
    assert votes.prompt.tolist() == [0, 0, 0, 1]
    assert votes.outcome.tolist() == [Outcome.A, Outcome.BOTH_BAD, Outcome.B, Outcome.TIE]
    assert votes.weight.tolist() == [1] * 4
    assert len(dropped) == 0
    only = votes.of([1])
    assert only.prompts == (("p2", "and more"),)
    assert only.prompt.tolist() == [0]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (("p", "x", "y", "left"), "winner: expected one of model_a, .*"),
        (("p", "x", None, "tie"), "model_b: expected a name"),
        (("p", "x", "x", "tie"), "a model against itself"),
        (("[]", "x", "y", "tie"), "prompt: expected at least one user turn"),
        (("  \n", "x", "y", "tie"), "prompt: empty"),
        ((None, "x", "y", "tie"), "prompt: expected a prompt, got nothing"),
        (('["hi", null]', "x", "y", "tie"), "prompt: message 1: expected a user turn of type str, or a message, got NoneType"),
        (("[null]", "x", "y", "tie"), "prompt: message 0: expected a user turn"),
        (('[null, {"role": "user", "content": "hi"}]', "x", "y", "tie"), "prompt: message 0: expected a user turn"),
    ],
)
def test_rows_that_cannot_be_used_are_counted_by_reason(row, reason, tmp_path):
    path = parquet(tmp_path / "v.parquet", [ROWS[0], row, row])
    with pytest.raises(ValueError, match=rf"2 of 3 rows cannot be used.*max_dropped.*2 x {reason}.*the first is row 1"):
        read(path)
    votes, dropped = read(path, max_dropped=0.7)
    assert len(votes) == 1
    assert len(dropped) == 2
    with pytest.raises(ValueError, match="at least one vote that can be used"):
        read(parquet(tmp_path / "w.parquet", [row]), max_dropped=1)


@pytest.mark.parametrize("weight", [float("nan"), -1.0, float("inf"), None])
def test_weights_that_are_no_weights_are_dropped(weight, tmp_path):
    path = parquet(tmp_path / "v.parquet", ROWS[:2], weight=[2.0, weight])
    votes, dropped = read(path, max_dropped=0.5)
    assert votes.weight.tolist() == [2.0]
    assert "weight: expected a finite number >= 0" in dropped.lines()[0]


def test_conversations_timestamps_and_categories(tmp_path):
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}, {"role": "user", "content": "bye"}]
    rows = [(talk, "x", "y", "model_a"), (talk[:2], "y", "x", "both_bad")]
    path = parquet(
        tmp_path / "v.parquet", rows, ("conversation_a", *NAMES[1:]), timestamp=["2024-01-02", "2024-01-01T12:00:00+00:00"],
        category=["farewell", None],
    )  # fmt: skip
    votes, _ = read(path)
    assert votes.prompts == (("hi", "bye"), ("hi",))
    assert votes.category == ("farewell", "none")
    assert votes.timestamp[0] > votes.timestamp[1]


def test_columns_may_have_names_of_their_own(tmp_path):
    path = parquet(tmp_path / "v.parquet", ROWS, ("question", "left", "right", "verdict"))
    with pytest.raises(ValueError, match="expected the columns prompt, model_a, model_b, winner"):
        read(path)
    own = {"prompt": "question", "model_a": "left", "model_b": "right", "winner": "verdict"}
    assert len(read(path, columns=own)[0]) == 4
    with pytest.raises(ValueError, match="columns: expected one of .* for 'winner', got 'result'"):
        read(path, columns=own | {"winner": "result"})


@pytest.mark.parametrize(("column", "first"), [("preference_a", Outcome.A), ("preference_b", Outcome.B)])
def test_soft_preferences_become_weighted_votes(column, first, tmp_path):
    rows = [("p", "x", "y", 0.75), ("q", "y", "z", 1.0)]
    votes, _ = read(parquet(tmp_path / "v.parquet", rows, (*NAMES[:3], column)))
    assert votes.outcome.tolist() == [first, 1 - first, first]
    assert votes.weight.tolist() == [0.75, 0.25, 1.0]
    with pytest.raises(ValueError, match=r"preference: expected a probability in \[0, 1\] .the first is row 0: got 1.5"):
        read(parquet(tmp_path / "w.parquet", [("p", "x", "y", 1.5)], (*NAMES[:3], column)))


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_votes_of_one_column_for_each_outcome(ending, tmp_path):
    """As in Kaggle's data of Chatbot Arena, whose prompts are JSON."""
    path, one_hot = tmp_path / f"v{ending}", ("winner_model_a", "winner_model_b", "winner_tie")
    rows = [('["p1"]', "x", "y", 1, 0, 0), ('["p1"]', "y", "z", 0, 1, 0), ('["p2", "more"]', "x", "z", 0, 0, 1)]
    given = table(rows, (*NAMES[:3], *one_hot))
    if ending == ".parquet":
        pq.write_table(given, path)
    elif ending == ".csv":
        pa.csv.write_csv(given, path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in given.to_pylist()))
    votes, dropped = read(str(path))
    assert votes.prompts == (("p1",), ("p2", "more"))
    assert votes.outcome.tolist() == [Outcome.A, Outcome.B, Outcome.TIE]
    assert not len(dropped)
    assert read(str(path), feedback=feedback_model("bt"))[1].ties == 1


FLAGS = [(0, 0), (1, 1), (0.0, 0), (1.0, 1), ("0", 0), ("1", 1), (False, 0), (True, 1), ("True", 1), ("false", 0)]
NO_FLAGS = [(cell, None) for cell in (None, 2, 0.5, "x", "", [1])]


@pytest.mark.slow
@given(rows=st.lists(st.tuples(*[st.sampled_from(FLAGS * 3 + NO_FLAGS)] * 3), min_size=1, max_size=20))
def test_only_a_1_beside_two_0_is_a_vote(rows, tmp_path):
    names = ("winner_model_a", "winner_model_b", "winner_tie")
    lines = [
        {"prompt": f"{i}", "model_a": "x", "model_b": "y"} | {name: cell for name, (cell, _) in zip(names, row, strict=True)}
        for i, row in enumerate(rows)
    ]
    path = tmp_path / "v.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = [[flag for _, flag in row] for row in rows]
    expected = {(f"{i}",): of.index(1) for i, of in enumerate(flags) if sorted(of, key=str) == [0, 0, 1]}
    if not expected:
        with pytest.raises(ValueError, match="winner_model_a, winner_model_b, winner_tie: expected a 1 and two 0"):
            read(str(path))
        return
    votes, dropped = read(str(path), max_dropped=1)
    assert dict(zip(votes.prompts, votes.outcome.tolist(), strict=True)) == expected
    assert len(dropped) == len(rows) - len(expected)


def test_a_column_of_the_three_that_is_missing_is_named(tmp_path):
    path = parquet(tmp_path / "v.parquet", [("p", "x", "y", 1)], (*NAMES[:3], "winner_model_a"))
    with pytest.raises(ValueError, match="expected the columns winner_model_b, winner_tie; got"):
        read(path)
    path = parquet(tmp_path / "v.parquet", ROWS, winner_model_a=[1] * 4, winner_model_b=[0] * 4, winner_tie=[0] * 4)
    assert Outcome.TIE in read(path)[0].outcome  # the column winner comes first


def test_the_votes_of_fastchats_logs(tmp_path):
    winners = {"leftvote": Outcome.A, "rightvote": Outcome.B, "tievote": Outcome.TIE, "bothbad_vote": Outcome.BOTH_BAD}
    path = parquet(tmp_path / "v.parquet", [("p", "x", "y", vote) for vote in winners], (*NAMES[:3], "type"))
    votes, _ = read(path, columns={"winner": "type"})
    assert votes.outcome.tolist() == list(winners.values())


@pytest.mark.slow
def test_data_sets_that_were_saved_to_disk_are_read(tmp_path):
    from datasets import Dataset, DatasetDict

    given = Dataset.from_list(table(ROWS).to_pylist())
    given.select([2, 0, 1]).save_to_disk(tmp_path / "one")
    DatasetDict({"train": given, "test": given.select([0])}).save_to_disk(tmp_path / "split")
    for name, rows in {"one": [ROWS[i] for i in (2, 0, 1)], "split": ROWS}.items():
        found, expected = read(str(tmp_path / name))[0], read(parquet(tmp_path / "v.parquet", rows))[0]
        assert (found.prompts, found.models) == (expected.prompts, expected.models)
        np.testing.assert_array_equal(found.outcome, expected.outcome)
    DatasetDict({"test": given}).save_to_disk(tmp_path / "other")
    with pytest.raises(ValueError, match="other: expected a data set, or its split train, saved by datasets"):
        read(str(tmp_path / "other"))


def test_weights_are_left_out_on_request(tmp_path):
    path = parquet(tmp_path / "v.parquet", ROWS, weight=[3.0, 1.0, 0.0, 2.0])
    assert sorted(read(path)[0].weight) == [0.0, 1.0, 2.0, 3.0]
    assert read(path, weighted=False)[0].weight.tolist() == [1.0] * 4


def test_of_two_label_columns_one_is_read_and_the_other_named(tmp_path, caplog):
    path = parquet(tmp_path / "v.parquet", ROWS, preference_a=[0.5] * 4)
    assert len(read(path)[0]) == 4
    assert "votes are read from the column winner, and not from preference_a" in caplog.text


def test_values_of_one_model_and_of_pairs(tmp_path):
    votes, _ = read(
        parquet(tmp_path / "v.parquet", [("p", "x", 2.5), ("p", "y", -1.0)], ("prompt", "model", "value")),
        feedback=feedback_model("ols"),
    )
    assert votes.are_values
    assert votes.b.tolist() == [-1, -1]
    assert votes.outcome.tolist() == [2.5, -1.0]
    votes, _ = read(
        parquet(tmp_path / "w.parquet", [("p", "x", "y", 2.5)], (*NAMES[:3], "value")), feedback=feedback_model("ols")
    )
    assert votes.b.tolist() == [1]


def test_files_that_are_not_there_or_broken_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"votes.parquet: no such file or folder"):
        read(str(tmp_path / "votes.parquet"))
    (tmp_path / "votes.txt").write_text("x")
    with pytest.raises(ValueError, match="votes.txt: expected a file that ends in .parquet"):
        read(str(tmp_path / "votes.txt"))
    (tmp_path / "votes.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match=r"votes.parquet: cannot be read: "):
        read(str(tmp_path / "votes.parquet"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: expected files in this folder that end in .*, found none"):
        read(str(tmp_path / "empty"))


def test_categories_of_scores_and_of_votes_are_the_same(tmp_path):
    """Of a prompt's rows the first one counts; without a category it is "none"."""
    kinds = {"p": ("x", "y"), "q": ("", "z"), "r": (None, None), "s": (3, "3")}
    scores = [{"prompt": p, "model": m, "score": i, "task": kinds[p][i]} for p in kinds for i, m in enumerate("ab")]
    votes = [
        {"prompt": p, "model_a": "a", "model_b": "b", "winner": "tie", "category": kind} for p in kinds for kind in kinds[p]
    ]
    for name, rows in (("scores", scores), ("votes", votes)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        found, _ = read(tmp_path / f"{name}.jsonl")
        assert dict(zip(found.prompts, found.category, strict=True)) == {
            ("p",): "x",
            ("q",): "none",
            ("r",): "none",
            ("s",): "3",
        }


def test_scores_become_every_pair(tmp_path):
    scores = np.array([[1.0, 0.0, 1.0], [0.2, 0.2, 0.6]])
    votes = from_scores((("a",), ("b",)), ("x", "y", "z"), scores)
    assert list(zip(votes.a, votes.b, strict=True)) == [(0, 1), (0, 2), (1, 2)] * 2
    assert votes.outcome.tolist() == [
        Outcome.A, Outcome.TIE, Outcome.B, Outcome.BOTH_BAD, Outcome.B, Outcome.B,
    ]  # fmt: skip
    rows = [(p, m, float(scores[i, j]), f"task {p}") for i, p in enumerate("ab") for j, m in enumerate("xyz")]
    again, _ = read(parquet(tmp_path / "s.parquet", rows, ("prompt", "model", "score", "task")))
    assert again.outcome.tolist() == votes.outcome.tolist()
    assert again.category == ("task a", "task b")


def many(n=101, seed=0, timestamp=True):
    rng = np.random.default_rng(seed)
    prompt = np.repeat(np.arange(n), 2)
    a = rng.integers(0, 4, 2 * n)
    b = (a + rng.integers(1, 4, 2 * n)) % 4
    times = rng.permutation(2 * n).astype(float) if timestamp else None
    return Votes.make([(f"p{i}",) for i in range(n)], "wxyz", prompt, a, b, rng.integers(0, 4, 2 * n), timestamp=times)


def test_splits_share_no_prompt_and_are_repeatable():
    votes = many()
    parts = split(votes, 0.1, 0.2, seed=3)
    assert [len(part.prompts) for part in parts] == [73, 18, 10]
    assert len({prompt for part in parts for prompt in part.prompts}) == 101
    assert parts.held_out.prompts == split(votes, 0.1, 0.2, seed=3).held_out.prompts
    assert parts.held_out.prompts != split(votes, 0.1, seed=4).held_out.prompts
    assert split(votes, 0.0).held_out is None


def test_a_split_by_time_holds_out_the_last_prompts():
    votes = many()
    training, _, held_out = split(votes, 0.2, by="time")
    first_of = {prompt: votes.timestamp[votes.prompt == i].min() for i, prompt in enumerate(votes.prompts)}
    assert max(first_of[p] for p in training.prompts) < min(first_of[p] for p in held_out.prompts)
    with pytest.raises(ValueError, match="timestamp: a split by time needs this column"):
        split(many(timestamp=False), 0.2, by="time")


def conversations(sizes, seed=0):
    """Votes on conversations of these sizes: prompts with the same first turn, written in different ways."""
    rng = np.random.default_rng(seed)
    prompts = [
        (f"Question {c}" if turn % 2 else f" question\n {c}", *map(str, range(turn)))
        for c, n in enumerate(sizes)
        for turn in range(n)
    ]
    prompts = [prompts[i] for i in rng.permutation(len(prompts))]
    p = np.repeat(np.arange(len(prompts)), 2)
    a = rng.integers(0, 4, len(p))
    return Votes.make(prompts, "wxyz", p, a, (a + 1) % 4, rng.integers(0, 4, len(p)), timestamp=rng.random(len(p)))


def openings(votes):
    return {" ".join(prompt[0].split()).casefold() for prompt in votes.prompts}


@pytest.mark.slow
@given(
    st.lists(st.integers(1, 6), min_size=2, max_size=40), st.floats(0, 0.9), st.floats(0, 0.9),
    st.sampled_from(["prompt", "hash", "time"]), st.integers(0, 99),
)  # fmt: skip
def test_parts_share_no_conversation(sizes, held_out, validation, by, seed):
    votes = conversations(sizes, seed)
    try:
        parts = split(votes, held_out, validation, by, seed)
    except ValueError as error:
        assert ("no whole conversation" if by != "hash" else "hash") in str(error)
        return
    kept = [part for part in parts if part is not None]
    assert sorted(prompt for part in kept for prompt in part.prompts) == sorted(votes.prompts)
    assert sum(len(openings(part)) for part in kept) == len(sizes)
    if parts.held_out is not None and by != "hash":
        count = int(len(votes.prompts) * held_out)
        assert count - max(sizes) < len(parts.held_out.prompts) <= count


def test_a_split_of_single_turns_is_a_permutation():
    votes = many()
    order = np.random.default_rng(3).permutation(101)
    assert split(votes, 0.1, seed=3).held_out.prompts == tuple(votes.prompts[i] for i in sorted(order[:10]))


def test_a_split_by_hash_does_not_depend_on_the_other_prompts():
    votes = many(300)
    parts = split(votes, 0.2, 0.25, by="hash", seed=5)
    assert [abs(len(part.prompts) - share * 300) < 45 for part, share in zip(parts, (0.6, 0.2, 0.2), strict=True)] == [True] * 3
    some = split(votes.of(range(0, 300, 3)), 0.2, 0.25, by="hash", seed=5)
    for part, whole in zip(some, parts, strict=True):
        assert set(part.prompts) == set(whole.prompts) & {votes.prompts[i] for i in range(0, 300, 3)}
    assert split(votes, 0.2, by="hash", seed=5).held_out.prompts == parts.held_out.prompts
    assert split(votes, 0.2, by="hash", seed=6).held_out.prompts != parts.held_out.prompts


@given(st.text(min_size=1, max_size=12), st.text(" .,!?-_\n\t", max_size=3))
def test_case_space_and_punctuation_do_not_part_prompts_by_hash(text, between):
    varied = between.join(text.upper() if text.upper().casefold() == text.casefold() else text)
    assume(any(c.isalnum() for c in text) and folded(varied) == folded(text))
    prompts = [(text,), (varied, "more"), *((f"other {i}",) for i in range(30))]
    a = np.zeros(len(prompts), np.int64)
    votes = Votes.make(dict.fromkeys(prompts), "xy", np.arange(len(set(prompts))), a, a + 1, a)
    for part in split(votes, 0.4, 0.3, by="hash"):
        assert ((text,) in part.prompts) == ((varied, "more") in part.prompts)


def test_what_is_folded():
    assert folded("What is\n17 * 23?") == folded("what  is 17*23") == "whatis1723"
    assert folded("ＡＢＣ straße!") == "abcstrasse"
    assert folded("?!") == "?!"


def test_a_split_needs_whole_conversations():
    with pytest.raises(
        ValueError, match="held_out: a share of 0.5 is 2 of 4 prompts, and no whole conversation .* fits into it"
    ):
        split(conversations([4]), 0.5)
    with pytest.raises(ValueError, match="validation: a share of 0.5 is 2 of 4 prompts"):
        split(conversations([4]), 0, 0.5)


def test_prompts_that_begin_like_training_prompts_are_named(caplog):
    votes = conversations([2, 2])
    first, second = (votes.of([i for i, prompt in enumerate(votes.prompts) if len(prompt) == n]) for n in (1, 2))
    check_apart("validation.parquet", second, first)
    assert "validation.parquet: 2 of its 2 prompts have the first turn of a training prompt, such as 'Question" in caplog.text
    with pytest.raises(ValueError, match="2 of its prompts are training prompts too"):
        check_apart("validation.parquet", second, second)


def test_a_smaller_share_of_the_training_prompts_is_part_of_a_larger_one():
    votes = many(200)
    whole, half, tenth = (split(votes, 0.1, 0.1, seed=3, train_share=share) for share in (1.0, 0.5, 0.1))
    assert set(tenth.training.prompts) < set(half.training.prompts) < set(whole.training.prompts)
    assert len(half.training.prompts) == round(len(whole.training.prompts) / 2)
    assert tenth.held_out.prompts == half.held_out.prompts == whole.held_out.prompts
    assert tenth.validation.prompts == whole.validation.prompts
    assert len(split(votes, 0.1, train_share=1e-9).training.prompts) == 1


def test_votes_among_some_models():
    votes = pairs_of("xy", "yz", "zx", "vw")
    some = votes.among(["z", "x"])
    assert some.models == ("z", "x")
    assert len(some) == len(some.prompts) == 1
    assert (some.a.tolist(), some.b.tolist()) == ([0], [1])
    with pytest.raises(ValueError, match="models: expected some of those that the votes are on, got unknown"):
        votes.among(["x", "unknown"])
    one = replace(votes, b=np.full(len(votes), -1))  # feedback on one model alone
    assert len(one.among(["x"])) == 1


def test_several_files_are_read_as_one(tmp_path):
    first, second = (str(tmp_path / name) for name in ("a.parquet", "b.csv"))
    parquet(first, [("p", "x", "y", "model_a")])
    pyarrow.csv.write_csv(table([("p", "y", "z", "tie"), ("q", "x", "z", "model_b")]), second)
    votes, dropped = read([first, second])
    assert (len(votes), dropped.rows, votes.models) == (3, 3, ("x", "y", "z"))
    assert votes.prompts == (("p",), ("q",))
    with pytest.raises(ValueError, match="at least one file"):
        read([])
    with pytest.raises(ValueError, match=r"missing.csv"):
        read([first, str(tmp_path / "missing.csv")])


def test_rows_may_be_left_out_by_a_columns_values(tmp_path):
    given = parquet(tmp_path / "a.parquet", ROWS, source=["good", "bad", "good", "worse"])
    votes, dropped = read(given, leave_out={"source": ["bad", "worse"]})
    assert (len(votes), dropped.rows) == (2, 2)
    for leave_out, message in (
        ({"sauce": ["bad"]}, "leave_out: expected one of .* got 'sauce'"),
        ({"source": ["bda"]}, "leave_out: no row's source is bda"),
        ({"source": [[1]]}, "leave_out: source: expected values of the type string"),
    ):
        with pytest.raises(ValueError, match=message):
            read(given, leave_out=leave_out)


def pairs_of(*wins):
    models = sorted({model for pair in wins for model in pair})
    a, b = (np.array([models.index(pair[k]) for pair in wins]) for k in (0, 1))
    return Votes.make([("p",)], models, np.zeros(len(wins), int), a, b, np.zeros(len(wins), int))


def test_a_summary_names_disconnected_models_duplicates_and_the_undecided():
    summary = Summary.of(pairs_of("xy", "yx", "xy", "vw", "wv", "zx"))
    assert summary.disconnected == (("v", "w"),)
    assert summary.duplicates == 1
    assert summary.undecided == ("z",)
    text = " ".join(summary.lines())
    assert "no chain of votes connects v, w" in text
    assert "a 100%" in text
    assert Summary.of(pairs_of("xy", "yz", "zx")).disconnected == ()


@pytest.mark.parametrize("name", ["bt", "bt-tie", "rk", "rk-reparam", "grk"])
def test_counts_are_the_likelihood(name):
    """The loss of a fit to counted outcomes is the mean loss of the votes themselves."""
    import torch

    votes, feedback = many(300, seed=5), feedback_model(name)
    if name == "bt":
        votes = votes.where(votes.outcome < 2)
    found = marginal_fit(feedback, votes)
    theta = torch.from_numpy(found.theta)
    eta = None if found.eta is None else torch.tensor(found.eta)
    each = feedback.log_likelihood(theta[votes.a], theta[votes.b], eta, torch.from_numpy(votes.outcome))
    assert found.loss == pytest.approx(-float(each.mean()), rel=1e-5)  # but for the ridge
    assert outcome_counts(feedback, votes).sum() == pytest.approx(len(votes))


@pytest.mark.slow
def test_real_votes_are_read(data):
    assert len(read(str(data / "votes_llm_judge.parquet"))[0]) == 55_183
    human, dropped = read(str(data / "votes_human.parquet"))
    assert len(human) + len(dropped) == 13_365
    assert human.category is not None


def test_prompts_of_several_lines_in_csv(tmp_path):
    rows = [(f"first line {i}\nsecond, line\n" + "x" * 400, "x", "y", "model_a") for i in range(4000)]
    pa.csv.write_csv(table(rows), tmp_path / "v.csv")
    assert len(read(str(tmp_path / "v.csv"))[0]) == 4000


def test_columns_that_nothing_reads_are_refused(tmp_path):
    path = parquet(tmp_path / "v.parquet", ROWS, weight=[1.0] * 4)
    with pytest.raises(ValueError, match="columns: expected some of .*, got weigth"):
        read(path, columns={"weigth": "weight"})


def test_votes_of_no_weight_connect_nothing():
    votes = pairs_of("xy", "yx", "yz")
    weight = np.array([1.0, 1.0, 0.0])
    without = Votes.make(votes.prompts, votes.models, votes.prompt, votes.a, votes.b, votes.outcome, weight)
    assert Summary.of(without).disconnected == (("z",),)


GOOD = '{"prompt": "p", "model_a": "x", "model_b": "y", "winner": "tie", "weight": 2}'


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "p", "model_a"', "row: expected a line of JSON"),
        ("[1, 2]", "row: expected a JSON object"),
        ('{"prompt": "\\ud800", "model_a": "x"}', "row: expected valid Unicode"),
        (GOOD.replace("2}", '"heavy"}'), "weight: expected a finite number >= 0.*'heavy'"),
        (GOOD.replace('"tie"', "5"), "winner: expected one of .*'5'"),
        (GOOD.replace('"x"', "null"), "model_a: expected a name"),
    ],
)
def test_a_bad_line_of_jsonl_is_skipped_and_counted(line, reason, tmp_path):
    (tmp_path / "v.jsonl").write_text("\n".join([GOOD, line, GOOD]))
    with pytest.raises(ValueError, match=f"1 of 3 rows cannot be used.*{reason}"):
        read(str(tmp_path / "v.jsonl"))
    votes, dropped = read(str(tmp_path / "v.jsonl"), max_dropped=0.5)
    assert votes.weight.tolist() == [2, 2]
    assert "the first is row 1" in dropped.lines()[0]
    (tmp_path / "w.jsonl").write_text(f"{line[:10]}\n")
    with pytest.raises(ValueError, match="expected a JSON object"):
        read(str(tmp_path / "w.jsonl"), max_dropped=1)


def test_prompts_of_several_kinds_in_one_jsonl_file(tmp_path):
    parts = [{"type": "text", "text": "look"}, {"type": "text", "text": "here"}]
    kinds = [
        "hi",
        ["hi", "you"],
        [{"role": "user", "content": "hi"}],
        [{"role": "user", "content": parts}],
        "[1] is a citation",
    ]
    lines = [json.dumps({"prompt": kind, "model_a": "x", "model_b": "y", "winner": "tie", "weight": "0.5"}) for kind in kinds]
    (tmp_path / "v.jsonl").write_text("\n".join(lines))
    votes, dropped = read(str(tmp_path / "v.jsonl"))
    assert set(votes.prompts) == {("hi",), ("hi", "you"), ("look\nhere",), ("[1] is a citation",)}
    assert votes.weight.tolist() == [0.5] * 5
    assert not len(dropped)
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]
    with pytest.raises(ValueError, match=r"part 0: expected a 'text' part \(images are not read\), got the type 'image_url'"):
        read(parquet(tmp_path / "i.parquet", [(json.dumps(image), "x", "y", "tie")]))


def test_a_row_with_a_bad_cell_of_csv_is_skipped_and_counted(tmp_path):
    rows = [f"{i},7,8,model_a,{'abc' if i == 3 else 1.5},2024-01-0{1 + i}" for i in range(5)]
    (tmp_path / "v.csv").write_text("\n".join(["prompt,model_a,model_b,winner,weight,timestamp", *rows]))
    votes, dropped = read(str(tmp_path / "v.csv"), max_dropped=0.2)
    assert votes.models == ("7", "8")
    assert votes.prompts == (("0",), ("1",), ("2",), ("4",))
    assert votes.weight.tolist() == [1.5] * 4
    assert dropped.lines() == ["1 x weight: expected a finite number >= 0 (the first is row 3: got 'abc')"]
    # Beside a file whose numbers are numbers; and rows left out by a number.
    parquet(tmp_path / "w.parquet", [("w", "7", "8", "tie")], weight=[0.25], timestamp=[1e9])
    both, _ = read([str(tmp_path / "v.csv"), str(tmp_path / "w.parquet")], max_dropped=0.2)
    assert both.weight.tolist() == [1.5] * 4 + [0.25]
    assert both.timestamp[-1] == 1e9
    assert len(read(str(tmp_path / "v.csv"), leave_out={"prompt": [3]})[0]) == 4


@pytest.mark.slow
def test_a_csv_row_of_too_many_or_too_few_cells_is_skipped_and_counted(tmp_path):
    rows = ['"a, b",x,y,model_a', "b,x,y", "c,x,y,tie", "d,x,y,tie,9", '"e, f",x,y', "", "g,x,omega,,", "h,x,y,model_b"]
    file = tmp_path / "v.csv"
    file.write_text("\n".join(["prompt,model_a,model_b,winner", *rows]))
    votes, dropped = read(str(file), max_dropped=0.6)
    assert votes.prompts == (("a, b",), ("c",), ("h",))
    assert dropped.rows == 7  # an empty line is none
    reason = "row: expected a value for each column"
    assert dropped.lines() == [f"4 x {reason} (the first is row 1: got 'b,x,y')"]
    # What follows a stray quote cannot be trusted: here it swallows a row.
    for stray in ('i,"x,y,tie\nj,x,y,tie', 'i,"x\n,y",tie'):
        file.write_text("\n".join(["prompt,model_a,model_b,winner", *rows, stray]))
        with pytest.raises(ValueError, match=r"v.csv: row 7: .*(a quote is|is a quote) not closed"):
            read(str(file), max_dropped=1)
    # Rows keep their numbers in files of several megabytes, which are read in blocks, and with prompts of two lines.
    bad, lines = {5, 20_000, 39_999}, [f'"{i}\n{"x" * 60}",x,y,tie' for i in range(40_000)]
    file.write_text("\n".join(["prompt,model_a,model_b,winner", *(f'"{i}",x' if i in bad else s for i, s in enumerate(lines))]))
    votes, dropped = read(str(file))
    assert (len(votes), dropped.rows, len(dropped)) == (39_997, 40_000, 3)
    assert "the first is row 5: got" in dropped.lines()[0]
    assert {int(prompt[0].split()[0]) for prompt in votes.prompts} == set(range(40_000)) - bad
    file.write_text("prompt,model,score\na,x,1\na,y\n")
    with pytest.raises(ValueError, match=r"v.csv: row 1: expected a value for each column: expected 3, got 2: a,y"):
        read(str(file), max_dropped=1)


@pytest.mark.parametrize("column", ["prompt", "text"])
@pytest.mark.parametrize("number", [7, 1.5, True])
def test_a_number_is_no_prompt(column, number, tmp_path):
    """Also beside texts: numbers of columns of text are text, but in jsonl a prompt is quoted."""
    rows = [{column: prompt, "model_a": "x", "model_b": "y", "winner": "tie"} for prompt in ("a", number, "b", "c")]
    (tmp_path / "v.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    votes, dropped = read(tmp_path / "v.jsonl", columns={"prompt": column}, max_dropped=0.5)
    assert (len(votes), list(dropped.counts)) == (
        3, [f"prompt: expected a string, a list of user turns or a list of messages, got {type(number).__name__}"]
    )  # fmt: skip


def test_decimals_are_numbers(tmp_path):
    from decimal import Decimal

    votes, _ = read(parquet(tmp_path / "v.parquet", ROWS[:1], weight=[Decimal("1.5")]))
    assert votes.weight.tolist() == [1.5]


def test_empty_prompts_have_no_scores(tmp_path):
    rows = [(p, m, 1.0) for p in ("a", " ") for m in "xy"]
    with pytest.raises(ValueError, match="row 2: prompt: empty"):
        read(parquet(tmp_path / "s.parquet", rows, ("prompt", "model", "score")))


@pytest.mark.parametrize("outcomes", slow_but([(0, 1), (0, 3)], [(0, 1), (0, 0), (0, 1, 1, 0, 2), (2, 2), (3, 3), (0, 3)]))
@pytest.mark.parametrize("name", ["rk", "rk-reparam", "grk"])
def test_marginal_leaderboards_of_outcomes_that_never_come(name, outcomes, rng):
    """Without ties, rk's optimum is where its clamp begins: the loss has a kink there."""
    a = rng.integers(0, 4, 200)
    b = (a + rng.integers(1, 4, 200)) % 4
    outcome = np.resize(outcomes, 200)
    votes = Votes.make([("p",)], list("wxyz"), np.zeros(200, np.int64), a, b, outcome)
    feedback = feedback_model(name)
    found = marginal_fit(feedback, votes)
    counts = outcome_counts(feedback, votes)
    i, j = np.triu_indices(4, 1)

    def loss(theta, eta):
        at = [torch.from_numpy(np.asarray(x)) for x in (theta[i], theta[j], np.full(6, eta))]
        ridge = 1e-6 * counts.sum() / 6 / 2 * ((theta**2).sum() + eta**2)
        return -(counts * feedback.log_probabilities(*at).numpy().T[: len(counts)]).sum() + ridge

    best = loss(found.theta, found.eta)
    for _ in range(30):
        size = 10.0 ** rng.uniform(-4, 0)
        assert loss(found.theta + size * rng.normal(size=4), found.eta + size * rng.normal()) >= best - 1e-9 * abs(best)


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_but(("bt",), ["bt", "bt-tie", "rk", "grk"]))
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10**6), won=st.booleans(), few=st.integers(1, 4))
def test_a_model_that_always_wins_moves_no_other(name, seed, won, few):
    """Its interval has no upper end; all others' are as without it, but for what grk's wins say of goodness."""
    rng, feedback, n = np.random.default_rng(seed), feedback_model(name), 150
    a = rng.integers(0, 3, n)
    b = (a + rng.integers(1, 3, n)) % 3
    outcome = rng.integers(0, 2 if name == "bt" else 4, n)
    outcome[:6], a[:6], b[:6] = [0, 1] * 3, [0, 0, 0, 0, 1, 1], [1, 1, 2, 2, 2, 2]
    more = np.full(few, 0 if won else 1)
    columns = (np.append(a, [3] * few), np.append(b, rng.integers(0, 3, few)), np.append(outcome, more))
    both = Votes.make([(str(i),) for i in range(n + few)], list("wxyz"), np.arange(n + few), *columns)
    without = Votes.make([(str(i),) for i in range(n)], list("wxyz"), np.arange(n), a, b, outcome)
    found, before = (
        {standing.model: standing for standing in marginal_leaderboard(feedback, votes, bootstrap=400, seed=seed)}
        for votes in (both, without)
    )
    for model in "wxy":
        assert found[model].coefficient == pytest.approx(before[model].coefficient, abs=0.25 if name == "grk" else 0.05)
        width = before[model].high - before[model].low
        assert found[model].high - found[model].low == pytest.approx(width, rel=0.3)
    end, other = (found["z"].low, found["z"].high) if won else (found["z"].high, found["z"].low)
    assert other is None
    assert end is not None
    assert (end < found["z"].coefficient) == won
    assert before["z"].interval == ""  # no vote, nothing known


def test_the_lower_end_of_three_wins_is_clopper_and_pearsons():
    """Three wins of three against a model of coefficient 0: p >= 0.025^(1/3) with 97.5% certainty."""
    n = 400
    a, b = np.append(np.zeros(n, int), [2] * 3), np.append(np.ones(n, int), [0, 0, 1])
    outcome = np.append(np.arange(n) % 2, [0] * 3)
    votes = Votes.make([(str(i),) for i in range(n + 3)], list("xyz"), np.arange(n + 3), a, b, outcome)
    of = {standing.model: standing for standing in marginal_leaderboard(feedback_model("bt"), votes, bootstrap=100)}
    assert of["z"].low == pytest.approx(logit(0.025 ** (1 / 3)), abs=1e-3)
    assert (of["z"].high, of["z"].interval) == (None, "from -0.884")
    assert of["x"].coefficient == pytest.approx(0, abs=1e-3)
    # Ten times the same votes on the same prompts are no more prompts.
    often = Votes.make(
        votes.prompts, votes.models, *(np.repeat(x, 10) for x in (votes.prompt, votes.a, votes.b, votes.outcome))
    )
    again = {standing.model: standing for standing in marginal_leaderboard(feedback_model("bt"), often, bootstrap=100)}
    assert again["z"].low == pytest.approx(of["z"].low, abs=1e-3)
    assert again["x"].high == pytest.approx(of["x"].high, abs=1e-3)


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(name=st.sampled_from(["bt", "grk"]), wins=st.integers(6, 30), weight=st.sampled_from([1.0, 1e-5, 1e-9, 1e-30]))
@example("bt", 10, 1e-12)
def test_intervals_hold_the_estimate_whatever_the_votes_weigh(name, wins, weight):
    """Votes that weigh less than the ridge leave a coefficient near 0, where the interval of so many wins does not reach."""
    n = wins + 2
    a, b = np.where(np.arange(n) < 2, 0, 2), np.where(np.arange(n) < 2, 1, np.arange(n) % 2)
    outcome, weights = np.where(np.arange(n) == 1, 1, 0), np.where(np.arange(n) < 2, 1.0, weight)
    prompts = [(str(i),) for i in range(n)]
    votes = Votes.make(prompts, ("x", "y", "z"), np.arange(n), a, b, outcome, weights)
    for standing in marginal_leaderboard(feedback_model(name), votes, bootstrap=20):
        assert standing.low is None or standing.low <= standing.coefficient
        assert standing.high is None or standing.high >= standing.coefficient

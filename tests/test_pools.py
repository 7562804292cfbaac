"""train/sources.py: score tables of several sources pooled into one, and training on them."""

from __future__ import annotations

import csv
import json
import unicodedata

import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from p2l_engine.feedback import feedback_model
from p2l_engine.train import sources
from p2l_engine.train.config import TrainConfig
from p2l_engine.train.data import load
from p2l_engine.train.spelling import spelling
from p2l_engine.votes.by_source import read_by_source
from p2l_engine.votes.splits import folded

ORIGIN = {"origin": "https://example.org", "license": "MIT"}


def written(path, rows, header=("prompt", "task", "model", "score")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def pooled(folder, **options):
    one = [(f"p{i}", ("math", "one/math")[i % 2], model, int(model == "a")) for i in range(4) for model in "abc"]
    two = [(f"q{i}", "", model, 0.5, judge) for i in range(3) for model in ("A", "d") for judge in ("j", "k")]
    written(folder / "one.csv", [*one, ("p0", "math", "rare", 1)])
    written(folder / "two.csv", [*two, ("alone", "", "lonely", 1, "j")], ("prompt", "task", "model", "score", "judge"))
    named = {"one": {"path": "one.csv", **ORIGIN}, "two": {"path": "two.csv", "within": ["judge"], **ORIGIN}}
    (folder / "pool.yaml").write_text(yaml.safe_dump({"sources": named, "names": {"a": ["A"]}, "min_prompts": 2} | options))
    return folder / "pool.yaml"


def test_scores_of_sources_are_pooled(tmp_path):
    rows, left_out = sources.pool(sources.Pool.load(pooled(tmp_path)), tmp_path)
    assert left_out == {"rare": 1, "lonely": 0}
    assert {row.model for row in rows} == {"a", "b", "c", "d"}
    assert {row.group for row in rows} == {"one", "two/j", "two/k"}
    assert {row.task for row in rows} == {"one/math", "two"}
    assert len(rows) == 4 * 3 + 3 * 2 * 2
    without, _ = sources.pool(sources.Pool.load(pooled(tmp_path, leave_out=["c"])), tmp_path)
    assert {row.model for row in without} == {"a", "b", "d"}


def test_a_source_has_names_of_its_own(tmp_path):
    """They come before those of all sources."""
    definition = pooled(tmp_path, names={"d": ["A"]}, min_prompts=1)
    values = yaml.safe_load(definition.read_text())
    values["sources"]["two"]["names"] = {"e": ["d"], "a-of-two": ["A"]}
    definition.write_text(yaml.safe_dump(values))
    rows, _ = sources.pool(sources.Pool.load(definition), tmp_path)
    assert {row.model for row in rows if row.group == "two/j"} == {"e", "a-of-two"}
    assert {row.model for row in rows if row.group == "one"} == {"a", "b", "c", "rare"}


def test_equal_prompts_of_two_sources_are_spelled_as_in_the_first(tmp_path):
    one = ["What is 2+2?", "Go, now", "go now!"]
    two = ["what  is 2 + 2", "GO NOW", "What is 2 + 2 ?", "other"]
    written(tmp_path / "one.csv", [(p, "", m, 1) for p in one for m in "ab"])
    written(tmp_path / "two.csv", [(p, "", m, 1) for p in two[:2] + two[3:] for m in "ab"])
    written(tmp_path / "three.csv", [(p, "", m, 1) for p in two for m in "ab"])
    named = {name: {"path": f"{name}.csv", **ORIGIN} for name in ("one", "two", "three")}
    (tmp_path / "pool.yaml").write_text(yaml.safe_dump({"sources": named}))
    rows, _ = sources.pool(sources.Pool.load(tmp_path / "pool.yaml"), tmp_path)
    prompts = {group: {row.prompt[0] for row in rows if row.group == group} for group in named}
    assert prompts["one"] == set(one)  # within a source, punctuation may be what is asked
    assert prompts["two"] == {"What is 2+2?", "GO NOW", "other"}  # the first source has two such prompts: which is meant?
    assert prompts["three"] == set(two)  # two of its texts are that of the first source


ALIKE = [
    ("What is 2+2?", "what  is 2 + 2"),
    ("Hello, world!", "hello world"),
    ('Say "yes".', "say \u201cyes\u201d"),
    ("What\u2019s new?", "what's new"),
    ("\uff21\uff22\uff23 stra\u00dfe", "abc strasse ..."),
    ("f( x, y )", "f(x, y)"),
    ("?!", "?!"),
]
APART = [
    ("What is 12+3?", "What is 12*3?"),
    ("1 + 2 * 3", "(1 + 2) * 3"),
    ("1.5 + 1", "15 + 1"),
    ("Sort 1, 2", "Sort 12"),
    ("Compute 5!", "Compute 5"),
    ("Compute n!", "Compute n"),
    ("f(x,y)", "f(xy)"),
    ("f'(x)", "f(x)"),
    ("x - 2018", "x + 2018"),
    ("a < b", "a > b"),
    ("C++", "C#"),
    ("?!", "!?"),
]


@pytest.mark.parametrize(("one", "other", "same"), [(*p, True) for p in ALIKE] + [(*p, False) for p in APART])
def test_prompts_of_two_sources_are_one_where_they_ask_the_same(tmp_path, one, other, same):
    written(tmp_path / "one.csv", [(one, "", m, 1) for m in "ab"])
    written(tmp_path / "two.csv", [(other, "", m, 1) for m in "ab"])
    named = {name: {"path": f"{name}.csv", **ORIGIN} for name in ("one", "two")}
    (tmp_path / "pool.yaml").write_text(yaml.safe_dump({"sources": named}))
    rows, _ = sources.pool(sources.Pool.load(tmp_path / "pool.yaml"), tmp_path)
    assert {row.prompt[0] for row in rows} == ({one} if same else {one, other})


# marks that join a letter would join another one without the white space
PLAIN = st.characters(categories=("L", "N", "P", "S", "Zs")).filter(lambda c: unicodedata.is_normalized("NFKD", c))


@given(text=st.text(PLAIN, min_size=1), space=st.sampled_from(["  ", "\n", "\t "]))
def test_a_spelling_keeps_letters_and_digits_and_not_how_wide_the_space_is(text, space):
    if any(c.isalnum() for c in text):
        assert spelling(space + text.replace(" ", space) + space) == spelling(text)
        assert folded(spelling(text)) == folded(text)


def test_a_model_goes_with_the_models_that_tied_it_to_the_others(tmp_path):
    written(tmp_path / "one.csv", [(f"p{i}", "", model, 1) for i in range(3) for model in ("a", "b")])
    written(
        tmp_path / "two.csv",
        [("p0", "", "b", 1), ("q0", "", "c", 1), *[(f"r{i}", "", "c", 1) for i in range(3)], ("q0", "", "e", 0)],
    )
    named = {name: {"path": f"{name}.csv", **ORIGIN} for name in ("one", "two")}
    (tmp_path / "pool.yaml").write_text(yaml.safe_dump({"sources": named, "min_prompts": 2}))
    rows, left_out = sources.pool(sources.Pool.load(tmp_path / "pool.yaml"), tmp_path)
    assert {row.model for row in rows} == {"a", "b"}
    assert left_out == {"c": 1, "e": 1}


def test_a_pool_is_written_and_trained_on(tmp_path):
    pooled(tmp_path)
    arguments = [str(tmp_path / "pool.yaml"), "--data", str(tmp_path)]
    outputs = []
    for name in ("one.parquet", "again.parquet"):
        result = CliRunner().invoke(sources.app, [*arguments, "-o", str(tmp_path / name)])
        assert result.exit_code == 0, result.output
        outputs.append((tmp_path / name).read_bytes())
    assert outputs[0] == outputs[1]
    assert "left out" in result.output
    result = CliRunner().invoke(
        sources.app, [*arguments, "-o", str(tmp_path / "one.parquet"), "--card", str(tmp_path / "card.md")]
    )
    assert result.exit_code == 0, result.output
    assert (tmp_path / "card.md").read_text().splitlines()[2:] == [
        "| [one](https://example.org) | MIT | 4 | 3 | 12 |",
        "| [two](https://example.org) | MIT | 3 | 2 | 12 |",
        "| all | | 7 | 4 | 24 |",
    ]
    found = pq.read_table(tmp_path / "one.parquet")
    assert found.column_names == ["prompt", "task", "model", "score", "source"]
    assert json.loads(found["prompt"][0].as_py()) == ["p0"]
    config = TrainConfig(
        proj_name="x", pretrain_model_name="y", learning_rate=1, head_type="rk", loss_type="grk",
        train_data_path=str(tmp_path / "one.parquet"), sources="source", source_balance=0.5,
        held_out=0.2, split_by="hash",
    )  # fmt: skip
    parts = load(config)
    votes, _, _ = read_by_source(config.train_data_path, "source", feedback_model("grk"), answers_once=True)
    assert len(votes) == 4 * 3 + 3 * 2
    assert len(parts.training) + len(parts.held_out) == len(votes)
    assert set(parts.training.category) <= {"one/math", "two"}
    with pytest.raises(ValueError, match="source_balance: expected 1 where sources is not given"):
        TrainConfig.model_validate(config.model_dump() | {"sources": None})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": {"a": ["Z"]}}, "names, leave_out: expected models of the sources, found none named Z"),
        ({"leave_out": ["z"]}, "found none named z"),
        (
            {"sources": {"one": {"path": "one.csv", "names": {"x": ["d"]}, **ORIGIN}}, "names": {}},
            "sources.one.names: expected models of the source, found none named d",
        ),
        (
            {"sources": {"one": {"path": "one.csv", "names": {"x": ["a"], "y": ["a"]}, **ORIGIN}}, "names": {}},
            "sources.one.names: expected each name of a source once, got twice a",
        ),
        ({"names": {"a": ["b"], "c": ["b"]}}, "names: expected each name of a source once, got twice b"),
        ({"names": {"a": ["b"]}}, "one.csv: row 1: names: 'a' and 'b' are both 'a'"),
        ({"sources": {"one": {"path": "none.csv", **ORIGIN}}}, "none.csv"),
        ({"sources": {"one": {"path": "blank.csv", **ORIGIN}}}, "blank.csv: row 1: prompt: empty"),
        (
            {"sources": {"one": {"path": "endless.csv", **ORIGIN}}},
            "endless.csv: row 0: score: expected a finite number",
        ),
        ({"sources": {"one": {"path": "percent.csv", **ORIGIN}}}, "a tie from 0.5 up, got 95 of 'a' on 'p'"),
        (
            {"sources": {"one": {"path": "below.csv", **ORIGIN}}},
            "below.csv: score: expected 0 to 1, since equal ones are a tie from 0.5 up, got -1 of",
        ),
        (
            {"sources": {"one": {"path": "tasks.csv", **ORIGIN}}},
            "tasks.csv: row 2: task: expected the prompt's first one, 'one/t'",
        ),
        ({"sources": {"all": {"path": "one.csv", **ORIGIN}}}, "expected names without '/', other than 'all', got 'all'"),
        ({"sources": {"a/b": {"path": "one.csv", **ORIGIN}}}, "expected names without '/', other than 'all', got 'a/b'"),
        ({"min_prompts": 5}, "sources: no row of one, two is left"),
        ({"leave_out": ["a", "d"], "min_prompts": 1}, "sources: no row of two is left"),
        ({"sources": {}}, "sources: "),
        ({"prices": {}}, "prices: "),
        ({"sources": {"one": {"path": "one.csv", "within": ["judge"], **ORIGIN}}}, "expected the columns judge"),
    ],
)
def test_what_is_wrong_in_a_pool_is_named(tmp_path, change, message):
    pooled(tmp_path, **change)
    written(tmp_path / "blank.csv", [("p", "", "a", 1), (" ", "", "b", 1)])
    written(tmp_path / "endless.csv", [("p", "", "a", "inf"), ("p", "", "b", 1)])
    written(tmp_path / "percent.csv", [("p", "", "a", 95), ("p", "", "b", 1)])
    written(tmp_path / "below.csv", [("p", "", "a", -1), ("p", "", "b", 1)])
    written(tmp_path / "tasks.csv", [("p", "t", "a", 0), ("q", "t", "a", 1), ("p", "s", "b", 1)])
    result = CliRunner().invoke(
        sources.app, [str(tmp_path / "pool.yaml"), "--data", str(tmp_path), "-o", str(tmp_path / "o.parquet")]
    )
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "o.parquet").exists()


def test_the_output_has_a_folder(tmp_path):
    """Said before the sources are read."""
    result = CliRunner().invoke(
        sources.app, [str(tmp_path / "none.yaml"), "--data", str(tmp_path), "-o", str(tmp_path / "missing" / "o.parquet")]
    )
    assert result.exit_code == 1
    assert "--output: expected a file in a folder that exists" in result.output

"""``p2l-engine eval`` on files of votes and scores: what it prints and writes, and what it refuses before it computes."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from p2l_engine import Engine
from p2l_engine.evaluation.sources import of_config
from p2l_engine.tables import parquet
from p2l_engine.votes import score_matrix
from tests.support import tiny
from tests.support.command import p2l_engine
from tests.support.simulate import Simulator

CATALOG = "unit: USD per request\nmodels:\n" + "".join(f"  {name}: {{cost: {1 + i}}}\n" for i, name in enumerate(tiny.MODELS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint; votes on 20 prompts and on 20 others, and scores on two more sets of 20 prompts."""
    folder = tmp_path_factory.mktemp("eval")
    tiny.write(folder / "c")
    tiny.write(folder / "quick", loss_type="bt-tie", head_type="bt")  # without a tie parameter, leaderboards are fitted fast
    simulator = Simulator.of("grk", 5)
    votes = simulator.votes(simulator.prompts(40), 5)
    winners, names = ("model_a", "model_b", "tie", "tie (bothbad)"), np.array(tiny.MODELS)
    for half, name in ((votes.prompt < 20, "known"), (votes.prompt >= 20, "held-out")):
        columns = {"prompt": [votes.prompts[p][0] for p in votes.prompt[half]], "model_a": names[votes.a[half]]}
        columns |= {"model_b": names[votes.b[half]], "winner": [winners[y] for y in votes.outcome[half]]}
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    rng = np.random.default_rng(0)
    for name in ("known", "held-out"):
        rows = [(f"{name} {i}", model, rng.random(), f"task {i % 2}") for i in range(20) for model in tiny.MODELS]
        columns = {key: [row[i] for row in rows] for i, key in enumerate(("prompt", "model", "score", "task"))}
        pq.write_table(pa.table(columns), folder / f"{name}-scores.parquet")
    (folder / "catalog.yaml").write_text(CATALOG)
    return folder


@pytest.fixture
def called(folder, monkeypatch):
    """Runs ``eval`` in this process: exit status, standard output and error without line breaks."""

    def call(*more, votes="held-out.parquet", checkpoint="quick"):
        monkeypatch.chdir(folder)
        ended = p2l_engine("eval", "--checkpoint", checkpoint, "--votes", votes, "--bootstrap", "5", *more)
        return ended.status, " ".join(ended.out.split()), ended.message

    return call


@pytest.mark.slow
def test_votes_are_evaluated(called, folder):
    status, out, err = called(
        "--training", "known.parquet", "--html", "r.html", "--json", "r.json", "--cluster", "--replace", "alpha:beta",
        checkpoint="c",
    )  # fmt: skip
    assert status == 0, err
    assert "log loss" in out
    assert json.loads((folder / "r.json").read_text())["replacements"][0]["new"] == "beta"
    assert "how often beta is preferred to alpha" in (folder / "r.html").read_text()


@pytest.mark.slow
def test_clusters_are_no_categories_of_the_training_votes(called, folder):
    known = pq.read_table(folder / "known.parquet")
    pq.write_table(known.append_column("category", pa.array(["other"] * len(known))), folder / "known-of.parquet")
    status, _, err = called("--training", "known-of.parquet", "--cluster", "--json", "c.json")
    assert status == 0, err
    assert set(json.loads((folder / "c.json").read_text())["votes"]["overall"]) == {"p2l", "marginal", "constant"}


@pytest.mark.slow
def test_scores_are_evaluated_under_budgets_and_by_category(called, folder):
    status, out, err = called(
        "--training", "known-scores.parquet", "--catalog", "catalog.yaml", "--budget", "1.5", "--budget", "3",
        "--reference", "beta", "--html", "s.html", votes="held-out-scores.parquet",
    )  # fmt: skip
    assert status == 0, err
    assert "under a budget, in USD per request" in out
    assert "win rate against beta" in out
    page = (folder / "s.html").read_text()
    assert "<td>1.5 USD per request</td>" in page
    assert "<td>task 1</td><td>10</td>" in page


@pytest.mark.slow
def test_each_file_is_read_once(called, folder, monkeypatch):
    read, names = parquet.values, []

    def counted(file, columns):
        names.append(file.shown)
        return read(file, columns)

    monkeypatch.setattr(parquet, "values", counted)
    for kind in ("-scores", ""):
        status, _, err = called("--training", f"known{kind}.parquet", votes=f"held-out{kind}.parquet")
        assert status == 0, err
    expected = [folder / f"{name}.parquet" for name in ("held-out-scores", "known-scores", "held-out", "known")]
    assert names == list(map(str, expected))


@pytest.mark.slow
def test_votes_are_named_as_in_other_commands(called, folder):
    (folder / "halves").mkdir()
    table = pq.read_table(folder / "held-out.parquet")
    for i, part in enumerate((table[: len(table) // 2], table[len(table) // 2 :])):
        pq.write_table(part, folder / "halves" / f"{i}.parquet")
    figures = []
    for i, votes in enumerate(("held-out.parquet", f"file://{folder}/held-out.parquet", "halves", "halves/*.parquet")):
        status, _, err = called("--json", f"as-{i}.json", "--training", f"file://{folder}/known.parquet", votes=votes)
        assert status == 0, err
        figures.append(json.loads((folder / f"as-{i}.json").read_text()))
    assert all(found == figures[0] for found in figures[1:])
    table = pq.read_table(folder / "held-out.parquet")
    pq.write_table(table.rename_columns(["question", *table.column_names[1:]]), folder / "question.parquet")
    known = pq.read_table(folder / "known.parquet")
    pq.write_table(known.rename_columns(["question", *known.column_names[1:]]), folder / "known-question.parquet")
    options = ("--column", "question", "--training", "known-question.parquet", "--json", "question.json")
    assert called(*options, votes="question.parquet")[0] == 0
    assert json.loads((folder / "question.json").read_text()) == figures[0]
    for option in ("--votes", "--training"):
        status, _, err = called(option, "")
        assert status == 2
        assert "expected a path or a URI, got ''" in err


def test_scores_in_columns_of_other_names_are_used(folder, tmp_path):
    tiny.write(tmp_path / "c", loss_type="bt-tie", head_type="bt")
    table = pq.read_table(folder / "known-scores.parquet")
    pq.write_table(table.rename_columns(["question", "llm", "points", "task"]), tmp_path / "scores.parquet")
    settings = json.loads((tmp_path / "c" / "training_config.json").read_text())
    settings |= {"train_data_path": str(tmp_path / "scores.parquet"), "held_out": 0.5}
    settings |= {"columns": {"prompt": "question", "model": "llm", "score": "points"}}
    (tmp_path / "c" / "training_config.json").write_text(json.dumps(settings))
    found = of_config(Engine.from_pretrained(tmp_path / "c", device="cpu"), "held-out", None)
    prompts, models, scores = score_matrix(str(folder / "known-scores.parquet"))
    expected = scores[[prompts.index(prompt) for prompt in found.held_out.prompts]]
    np.testing.assert_array_equal(found.scores.held_out, expected[:, [models.index(name) for name in tiny.MODELS]])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("--replace", "alpha"), "expected OLD:NEW"),
        (("--replace", "alpha:omega", "--cluster"), "two of alpha, beta"),
        (("--part", "all"), "expected held-out or validation"),
        (("--reference", "omega"), "expected one of alpha"),
        (("--reference", "beta"), "needs categories"),
        (("--budget", "1"), "needs scores"),
        (("--probes",), "needs scores"),
        (("--json", "nowhere/x.json"), "nowhere/x.json cannot be written: is its folder there?"),
        (("--html", "c"), "c cannot be written"),
        (("--training", "held-out.parquet"), "20 of its prompts are training prompts too"),
    ],
)
def test_impossible_options_are_refused(wrong, message, called):
    status, _, err = called(*wrong)
    assert status == 2
    assert message in err


@pytest.mark.parametrize("option", [("--max-dropped", "0.5"), ("--column", "question"), ("--training", "known.parquet")])
def test_options_of_files_need_votes(option, folder):
    ended = p2l_engine("eval", "--checkpoint", str(folder / "quick"), *option)
    assert ended.status == 2
    assert f"Invalid value for {option[0]}: needs --votes" in ended.message


@pytest.mark.parametrize("budget", ["0.5", "nan", "-1", "inf"])
def test_budgets_that_no_model_meets_are_refused(budget, called):
    scores = ("--training", "known-scores.parquet", "--catalog", "catalog.yaml", "--budget", budget)
    status, _, err = called(*scores, votes="held-out-scores.parquet")
    assert status == 2
    assert "expected a mean cost of at least the cheapest model's 1, got" in err


@pytest.mark.slow
def test_votes_on_other_models_are_dropped_where_that_is_allowed(called, folder):
    table = pq.read_table(folder / "held-out.parquet").to_pylist()
    table[0]["model_a"] = "omega"
    pq.write_table(pa.Table.from_pylist(table[:50]), folder / "omega.parquet")
    status, _, err = called(votes="omega.parquet")
    assert status == 2
    assert "expected one of the training votes' (or the checkpoint's) models" in err
    status, _, err = called("--max-dropped", "0.1", votes="omega.parquet")
    assert status == 0, err
    assert "dropped 1 x model_a" in err

"""``p2l-engine eval`` on files of votes and scores: what it prints and writes, and what it refuses before it computes."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from p2l_engine.train.simulate import Simulator
from tests import tiny

CATALOG = "unit: USD per request\nmodels:\n" + "".join(f"  {name}: {{cost: {1 + i}}}\n" for i, name in enumerate(tiny.MODELS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint; votes and scores on 40 prompts and on 40 others."""
    folder = tmp_path_factory.mktemp("eval")
    tiny.write(folder / "c")
    simulator = Simulator.of("grk", 5)
    votes = simulator.votes(simulator.prompts(80), 5)
    winners, names = ("model_a", "model_b", "tie", "tie (bothbad)"), np.array(tiny.MODELS)
    for half, name in ((votes.prompt < 40, "known"), (votes.prompt >= 40, "asked")):
        columns = {"prompt": [votes.prompts[p][0] for p in votes.prompt[half]], "model_a": names[votes.a[half]]}
        columns |= {"model_b": names[votes.b[half]], "winner": [winners[y] for y in votes.outcome[half]]}
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    rng = np.random.default_rng(0)
    for name in ("known", "asked"):
        rows = [(f"{name} {i}", model, rng.random(), f"task {i % 2}") for i in range(20) for model in tiny.MODELS]
        columns = {key: [row[i] for row in rows] for i, key in enumerate(("prompt", "model", "score", "task"))}
        pq.write_table(pa.table(columns), folder / f"{name}-scores.parquet")
    (folder / "catalog.yaml").write_text(CATALOG)
    return folder


def called(folder, *more, votes="asked.parquet"):
    command = ["eval", "--checkpoint", "c", "--votes", votes, "--bootstrap", "5", *more]
    return subprocess.run(
        [sys.executable, "-m", "p2l_engine", *command], cwd=folder, capture_output=True, text=True, check=False
    )


def refused(folder, *more, **options):
    bad = called(folder, *more, **options)
    assert bad.returncode == 2, more
    assert "Traceback" not in bad.stderr
    return " ".join(bad.stderr.replace("│", " ").split())


def test_votes_are_evaluated(folder):
    good = called(
        folder, "--training", "known.parquet", "--html", "r.html", "--json", "r.json", "--cluster", "--replace", "alpha:beta",
    )  # fmt: skip
    assert good.returncode == 0, good.stderr
    assert "log loss" in good.stdout
    assert json.loads((folder / "r.json").read_text())["replacements"][0]["new"] == "beta"
    assert "how often beta is preferred to alpha" in (folder / "r.html").read_text()


def test_scores_are_evaluated_under_budgets_and_by_category(folder):
    good = called(
        folder, "--training", "known-scores.parquet", "--catalog", "catalog.yaml", "--budget", "1.5", "--budget", "3",
        "--reference", "beta", "--html", "s.html", votes="asked-scores.parquet",
    )  # fmt: skip
    assert good.returncode == 0, good.stderr
    printed = " ".join(good.stdout.split())
    assert "under a budget, in USD per request" in printed
    assert "win rate against beta" in printed
    page = (folder / "s.html").read_text()
    assert "<td>1.5 USD per request</td>" in page
    assert "<td>task 1</td><td>10</td>" in page


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
        (("--training", "asked.parquet"), "40 of its prompts are training prompts too"),
    ],
)
def test_what_cannot_be_done_is_refused(wrong, message, folder):
    assert message in refused(folder, *wrong)


@pytest.mark.parametrize("budget", ["0.5", "nan", "-1", "inf"])
def test_budgets_that_no_model_meets_are_refused(budget, folder):
    scores = ("--training", "known-scores.parquet", "--catalog", "catalog.yaml", "--budget", budget)
    message = "expected a mean cost of at least the cheapest model's 1, got"
    assert message in refused(folder, *scores, votes="asked-scores.parquet")


def test_votes_on_other_models_are_dropped_where_that_is_allowed(folder):
    table = pq.read_table(folder / "asked.parquet").to_pylist()
    table[0]["model_a"] = "omega"
    pq.write_table(pa.Table.from_pylist(table[:50]), folder / "omega.parquet")
    assert "not one of the models that are known" in refused(folder, votes="omega.parquet")
    good = called(folder, "--max-dropped", "0.1", votes="omega.parquet")
    assert good.returncode == 0, good.stderr
    assert "dropped 1 x model_a" in good.stderr

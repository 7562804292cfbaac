"""``p2l-engine strengths``: prompts without votes, by category."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from p2l_engine import Engine
from p2l_engine.evaluation import features
from p2l_engine.leaderboard import Leaderboard
from tests.support import tiny
from tests.support.command import p2l_engine

PROMPTS = [f"{kind} number {i}" for i in range(10) for kind in ("sum", "poem")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, and the same prompts in every kind of file."""
    folder = tmp_path_factory.mktemp("strengths")
    tiny.write(folder / "c")
    kinds = [prompt.split()[0] for prompt in PROMPTS]
    pq.write_table(pa.table({"prompt": PROMPTS, "task": kinds}), folder / "p.parquet")
    (folder / "p.csv").write_text("prompt,category\n" + "".join(f"{p},{k}\n" for p, k in zip(PROMPTS, kinds, strict=True)))
    rows = [{"prompt": p, "category": k, "weight": 1 + (k == "sum")} for p, k in zip(PROMPTS, kinds, strict=True)]
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "p.txt").write_text("\n".join(PROMPTS))
    return folder


@pytest.fixture
def called(folder, monkeypatch):
    """Runs ``strengths`` in this process: exit status, standard output and error without line breaks."""

    def call(*command):
        monkeypatch.chdir(folder)
        ended = p2l_engine("strengths", "--checkpoint", "c", "--bootstrap", "5", *command)
        return ended.status, " ".join(ended.out.split()), ended.message

    return call


@pytest.mark.slow
def test_strengths_by_category_are_means_of_win_rates(called, folder):
    more = ("--dtype", "float32", "--reference", "beta", "--replace", "alpha:beta", "--html", "r.html", "--plot", "r.png")
    reports = {}
    for name in ("p.parquet", "p.csv"):
        status, out, err = called(name, *more, "--json", "r.json")
        assert status == 0, err
        reports[name] = json.loads((folder / "r.json").read_text())
    assert reports["p.parquet"] == reports["p.csv"]
    assert "win rate against beta" in out
    assert "reliability" in out
    assert "beta in place of alpha" in out
    c = Engine.from_pretrained(folder / "c", dtype=torch.float32).coefficients(PROMPTS)
    theta = c.theta.astype(np.float64)
    of = reports["p.csv"]
    for k, kind in enumerate(("sum", "poem")):
        rates = 1 / (1 + np.exp(theta[k::2, 1] - theta[k::2, 0]))
        assert of["strengths"]["categories"][kind]["win_rate"]["alpha"]["value"] == pytest.approx(rates.mean(), abs=1e-5)
        board = Leaderboard.over(c.rows(np.arange(k, 20, 2)))
        assert [place["model"] for place in of["leaderboards"]["categories"][kind]] == [place.model for place in board]
        assert sum(of["choices"][kind]) == pytest.approx(1)
    assert of["replacements"][0]["overall"]["prompts"] == 20
    page = (folder / "r.html").read_text()
    assert "A survey of prompts" in page
    assert "how often beta is preferred to alpha" in page
    assert (folder / "r.png").stat().st_size > 1000


@pytest.mark.slow
def test_weights_and_shown_models(called, folder):
    status, _, err = called("p.jsonl", "--model", "gamma", "--model", "alpha", "--replace", "alpha:beta", "--json", "w.json")
    assert status == 0, err
    report = json.loads((folder / "w.json").read_text())
    assert report["weighted"]
    assert list(report["strengths"]["categories"]["sum"]["win_rate"]) == ["gamma", "alpha"]
    swap = {entry["category"]: entry["win_rate"] for entry in report["replacements"][0]["categories"]}
    whole = report["replacements"][0]["overall"]["win_rate"]
    assert whole == pytest.approx((2 * swap["sum"] + swap["poem"]) / 3)


@pytest.mark.slow
def test_prompts_without_categories(called, folder):
    status, _, err = called("p.txt", "--json", "t.json")
    assert status == 0, err
    assert "no column category or task: all prompts are one category" in err
    assert list(json.loads((folder / "t.json").read_text())["strengths"]["categories"]) == ["all"]
    status, _, err = called("p.txt", "--cluster", "--json", "t.json")
    assert status == 0, err
    report = json.loads((folder / "t.json").read_text())
    assert len(report["clusters"]) == 20
    assert set(report["clusters"]) == set(report["strengths"]["categories"])


def test_hidden_states_are_what_the_head_reads(folder):
    engine = Engine.from_pretrained(folder / "c", device="cpu", dtype=torch.float32)
    hidden, c = features.hidden_states(engine, PROMPTS)
    assert np.array_equal(c.theta, engine.coefficients(PROMPTS).theta)
    outputs = hidden @ engine.head.weight.numpy().T + engine.head.bias.numpy()
    assert outputs[:, :5] == pytest.approx(c.theta, abs=1e-4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("p.csv", "--cluster"), "these prompts have categories already"),
        (("p.csv", "--reference", "omega"), "expected one of alpha, beta, gamma, delta, epsilon, got 'omega'"),
        (("p.csv", "--model", "omega"), "expected one of alpha"),
        (("p.csv", "--replace", "alpha"), "expected OLD:NEW"),
        (("p.csv", "--replace", "alpha:alpha"), "expected OLD:NEW"),
        (("p.csv", "--plot", "a.xyz"), "ends in .png, .svg, .pdf"),
        (("p.csv", "--html", "nowhere/x.html"), "cannot be written"),
        (("nowhere.jsonl",), "nowhere.jsonl"),
    ],
)
def test_impossible_options_are_refused(wrong, message, called):
    status, _, err = called(*wrong)
    assert status == 2
    assert message in err


def test_a_checkpoint_of_values_has_no_win_rates(called, folder):
    tiny.write(folder / "values", loss_type="ols", head_type="bt")
    status, _, err = called("p.csv", "--checkpoint", "values")
    assert status == 2
    assert "expected a feedback model that compares models, got 'ols'" in err


def test_a_line_that_is_no_json_is_named(called, folder):
    (folder / "bad.jsonl").write_text('{"prompt": "a", "category": "x"}\n{"prompt": ' + "[" * 100_000 + "\n")
    status, _, err = called("bad.jsonl")
    assert status == 2
    assert "bad.jsonl: row 1: expected a line of JSON" in err


@pytest.mark.slow
def test_one_warning_for_characters_that_a_plot_cannot_draw(called, folder, caplog, recwarn):
    (folder / "cjk.jsonl").write_text('{"prompt": "a", "category": "诗歌"}\n{"prompt": "b", "category": "$x_1$ <b>"}\n')
    status, out, err = called("cjk.jsonl", "--plot", "c.png", "--html", "c.html")
    assert status == 0, err
    assert ["c.png: the plot's font lacks 2 of its characters" in line for line in caplog.messages] == [True]
    assert not [w for w in recwarn if "Glyph" in str(w.message)]
    assert "诗歌" in out
    assert "<b>" not in (folder / "c.html").read_text().split("<script")[0]

"""The comparison of distances for prompts away from training: to the end at a tiny size, the distances, the refitted head."""

from __future__ import annotations

import csv
import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from bench import away, away_votes, distances
from p2l_engine.backbone.head import Head
from p2l_engine.feedback import feedback_model
from tests.support import tiny

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    monkeypatch.setenv("P2L_ENGINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(distances, "CENTROIDS", 6)
    monkeypatch.setattr(distances, "COMPONENTS", 3)
    monkeypatch.setattr(distances, "RANK", 8)
    monkeypatch.setattr(away, "PENALTIES", (1e-3,))


@pytest.mark.parametrize("name", distances.DISTANCES)
def test_distances_grow_away_from_the_training_prompts(name, rng):
    task = rng.integers(5, size=300)
    training = (rng.normal(size=(300, 12)) + rng.normal(size=(5, 12))[task]) * rng.uniform(0.5, 2, 12)
    head = Head(torch.randn(3, 12), torch.zeros(3), 3)
    distance = distances.DISTANCES[name](training, task.astype(str), head)
    direction = rng.normal(size=12)
    found = distance(training.mean(0) + direction * np.array([0.1, 3, 10, 30, 100])[:, None])
    assert (np.diff(found[1:]) > 0).all()
    assert found[2] > np.quantile(distance(training), 0.99)
    assert name in ("kinds", "clusters") or (distance(training) >= 0).all()


def test_a_refitted_head_finds_the_scores_order(rng):
    states = rng.normal(size=(400, 6))
    chance = 1 / (1 + np.exp(-3 * states[:, :4]))
    scores = (rng.random((400, 4)) < chance).astype(np.float64)
    scores[::7, 2] = np.nan
    kind = away_votes.Kind("simulated", states, scores, np.full(400, "a"))
    feedback, start = feedback_model("grk"), np.zeros(5)
    head = away_votes.refit(kind, start, feedback, 1e-4)
    theta = away_votes.outputs(head, states)
    before = away_votes.losses(kind, np.tile(start, (400, 1)), feedback)
    after = away_votes.losses(kind, theta, feedback)
    assert after.mean() < before.mean() - 0.1
    assert np.corrcoef(theta[:, 0] - theta[:, 1], states[:, 0] - states[:, 1])[0, 1] > 0.9
    a, b = scores[0, 0], scores[0, 1]
    one = away_votes.Kind("pair", states[:1], np.array([[a, b, np.nan, np.nan]]), kind.task[:1])
    outcome = torch.tensor(0 if a > b else 1 if a < b else 2 if a >= 0.5 else 3)
    direct = -feedback.log_likelihood(*(torch.tensor(x) for x in (theta[0, 0], theta[0, 1], theta[0, 4])), outcome)
    assert away_votes.losses(one, theta[:1], feedback)[0] == pytest.approx(float(direct))
    assert away_votes.scored(one, np.array([0.0, 1, 5, 5]))[0] == b


def test_it_runs_to_the_end(tmp_path, rng, monkeypatch, capsys):
    folder = tiny.write(tmp_path / "tiny")
    config = folder / "training_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"held_out": 0.1, "split_seed": 0}))

    def table(path, prompts, models, **more):
        rows = [(p, m) for p in prompts for m in models]
        columns = {"prompt": [json.dumps([p]) for p, _ in rows], "model": [m for _, m in rows]}
        columns["score"] = rng.integers(0, 2, len(rows)).astype(np.float64)
        columns |= {name: [of(p) for p, _ in rows] for name, of in more.items()}
        pq.write_table(pa.table(columns), path)
        return str(path)

    own = [f"{kind} {'x' * (i % 7)} {i}" for i in range(100) for kind in ("sum", "name", "code")]
    scores = table(tmp_path / "scores.parquet", own, tiny.MODELS, task=lambda p: p.split()[0])
    others = [f"other {i}" for i in range(40)] + [f"judged {i}" for i in range(30)] + own[:5] + ["few 1"]
    pool = table(
        tmp_path / "pool.parquet", others, tiny.MODELS[:3], task=lambda p: "t",
        source=lambda p: {"judged": "chat/one", "other": "other", "few": "few"}.get(p.split()[0], "other"),
    )  # fmt: skip
    out = tmp_path / "rows.csv"
    arguments = ["bench", pool, "--scores", scores, "--checkpoint", str(folder), "--csv", str(out), "--training-prompts", "250"]
    monkeypatch.setattr(sys, "argv", arguments)
    away.main()
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["way"] for row in rows} == {"none", "leaderboard", "constant", *distances.DISTANCES}
    assert {row["prompts_of"] for row in rows} == {"tasks left out", "held out", "other", "chat/one", "all others"}
    assert {row["prompts"] for row in rows if row["prompts_of"] == "other"} == {"40"}  # without those of training
    none = {row["prompts_of"]: row for row in rows if row["way"] == "none"}
    assert all(float(row["points"]) == float(row["gain"]) == 0 for row in none.values())
    for row in rows:
        base = none[row["prompts_of"]]
        assert float(row["points"]) == pytest.approx(100 * (float(row["score"]) - float(base["score"])), abs=1e-2)
        assert float(row["gain"]) == pytest.approx(float(base["loss"]) - float(row["loss"]), abs=1e-4)
        assert float(row["own_single"]) >= float(row["single"]) - 1e-6
        if row["way"] == "leaderboard":
            assert float(row["kept"]) == 0
            assert float(row["score"]) == pytest.approx(float(row["single"]), abs=0.3)
    assert "Points of true score" in capsys.readouterr().out

"""bench/left_out.py: routers on sources and tasks that they never saw; bench/routers.py: models without a cost;
bench/prompts_needed.py: how many prompts a model needs."""

from __future__ import annotations

import csv
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bench import left_out, prompts_needed, routers, simple_routers
from p2l_engine import Catalog
from p2l_engine.catalog import CatalogModel
from tests.support.scored import scored_world


def test_models_without_a_cost_are_left_out_of_curves():
    scores = np.array([[1.0, 0.0, np.nan], [np.nan, np.nan, 0.5], [0.0, 1.0, 1.0]])
    test = simple_routers.Scored(np.zeros((3, 1)), scores, np.array(["s"] * 3), np.array(["t"] * 3))
    catalog = Catalog((CatalogModel("a", 1e-3), CatalogModel("c", 2e-3), CatalogModel("other", 3e-3)))
    costs = routers.costs_of(catalog, ("a", "b", "c"))
    np.testing.assert_array_equal(costs, [1e-3, np.nan, 2e-3])
    costs = routers.costs_of(catalog, ("a", "c", "b"))
    predicted, left = routers.with_costs({"x": np.arange(9.0).reshape(3, 3)}, test, np.array([1e-3, 2e-3, np.nan]))
    np.testing.assert_array_equal(left.scores, scores[[0, 2], :2])  # on the second prompt only the third model has a score
    np.testing.assert_array_equal(predicted["x"], [[0, 1], [6, 7]])
    with pytest.raises(ValueError, match="expected costs of models of the pool, found none"):
        routers.costs_of(catalog, ("b",))
    with pytest.raises(ValueError, match="unit: expected 'USD per request', got 'cents'"):
        routers.costs_of(replace(catalog, unit="cents"), ("a",))


def test_model_effects_are_least_squares(rng):
    """Against the regression on indicators of all prompts and models."""
    scores = np.where(rng.random((30, 5)) < 0.6, rng.random((30, 5)), np.nan)
    rows, columns = np.nonzero(np.isfinite(scores))
    design = np.zeros((len(rows), 35))
    design[np.arange(len(rows)), rows] = 1
    design[np.arange(len(rows)), 30 + columns] = 1
    expected = np.linalg.lstsq(design, scores[rows, columns], rcond=None)[0][30:]
    found = left_out.model_effects(scores)
    np.testing.assert_allclose(found, expected - expected.mean(), atol=1e-10)
    shifted = scores + rng.random((30, 1))  # how hard a prompt is changes nothing
    np.testing.assert_allclose(left_out.model_effects(shifted), found, atol=1e-10)
    of_prompts = left_out.without_prompts(simple_routers.Scored(np.zeros((30, 1)), scores, *[np.array(["s"] * 30)] * 2), found)
    np.testing.assert_allclose(np.nanmean(of_prompts.scores - found, 1), 0, atol=1e-10)
    np.testing.assert_array_equal(np.isfinite(of_prompts.scores), np.isfinite(scores))
    apart = np.array([[1.0, 0.0, np.nan, np.nan, np.nan], [np.nan, np.nan, 0.2, 0.8, np.nan], [np.nan] * 4 + [1.0]])
    np.testing.assert_allclose(left_out.model_effects(apart), [0.5, -0.5, -0.3, 0.3, 0], atol=1e-10)


def test_what_is_left_out_is_not_learned_from(rng, monkeypatch):
    """Neither the part itself nor prompts that it shares with others, whatever their case and punctuation."""
    world, _ = scored_world(rng)
    world = replace(world, source=np.array(["one", "two/j", "two/k"] * 80))
    texts = [f"Question {i}?" for i in range(240)]
    texts[1] = "question 0!"  # of another source than the first
    seen = []

    def spied(training, validation, test):
        seen.append((training, validation, test))
        return {name: np.zeros_like(test.scores) for name in ("source", "task", "ridge")}

    monkeypatch.setattr(left_out, "predictions", spied)
    rows = [np.arange(0, 200), np.arange(200, 240), np.arange(240)]
    parts = [world.of(of) for of in rows]
    found = left_out.left_out(*parts, [[texts[i] for i in of] for of in rows], "source", lambda line: None)
    assert {row.router for row in found} == {"single", "ridge", "oracle"}
    assert {row.source for row in found} == {"all", "one", "two"}
    for training, validation, test in seen:
        tested = set(left_out.sources_of(test))
        assert len(tested) == 1
        for part in (training, validation):
            assert not tested & set(left_out.sources_of(part))
        shared = world.features[1] if "one" in tested else world.features[0]
        assert not (training.features == shared).all(1).any()
    assert all(row.points == 0 for row in found if row.router == "single")


def test_each_task_is_left_out_once(rng):
    task = np.array([f"t{i % 37}" for i in range(400)])
    groups = left_out.groups_of(task, "task")
    assert len(set(groups)) == left_out.GROUPS
    for name in set(task):
        assert len(set(groups[task == name])) == 1
    sizes = [len(set(task[groups == group])) for group in range(left_out.GROUPS)]
    assert max(sizes) - min(sizes) <= 1


def test_ridge_is_the_penalised_optimum(rng):
    x, y = rng.normal(size=(40, 6)) + 3, rng.normal(size=40)
    for penalty, (weight, intercept) in zip((0.1, 10.0), prompts_needed.ridge(x, y, (0.1, 10.0)), strict=True):
        residual = x @ weight + intercept - y
        assert residual.sum() == pytest.approx(0, abs=1e-9)
        np.testing.assert_allclose(x.T @ residual + penalty * weight, 0, atol=1e-9)


def test_more_prompts_predict_better(rng):
    """Of models whose scores depend on the features; of coins, prompts predict nothing."""
    x = rng.normal(size=(1500, 8))
    scores = 1 / (1 + np.exp(-x @ rng.normal(size=(8, 4))))
    scores[rng.random(scores.shape) < 0.2] = np.nan
    few, many, most = prompts_needed.measured("s", x, scores, (30, 300, 900), 2)
    assert few.gain < many.gain
    assert many.gain > 50
    assert (many.models, most.prompts) == (4, 900)
    assert prompts_needed.measured("s", x, scores, (1400,), 2) == []  # no model has so many
    coins = prompts_needed.measured("s", x, rng.random((1500, 4)), (800,), 2)[0]
    assert abs(coins.gain) < 4


def test_a_pool_is_measured_from_its_texts(tmp_path, monkeypatch, capsys, rng):
    """Models that are good at one subject each: words say who is right."""
    rows = []
    for i in range(60):
        subject = ("apples pears", "rivers lakes")[i % 2]
        for m, model in enumerate(("x", "y", "z")):
            score = float(m == i % 2) if m < 2 else float(rng.random())
            prompt = f'["Question {i} on {subject}"]'
            rows.append({"prompt": prompt, "task": "t", "model": model, "score": score, "source": "one"})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pool.parquet")
    monkeypatch.setattr(prompts_needed, "LEAST", 50)
    monkeypatch.setattr(prompts_needed, "COMPONENTS", 3)
    table = tmp_path / "rows.csv"
    monkeypatch.setattr(sys, "argv", ["prompts_needed", str(tmp_path / "pool.parquet"), "--sizes", "40", "--csv", str(table)])
    prompts_needed.main()
    with table.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["source"], row["prompts"], row["models"]) == ("one", "40", "3")
    assert float(row["gain"]) > 30
    assert "one" in capsys.readouterr().out

"""Batch runs of a router that explores: the same draws in any chunks, order and after any interruption."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy.stats import binom

from p2l_engine import Router, checkpoint
from p2l_engine.backbone.uncertainty import Uncertainty
from p2l_engine.batch import BatchConfig, run
from p2l_engine.batch.worker import Route
from p2l_engine.engine import Engine
from tests.support import tiny
from tests.support.batch_files import PROMPTS, assert_routed_as, contents, output, write
from tests.support.catalogs import catalog

ADDED = ("propensity", "propensity_error")


@pytest.fixture(scope="module")
def explorer(tmp_path_factory) -> Router:
    """Of a tiny checkpoint that is unsure of three of its models."""
    loaded = checkpoint.load(tiny.write(tmp_path_factory.mktemp("tiny") / "checkpoint"))
    basis = torch.cat([torch.zeros(48, 1), torch.ones(1, 1)])
    unsure = Uncertainty(basis, torch.tensor([3.0, 5.0, 4.0]).reshape(3, 1, 1), ("alpha", "gamma", "delta"), loaded.models)
    engine = Engine(replace(loaded, uncertainty=unsure), "cpu", "float32")
    return Router(engine, catalog(), explore="thompson", seed=3)


def rows_of(folder):
    return output(folder).to_pylist()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"budget": 1.5}, {"budget": 1.5, "draw": "id"}, {"draw": "id"}])
def test_rows_are_the_routers_decisions_in_any_parts(options, explorer, tmp_path):
    given = write(tmp_path / "in.parquet")
    draws = [f"row {i}" for i in range(150)] if "draw" in options else None
    expected = explorer.route_batch(PROMPTS, options.get("budget"), draws=draws)
    for rows in (32, 1000):
        run(explorer, BatchConfig([given], str(tmp_path / f"out{rows}"), rows_per_part=rows, **options))
        found = rows_of(tmp_path / f"out{rows}")
        assert_routed_as(found, expected)
        for row, decision in zip(found, expected, strict=True):
            assert [row[name] for name in ADDED] == pytest.approx([getattr(decision, name) for name in ADDED], abs=1e-6)
    assert len({row["model"] for row in found}) > 1
    assert {0 < row["propensity"] <= 1 for row in found} == {True}
    alike = {(row["model"], row["propensity"]) for row, prompt in zip(found, PROMPTS, strict=True) if prompt == PROMPTS[0]}
    assert len(alike) == 1 or "draw" in options


@pytest.mark.slow
def test_rows_in_another_order_are_drawn_alike(explorer, tmp_path, rng):
    ids, order = [f"row {i}" for i in range(150)], rng.permutation(150).tolist()
    for name, places in (("a", range(150)), ("b", order)):
        given = write(tmp_path / f"{name}.parquet", [PROMPTS[i] for i in places], key=[ids[i] for i in places])
        config = BatchConfig([given], str(tmp_path / name), draw="key", budget=1.5, rows_per_part=40)
        run(explorer, config)
    first, second = ({row["key"]: row for row in rows_of(tmp_path / name)} for name in "ab")
    for key in ids:
        assert first[key]["model"] == second[key]["model"]
        assert first[key]["propensity"] == pytest.approx(second[key]["propensity"], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["prompt", "batch"])
def test_an_interrupted_run_is_resumed_to_the_same_bytes(scope, explorer, tmp_path):
    given = write(tmp_path / "in.csv")
    options = {"budget": 1.5, "budget_scope": scope, "draw": "id", "rows_per_part": 20}
    run(explorer, BatchConfig([given], str(tmp_path / "whole"), **options))
    config, seen = BatchConfig([given], str(tmp_path / "broken"), **options), []

    def interrupt(report):
        seen.append(report)
        if len(seen) in (3, 7):
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(explorer, config, progress=interrupt)
    run(explorer, config)
    whole, broken = (contents(tmp_path / name) for name in ("whole", "broken"))
    parts = [name for name in whole if name.startswith("part-")]
    assert len(parts) == 8
    assert {name: whole[name] for name in parts} == {name: broken[name] for name in parts}


@pytest.mark.slow
def test_a_budget_over_the_batch_holds_and_its_propensities_are_the_shares(explorer, tmp_path):
    n = 400
    given = write(tmp_path / "in.parquet", ["one prompt", "another prompt"] * (n // 2))
    options = {"budget": 1.2, "budget_scope": "batch", "max_share": {"gamma": 0.3}, "draw": "id", "rows_per_part": 64}
    report = run(explorer, BatchConfig([given], str(tmp_path / "out"), **options))
    found = rows_of(tmp_path / "out")
    assert report.spend / n <= 1.2 + 1e-9
    assert np.mean([sum(p["probability"] for p in row["policy"] if p["model"] == "gamma") for row in found]) <= 0.3 + 1e-9
    for place in (0, 1):
        own = found[place::2]
        for name in {row["model"] for row in own}:
            chosen = [row["propensity"] for row in own if row["model"] == name]
            p = float(np.mean(chosen))
            assert binom.cdf(len(chosen), len(own), min(p + 0.05, 1)) > 1e-6
            assert binom.sf(len(chosen) - 1, len(own), max(p - 0.05, 0)) > 1e-6


def test_a_price_in_place_of_a_budget(explorer, tmp_path):
    given = write(tmp_path / "in.parquet", PROMPTS[:40])
    run(explorer, BatchConfig([given], str(tmp_path / "out"), price=0.2, draw="id"))
    found = rows_of(tmp_path / "out")
    assert all(len(row["policy"]) == 1 and 0 < row["propensity"] <= 1 for row in found)
    assert len({row["model"] for row in found}) > 1


def test_rows_that_cannot_be_routed_have_no_propensity(explorer, tmp_path):
    given = write(tmp_path / "in.parquet", ["good", None, "good"])
    run(explorer, BatchConfig([given], str(tmp_path / "out")))
    found = rows_of(tmp_path / "out")
    assert [row["propensity"] is None for row in found] == [False, True, False]
    assert found[1]["error"]
    given = write(tmp_path / "none.parquet", pa.array([None], pa.string()))
    run(explorer, BatchConfig([given], str(tmp_path / "empty")))
    assert rows_of(tmp_path / "empty")[0]["propensity_error"] is None


def test_what_cannot_be_drawn_by_is_refused(explorer, tmp_path):
    given = write(tmp_path / "in.parquet", ["x"], tags=[["a"]], propensity=[0.5])
    for options, message in (
        ({"draw": "nothing", "keep": ["id"]}, r"draw: expected a column that is kept \(id\), got 'nothing'"),
        ({"draw": "nothing", "keep": None}, "propensity"),
        ({"draw": "tags", "keep": ["tags"]}, "draw: tags: expected texts or numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            run(explorer, BatchConfig([given], str(tmp_path / "out"), **options))
        assert not (tmp_path / "out.run").exists()
    plain = Router(explorer.engine, catalog())
    with pytest.raises(ValueError, match="draw: expected a router that explores"):
        run(plain, BatchConfig([given], str(tmp_path / "out"), draw="id", keep=["id"]))
    config = BatchConfig([given], str(tmp_path / "done"), keep=["id"])
    run(explorer, config)
    again = run(plain, config)
    assert (again.computed, again.changed) == (
        0,
        ("seed: was 3, is 0", "explore: was 'thompson', is None", "draw: was None, is None")[:2],
    )
    assert "propensity" not in output(tmp_path / "done").column_names


def test_the_worker_explores_too(explorer, tmp_path, monkeypatch):
    monkeypatch.setattr(Engine, "from_pretrained", classmethod(lambda *_: explorer.engine))
    route = Route(None, catalog(), budget=1.5, seed=3, explore="thompson", draw="id")
    ids = np.array([f"row {i}" for i in range(20)], object)
    found = route({"prompt": np.array(PROMPTS[:20], object), "id": ids})
    expected = explorer.route_batch(PROMPTS[:20], 1.5, draws=ids.tolist())
    assert found["model"].tolist() == [d.model for d in expected]
    np.testing.assert_allclose(found["propensity"], [d.propensity for d in expected], atol=1e-6)

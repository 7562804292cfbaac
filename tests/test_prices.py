"""train/prices.py: a catalog of a pool's models with the prices of a table."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from p2l_engine import Catalog
from p2l_engine.train import prices

ROOT = Path(__file__).resolve().parent.parent
PRICES = [
    ("maker", "a-1", 2, 8, "list@1 (MIT)"), ("host", "m/a-1", 1, 3, "list@1 (MIT)"), ("host", "b", 1, 4, "list@1 (MIT)"),
    ("other", "B", 0.5, 9, "list@1 (MIT)"), ("third", "b", 3, 5, "list@1 (MIT)"), ("maker", "words", 0.1, "", "list@1 (MIT)"),
    ("host", "t", 0.25, 1, "list@1 (MIT)"), ("host", "u", 1, 2, "list@1 (MIT)"),
]  # fmt: skip
MODELS = {
    "a": {"maker": "maker", "listed": {"maker": "a-1", "host": "m/a-1"}, "context": 8192, "accepts": ["text", "tools"]},
    "b": {"listed": {"host": "b", "other": "B", "third": "b"}},
    "t": {"listed": {"host": "t"}, "thinks": True},
    "u": {"listed": {"host": "u"}, "thinks": True},
    "gone": {"listed": {"host": "was there"}},
}


def written(path, header, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def run(folder, models=MODELS, listed=PRICES, answers=(("a", 1), ("t", 100), ("t", 300), ("t", ""))):
    prompts = [json.dumps(["x" * 40]), json.dumps(["y" * 100, "z" * 60])]
    pool = [(prompt, model) for prompt in (prompts[0], *prompts) for model in ("a", "b", "t", "u", "unpriced")]
    written(folder / "pool.csv", ("prompt", "model"), pool)
    written(folder / "prices.csv", ("provider", "model_id", "usd_per_m_in", "usd_per_m_out", "source"), listed)
    written(folder / "answers.csv", ("model", "completion_tokens"), answers)
    (folder / "models.yaml").write_text(yaml.safe_dump({"answer_tokens": 50, "models": models}))
    arguments = ["pool.csv", "--prices", "prices.csv", "--models", "models.yaml", "--answers", "answers.csv", "-o", "c.yaml"]
    paths = [str(folder / part) if "." in part else part for part in arguments]
    return CliRunner().invoke(prices.app, [*paths, "--date", "2026-08"])


def test_a_catalog_has_the_makers_price_or_the_median_of_hosts(tmp_path):
    result = run(tmp_path)
    assert result.exit_code == 0, result.output
    assert "not in the pool: gone" in result.output
    assert "4 models; 1 without a price" in result.output
    text = (tmp_path / "c.yaml").read_text()
    head = [line for line in text.splitlines() if line.startswith("# ")]
    assert "as listed in 2026-08 by list@1 (MIT)" in head[0]
    values = yaml.safe_load(text)["models"]
    tokens_in = (40 + 160) / 2 / prices.CHARACTERS  # each prompt once
    assert values["a"] == {
        "usd_per_m_in": 2.0, "usd_per_m_out": 8.0, "tokens_in": tokens_in, "tokens_out": 50,
        "context": 8192, "accepts": ["text", "tools"],
    }  # fmt: skip
    assert (values["b"]["usd_per_m_in"], values["b"]["usd_per_m_out"]) == (1.0, 5.0)  # the medians of each
    assert values["t"]["tokens_out"] == 50 + 200
    assert values["u"]["tokens_out"] == 50 + 200  # as the others that think
    catalog = Catalog.from_yaml(tmp_path / "c.yaml")
    assert (catalog.names, catalog.left_out) == (("a", "b", "t", "u"), ("unpriced",))
    assert catalog.models[0].cost == pytest.approx((2 * 25 + 8 * 50) / 1e6)
    assert (catalog.models[0].context, catalog.models[0].accepts) == (8192, ("text", "tools"))
    assert (catalog.models[1].context, catalog.models[1].accepts) == (None, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": {"a": {"listed": {"maker": "a-2"}}}}, "found none of a: maker: a-2; correct them"),
        ({"models": {"a": {"listed": {"host": "b"}, "maker": "maker"}}}, "models.a: Value error, maker: expected one of host"),
        ({"models": {"a": {"listed": {}}}}, "models.a.listed"),
        ({"models": {"a": {"listed": {"host": "b"}, "accepts": ["smells"]}}}, "models.a.accepts.0"),
        ({"models": {"a": {"listed": {"host": "b"}, "price": 1}}}, "models.a.price"),
        ({"models": {"x": {"listed": {"host": "b"}}}}, "expected models of the pool, found none"),
        ({"listed": [("host", "b", -1, 2, "s")]}, "host, b: expected prices >= 0, got '-1'"),
        ({"listed": [("host", "b", "inf", 2, "s")]}, "host, b: expected prices >= 0"),
        ({"listed": [("host", "b", 1, 2, "s"), ("host", "b", 1, 3, "s")]}, "host, b: expected one price, got two"),
        ({"answers": [("a", 1)]}, "expected answers of t, u, found none"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, change, message):
    result = run(tmp_path, **change)
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "c.yaml").exists()


def test_the_committed_catalog_is_of_the_committed_names():
    """Its prices are those of the table in ../shared/data: see the test below."""
    options = prices.Models.load(ROOT / "train" / "pools" / "models.yaml")
    catalog = Catalog.from_yaml(ROOT / "p2l_engine" / "builtin" / "pool-85" / "catalog.yaml")
    assert set(catalog.names) == set(options.models)
    for model in catalog.models:
        known = options.models[model.name]
        assert model.context == known.context
        assert set(model.accepts or ()) == set(known.accepts or ())


def test_the_committed_catalog_has_the_tables_prices(data):
    options = prices.Models.load(ROOT / "train" / "pools" / "models.yaml")
    found = prices.PriceTable.read(data / "model_prices_2026_08.parquet").of(options.models)
    for model in Catalog.from_yaml(ROOT / "p2l_engine" / "builtin" / "pool-85" / "catalog.yaml").models:
        assert model.usd_per_m_in == pytest.approx(found[model.name].usd_per_m_in)
        assert model.usd_per_m_out == pytest.approx(found[model.name].usd_per_m_out)

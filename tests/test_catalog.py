"""Catalogs: both layouts, and everything that may be wrong with one."""

from __future__ import annotations

import numpy as np
import pytest

from p2l_engine import Catalog
from p2l_engine.errors import CatalogError


def read(tmp_path, text):
    file = tmp_path / "models.yaml"
    file.write_text(text, encoding="utf-8")
    return Catalog.from_yaml(file)


def test_costs_prices_and_provider_settings(tmp_path):
    catalog = read(
        tmp_path,
        """
        unit: cents per request
        models:
          cheap: {cost: 0.5, provider: {type: openai, base_url: "http://localhost:1"}}
          expensive: {usd_per_m_in: 2, usd_per_m_out: 8, tokens_in: 500, tokens_out: 250}
          free: {cost: 0, context: 8192, accepts: [tools, text]}
        """,
    )
    assert (catalog.models[2].context, catalog.models[2].accepts) == (8192, ("text", "tools"))
    assert (catalog.models[1].context, catalog.models[1].accepts) == (None, None)
    assert catalog.names == ("cheap", "expensive", "free")
    np.testing.assert_allclose(catalog.costs, [0.5, 0.003, 0.0])
    assert catalog.models[0].provider["type"] == "openai"
    assert catalog.unit == "cents per request"


def test_the_layout_of_lmarena_p2l(tmp_path):
    catalog = read(
        tmp_path,
        """
        model_configs:
          gpt-4o:
            name: gpt-4o-2024-08-06
            type: openai
            temp: 0.7
            top_p: 1.0
            cost: 0.0044
            extra_fields: {reasoning_effort: high}
          o1-mini:
            {api_key: <your-api-key>, base_url: null, cost: 16.48, name: o1-mini, system_prompt: null, temp: 1.0, type: openai}
        name: test-router""",
    )
    assert catalog.names == ("gpt-4o", "o1-mini")
    assert catalog.models[0].cost == 0.0044
    assert catalog.models[0].provider["name"] == "gpt-4o-2024-08-06"
    assert "cost" not in catalog.models[0].provider


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: {a: {cst: 1}}", "models.a: unknown key 'cst', expected cost, .*did you mean 'cost'"),
        ("models: {a: {cost: 1, context: 0}}", "models.a.context: expected a whole number of at least 1, got 0"),
        ("models: {a: {cost: 1, context: 8k}}", "models.a.context: expected a whole number of at least 1, got '8k'"),
        ("models: {a: {cost: 1, accepts: text}}", "models.a.accepts: expected a list of text, image, .*got 'text'"),
        ("models: {a: {cost: 1, accepts: [text, smell]}}", "models.a.accepts: expected a list of text, image, .*smell"),
        ("model: {}", "unknown key 'model', expected models, unit, left_out; did you mean 'models'"),
        ("models: {}", "expected at least one model, got none"),
        ("unit: x", "expected the key 'models'"),
        ("models: [a]", "models: expected a mapping, got list"),
        ("[]", "expected a mapping, got list"),
        ("", "expected a mapping, got NoneType"),
        ("models: {a: {cost: -1}}", "models.a.cost: expected a finite number >= 0, got -1"),
        ("models: {a: {cost: .nan}}", "models.a.cost: expected a finite number >= 0, got nan"),
        ("models: {a: {cost: .inf}}", "models.a.cost: expected a finite number >= 0, got inf"),
        ("models: {a: {cost: cheap}}", "models.a.cost: expected a finite number >= 0, got 'cheap'"),
        ("models: {a: {cost: true}}", "models.a.cost: expected a finite number >= 0, got True"),
        ("models: {a: {}}", "models.a: expected 'cost', or usd_per_m_in"),
        ("models: {a: {usd_per_m_in: 1, tokens_in: 3}}", "missing usd_per_m_out, tokens_out"),
        ("models: {a: {cost: 1, tokens_in: 3}}", "expected either cost or prices"),
        ("models: {a: {cost: 1}, a: {cost: 2}}", "the key 'a' occurs twice"),
        ("models: {1: {cost: 1}}", "expected keys of text, got 1; quote it"),
        ("models: {a: {cost: 1}", "expected YAML"),
        ("models: " + "[" * 500, "nested too deeply"),
        ("model_configs: {a: {type: openai}}", "model_configs.a: expected 'cost'"),
        ("model_configs: {a: {cost: 1}}\nname: [x]", "name: expected text, got .'x'."),
        ("model_configs: {a: {cost: 1}}\nnames: x", "unknown key 'names', expected model_configs, name; did you mean 'name'"),
        ("models: {a: {cost: 1}}\nname: x", "unknown key 'name', expected models, unit, left_out"),
        ("model_configs: {a: {cost: 1, tempo: 2}}", "unknown key 'tempo', .*did you mean 'temp'"),
        ("unit: 3\nmodels: {a: {cost: 1}}", "unit: expected text, got 3"),
        ("left_out: b\nmodels: {a: {cost: 1}}", "left_out: expected a list of names, got 'b'"),
        ("left_out: [b, 2]\nmodels: {a: {cost: 1}}", r"left_out\[1\]: expected text, got 2"),
        ("left_out: [b, a]\nmodels: {a: {cost: 1}}", "every model once, got a more than once"),
        ("left_out: [b, b]\nmodels: {a: {cost: 1}}", "every model once, got b more than once"),
    ],
)
def test_what_is_wrong_is_named(text, message, tmp_path):
    with pytest.raises(CatalogError, match=message):
        read(tmp_path, text)


def test_a_missing_file_and_bytes_that_are_no_text(tmp_path):
    with pytest.raises(CatalogError, match="cannot be read"):
        Catalog.from_yaml(tmp_path / "none.yaml")
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CatalogError, match="cannot be read"):
        Catalog.from_yaml(tmp_path / "x.yaml")

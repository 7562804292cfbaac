"""``batch.Route`` called directly, without Ray or Spark."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from p2l_engine import Router
from p2l_engine.batch import Route
from tests.support.catalogs import catalog

PROMPTS = [f"question {i % 20} " + "so " * (i % 11) for i in range(50)]


@pytest.fixture(scope="module")
def arguments(engine):
    return {"checkpoint": str(engine.folder), "catalog": catalog(), "seed": 3, "device": "cpu", "dtype": "float32"}


def objects(values):
    out = np.empty(len(values), object)
    out[:] = values
    return out


def test_rows_keep_their_columns_and_get_the_routers_decisions(arguments, engine):
    arguments = pickle.loads(pickle.dumps(arguments))
    found = Route(**arguments, budget=1.5, coefficients="float32")({"id": np.arange(50), "prompt": np.array(PROMPTS)})
    decisions = Router(engine, catalog(), seed=3).route_batch(PROMPTS, 1.5)
    assert list(found) == ["id", "prompt", "model", "policy", "expected_cost", "win_rate", "score", "theta", "eta", "error"]
    assert found["id"].tolist() == list(range(50))
    assert found["model"].tolist() == [d.model for d in decisions]
    for row, d in zip(found["policy"], decisions, strict=True):
        assert {part["model"]: part["probability"] for part in row} == pytest.approx(d.policy, abs=1e-4)
    for name in ("expected_cost", "win_rate", "score"):
        np.testing.assert_allclose(found[name], [getattr(d, name) for d in decisions], atol=1e-4)
    c = engine.coefficients(PROMPTS)
    np.testing.assert_allclose(found["theta"], c.theta, atol=1e-5)
    np.testing.assert_allclose(found["eta"], c.eta, atol=1e-5)
    assert found["error"].tolist() == [None] * 50


def test_requests_and_nested_columns_are_read(arguments):
    """As pandas gives them: lists are arrays."""
    parts = np.array([{"type": "text", "text": "one"}, {"type": "image_url", "image_url": {"url": "x"}}], object)
    body = {"messages": np.array([{"role": "user", "content": parts}], object), "model": "m"}
    expected = Route(**arguments)({"prompt": np.array(["one\n[image]"])})["score"]
    for column in ("body", "body.messages", "row.body", "row.body.messages"):
        found = Route(**arguments, column=column)({"body": objects([body]), "row": objects([{"body": body}])})
        assert found["error"][0] is None
        np.testing.assert_array_equal(found["score"], expected)
    with pytest.raises(ValueError, match="column: expected one of body, got 'row.body'"):
        Route(**arguments, column="row.body")({"body": objects([body])})


def test_rows_that_cannot_be_routed_say_why(arguments):
    turns = [
        "one", None, float("nan"), np.array(["two", "turns"], object), [{"role": "assistant", "content": "no"}], 7, "\ud800",
        np.array([{"role": "user", "content": "a message"}], object),
    ]  # fmt: skip
    route = Route(**arguments, coefficients="float16")
    found = route({"prompt": objects(turns)})
    assert [why is None for why in found["error"]] == [True, False, False, True, False, False, False, True]
    assert "got nothing" in found["error"][1]
    assert found["error"][1] == found["error"][2]
    bad = found["error"] != None  # noqa: E711
    assert np.isnan(found["score"][bad]).all()
    assert np.isnan(found["theta"][bad]).all()
    assert found["theta"].dtype == np.float16
    assert all(model is None for model in found["model"][bad])
    alone = route({"prompt": np.array(["a message"])})
    assert found["score"][-1] == pytest.approx(alone["score"][0], abs=1e-4)
    for none in (objects([None, None]), objects([])):
        found = route({"prompt": none})
        assert all(len(column) == len(none) for column in found.values())
        assert found["theta"].shape == (len(none), len(route.router.engine.models))


def test_invalid_columns_and_options_are_refused(arguments):
    route = Route(**arguments)
    with pytest.raises(ValueError, match="column: expected one of text, got 'prompt'"):
        route({"text": np.array(["a"])})
    with pytest.raises(ValueError, match="columns of its own named model, score"):
        route({"prompt": np.array(["a"]), "model": np.array([1]), "score": np.array([1])})
    with pytest.raises(ValueError, match="budget 0.5 is infeasible"):
        Route(**arguments, budget=0.5)
    with pytest.raises(ValueError, match="price: cannot be combined with a budget"):
        Route(**arguments, budget=2.0, price=1.0)
    with pytest.raises(ValueError, match="dtype: expected one of float32"):
        Route(**{**arguments, "dtype": "int4"})


def test_a_price_maximises_win_rate_less_cost(arguments, engine):
    route = Route(**arguments, price=0.01)
    found = route({"prompt": np.array(PROMPTS)})
    v = route.router.win_rates(route.router.engine.coefficients(PROMPTS))
    np.testing.assert_allclose(
        found["win_rate"] - 0.01 * found["expected_cost"], (v - 0.01 * route.router.costs).max(1), atol=1e-5
    )

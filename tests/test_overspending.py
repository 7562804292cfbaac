"""routing.overspending: the budget that is really kept."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2l_engine import routing
from p2l_engine.catalog import Catalog, CatalogModel
from p2l_engine.chooser import Chooser
from p2l_engine.coefficients import Coefficients, ExpectedUsage
from p2l_engine.evaluation.spent import held_budget
from p2l_engine.feedback import feedback_model


def world(seed, n=60, m=4, noise=0.5, level=1.0):
    """Values, expected costs with errors, and real ones, which are ``level`` times as high on average."""
    rng = np.random.default_rng(seed)
    real = rng.gamma(4, 0.25, (n, m)) * [1, 2, 4, 8]
    expected = real / level * np.exp(rng.normal(0, noise, (n, m)) - noise**2 / 2)
    return rng.random((n, m)) + real / 20, expected, real


def spent(value, costs, real, budget):
    limit = max(budget, costs.min(1).mean() * (1 + 1e-9))
    found = routing.solve(routing.Problem(value, costs, limit, "batch"))
    return float((found.probabilities * np.take_along_axis(real, found.indices, 1)).sum(1).mean())


@settings(max_examples=4)
@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.floats(0.5, 3))
def test_the_divided_budget_is_kept(seed, noise, level):
    value, expected, real = world(seed, noise=noise, level=level)
    budget = 1.5 * float(real.min(1).mean()) + 1
    factor = routing.overspending(value, expected, real, budget)
    assert factor >= 1
    assert spent(value, expected, real, budget / factor) <= budget * (1 + 1e-9)
    if factor > 1:
        assert spent(value, expected, real, budget) > budget


def test_exact_costs_need_no_factor_and_costs_of_another_unit_their_ratio():
    value, _, real = world(0)
    assert routing.overspending(value, real, real, 2.0) == pytest.approx(1, abs=1e-6)
    assert routing.overspending(value, real / 3, real, 2.0) == pytest.approx(3, rel=1e-6)


@settings(max_examples=4)
@given(st.integers(0, 2**32 - 1), st.floats(0.5, 3))
def test_a_routers_budget_is_kept_at_what_answers_really_cost(seed, level):
    """Models without answers, and prompts that some have not answered, are left out; what the catalog says is a cost, too."""
    rng, names = np.random.default_rng(seed), ("a", "b", "c", "unknown")
    prices = {"a": (0.5, 1), "b": (0.5, 5), "c": (None, None), "unknown": (0.5, 9)}
    chooser = Chooser(
        names, feedback_model("bt"), Catalog(tuple(CatalogModel(name, 1e-4, {}, *of) for name, of in prices.items()))
    )
    real = rng.gamma(4, 25, (60, 4))
    expected = (real / level * np.exp(rng.normal(0, 0.5, real.shape))).astype(np.float32)
    real[:, 3], real[0, 0] = np.nan, np.nan
    usage = ExpectedUsage(rng.uniform(1, 9, 60).astype(np.float32), expected, None, np.array([True, True, True, False]))
    theta = rng.normal([0, 1, 2, 3], size=(60, 4)).astype(np.float32)
    found = held_budget(chooser, Coefficients(theta, None, names, feedback_model("bt"), usage=usage), expected, real, 2e-4)
    assert (found.prompts, found.models) == (59, ("a", "b", "c"))
    costs, paid = (
        np.where([True, True, False], (0.5 * usage.tokens_in[1:, None] + tokens[1:, :3] * [1, 5, 9]) / 1e6, 1e-4)
        for tokens in (expected, real)
    )
    value = chooser.win_rates(Coefficients(theta, None, names, feedback_model("bt")))[1:, :3]
    assert found.factor == pytest.approx(routing.overspending(value, costs, paid, 2e-4), rel=1e-4)
    assert spent(value, costs, paid, found.holds) <= 2e-4 * (1 + 1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 0.0}, "budget: expected a number above 0"),
        ({"budget": float("nan")}, "budget: expected a number above 0"),
        ({"budget": 1e-6}, "budget: expected at least .*, which the cheapest models really cost"),
        ({"paid": np.ones((60, 3))}, r"value, expected, paid: expected one shape"),
        ({"paid": -np.ones((60, 4))}, "expected, paid: expected costs above 0"),
        ({"expected": np.zeros((60, 4))}, "expected, paid: expected costs above 0"),
        ({"value": np.full((60, 4), np.nan)}, "value.*expected a finite number"),
    ],
)
def test_what_cannot_be_compared_is_refused(change, message):
    value, expected, real = world(1)
    with pytest.raises(ValueError, match=message):
        routing.overspending(**({"value": value, "expected": expected, "paid": real, "budget": 2.0} | change))

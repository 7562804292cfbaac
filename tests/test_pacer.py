"""A mean budget over a stream, against the optimum in hindsight."""

from __future__ import annotations

import logging
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from bench.streams import stream
from p2l_engine import routing
from p2l_engine.routing import BudgetPacer


@pytest.mark.parametrize("seed", range(10))
def test_the_mean_holds_within_one_percent_when_the_mix_shifts(seed):
    v, past, costs = stream(seed, 10_000)
    unbounded = min(costs[half.argmax(1)].mean() for half in (v[:5000], v[5000:]))
    budget = float(costs.min() + 0.4 * (unbounded - costs.min()))
    best = routing.solve_batch_budget(v, costs, budget)
    for pacer, points in ((BudgetPacer.learned(past, costs, budget), 0.5), (BudgetPacer(budget), 1.0)):
        chosen = np.array([pacer.choose(row, costs) for row in v])
        assert pacer.count == 10_000
        assert pacer.mean_cost == pytest.approx(costs[chosen].mean())
        assert abs(pacer.mean_cost / budget - 1) < 0.01
        lost = best.value.mean() - v[np.arange(len(v)), chosen].mean()
        assert 100 * lost < points


def test_a_budget_that_does_not_bind_takes_the_best():
    v, _, costs = stream(1, 2000, shift=False)
    pacer = BudgetPacer(float(costs.max()), price=0.0)
    chosen = np.array([pacer.choose(row, costs) for row in v])
    assert (chosen[200:] == v[200:].argmax(1)).all()


def test_an_infeasible_budget_warns_once(caplog):
    pacer = BudgetPacer(0.1, horizon=10)
    with caplog.at_level(logging.WARNING):
        for _ in range(100):
            assert pacer.choose([0.5, 0.9], [1.0, 2.0]) in (0, 1)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "may be infeasible" in caplog.text


def test_masks_and_settlements(rng):
    pacer = BudgetPacer(1.0)
    assert pacer.choose([0.1, 0.9, 0.2], [1.0, 1.0, 1.0], np.array([True, False, True])) == 2
    pacer.settle(4.0)
    assert pacer.spent == 5.0
    before = pacer.price
    pacer.settle(1.0)
    assert pacer.price > before


def test_state_survives_saving(tmp_path):
    v, past, costs = stream(3, 4000)
    budget = float(np.quantile(costs, 0.3))
    whole = BudgetPacer.learned(past, costs, budget)
    expected = [whole.choose(row, costs) for row in v]
    half = BudgetPacer.learned(past, costs, budget)
    first = [half.choose(row, costs) for row in v[:2000]]
    half.save(tmp_path / "pacer.json")
    again = BudgetPacer.load(tmp_path / "pacer.json")
    assert first + [again.choose(row, costs) for row in v[2000:]] == expected
    assert (again.count, again.spent, again.price) == (whole.count, whole.spent, whole.price)
    assert list(tmp_path.iterdir()) == [tmp_path / "pacer.json"]
    for text in (
        "{}",
        "no json",
        '{"budget": 0, "horizon": 500}',
        (tmp_path / "pacer.json").read_text().replace("2000", "null"),
    ):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=r"bad.json: expected the state of a BudgetPacer"):
            BudgetPacer.load(tmp_path / "bad.json")


def test_threads_lose_nothing():
    v, _, costs = stream(4, 4000)
    pacer = BudgetPacer(float(np.quantile(costs, 0.4)))
    with ThreadPoolExecutor(8) as pool:
        chosen = list(pool.map(lambda row: pacer.choose(row, costs), v))
    assert pacer.count == 4000
    assert pacer.spent == pytest.approx(costs[chosen].sum())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 0}, "budget: expected a number > 0, got 0"),
        ({"budget": math.nan}, "budget: expected a number > 0"),
        ({"budget": True}, "budget: expected a number > 0, got True"),
        ({"budget": 1.0, "price": -1}, "price: expected a number >= 0"),
        ({"budget": 1.0, "price": math.inf}, "price: expected a number >= 0"),
        ({"budget": 1.0, "horizon": 5}, "horizon: expected a whole number of prompts >= 10, got 5"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        BudgetPacer(**arguments)


def test_bad_prompts_are_named():
    pacer = BudgetPacer(1.0)
    for v, costs, allowed, message in [
        ([0.1, np.nan], [1, 1], None, r"v\[0, 1\]: expected a finite number"),
        ([0.1, 0.2], [1, -1], None, "costs.*expected a cost >= 0"),
        ([0.1, 0.2], [1], None, "costs: expected shape"),
        ([0.1, 0.2], [1, 1], [False, False], "allowed: expected bools"),
        ([0.1, 0.2], [1, 1], [1, 0], "allowed: expected bools"),
    ]:
        with pytest.raises(ValueError, match=message):
            pacer.choose(v, costs, allowed)
    assert pacer.count == 0

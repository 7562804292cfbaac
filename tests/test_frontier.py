"""The whole curve of cost against win rate."""

from __future__ import annotations

import numpy as np
import pytest

from p2l_engine import routing


def test_the_curve_holds_the_optimum_of_every_budget(rng):
    for costs in (rng.exponential(size=8), rng.exponential(size=(300, 8))):
        v = rng.random((300, 8))
        curve = routing.frontier(v, costs)
        assert (np.diff(curve.cost) > 0).all()
        assert (np.diff(curve.value) > 0).all()
        assert (np.diff(curve.price) < 0).all()
        for budget in np.linspace(curve.cost[0], curve.cost[-1] * 1.1, 7):
            best = routing.solve_batch_budget(v, costs, float(budget))
            assert curve.at(budget) == pytest.approx(best.value.mean(), rel=1e-12)
            each = routing.solve_budget(v, costs, np.maximum(budget, np.broadcast_to(costs, v.shape).min(1)))
            assert curve.at(each.cost.mean()) >= each.value.mean() - 1e-12
        np.testing.assert_allclose(curve.model_value, v.mean(0))
        np.testing.assert_allclose(curve.model_cost, np.broadcast_to(costs, v.shape).mean(0))
        above = curve.at(np.maximum(curve.model_cost, curve.cost[0]))
        assert (above >= curve.model_value - 1e-12).all()
        assert np.isnan(curve.at(curve.cost[0] * 0.99))


def test_thinned_keeps_the_ends_and_the_shape(rng):
    curve = routing.frontier(rng.random((5000, 6)), rng.exponential(size=6))
    thin = curve.thinned(100)
    assert len(thin.cost) <= 100 < len(curve.cost)
    assert (thin.cost[0], thin.cost[-1]) == (curve.cost[0], curve.cost[-1])
    # Between two of the 100 points, which are 2 / 99 of both axes apart at most, a concave curve rises by no more than that.
    np.testing.assert_allclose(thin.at(curve.cost), curve.value, atol=2 / 99 * np.ptp(curve.value))
    usual = np.random.default_rng(20)  # where the curve has no sharp bend, it is much nearer
    curve = routing.frontier(usual.random((5000, 6)), usual.exponential(size=6))
    np.testing.assert_allclose(curve.thinned(100).at(curve.cost), curve.value, atol=1e-3)


def test_odd_batches(rng):
    one = routing.frontier(np.array([[0.3, 0.9]]), np.array([1.0, 2.0]))
    np.testing.assert_allclose(one.cost, [1, 2])
    np.testing.assert_allclose(one.value, [0.3, 0.9])
    alone = routing.frontier(rng.random((5, 1)), np.ones(1))
    assert len(alone.cost) == 1
    equal = routing.frontier(np.tile([[0.3, 0.9, 0.5]], (1000, 1)), np.array([1.0, 2.0, 1.0]))
    assert len(equal.cost) == 2
    masked = routing.frontier(np.array([[0.3, 0.9], [0.4, 0.8]]), np.ones(2), np.array([[True, False], [True, True]]))
    assert np.isnan(masked.model_value[1])
    with pytest.raises(ValueError, match="v: expected at least one prompt"):
        routing.frontier(np.zeros((0, 2)), np.ones(2))
    free = routing.frontier(rng.random((50, 3)), np.zeros(3))
    assert free.at(0.0) == pytest.approx(free.value[-1])

"""Expected output tokens by prompt and model: the optimum, calibrated means, and what models learn from each other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from p2l_engine.learning import lengths
from p2l_engine.learning.lengths import deviance, fit_lengths

FAMILIES = ("poisson", "gamma")


def world(rng, prompts=600, hidden=32, models=6, own=0.1):
    """Hidden states, true means and observations: models share a pattern, and each has its own besides."""
    h = rng.normal(0, 1, (prompts, hidden)) * np.geomspace(3, 0.1, hidden)
    shared = rng.normal(0, 0.15, hidden)
    mean = np.exp(h @ (shared + rng.normal(0, own, (models, hidden))).T + rng.normal(5, 1, models))
    return h, mean, mean * rng.gamma(2, 0.5, mean.shape)


def names(k):
    return [f"m{i}" for i in range(k)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mode_of_a_row_is_scipys(family, rng):
    x = np.column_stack([rng.normal(0, 0.5, (80, 3)), np.ones(80)])
    y = np.exp(x @ [0.5, -1.0, 0.2, 2.0]) * rng.gamma(3, 1 / 3, 80)
    mean, precision = np.array([0.1, 0.0, 0.0, 2.0]), np.array([2.0, 3.0, 1.0, 0.01])
    row, covariance = lengths._mode(x, y, np.zeros(4), mean, precision, 1.7, family)

    def negative(w):
        fitted = np.exp(x @ w)
        own = fitted - y * np.log(fitted) if family == "poisson" else y / fitted + np.log(fitted)
        return own.sum() / 1.7 + 0.5 * precision @ (w - mean) ** 2

    found = minimize(negative, mean, method="BFGS", options={"gtol": 1e-7})
    np.testing.assert_allclose(row, found.x, atol=1e-4)
    step = 1e-3 * np.eye(4)
    bend = [[sum(a * b * negative(row + a * i + b * j) for a in (1, -1) for b in (1, -1)) / 4e-6 for i in step] for j in step]
    np.testing.assert_allclose(covariance, np.linalg.inv(bend), rtol=1e-3, atol=1e-5)


@settings(max_examples=10)
@given(seed=st.integers(0, 10**6), scale=st.floats(0.1, 10), missing=st.floats(0, 0.9))
def test_sums_of_predictions_are_sums_of_observations(seed, scale, missing):
    """The mean itself is calibrated, whatever the distribution: the score of the level is 0."""
    rng = np.random.default_rng(seed)
    h, _, y = world(rng, prompts=150, hidden=8, models=3)
    y = np.where(rng.random(y.shape) < missing, np.nan, y * scale)
    y[0] = scale
    found = fit_lengths(h, y, names(3))
    logs = h @ found.weight.T + found.bias
    for m in range(3):
        some = ~np.isnan(y[:, m])
        assert np.exp(logs[some, m]).sum() == pytest.approx(y[some, m].sum(), rel=0.02)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_tell_lengths_better_than_each_models_mean(family, rng):
    h, mean, y = world(rng)
    found = fit_lengths(h[:300], y[:300], names(6), family)
    expected, constant = found.expected(h[300:]), y[:300].mean(0)
    predictions = expected, np.tile(constant, (300, 1)), mean[300:]
    of, flat, best = (np.array([deviance(y[300:, m], at[:, m], family) for m in range(6)]) for at in predictions)
    assert np.median(of / flat) < 0.8
    assert np.median(of / best) < 1.5
    errors = (np.abs(y[300:] - at).mean(0) for at in (expected, predictions[1]))
    assert np.median(np.divide(*errors)) < 0.9
    assert np.median(expected.sum(0) / y[300:].sum(0)) == pytest.approx(1, abs=0.2)


def test_a_regression_of_logarithms_would_bill_too_little(rng):
    h, _, y = world(rng, prompts=2000, hidden=4)
    x = np.column_stack([h, np.ones(2000)])
    of_logs = np.exp(x @ np.linalg.lstsq(x, np.log(y), rcond=None)[0])
    assert of_logs.sum() < 0.9 * y.sum()
    assert fit_lengths(h, y, names(6)).expected(h).sum() == pytest.approx(y.sum(), rel=0.05)


@pytest.mark.slow
def test_a_model_with_few_observations_learns_from_the_others(rng):
    h, _, y = world(rng, own=0.03)
    ratios = []
    for m in range(6):
        few = y[:300].copy()
        few[12:, m] = np.nan
        together = fit_lengths(h[:300], few, names(6)).expected(h[300:])[:, m]
        alone = fit_lengths(h[:12], y[:12, m : m + 1], ["m0"]).expected(h[300:])[:, 0]
        mean = np.full(300, y[:12, m].mean())
        losses = [deviance(y[300:, m], at, "poisson") for at in (together, alone, mean)]
        ratios.append(losses[0] / np.array(losses[1:]))
    assert (np.median(ratios, 0) < 0.8).all()


def test_predictions_stay_within_what_was_seen(rng):
    h, _, y = world(rng, prompts=100)
    found = fit_lengths(h, y, names(6))
    far = found.expected(1e6 * h)
    assert (far <= y.max(0) * (1 + 1e-12)).all()
    assert (far >= y.min(0) * (1 - 1e-12)).all()
    assert found.observations == (100,) * 6


def test_equal_observations_of_equal_prompts():
    found = fit_lengths(np.ones((3, 4)), np.full((3, 2), 7.0), ["a", "b"])
    np.testing.assert_allclose(found.expected(np.ones((1, 4))), 7.0)


@pytest.mark.parametrize(
    ("hidden", "observed", "family", "what"),
    [
        (np.ones((3, 2)), np.ones((2, 1)), "poisson", r"expected \[N, D\] and \[N, 1\] with N > 0, got \[3, 2\] and \[2, 1\]"),
        (np.ones((0, 2)), np.ones((0, 1)), "poisson", "with N > 0"),
        (np.full((3, 2), np.inf), np.ones((3, 1)), "poisson", "hidden: expected finite numbers"),
        (np.ones((3, 2)), np.array([[1.0], [0.0], [2.0]]), "poisson", "observed: expected finite numbers above 0, or NaN, got"),
        (np.ones((3, 2)), np.array([[1.0], [np.inf], [2.0]]), "gamma", "observed: expected finite numbers above 0"),
        (np.ones((3, 2)), np.full((3, 1), np.nan), "gamma", "at least one of every model, got none of m0"),
        (np.ones((3, 2)), np.ones((3, 1)), "normal", "family: expected poisson or gamma, got 'normal'"),
    ],
)
def test_what_cannot_be_fitted_is_named(hidden, observed, family, what):
    with pytest.raises(ValueError, match=what):
        fit_lengths(hidden, observed, names(1), family)

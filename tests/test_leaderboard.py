"""Leaderboards over prompts: exact, mergeable, weighted, with intervals; the bootstrap; connected components."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit

from p2l_engine import Leaderboard
from p2l_engine.coefficients import Coefficients
from p2l_engine.feedback import feedback_model
from p2l_engine.leaderboard import OutcomeSums, fit, pair_count, pairs
from p2l_engine.leaderboard.fit import deviations
from p2l_engine.leaderboard.outcomes import probabilities
from tests.support.cases import slow_but

NAMES = ("bt", "bt-tie", "rk", "rk-reparam", "grk")


def coefficients(name, n, m, seed=0, spread=1.0):
    rng, feedback = np.random.default_rng(seed), feedback_model(name)
    theta = (spread * (rng.normal(size=m) + rng.normal(size=(n, m)))).astype(np.float32)
    eta = (rng.normal(size=n) + (22 if name == "rk" else 0)).astype(np.float32) if feedback.has_eta else None
    return Coefficients(theta, eta, tuple(f"m{i}" for i in range(m)), feedback)


def sums_of(c, **options):
    sums = OutcomeSums(c.feedback, c.models, **options)
    sums.add(c)
    return sums


@pytest.mark.parametrize("name", NAMES)
def test_one_model_cannot_be_compared(name):
    with pytest.raises(ValueError, match=r"models: expected at least two, which votes can compare, got \['m0'\]"):
        Leaderboard.over(coefficients(name, 6, 1), bootstrap=3)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), m=st.integers(2, 9), spread=st.sampled_from([0.1, 1.0, 10.0, 50.0, 200.0, 400.0]))
def test_probabilities_are_the_feedback_models(name, seed, m, spread):
    c = coefficients(name, 3, m, seed, spread)
    a, b = pairs(m)
    theta = torch.from_numpy(c.theta).double()
    eta = None if c.eta is None else torch.from_numpy(c.eta).double()
    expected = c.feedback.probabilities(theta[:, a], theta[:, b], None if eta is None else eta[:, None])
    found = probabilities(c.feedback, theta, eta)
    torch.testing.assert_close(found, expected[..., : found.shape[1]].movedim(-1, 1), rtol=1e-9, atol=1e-300)


@pytest.mark.parametrize("name", slow_but(("bt", "grk"), NAMES))
def test_the_fit_is_the_optimum(name):
    c = coefficients(name, 40, 6)
    means = sums_of(c).means[0]
    found = fit(c.feedback, means, 6)
    a, b = pairs(6)
    known = len(c.feedback.outcomes)

    def loss(x):
        theta, eta = torch.from_numpy(x[:6]), torch.tensor(x[6]) if c.feedback.has_eta else None
        log_p = c.feedback.log_probabilities(theta[a], theta[b], eta)[:, :known].T
        return -float((torch.from_numpy(means) * log_p).sum() / means.sum())

    start = np.zeros(6 + c.feedback.has_eta)
    other = minimize(loss, start, method="BFGS", options={"gtol": 1e-9})
    assert found.loss == pytest.approx(loss(np.append(found.theta, [] if found.eta is None else [found.eta])), abs=1e-12)
    assert found.loss <= other.fun + 1e-10
    if not c.feedback.grounded:
        assert found.theta.mean() == pytest.approx(0, abs=1e-12)


def test_one_prompt_gives_its_coefficients():
    for name in NAMES:
        c = coefficients(name, 1, 7, seed=3)
        found = fit(c.feedback, sums_of(c).means[0], 7)
        expected = c.theta[0].astype(np.float64)
        np.testing.assert_allclose(found.theta, expected - (0 if c.feedback.grounded else expected.mean()), atol=2e-6)


@pytest.mark.parametrize("name", NAMES)
def test_sums_of_two_halves_are_those_of_the_whole(name):
    c = coefficients(name, 31, 5)
    halves = OutcomeSums(c.feedback, c.models), OutcomeSums(c.feedback, c.models)
    halves[0].add(c.rows(slice(0, 13)))
    halves[1].add(c.rows(slice(13, 31)))
    both, whole = halves[0] + halves[1], sums_of(c)
    np.testing.assert_allclose(both.sums, whole.sums, rtol=1e-13)
    assert both.prompts == whole.prompts == 31
    np.testing.assert_allclose(
        Leaderboard.fitted(both).coefficients(c.models), Leaderboard.over(c).coefficients(c.models), atol=1e-9
    )


def test_weights_of_prompts_and_pairs():
    c = coefficients("grk", 6, 4)
    doubled = c.rows(np.array([0, 1, 2, 3, 4, 5, 2, 2]))
    weighted = Leaderboard.over(c, weights=[1, 1, 3, 1, 1, 1])
    np.testing.assert_allclose(weighted.coefficients(c.models), Leaderboard.over(doubled).coefficients(c.models), atol=1e-9)
    # Pairs that never meet: the fit is that of the others alone.
    meet = np.ones((4, 4))
    meet[3, :] = meet[:, 3] = 0
    meet[3, 0] = meet[0, 3] = 1
    bt = coefficients("bt", 6, 4)
    board = Leaderboard.over(bt, pair_weights=meet)
    of_03 = expit(bt.theta[:, 3].astype(float) - bt.theta[:, 0]).mean()
    x = board.coefficients(bt.models)
    assert expit(x[3] - x[0]) == pytest.approx(of_03, abs=1e-9)  # its only pair is met exactly
    with pytest.raises(ValueError, match="connect all models"):
        Leaderboard.over(bt, pair_weights=np.kron(np.eye(2), np.ones((2, 2))))
    with pytest.raises(ValueError, match="pair_weights: expected .4, 4."):
        Leaderboard.over(bt, pair_weights=np.ones((3, 3)))
    with pytest.raises(ValueError, match="weights: expected 6 finite numbers"):
        Leaderboard.over(bt, weights=[1, 1, -1, 1, 1, 1])
    with pytest.raises(ValueError, match="some prompts of a weight above 0"):
        Leaderboard.over(bt, weights=np.zeros(6))
    for wrong in (-1, 1.5, True):
        with pytest.raises(ValueError, match="bootstrap: expected a whole number of at least 0"):
            Leaderboard.over(bt, bootstrap=wrong)


def test_intervals_do_not_depend_on_the_weights_unit():
    c = coefficients("grk", 30, 4)
    boards = [Leaderboard.over(c, weights=np.full(30, weight), bootstrap=20) for weight in (1.0, 1e100)]
    for one, other in zip(*boards, strict=True):
        assert (one.low, one.high) == pytest.approx((other.low, other.high), rel=1e-6)
    samples = OutcomeSums(c.feedback, c.models, 20)
    samples.add(c)
    np.testing.assert_allclose(samples.sums.sum(1), np.broadcast_to(samples.weight[:, None], (21, 6)), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("name", "n"), [("bt", 5), ("bt", 10), ("bt", 50), ("grk", 10)])
def test_intervals_cover_as_often_as_they_say(name, n, weighted):
    """The coefficients of a large population lie in 95% of its samples' 95% intervals; 92% to 98% are three standard errors."""
    population = coefficients(name, 20_000, 4, seed=1)
    truth = Leaderboard.over(population).coefficients(population.models)
    rng, covered = np.random.default_rng(0), []
    for seed in range(300):
        sample, weights = population.rows(rng.choice(20_000, n)), rng.exponential(size=n) if weighted else None
        of = {standing.model: standing for standing in Leaderboard.over(sample, weights, bootstrap=200, seed=seed)}
        covered += [of[m].low is None or of[m].low <= x <= of[m].high for m, x in zip(population.models, truth, strict=True)]
    assert 0.92 < np.mean(covered) < 0.98


@pytest.mark.parametrize("name", slow_but(("bt",), NAMES))
def test_deviations_are_those_of_the_samples_own_optima_to_first_order(name):
    c = coefficients(name, 400, 6, seed=2)
    sums = sums_of(c, bootstrap=20)
    means, away = sums.sums[0] / 400, (sums.sums[1:] - sums.sums[0]) / 400
    whole = fit(c.feedback, means, 6)
    found = deviations(c.feedback, means, 1e-4 * away, whole).T
    exact = np.array([fit(c.feedback, means + 1e-4 * each, 6).theta - whole.theta for each in away])
    np.testing.assert_allclose(found, exact, atol=2e-3 * np.abs(exact).max())


def test_streams_keep_bootstrap_samples_apart():
    c = coefficients("bt", 10, 3)
    one, same, other = (sums_of(c, bootstrap=5, stream=stream) for stream in (0, 0, 1))
    with pytest.raises(ValueError, match="stream: expected another"):
        one + same
    assert (one + other).weight[0] == 20
    with pytest.raises(ValueError, match="other: expected sums of the same models"):
        one + sums_of(c, bootstrap=4)


def test_outcomes_are_the_mean_over_prompts():
    c = coefficients("bt", 50, 5)
    theta = c.theta.astype(np.float64)
    expected = expit(theta[:, :, None] - theta[:, None, :]).mean(0)
    a, b = pairs(5)
    np.testing.assert_allclose(sums_of(c).means[0], [expected[a, b], expected[b, a]], atol=1e-12)


@pytest.mark.parametrize("name", ["ols", "poisson"])
def test_leaderboards_of_values(name):
    c = coefficients(name, 50, 4)
    theta = c.theta.astype(np.float64)
    board = Leaderboard.over(c, bootstrap=50)
    expected = theta.mean(0) if name == "ols" else np.log(np.exp(theta).mean(0))
    np.testing.assert_allclose(board.coefficients(c.models), expected)
    assert all(each.win_rate is None and each.low < each.coefficient < each.high for each in board)
    assert Leaderboard.of(c).standings[0].win_rate is None
    with pytest.raises(ValueError, match="compares no pairs"):
        Leaderboard.over(c, pair_weights=np.ones((4, 4)))


def test_what_cannot_be_fitted_is_said():
    bt = feedback_model("bt")
    with pytest.raises(ValueError, match="outcomes: expected .2, 3."):
        fit(bt, np.ones((2, 4)), 3)
    with pytest.raises(ValueError, match="not all of them 0"):
        fit(bt, np.zeros((2, 3)), 3)
    always = np.array([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    bounded = fit(bt, always, 3, ridge=1e-3)
    assert np.isfinite(bounded.theta).all()
    assert bounded.theta[0] > bounded.theta[1] > bounded.theta[2]
    with pytest.raises(ValueError, match="always win or always lose.*give a ridge"):
        fit(bt, always, 3)
    with pytest.raises(ValueError, match="expected a model of votes, got 'ols'"):
        OutcomeSums(feedback_model("ols"), ("x", "y"))
    nan = coefficients("bt", 2, 3)
    nan.theta[0, 0] = np.nan
    with pytest.raises(ValueError, match="finite theta"):
        Leaderboard.over(nan)


def test_a_fit_that_rounding_stops_is_an_optimum():
    """Votes that are all ties: the last bits of loss and gradient cannot fall below the usual tolerance."""
    counts = np.zeros((4, 6))
    counts[2] = [36.0, 28.0, 37.0, 32.0, 31.0, 36.0]
    found = fit(feedback_model("grk"), counts, 4, ridge=1e-6)
    assert found.iterations < 30
    assert found.loss < 1e-4


def test_pairs_are_in_order():
    a, b = pairs(4)
    assert list(zip(a.tolist(), b.tolist(), strict=True)) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert pair_count(4) == 6


def test_few_prompts_have_a_leaderboard_too():
    """A bootstrap sample of three prompts is empty now and then."""
    for name in ("bt", "ols"):
        board = Leaderboard.over(coefficients(name, 3, 4), bootstrap=200)
        assert all(standing.low <= standing.high for standing in board)

"""The bootstrap's samples and intervals, and the connected components of a graph of models."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.special import expit

from p2l_engine.bootstrap import WeightSums, effective, interval, poisson, share_interval, shares, student, with_replacement
from p2l_engine.leaderboard.connected import components


def test_samples_hold_as_many_prompts_as_there_are():
    counts = with_replacement(50, 400, seed=3)
    assert counts.shape == (401, 50)
    assert (counts[0] == 1).all()
    assert (counts.sum(1) == 50).all()
    assert counts[1:].mean() == pytest.approx(1)
    assert counts[1:].var() == pytest.approx(1, abs=0.1)
    np.testing.assert_array_equal(counts, with_replacement(50, 400, seed=3))
    expected = np.random.default_rng(3).multinomial(50, np.full(50, 0.02), 400)  # as persisted figures were drawn
    np.testing.assert_array_equal(counts[1:], expected)


def test_poisson_samples_can_be_drawn_in_parts(seed):
    parts, rng = np.random.default_rng(seed), np.random.default_rng(seed)
    counts = np.concatenate([poisson(10, 300, parts), poisson(30, 300, parts)], axis=1)
    assert counts.shape == (300, 40)
    assert counts.mean() == pytest.approx(1, abs=0.1)
    np.testing.assert_array_equal(counts[:, :10], rng.poisson(1.0, (300, 10)))


def test_shares_leave_out_samples_without_weight():
    counts = np.array([[1.0, 1, 1], [0, 3, 0], [2, 0, 1]])
    np.testing.assert_allclose(shares(counts), counts / 3)
    np.testing.assert_allclose(shares(counts, [1, 0, 3]), [[0.25, 0, 0.75], [0.4, 0, 0.6]])
    with pytest.raises(ValueError, match="weights: expected some prompts of a weight above 0"):
        shares(counts, [0, 0, 0])


def test_students_quantiles_are_scipys():
    for level in (0.5, 0.8, 0.95, 0.999):
        df = np.array([1.0, 1.5, 2.0, 3.7, 9.0, 57.3, 199.0, 1e4, 1e6])
        np.testing.assert_allclose(student(level, df), stats.t.ppf((1 + level) / 2, df), rtol=1e-7)
    assert student(0.95, 0.5) == pytest.approx(stats.t.ppf(0.975, 0.5), rel=0.2)  # one sample of the bootstrap
    assert student(0.95, np.full((2, 3), 4.0)).shape == (2, 3)


def test_the_interval_of_a_mean_is_students(rng):
    x = rng.normal(size=12)
    deviations = (poisson(12, 200_000, rng) - 1) @ (x - x.mean()) / 12
    low, high = interval(x.mean(), deviations, WeightSums.of(np.ones(12)))
    half = stats.t.ppf(0.975, 11) * x.std(ddof=1) / np.sqrt(12)
    assert (low, high) == (pytest.approx(x.mean() - half, abs=0.01), pytest.approx(x.mean() + half, abs=0.01))


def test_intervals_without_knowledge_are_infinite():
    low, high = interval([1.0, 2.0, 3.0], np.ones((5, 3)), [WeightSums.of(of) for of in ([1.0], [1.0, 0.6], [1.0, 1.0])])
    assert low.tolist()[:2] == [-np.inf, -np.inf]
    assert high.tolist()[:2] == [np.inf, np.inf]
    assert np.isfinite([low[2], high[2]]).all()
    assert interval(0.0, np.ones(0), WeightSums.of(np.ones(10)))[1] == np.inf
    with pytest.raises(ValueError, match="level: expected a probability"):
        interval(0.0, np.ones(3), WeightSums.of(np.ones(10)), level=1.0)


@given(
    values=st.lists(st.floats(0, 1), min_size=1, max_size=12),
    scale=st.sampled_from([0.0, 1e-200, 1e-9, 1.0]),
    of_hits=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=40)
def test_intervals_of_shares_hold_the_share_within_0_and_1(values, scale, of_hits, seed):
    """Their ends p are where (p - mean)^2 = a p (1 - p), with a such that the mean has the bootstrap's spread."""
    x = np.round(values) if of_hits else np.array(values) * scale
    n, mean, weights = len(x), x.mean(), WeightSums.of(np.ones(len(x)))
    deviations = (poisson(n, 20, np.random.default_rng(seed)) - 1) @ (x - mean) / n
    low, high = share_interval(mean, deviations, weights, of_hits=of_hits)
    assert 0 <= low <= mean <= high <= 1
    other = share_interval(1 - mean, deviations, weights, of_hits=of_hits)
    np.testing.assert_allclose([1 - other[1], 1 - other[0]], [low, high], rtol=0, atol=1e-9)
    _, half = interval(0.0, deviations, weights)
    if n == 1:
        assert (low, high) == (0, 1)
    elif half > 1e-6:
        for end in (low, high):
            assert (end - mean) ** 2 * mean * (1 - mean) == pytest.approx(half**2 * end * (1 - end), rel=1e-6, abs=1e-15)
    elif half == 0:
        assert (low < high) == of_hits


def test_a_skewed_mean_of_win_rates_is_covered(rng):
    """Even intervals hold these means in 0.89 to 0.94 of the samples."""
    n, repeats = 10, 4000
    times = poisson(n, 400, rng) - 1
    nodes, weight = np.polynomial.hermite_e.hermegauss(60)
    covered = []
    for apart in (-0.52, 0.55, 1.22, 1.94):
        values = expit(apart + np.sqrt(2) * rng.normal(size=(n, repeats)))
        truth = weight @ expit(apart + np.sqrt(2) * nodes) / weight.sum()
        low, high = share_interval(values.mean(0), times @ (values - values.mean(0)) / n, WeightSums.of(np.ones(n)))
        covered.append(((low <= truth) & (truth <= high)).mean())
    assert min(covered) > 0.92
    assert 0.94 < np.mean(covered) < 0.96


def test_equal_weights_count_each_prompt():
    assert effective(np.full(7, 1e200)) == pytest.approx(7)
    assert effective([3, 0, 0]) == 1
    assert effective([0, 0]) == 0
    assert effective([1, 2]) == pytest.approx(9 / 5)


weights_of_prompts = st.lists(st.sampled_from([0.0, 1e-300, 1e-3, 0.5, 1.0, 1.7, 30.0, 1e300]), min_size=1, max_size=9)


@pytest.mark.slow
@given(weights_of_prompts.filter(any), weights_of_prompts)
def test_the_expected_variance_is_the_quadratic_forms_trace(weights, others):
    sums = WeightSums.of(weights) + WeightSums.of(others)
    w = [Fraction(of) for of in weights + others]
    share = [of / sum(w) for of in w]
    n, square = len(share), sum(s * s for s in share)
    away = [[(i == j) - share[j] for j in range(n)] for i in range(n)]  # of each value from the weighted mean
    trace = sum(share[i] ** 2 * away[i][j] ** 2 for i in range(n) for j in range(n))
    assert sums.effective == pytest.approx(float(1 / square))
    if sums.effective >= 2:
        assert sums.expected == pytest.approx(float(trace / square))


def test_a_weighted_mean_of_normal_values_is_covered(rng):
    weights = rng.exponential(size=10)
    share = weights / weights.sum()
    x = rng.normal(size=(40_000, 10))
    away = x - (x @ share)[:, None]
    variance = (away**2) @ share**2 / WeightSums.of(weights).expected  # as of infinitely many bootstrap samples
    half = stats.t.ppf(0.975, WeightSums.of(weights).effective - 1) * np.sqrt(variance)
    assert (np.abs(x @ share) <= half).mean() == pytest.approx(0.95, abs=0.01)


@pytest.mark.parametrize("connection", ["weak", "strong"])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.05, 0.2])
def test_components_are_scipys(connection, density, rng):
    for m in (1, 2, 7, 40):
        edges = rng.random((m, m)) < density
        found = components(edges, connection)
        _, expected = connected_components(coo_array(edges), directed=True, connection=connection)
        # The same groups, numbered by their first members.
        first = [int(np.flatnonzero(expected == label)[0]) for label in expected]
        _, renumbered = np.unique(first, return_inverse=True)
        np.testing.assert_array_equal(found, renumbered)

"""Fits of leaderboards: saturated outcomes, outcomes that never come, and what the linear systems of graphs keep."""

from __future__ import annotations

import time
from dataclasses import replace
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from p2l_engine import Leaderboard
from p2l_engine.coefficients import Coefficients
from p2l_engine.feedback import feedback_model, formulas
from p2l_engine.leaderboard import fit, pair_count, pairs
from p2l_engine.leaderboard.bounds import bounds
from p2l_engine.leaderboard.losses import Loss
from p2l_engine.leaderboard.network import eliminate, solve_flows, solve_nodes
from tests.support.cases import slow_but

NAMES = ("bt", "bt-tie", "rk", "rk-reparam", "grk")


def one_prompt(name, theta, eta=0.5):
    feedback = feedback_model(name)
    ties = np.array([eta + (22 if name == "rk" else 0)], np.float32) if feedback.has_eta else None
    return Coefficients(np.array([theta], np.float32), ties, tuple(f"m{i}" for i in range(len(theta))), feedback)


def expected(c):
    theta = c.theta[0].astype(np.float64)
    return theta - (0 if c.feedback.grounded else theta.mean())


SATURATED = [[20, 0, 1], [30, 0, -30], [300, 0, -300], [30, 30, 0, 0], [300, 299, 0, -1], [-30, -31, 1]]


@pytest.mark.parametrize("theta", slow_but(SATURATED[2:5:2], SATURATED))
@pytest.mark.parametrize("name", NAMES)
def test_saturated_coefficients_come_back(name, theta):
    c = one_prompt(name, theta)
    board = Leaderboard.over(c, bootstrap=20)
    np.testing.assert_allclose(board.coefficients(c.models), expected(c), rtol=1e-9, atol=1e-9)
    assert all(standing.interval == "" for standing in board)  # one prompt says nothing of others


def test_the_first_saturated_leaderboard():
    assert Leaderboard.over(one_prompt("bt", [20, 0, 1])).standings[0].coefficient == pytest.approx(13.0, rel=1e-12)
    assert Leaderboard.over(one_prompt("bt", [30, 0, -30])).standings[0].coefficient == pytest.approx(30.0, rel=1e-12)


@pytest.mark.parametrize("name", slow_but(("bt", "grk"), NAMES))
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), m=st.integers(3, 6), spread=st.sampled_from([0.01, 1.0, 5.0, 30.0]))
def test_any_single_prompts_coefficients_come_back(name, seed, m, spread):
    rng = np.random.default_rng(seed)
    theta = spread * rng.normal(size=m)
    if name == "rk-reparam":  # its common level, and eta, are lost in the rounding of outcomes unless some model is near 0
        theta[0] = rng.normal()
    c = one_prompt(name, theta, eta=rng.normal())
    board = Leaderboard.over(c)
    np.testing.assert_allclose(board.coefficients(c.models), expected(c), rtol=1e-8, atol=1e-8)
    if c.feedback.has_eta:
        assert board.eta == pytest.approx(float(c.eta[0]), abs=1e-4)


def test_a_saturated_mean_of_prompts_is_mpmaths():
    """Bradley-Terry's optimum for two prompts of theta +-(20, 0, -15), ..., by Newton's method with 60 digits."""
    theta = np.array([[20.0, 0.0, -15.0], [24.0, 1.0, -9.0]])
    c = Coefficients(theta.astype(np.float32), None, ("x", "y", "z"), feedback_model("bt"))
    with mpmath.workdps(60):
        sigmoid = lambda x: 1 / (1 + mpmath.exp(-x))  # noqa: E731
        p = {
            (a, b): sum(sigmoid(mpmath.mpf(row[a] - row[b])) for row in theta.tolist()) / 2 for a in range(3) for b in range(3)
        }

        def gradient(x, y):
            at = [x, y, 0]
            return [sum(p[a, b] - sigmoid(at[a] - at[b]) for b in range(3) if b != a) for a in (0, 1)]

        found = Leaderboard.over(c).coefficients(c.models)
        near = [round(float(v - found[2]), 2) for v in found[:2]]
        x, y = mpmath.findroot(gradient, near, maxsteps=100)
        exact = np.array([float(v - (x + y) / 3) for v in (x, y, 0)])
    np.testing.assert_allclose(found, exact, rtol=1e-9)


def counts_of(kinds, outcomes, rng, m=4):
    counts = np.zeros((outcomes, pair_count(m)))
    for kind in kinds:
        counts[min(kind, outcomes - 1)] += rng.integers(1, 40, pair_count(m))
    return counts


def negative_log_likelihood(feedback, counts, x, m):
    a, b = pairs(m)
    eta = torch.tensor(x[m], dtype=torch.float64) if feedback.has_eta else None
    theta = torch.from_numpy(x[:m])
    log_p = feedback.log_probabilities(theta[a], theta[b], eta)[:, : len(counts)].T.numpy()
    return -float((counts * log_p).sum())


KINDS = [(0,), (1,), (2,), (3,), (0, 1), (0, 2), (0, 3), (2, 3), (0, 1, 2), (0, 1, 2, 3)]


@pytest.mark.parametrize("kinds", slow_but(KINDS[1::4], KINDS))
@pytest.mark.parametrize("name", NAMES)
def test_votes_of_some_outcomes_only_have_an_optimum_with_a_ridge(name, kinds, rng):
    feedback = feedback_model(name)
    if min(kinds) > 1 and not feedback.has_eta:
        return  # bt knows no ties, and bt-tie's are counted as halves
    counts = counts_of(kinds, len(feedback.outcomes), rng)
    found = fit(feedback, counts, 4, ridge=1e-6)
    assert found.iterations < 60
    x = np.append(found.theta, [] if found.eta is None else [found.eta])
    ridge = 1e-6 * counts.sum() / pair_count(4) / 2
    whole = lambda x: negative_log_likelihood(feedback, counts, x, 4) + ridge * x @ x  # noqa: E731
    assert found.loss == pytest.approx(negative_log_likelihood(feedback, counts, x, 4) / counts.sum(), rel=1e-9, abs=1e-15)
    best = whole(x)
    for _ in range(30):
        near = x + 10.0 ** rng.uniform(-4, 0) * rng.normal(size=len(x))
        assert whole(near) >= best - 1e-12 * counts.sum()


def test_votes_that_are_all_ties_converge():
    counts = np.zeros((3, 6))
    counts[2] = [37, 34, 35, 32, 33, 29]
    found = fit(feedback_model("rk-reparam"), counts, 4, ridge=1e-6)
    assert found.iterations < 30
    assert found.theta == pytest.approx(0, abs=1e-4)
    with pytest.raises(ArithmeticError, match="the outcomes give no bound to .*; give a ridge, such as 1e-6"):
        fit(feedback_model("rk-reparam"), counts, 4)


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    name=st.sampled_from(NAMES),
    never=st.sampled_from([0.0, 0.5]),
    scale=st.sampled_from([-200, 0, 150]),
)
def test_wild_weights_have_an_optimum_or_a_reason_in_few_evaluations(seed, name, never, scale):
    """Weights over ten orders of magnitude, half of them 0 or none. Searches along a step ended in thousands of evaluations."""
    rng, feedback = np.random.default_rng(seed), feedback_model(name)
    shape = (len(feedback.outcomes), pair_count(4))
    counts = np.exp(rng.normal(0, 6, shape)) * (rng.random(shape) >= never) * 10.0**scale
    counts[0, 0] += 10.0**scale
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        for method in ("value", "distance"):
            plain = getattr(Loss, method)
            patch.setattr(Loss, method, lambda self, x, plain=plain: calls.append(1) or plain(self, x))
        for ridge in (0.0, 1e-6):
            try:
                fit(feedback, counts, 4, ridge=ridge)
            except (ValueError, ArithmeticError) as error:
                assert not ridge
                assert "give a ridge" in str(error) or "connect all models" in str(error)
    assert len(calls) < 1500


NONE = -np.inf
# Powers of ten of the weights of votes for A and for B, of each pair.
WEIGHTS_FAR_APART = {
    "one outcome of each pair": (
        5,
        [80, NONE, 34, NONE, NONE, NONE, 69, NONE, NONE, 3],
        [NONE, NONE, NONE, 20, 59, NONE, NONE, 75, NONE, NONE],
    ),
    "steps that lead back": (4, [-62, -141, -148, 84, 109, 144], [-15, -58, -143, 83, -115, 64]),
    "hundreds of short steps": (4, [134, 77, 77, -75, -13, -45], [-74, 15, 150, 96, -96, -6]),
    "more of them": (4, [-131, 148, -21, 131, 129, -70], [142, 150, 72, -148, -122, 74]),
}


def exact_strengths(counts, m, start):
    """[M]: Newton's method on Bradley and Terry's likelihood in 400 digits, from near the optimum."""
    x = [mpmath.mpf(of) for of in start]
    with mpmath.workdps(400):
        for _ in range(200):
            gradient, hessian = mpmath.zeros(m, 1), mpmath.zeros(m, m)
            for pair, (i, j) in enumerate(zip(*(of.tolist() for of in pairs(m)), strict=True)):
                p = 1 / (1 + mpmath.exp(x[j] - x[i]))
                won, lost = (mpmath.mpf(float(of)) for of in counts[:, pair])
                for at, sign in ((i, 1), (j, -1)):
                    gradient[at] += sign * (lost * p - won * (1 - p))
                    for to, other in ((i, 1), (j, -1)):
                        hessian[at, to] += sign * other * (won + lost) * p * (1 - p)
            step = mpmath.lu_solve(hessian[0 : m - 1, 0 : m - 1], -gradient[0 : m - 1, 0])
            longest = max(abs(of) for of in step)
            x = [of + min(1, 5 / longest) * (step[i] if i < m - 1 else 0) for i, of in enumerate(x)]
            if longest < mpmath.mpf(10) ** -20:
                break
        return np.array([float(of - sum(x) / m) for of in x])


@pytest.mark.parametrize("case", slow_but([*WEIGHTS_FAR_APART][:2], WEIGHTS_FAR_APART))
def test_weights_far_apart_have_the_exact_optimum(case):
    m, *exponents = WEIGHTS_FAR_APART[case]
    counts = 10.0 ** np.array(exponents)
    found = fit(feedback_model("bt"), counts, m).theta
    np.testing.assert_allclose(found, exact_strengths(counts, m, found), rtol=1e-8, atol=1e-8)


@pytest.mark.slow
@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), m=st.integers(2, 5), span=st.sampled_from([20, 100, 300]), some=st.sampled_from([1.0, 0.6]))
def test_weights_far_apart_have_the_exact_optimum_or_none(seed, m, span, some):
    """What is given as the optimum is one; where it is not reached, that is said."""
    rng = np.random.default_rng(seed)
    counts = 10.0 ** rng.uniform(-span / 2, span / 2, (2, pair_count(m))) * (rng.random((2, pair_count(m))) < some)
    counts[0, 0] += 1.0
    try:
        found = fit(feedback_model("bt"), counts, m).theta
    except (ValueError, ArithmeticError) as error:
        assert "give a ridge" in str(error) or "connect all models" in str(error)
    else:
        np.testing.assert_allclose(found, exact_strengths(counts, m, found), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kinds", slow_but(KINDS[2:7:4], KINDS[:-1]))
@pytest.mark.parametrize("name", NAMES)
def test_without_a_ridge_there_is_an_optimum_or_a_reason_soon(name, kinds, rng):
    feedback = feedback_model(name)
    if min(kinds) > 1 and not feedback.has_eta:
        return
    counts = counts_of(kinds, len(feedback.outcomes), rng)
    start = time.process_time()
    try:
        found = fit(feedback, counts, 4)
    except (ValueError, ArithmeticError) as error:
        assert "give a ridge" in str(error)
    else:
        bounded = fit(feedback, counts, 4, ridge=1e-9)
        assert found.loss <= bounded.loss + 1e-9
    assert time.process_time() - start < 5


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(name=st.sampled_from(NAMES[2:]), seed=st.integers(0, 10**6))
@example("rk", -1)
def test_a_far_tie_parameter_leaves_steps_that_lower_the_loss(name, seed):
    """One pair whose outcomes weigh orders of magnitude apart: eta's step is cut, and the others' must fit the cut one."""
    feedback, rng = feedback_model(name), np.random.default_rng(abs(seed))
    counts = np.zeros((len(feedback.outcomes), 6))
    counts[:, 0] = 10.0 ** rng.uniform(-60, 0, len(counts))
    if seed < 0:
        counts[:, 0] = [1.31500046e33, 1.37900337e98, 2.95879399e70]
    found = fit(feedback, counts, 4, ridge=1e-6)
    x = np.append(found.theta, found.eta)
    ridge = 1e-6 * counts.sum() / 6 / 2
    whole = lambda x: (negative_log_likelihood(feedback, counts, x, 4) + ridge * x @ x) / counts.sum()  # noqa: E731
    for _ in range(30):
        assert whole(x + 10.0 ** rng.uniform(-4, 0) * rng.normal(size=len(x))) >= whole(x) - 1e-12


def test_the_ridge_is_not_part_of_the_loss():
    counts = np.array([[3.0, 4.0, 5.0], [1.0, 0.0, 2.0]])
    for name in ("bt", "grk"):
        feedback = feedback_model(name)
        some = np.pad(counts, [(0, len(feedback.outcomes) - 2), (0, 0)], constant_values=1.0)
        strong = fit(feedback, some, 3, ridge=1.0)
        x = np.append(strong.theta, [] if strong.eta is None else [strong.eta])
        assert strong.loss == pytest.approx(negative_log_likelihood(feedback, some, x, 3) / some.sum(), rel=1e-12)


def test_a_model_without_eta_need_not_be_bradley_terrys(monkeypatch):
    """A feedback model of another form: probits in place of logits."""

    def probit(a, b, eta, ground):
        return torch.special.log_ndtr(a - b), torch.special.log_ndtr(b - a)

    monkeypatch.setitem(formulas._votes, "probit", probit)
    feedback = replace(feedback_model("bt"), name="probit", rao_kupper=False)
    counts = np.array([[30.0, 40.0, 25.0], [10.0, 5.0, 20.0]])
    other = minimize(lambda x: negative_log_likelihood(feedback, counts, x, 3) + x.sum() ** 2, np.zeros(3), tol=1e-12)
    np.testing.assert_allclose(fit(feedback, counts, 3).theta, other.x, atol=1e-5)


@given(seed=st.integers(0, 10**6), n=st.integers(2, 6), span=st.sampled_from([0, 20, 200]))
@settings(deadline=None, max_examples=40)
def test_the_systems_of_graphs_keep_every_digit(seed, n, span):
    """Weights over many orders of magnitude, against exact fractions."""
    rng = np.random.default_rng(seed)
    w = np.triu(10.0 ** rng.uniform(-span, 0, (n, n)), 1)
    w += w.T
    f = np.triu(w * rng.normal(size=(n, n)), 1)
    f -= f.T
    exact = [
        [Fraction(w[i, j]) if i != j else -sum(Fraction(v) for k, v in enumerate(w[i]) if k != i) for j in range(n)]
        for i in range(n)
    ]
    rows = [[-v for v in row[:-1]] + [sum(Fraction(v) for v in f[i])] for i, row in enumerate(exact[:-1])]
    for k in range(n - 1):  # Gauss
        pivot = next(i for i in range(k, n - 1) if rows[i][k] != 0)
        rows[k], rows[pivot] = rows[pivot], rows[k]
        for i in range(n - 1):
            if i != k:
                share = rows[i][k] / rows[k][k]
                rows[i] = [x - share * y for x, y in zip(rows[i], rows[k], strict=True)]
    x = [float(rows[k][-1] / rows[k][k]) for k in range(n - 1)] + [0.0]
    stars = eliminate(w)
    np.testing.assert_allclose(solve_flows(stars, f), x, rtol=1e-9, atol=1e-12 * n)
    if span == 0:
        np.testing.assert_allclose(solve_nodes(stars, f.sum(1)[:, None])[:, 0], x, rtol=1e-7, atol=1e-9)


def test_what_outcomes_bound():
    bt, grk = feedback_model("bt"), feedback_model("grk")
    counts = np.zeros((2, 6))  # pairs 01 02 03 12 13 23
    counts[:, 0] = 5  # 0 and 1 beat each other
    counts[0, 4] = 3  # 1 beats 3
    counts[1, 1] = 3  # 2 beats 0
    above, below, anchor = bounds(bt, counts, 4)
    assert above.tolist() == [True, True, False, True]
    assert below.tolist() == [True, True, True, False]
    assert anchor.tolist() == [True, True, False, False]
    whole = np.zeros((4, 6))
    whole[:2] = counts
    above, below, anchor = bounds(grk, whole, 4)
    assert not above.any()  # wins and losses alone say nothing of good and bad
    assert below.tolist() == [True, True, True, False]
    whole[3, 0] = 1
    assert bounds(grk, whole, 4).above.tolist() == [True, True, False, True]
    assert bounds(grk, whole, 4).anchor.tolist() == [True, True, False, False]

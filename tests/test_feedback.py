"""The feedback models against their formulas in float64, their limits, and each other."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from p2l_engine.feedback import NAMES, Outcome, feedback_model
from p2l_engine.leaderboard.losses import pair_derivatives
from tests.support.cases import slow_but

VOTE_MODELS = [name for name in NAMES if not feedback_model(name).of_values]
coefficients = st.floats(-4, 4)
etas = st.floats(-3, 3)


def formula(name: str, a: float, b: float, eta: float) -> list[float]:
    """The four probabilities as the paper and the published code write them."""
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    if name in ("bt", "bt-tie"):
        return [sigmoid(a - b), sigmoid(b - a), 0.0, 0.0]
    if name == "rk":
        t = max(math.log1p(math.exp(0.1 * (eta - 22.5))) / 0.1, 0.02)
        win, lose = sigmoid(a - b - t), sigmoid(b - a - t)
        return [win, lose, 1 - win - lose, 0.0]
    phi_a, phi_b, lam = math.exp(a), math.exp(b), math.exp(eta) + 1.000001
    win, lose = phi_a / (phi_a + lam * phi_b + 1), phi_b / (phi_b + lam * phi_a + 1)
    if name == "rk-reparam":
        return [win, lose, 1 - win - lose, 0.0]
    bad = 1 / (1 + phi_a + phi_b)
    return [win, lose, 1 - win - lose - bad, bad]


@pytest.mark.parametrize("name", slow_but(("bt", "grk"), VOTE_MODELS))
@given(a=coefficients, b=coefficients, eta=etas)
def test_probabilities_are_the_published_formulas(name, a, b, eta):
    tensors = [torch.tensor(x, dtype=torch.float64) for x in (a, b, eta)]
    p = feedback_model(name).probabilities(*tensors)
    np.testing.assert_allclose(p, formula(name, a, b, eta), atol=1e-12)


@pytest.mark.parametrize("name", VOTE_MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_safe_and_differentiable_at_plus_minus_50(name, dtype):
    model = feedback_model(name)
    ends = torch.tensor([-50.0, -20.0, 0.0, 20.0, 50.0], dtype=dtype)
    a, b, eta = (t.clone().requires_grad_() for t in torch.meshgrid(ends, ends, ends, indexing="ij"))
    for outcome in model.outcomes:
        likelihood = model.log_likelihood(a, b, eta, torch.full(a.shape, int(outcome)))
        assert torch.isfinite(likelihood).all()
        assert (likelihood <= 1e-6).all()
        grads = torch.autograd.grad(likelihood.sum(), [a, b, *([eta] if model.has_eta else [])])
        assert all(torch.isfinite(g).all() for g in grads)
    total = model.probabilities(a, b, eta).sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", VOTE_MODELS)
def test_second_derivatives_are_finite_where_exp_overflows(name):
    model = feedback_model(name)
    ends = torch.tensor([-2000.0, -800.0, -1.0, 800.0, 2000.0], dtype=torch.float64)
    a, b, eta = (t.clone().requires_grad_() for t in torch.meshgrid(ends, ends, ends, indexing="ij"))
    by = [a, b, *([eta] if model.has_eta else [])]
    for outcome in model.outcomes:
        likelihood = model.log_likelihood(a, b, eta, torch.full(a.shape, int(outcome)))
        for slope in torch.autograd.grad(likelihood.sum(), by, create_graph=True):
            assert torch.isfinite(slope).all()
            assert all(torch.isfinite(bend).all() for bend in torch.autograd.grad(slope.sum(), by, retain_graph=True))


def differentiated(model, a, b, eta):
    """log P [P, K] of the K outcomes, its gradient [P, K, 4] and its Hessian [P, K, 4, 4] by a, b, ground and eta, by torch."""
    x = torch.from_numpy(np.stack([a, b, np.zeros(len(a)), eta], 1)).requires_grad_()
    log_p = model.log_probabilities(x[:, 0], x[:, 1], x[:, 3], x[:, 2])[:, : len(model.outcomes)]

    def slopes(of):
        more = {"retain_graph": True, "create_graph": True, "materialize_grads": True}
        found = [torch.autograd.grad(one.sum(), x, **more)[0] for one in of.unbind(-1)]
        return torch.stack(found, 1)

    slope = slopes(log_p)
    bend = slopes(slope.flatten(1)).unflatten(1, slope.shape[1:])
    return [of.detach().numpy() for of in (log_p, slope, bend)]


KINK = feedback_model("rk").least_eta


@pytest.mark.slow
@pytest.mark.parametrize("name", VOTE_MODELS)
@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), spread=st.sampled_from([0.01, 1.0, 10.0, 50.0, 500.0]), n=st.integers(0, 40))
def test_derivatives_are_torchs(name, seed, spread, n):
    a, b, eta = np.random.default_rng(seed).normal(size=(3, n)) * spread
    # Where rk's tie parameter is at its least, and where torch's softplus becomes linear; more pairs than one chunk holds.
    a, b, eta = (
        np.r_[a, np.zeros(4), np.zeros(512)],
        np.r_[b, np.ones(4), np.ones(512)],
        np.r_[eta, [KINK - 1, KINK + 1], [222, 223], np.zeros(512)],
    )
    model = feedback_model(name)
    for found, expected in zip(pair_derivatives(model, a, b, eta), differentiated(model, a, b, eta), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-10 * max(1.0, spread))


@pytest.mark.parametrize(
    ("name", "point"),
    [("rk", (12.0, -11.0, 29.0)), ("rk-reparam", (-40.0, 3.0, 20.0)), ("grk", (-30.0, -35.0, 1.0)), ("grk", (20.0, 1.0, -9.0))],
)
def test_derivatives_of_rare_outcomes_keep_their_digits(name, point):
    """mpmath's of the published formulas, with digits enough for probabilities that float64 holds as logarithms alone."""
    model, (a, b, eta) = feedback_model(name), point
    log_p, slope, bend = (of[0] for of in pair_derivatives(model, *(np.array([x]) for x in point)))
    with mpmath.workdps(120):
        sigmoid = lambda x: 1 / (1 + mpmath.exp(-x))  # noqa: E731

        def log_probability(a, b, ground, eta, k):
            if name == "rk":
                t = max(mpmath.log1p(mpmath.exp((eta - mpmath.mpf("22.5")) / 10)) * 10, mpmath.mpf(0.02))
                win, lose = sigmoid(a - b - t), sigmoid(b - a - t)
                return mpmath.log([win, lose, 1 - win - lose][k])
            x, y, g, lam = mpmath.exp(a), mpmath.exp(b), mpmath.exp(ground), mpmath.exp(eta) + 1 + mpmath.mpf("1e-6")
            win, lose = x / (x + lam * y + g), y / (y + lam * x + g)
            bad = g / (x + y + g) if name == "grk" else 0
            return mpmath.log([win, lose, 1 - win - lose - bad, bad][k])

        at = [mpmath.mpf(x) for x in (a, b, 0, eta)]
        unit = np.eye(4, dtype=int).tolist()
        for k in range(len(model.outcomes)):
            of = lambda *x, k=k: log_probability(*x, k)  # noqa: E731
            assert log_p[k] == pytest.approx(float(of(*at)), rel=1e-13, abs=1e-13)
            for i in range(4):
                first = float(mpmath.diff(of, at, tuple(unit[i])))
                assert slope[k, i] == pytest.approx(first, rel=1e-11, abs=1e-13)
                for j in range(i + 1):
                    order = tuple(x + y for x, y in zip(unit[i], unit[j], strict=True))
                    assert (
                        bend[k, i, j] == bend[k, j, i] == pytest.approx(float(mpmath.diff(of, at, order)), rel=1e-11, abs=1e-13)
                    )


@pytest.mark.parametrize("name", VOTE_MODELS)
def test_swapping_the_models_swaps_the_outcomes(name):
    model = feedback_model(name)
    a, b, eta = torch.randn(3, 20, dtype=torch.float64)
    torch.testing.assert_close(model.probabilities(a, b, eta), model.probabilities(b, a, eta)[..., [1, 0, 2, 3]])


@pytest.mark.slow
def test_gradients_match_differences():
    for name in VOTE_MODELS:
        model = feedback_model(name)
        a, b, eta = (t.clone().requires_grad_() for t in torch.randn(3, 4, dtype=torch.float64))
        for outcome in model.outcomes:
            y = torch.full((4,), int(outcome))
            assert torch.autograd.gradcheck(lambda *x, m=model, y=y: m.log_likelihood(*x, y), (a, b, eta))


def test_ties_where_the_model_has_none():
    a, b = torch.zeros(2), torch.ones(2)
    ties = torch.tensor([Outcome.TIE, Outcome.BOTH_BAD])
    half = feedback_model("bt-tie").log_likelihood(a, b, None, ties)
    expected = (torch.nn.functional.logsigmoid(a - b) + torch.nn.functional.logsigmoid(b - a)) / 2
    torch.testing.assert_close(half, expected)
    with pytest.raises(ValueError, match="'bt' knows no ties"):
        feedback_model("bt").log_likelihood(a, b, None, ties)
    rk, eta = feedback_model("rk"), torch.zeros(2)
    likelihood = rk.log_likelihood(a, b, eta, ties)
    assert likelihood[0] == likelihood[1]


def test_models_with_ties_need_the_tie_parameter():
    with pytest.raises(ValueError, match="eta: the feedback model 'grk' needs"):
        feedback_model("grk").probabilities(torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match="expected one of bt, .*, got 'elo'"):
        feedback_model("elo")


@pytest.mark.parametrize("name", ["ols", "poisson"])
def test_values_have_the_density_of_scipy(name):
    from scipy.stats import norm, poisson

    rng, model = np.random.default_rng(0), feedback_model(name)
    a, b = rng.normal(size=(2, 50))
    value = rng.normal(size=50) if name == "ols" else rng.poisson(3, 50).astype(float)
    expected = norm.logpdf(value, a - b) if name == "ols" else poisson.logpmf(value, np.exp(a - b))
    found = model.log_likelihood(*(torch.from_numpy(x) for x in (a, b)), None, torch.from_numpy(value))
    np.testing.assert_allclose(found, expected, atol=1e-12)
    with pytest.raises(ValueError, match="observes values and gives no probabilities of votes"):
        model.probabilities(torch.zeros(2), torch.zeros(2))


def test_what_a_model_knows():
    known = {name: feedback_model(name) for name in NAMES}
    assert {name for name, model in known.items() if not model.has_ties} == {"bt", "ols", "poisson"}
    assert {name for name, model in known.items() if model.ties_as_half} == {"bt-tie"}
    assert {name for name, model in known.items() if model.counts} == {"poisson"}
    assert {name for name, model in known.items() if model.least_eta > -math.inf} == {"rk"}
    assert all(model.rao_kupper != model.of_values for model in known.values())

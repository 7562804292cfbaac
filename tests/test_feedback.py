"""The feedback models against their formulas in float64, their limits, and each other."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from p2l_engine.feedback import NAMES, Outcome, feedback_model

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


@pytest.mark.parametrize("name", VOTE_MODELS)
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


@pytest.mark.parametrize("name", VOTE_MODELS)
def test_swapping_the_models_swaps_the_outcomes(name):
    model = feedback_model(name)
    a, b, eta = torch.randn(3, 20, dtype=torch.float64)
    torch.testing.assert_close(model.probabilities(a, b, eta), model.probabilities(b, a, eta)[..., [1, 0, 2, 3]])


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

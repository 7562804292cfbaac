"""The formulas of the feedback models, in torch and differentiable, or with their derivatives (``expanded``).

Each function turns the coefficients of two models on one prompt, and the prompt's tie parameter eta, into log-probabilities of
the outcomes that its feedback model knows, in their order. Everything is computed in log space from sums of positive terms, so
that nothing cancels and nothing overflows for coefficients of +-50 and more. Inputs broadcast. ``ground`` is the coefficient of
the fictitious bad model, 0 (phi_g = 1) except to differentiate by it; models without one ignore it.

The private functions and the operators +, - and * take tensors or ``Taylor``: each formula is written once, and ``expanded``
gives its first and second derivatives. Formulas of models that are not ``rao_kupper`` may be torch's alone.

The parametrisation of eta is that of published checkpoints (lmarena/p2l, p2l/model.py): grk and rk-reparam use
lambda = exp(eta) + 1 + 1e-6, rk uses softplus(eta - 22.5, beta = 0.1) clamped to at least 0.02.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from p2l_engine.feedback.outcome import RK_LEAST_LOG_LAMBDA, Outcome
from p2l_engine.feedback.taylor import Float64, Taylor, log_sum_exp

LOG_EPSILON = math.log(1e-6)
LINEAR = 20.0  # beyond it torch's softplus is its argument

T = TypeVar("T", Tensor, Taylor)


def log_lambda(eta: T, grounded: bool) -> T:
    """See ``FeedbackModel.log_lambda``."""
    if grounded:
        return _log_sum(eta, _constant(eta, math.log1p(1e-6)))
    return _softplus_above(eta - 22.5, 0.1, RK_LEAST_LOG_LAMBDA)


def log_probabilities(name: str, theta_a: Tensor, theta_b: Tensor, eta: Tensor | None, ground: Tensor | None = None) -> Tensor:
    """See ``FeedbackModel.log_probabilities``; of the model called ``name``, which needs eta or ignores it."""
    wide = torch.promote_types(theta_a.dtype, torch.float32)
    a, b = theta_a.to(wide), theta_b.to(wide)
    bad = torch.zeros_like(a) if ground is None else ground.to(wide)
    known = _votes[name](a, b, None if eta is None else eta.to(wide), bad)
    never = torch.full_like(known[0], -math.inf)
    return torch.stack([*known, *[never] * (len(Outcome) - len(known))], dim=-1)


def expanded(name: str, a: Float64, b: Float64, eta: Float64 | None) -> tuple[Taylor, ...]:
    """log P of each outcome that the model called ``name`` knows, at coefficients a, b and tie parameters eta [P]."""
    zeros = np.zeros(len(a))
    first, second, ground, tie = Taylor.variables(a, b, zeros, zeros if eta is None else eta)
    found: tuple[Taylor, ...] = _votes[name](first, second, None if eta is None else tie, ground)
    return found


def with_half_ties(log_p: Tensor, outcome: Tensor) -> Tensor:
    """The log-likelihood [...] of outcomes [...] under log_p [..., 4], a tie of either kind as half a win and half a loss."""
    decided = log_p[..., :2].gather(-1, outcome.clamp_max(1).unsqueeze(-1)).squeeze(-1)
    return torch.where(outcome >= Outcome.TIE, log_p[..., :2].mean(-1), decided)


def log_density(name: str, linear: Tensor, value: Tensor) -> Tensor:
    """The log-density of values [...] under the model called ``name``, at its linear predictor [...]."""
    return _values[name](linear, value)


def _constant(like: T, value: float) -> T:
    """Of the shape of ``like``."""
    return like.constant(value) if isinstance(like, Taylor) else torch.full_like(like, value)


def _log_sigmoid(x: T) -> T:
    """torch's own starts threads even for six numbers, which takes milliseconds on a busy machine. Beyond 700 the second
    derivative of this one is inf / inf, and both are 0 in effect."""
    if isinstance(x, Taylor):
        return -log_sum_exp([x.constant(0.0), -x])
    return -torch.logaddexp(x.new_zeros(()), -x.clamp_max(700.0))


def _log_sum(a: T, b: T) -> T:
    """log(exp(a) + exp(b)). torch.logaddexp has no second derivative where one is 710 above the other."""
    return log_sum_exp([a, b]) if isinstance(a, Taylor) else b - _log_sigmoid(b - a)


def _log_sum_exp(terms: Sequence[T]) -> T:
    """log(exp(term) + ...)."""
    if isinstance(terms[0], Taylor):
        return log_sum_exp(terms)
    return torch.logsumexp(torch.stack(list(terms)), 0)


def _softplus_above(x: T, beta: float, least: float) -> T:
    """log(1 + exp(beta x)) / beta, or ``least`` where it is less."""
    if not isinstance(x, Taylor):
        return F.softplus(x, beta=beta).clamp_min(least)
    scaled = beta * x.value
    log_e = np.logaddexp(0, scaled)
    linear = scaled > LINEAR
    value, share = np.where(linear, x.value, log_e / beta), np.where(linear, 1.0, np.exp(scaled - log_e))
    free = value >= least
    return x.through(np.maximum(value, least), share * free, beta * share * (1 - share) * free)


def _log_expm1(x: T) -> T:
    """log(exp(x) - 1), x > 0."""
    if not isinstance(x, Taylor):
        return x + torch.log(-torch.expm1(-x))
    less = np.exp(-x.value) / -np.expm1(-x.value)  # 1 / (exp(x) - 1)
    return x.through(x.value + np.log(-np.expm1(-x.value)), 1 + less, -less * (1 + less))


def _bt(a: T, b: T, eta: T | None, ground: T) -> tuple[T, ...]:
    """P(A) = sigmoid(a - b) (paper, 2.1)."""
    return _log_sigmoid(a - b), _log_sigmoid(b - a)


def _rk(a: T, b: T, eta: T | None, ground: T) -> tuple[T, ...]:
    """P(A) = sigmoid(a - b - t), P(B) = sigmoid(b - a - t), t = clamp(softplus(eta - 22.5, 0.1), 0.02) (paper, 2.2).

    The rest is a tie: 1 - P(A) - P(B) = (exp(2t) - 1) P(A) P(B).
    """
    assert eta is not None
    t = log_lambda(eta, grounded=False)
    win, lose = _log_sigmoid(a - b - t), _log_sigmoid(b - a - t)
    return win, lose, _log_expm1(2 * t) + win + lose


def _grounded_terms(a: T, b: T, eta: T, ground: T) -> tuple[T, ...]:
    """a, b, eta, the ground g, log lambda and the logs of phi_A + lambda phi_B + phi_g and phi_B + lambda phi_A + phi_g, all of
    one shape."""
    if isinstance(a, Tensor):
        a, b, eta, ground = torch.broadcast_tensors(a, b, eta, ground)
    handicap = log_lambda(eta, grounded=True)
    beats = _log_sum_exp([a, handicap + b, ground])
    loses = _log_sum_exp([b, handicap + a, ground])
    return a, b, eta, ground, handicap, beats, loses


def _rk_reparam(a: T, b: T, eta: T | None, ground: T) -> tuple[T, ...]:
    """P(A) = phi_A / (phi_A + lambda phi_B + 1), likewise P(B), phi = exp(theta); the rest is a tie.

    1 - P(A) - P(B) has the numerator (lambda^2 - 1) phi_A phi_B + lambda (phi_A + phi_B) + 1: no term is negative.
    """
    assert eta is not None
    a, b, eta, ground, handicap, beats, loses = _grounded_terms(a, b, eta, ground)
    log_excess = _log_sum(eta, _constant(a, LOG_EPSILON))  # log(lambda - 1)
    log_lambda_plus_1 = _log_sum(handicap, _constant(a, 0.0))
    terms = [log_excess + log_lambda_plus_1 + a + b, handicap + a + ground, handicap + b + ground, 2 * ground]
    return a - beats, b - loses, _log_sum_exp(terms) - beats - loses


def _grk(a: T, b: T, eta: T | None, ground: T) -> tuple[T, ...]:
    """The grounded Rao-Kupper model (paper, 2.2): as rk-reparam, and P(bad) = 1 / (1 + phi_A + phi_B).

    What is left for the tie has the numerator (lambda - 1) phi_A phi_B (2 + (lambda + 1)(phi_A + phi_B)) over the product
    of the three denominators.
    """
    assert eta is not None
    a, b, eta, ground, handicap, beats, loses = _grounded_terms(a, b, eta, ground)
    log_excess = _log_sum(eta, _constant(a, LOG_EPSILON))
    log_sum = _log_sum(a, b)
    bad = ground - _log_sum(log_sum, ground)
    log_bracket = _log_sum(ground + math.log(2), _log_sum(handicap, _constant(a, 0.0)) + log_sum)
    return a - beats, b - loses, a + b + log_excess + log_bracket - beats - loses + bad - ground, bad


def _ols(mean: Tensor, value: Tensor) -> Tensor:
    """log N(value; mean, 1): least squares (paper, 2.2)."""
    return -0.5 * (value.to(mean.dtype) - mean).square() - 0.5 * math.log(2 * math.pi)


def _poisson(log_rate: Tensor, value: Tensor) -> Tensor:
    """log of the Poisson probability of a count, at the rate exp(log_rate) (paper, 2.2)."""
    value = value.to(log_rate.dtype)
    return value * log_rate - log_rate.exp() - torch.lgamma(value + 1)


_votes: dict[str, Callable[..., Any]] = {
    "bt": _bt,
    "bt-tie": _bt,
    "rk": _rk,
    "rk-reparam": _rk_reparam,
    "grk": _grk,
}
_values: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ols": _ols, "poisson": _poisson}

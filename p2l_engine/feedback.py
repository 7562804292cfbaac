"""The feedback models: what coefficients mean (paper, 2.1 and 2.2).

Each turns the coefficients of two models on one prompt (and the prompt's tie parameter eta) into probabilities of the four
outcomes that a voter may give. Everything is computed in log space from sums of positive terms, so that nothing cancels
and nothing overflows for coefficients of +-50 and more; everything is torch and differentiable. Inputs broadcast.

The parametrisation of eta is that of published checkpoints (lmarena/p2l, p2l/model.py): grk and rk-reparam use
lambda = exp(eta) + 1 + 1e-6, rk uses softplus(eta - 22.5, beta = 0.1) clamped to at least 0.02.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_LOG_LAMBDA = 0.02  # of rk

LOG_EPSILON = math.log(1e-6)


class Outcome(IntEnum):
    """What a voter says of the answers of models A and B; the last axis of every outcome tensor."""

    A = 0
    B = 1
    TIE = 2
    BOTH_BAD = 3


@dataclass(frozen=True, slots=True)
class FeedbackModel:
    """One statistical model of votes.

    ``outcomes``: the outcomes it tells apart, in order. ``has_eta``: whether it has a tie parameter per prompt. ``grounded``:
    whether a fictitious bad model of coefficient 0 takes part in every vote.

    Models without outcomes (ols, poisson) observe values instead: of one model, whose linear predictor is theta_a, or of a
    pair, where it is theta_a - theta_b (paper, 2.2: prompt-to-regression).
    """

    name: str
    outcomes: tuple[Outcome, ...]
    has_eta: bool
    _log_probabilities: Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, ...]]
    grounded: bool = False

    @property
    def of_values(self) -> bool:
        """Whether it observes values, not votes."""
        return not self.outcomes

    @property
    def least_eta(self) -> float:
        """The tie parameter below which nothing changes any more: for rk where its clamp begins, else -inf."""
        return 22.5 + 10 * math.log(math.expm1(0.1 * LEAST_LOG_LAMBDA)) + 1e-9 if self.name == "rk" else -math.inf

    def log_lambda(self, eta: Tensor) -> Tensor:
        """log lambda, the handicap of the tie models: P(A) = phi_A / (phi_A + lambda phi_B + g), phi = exp(theta).

        g is 1 for the grounded models (rk-reparam, grk), whose lambda is exp(eta) + 1 + 1e-6, and 0 for rk, whose log lambda is
        clamp(softplus(eta - 22.5, beta = 0.1), min 0.02). Models without a tie parameter raise ValueError.
        """
        if not self.has_eta:
            raise ValueError(f"eta: the feedback model {self.name!r} has no tie parameter")
        if self.grounded:
            return torch.logaddexp(eta, torch.full_like(eta, math.log1p(1e-6)))
        return F.softplus(eta - 22.5, beta=0.1).clamp_min(LEAST_LOG_LAMBDA)

    def log_probabilities(self, theta_a: Tensor, theta_b: Tensor, eta: Tensor | None = None) -> Tensor:
        """log P of A, B, tie, both bad: [..., 4] float32 or wider; -inf for an outcome that this model does not know.

        A model without "both bad" counts it as a tie, so its TIE is either tie.
        """
        if self.of_values:
            raise ValueError(f"feedback model: {self.name!r} observes values and gives no probabilities of votes")
        if self.has_eta and eta is None:
            raise ValueError(f"eta: the feedback model {self.name!r} needs its tie parameter, got None")
        wide = torch.promote_types(theta_a.dtype, torch.float32)
        known = self._log_probabilities(
            theta_a.to(wide), theta_b.to(wide), eta.to(wide) if self.has_eta and eta is not None else None
        )
        never = torch.full_like(known[0], -math.inf)
        return torch.stack([*known, *[never] * (len(Outcome) - len(known))], dim=-1)

    def probabilities(self, theta_a: Tensor, theta_b: Tensor, eta: Tensor | None = None) -> Tensor:
        """P of A, B, tie, both bad: [..., 4], summing to 1."""
        return self.log_probabilities(theta_a, theta_b, eta).exp()

    def log_likelihood(self, theta_a: Tensor, theta_b: Tensor, eta: Tensor | None, outcome: Tensor) -> Tensor:
        """log-likelihood of each vote; ``outcome`` holds Outcome values, broadcast against the coefficients.

        bt-tie counts either tie as half a win and half a loss; rk and rk-reparam count BOTH_BAD as TIE; bt has no ties:
        a tie is a ValueError there. For ols and poisson ``outcome`` holds the values (poisson: counts).
        """
        if self.name in _densities:
            return _densities[self.name](theta_a - theta_b, outcome)
        log_p = self.log_probabilities(theta_a, theta_b, eta)
        outcome = outcome.long()
        if self.name == "bt" and bool((outcome >= Outcome.TIE).any()):
            raise ValueError("outcome: the feedback model 'bt' knows no ties; leave them out or use 'bt-tie'")
        if self.name == "bt-tie":
            decided = log_p[..., :2].gather(-1, outcome.clamp_max(1).unsqueeze(-1)).squeeze(-1)
            return torch.where(outcome >= Outcome.TIE, log_p[..., :2].mean(-1), decided)
        known = outcome.clamp_max(len(self.outcomes) - 1)
        return log_p.gather(-1, known.expand(log_p.shape[:-1]).unsqueeze(-1)).squeeze(-1)

    def win_rate(self, theta_b: Tensor, theta_a: Tensor) -> Tensor:
        """The win rate of b over a that routing maximises: sigmoid(theta_b - theta_a), the Bradley-Terry reading.

        For the tie models too, as published routers do: under it the best policy by win rate is the best by score (paper,
        Theorem 1).
        """
        return torch.sigmoid(theta_b - theta_a)


def _bt(a: Tensor, b: Tensor, eta: Tensor | None) -> tuple[Tensor, ...]:
    """P(A) = sigmoid(a - b) (paper, 2.1)."""
    return F.logsigmoid(a - b), F.logsigmoid(b - a)


def _rk(a: Tensor, b: Tensor, eta: Tensor | None) -> tuple[Tensor, ...]:
    """P(A) = sigmoid(a - b - t), P(B) = sigmoid(b - a - t), t = clamp(softplus(eta - 22.5, 0.1), 0.02) (paper, 2.2).

    The rest is a tie: 1 - P(A) - P(B) = (exp(2t) - 1) P(A) P(B).
    """
    assert eta is not None
    t = _models["rk"].log_lambda(eta)
    win, lose = F.logsigmoid(a - b - t), F.logsigmoid(b - a - t)
    return win, lose, 2 * t + torch.log(-torch.expm1(-2 * t)) + win + lose


def _grounded(a: Tensor, b: Tensor, eta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """a, b, log lambda and the logs of phi_A + lambda phi_B + 1 and phi_B + lambda phi_A + 1, all of one shape."""
    a, b, eta = torch.broadcast_tensors(a, b, eta)
    log_lambda = _models["grk"].log_lambda(eta)
    zero = torch.zeros_like(a)
    beats = torch.logsumexp(torch.stack([a, log_lambda + b, zero]), 0)
    loses = torch.logsumexp(torch.stack([b, log_lambda + a, zero]), 0)
    return a, b, log_lambda, beats, loses


def _rk_reparam(a: Tensor, b: Tensor, eta: Tensor | None) -> tuple[Tensor, ...]:
    """P(A) = phi_A / (phi_A + lambda phi_B + 1), likewise P(B), phi = exp(theta); the rest is a tie.

    1 - P(A) - P(B) has the numerator (lambda^2 - 1) phi_A phi_B + lambda (phi_A + phi_B) + 1: no term is negative.
    """
    assert eta is not None
    a, b, log_lambda, beats, loses = _grounded(a, b, eta)
    log_excess = torch.logaddexp(eta.expand_as(a), torch.full_like(a, LOG_EPSILON))  # log(lambda - 1)
    log_lambda_plus_1 = torch.logaddexp(log_lambda, torch.zeros_like(a))
    terms = [log_excess + log_lambda_plus_1 + a + b, log_lambda + a, log_lambda + b, torch.zeros_like(a)]
    return a - beats, b - loses, torch.logsumexp(torch.stack(terms), 0) - beats - loses


def _grk(a: Tensor, b: Tensor, eta: Tensor | None) -> tuple[Tensor, ...]:
    """The grounded Rao-Kupper model (paper, 2.2): as rk-reparam, and P(bad) = 1 / (1 + phi_A + phi_B).

    What is left for the tie has the numerator (lambda - 1) phi_A phi_B (2 + (lambda + 1)(phi_A + phi_B)) over the product
    of the three denominators.
    """
    assert eta is not None
    a, b, log_lambda, beats, loses = _grounded(a, b, eta)
    zero = torch.zeros_like(a)
    log_excess = torch.logaddexp(eta.expand_as(a), torch.full_like(a, LOG_EPSILON))
    log_sum = torch.logaddexp(a, b)
    bad = -torch.logaddexp(log_sum, zero)
    log_bracket = torch.logaddexp(zero + math.log(2), torch.logaddexp(log_lambda, zero) + log_sum)
    return a - beats, b - loses, a + b + log_excess + log_bracket - beats - loses + bad, bad


def _ols(mean: Tensor, value: Tensor) -> Tensor:
    """log N(value; mean, 1): least squares (paper, 2.2)."""
    return -0.5 * (value.to(mean.dtype) - mean).square() - 0.5 * math.log(2 * math.pi)


def _poisson(log_rate: Tensor, value: Tensor) -> Tensor:
    """log of the Poisson probability of a count, at the rate exp(log_rate) (paper, 2.2)."""
    value = value.to(log_rate.dtype)
    return value * log_rate - log_rate.exp() - torch.lgamma(value + 1)


def _no_votes(a: Tensor, b: Tensor, eta: Tensor | None) -> tuple[Tensor, ...]:
    raise AssertionError("models of values have no outcomes")


_densities = {"ols": _ols, "poisson": _poisson}

_two = (Outcome.A, Outcome.B)
_three = (*_two, Outcome.TIE)

_models = {
    model.name: model
    for model in (
        FeedbackModel("bt", _two, False, _bt),
        FeedbackModel("bt-tie", _two, False, _bt),
        FeedbackModel("rk", _three, True, _rk),
        FeedbackModel("rk-reparam", _three, True, _rk_reparam, grounded=True),
        FeedbackModel("grk", (*_three, Outcome.BOTH_BAD), True, _grk, grounded=True),
        FeedbackModel("ols", (), False, _no_votes),
        FeedbackModel("poisson", (), False, _no_votes),
    )
}
_models["bag"] = _models["grk"]  # its name in published training configs

NAMES = tuple(_models)


def feedback_model(name: str) -> FeedbackModel:
    """The feedback model called bt, bt-tie, rk, rk-reparam, grk, bag (= grk), ols or poisson."""
    try:
        return _models[name]
    except KeyError:
        raise ValueError(f"feedback model: expected one of {', '.join(NAMES)}, got {name!r}") from None

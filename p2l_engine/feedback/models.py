"""The feedback models by name: their outcomes and parameters. Their formulas are in ``formulas``, which loads torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from p2l_engine.feedback.outcome import RK_LEAST_LOG_LAMBDA, Outcome

if TYPE_CHECKING:
    from torch import Tensor

    from p2l_engine.feedback.taylor import Float64, Taylor


@dataclass(frozen=True, slots=True)
class FeedbackModel:
    """One statistical model of votes, or of values.

    name: also that of its formula in ``formulas``. outcomes: those it tells apart, in order. has_eta: it has a tie parameter
    per prompt. grounded: a fictitious bad model of coefficient 0 takes part in every vote. ties_as_half: it counts a tie as
    half a win and half a loss. rao_kupper: P(A) = phi_A / (phi_A + lambda phi_B + g), phi = exp(theta), with lambda = 1 without
    eta and g = 1 if grounded; the native core computes this form, all others go through ``probabilities``. least_eta: the tie
    parameter below which nothing changes.

    Models without outcomes (ols, poisson) observe values instead: of one model, whose linear predictor is theta_a, or of a
    pair, where it is theta_a - theta_b (paper, 2.2: prompt-to-regression). counts: the values are counts, and the linear
    predictor is the logarithm of their mean.
    """

    name: str
    outcomes: tuple[Outcome, ...] = ()
    has_eta: bool = False
    grounded: bool = False
    ties_as_half: bool = False
    rao_kupper: bool = False
    least_eta: float = -math.inf
    counts: bool = False

    @property
    def of_values(self) -> bool:
        """Whether it observes values, not votes."""
        return not self.outcomes

    @property
    def has_ties(self) -> bool:
        """Whether it can use a tie: as an outcome of its own, or as half a win and half a loss."""
        return self.ties_as_half or Outcome.TIE in self.outcomes

    def log_lambda(self, eta: Tensor) -> Tensor:
        """log lambda [...] of eta [...]: the handicap of the tie models, P(A) = phi_A / (phi_A + lambda phi_B + g).

        For the grounded models (rk-reparam, grk) lambda = exp(eta) + 1 + 1e-6 and g = 1; for rk log lambda =
        max(softplus(eta - 22.5, beta = 0.1), 0.02) and g = 0. Raises ValueError for models without a tie parameter.
        """
        if not self.has_eta:
            raise ValueError(f"eta: the feedback model {self.name!r} has no tie parameter")
        from p2l_engine.feedback import formulas

        return formulas.log_lambda(eta, self.grounded)

    def log_probabilities(
        self, theta_a: Tensor, theta_b: Tensor, eta: Tensor | None = None, ground: Tensor | None = None
    ) -> Tensor:
        """log P of A, B, tie, both bad: [..., 4] float32 or wider; -inf for an outcome that this model does not know.

        ground: the coefficient of the grounded models' fictitious bad model, None: 0. The arguments broadcast. A model without
        "both bad" counts it as a tie, so its TIE is either. Raises ValueError for models of values, and where eta is missing.
        """
        self._check_votes(eta)
        from p2l_engine.feedback import formulas

        return formulas.log_probabilities(self.name, theta_a, theta_b, eta if self.has_eta else None, ground)

    def expanded(self, theta_a: Float64, theta_b: Float64, eta: Float64 | None = None) -> tuple[Taylor, ...]:
        """log P of each of a ``rao_kupper`` model's outcomes, of P pairs [P], with first and second derivatives by a, b, the
        ground and eta. Raises ValueError as ``log_probabilities``."""
        self._check_votes(eta)
        from p2l_engine.feedback import formulas

        return formulas.expanded(self.name, theta_a, theta_b, eta if self.has_eta else None)

    def _check_votes(self, eta: object) -> None:
        if self.of_values:
            raise ValueError(f"feedback model: {self.name!r} observes values and gives no probabilities of votes")
        if self.has_eta and eta is None:
            raise ValueError(f"eta: the feedback model {self.name!r} needs its tie parameter, got None")

    def probabilities(self, theta_a: Tensor, theta_b: Tensor, eta: Tensor | None = None) -> Tensor:
        """P of A, B, tie, both bad: [..., 4], summing to 1."""
        return self.log_probabilities(theta_a, theta_b, eta).exp()

    def log_likelihood(self, theta_a: Tensor, theta_b: Tensor, eta: Tensor | None, outcome: Tensor) -> Tensor:
        """log-likelihood of each vote; ``outcome`` holds Outcome values, broadcast against the coefficients.

        bt-tie counts either tie as half a win and half a loss; rk and rk-reparam count BOTH_BAD as TIE; bt has no ties, and
        raises ValueError for one. For ols and poisson ``outcome`` holds the values (poisson: counts).
        """
        from p2l_engine.feedback import formulas

        if self.of_values:
            return formulas.log_density(self.name, theta_a - theta_b, outcome)
        log_p = self.log_probabilities(theta_a, theta_b, eta)
        outcome = outcome.long()
        if not self.has_ties and bool((outcome >= Outcome.TIE).any()):
            raise ValueError(f"outcome: the feedback model {self.name!r} knows no ties; leave them out or use 'bt-tie'")
        if self.ties_as_half:
            return formulas.with_half_ties(log_p, outcome)
        known = outcome.clamp_max(len(self.outcomes) - 1)
        return log_p.gather(-1, known.expand(log_p.shape[:-1]).unsqueeze(-1)).squeeze(-1)


_WIN_OR_LOSS = (Outcome.A, Outcome.B)
_WITH_TIE = (*_WIN_OR_LOSS, Outcome.TIE)

_MODELS = (
    FeedbackModel("bt", _WIN_OR_LOSS, rao_kupper=True),
    FeedbackModel("bt-tie", _WIN_OR_LOSS, rao_kupper=True, ties_as_half=True),
    FeedbackModel(
        "rk",
        _WITH_TIE,
        has_eta=True,
        rao_kupper=True,
        least_eta=22.5 + 10 * math.log(math.expm1(0.1 * RK_LEAST_LOG_LAMBDA)) + 1e-9,
    ),
    FeedbackModel("rk-reparam", _WITH_TIE, has_eta=True, rao_kupper=True, grounded=True),
    FeedbackModel("grk", (*_WITH_TIE, Outcome.BOTH_BAD), has_eta=True, rao_kupper=True, grounded=True),
    FeedbackModel("ols"),
    FeedbackModel("poisson", counts=True),
)
_BY_NAME = {model.name: model for model in _MODELS}
_BY_NAME["bag"] = _BY_NAME["grk"]  # its name in published training configs

NAMES = tuple(_BY_NAME)


def feedback_model(name: str) -> FeedbackModel:
    """The feedback model called bt, bt-tie (bt_tie in some published configs), rk, rk-reparam, grk, bag (= grk), ols or
    poisson; ValueError for another name."""
    try:
        return _BY_NAME[name.replace("_", "-")]
    except (KeyError, AttributeError, TypeError):
        raise ValueError(f"feedback model: expected one of {', '.join(NAMES)}, got {name!r}") from None

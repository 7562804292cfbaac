"""The loss of votes (or values) at their linear predictors, with its exact first and second derivatives.

The linear predictors of a vote are theta_a, theta_b and eta: linear [3, V]. theta_b is 0 for values of one model; eta is not
read where the feedback model has none.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from p2l_engine.feedback import FeedbackModel, Outcome
from p2l_engine.leaderboard.losses import pair_derivatives, sums_of_derivatives

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

CHUNK = 1 << 16  # votes that are differentiated at once: their terms stay in the cache
HEAVIEST = 1e9  # of a vote: beyond it float64 no longer sees the prior, or other votes, beside it
OF_VALUES = np.array([1.0, -1.0, 0.0])  # derivatives of theta_a - theta_b by the linear predictors


@dataclass(frozen=True, slots=True)
class Information:
    """losses [V], and the sizes [V] of the numbers that they are computed from, by which rounding goes. first [V, 3]; second
    derivatives [V, 3, 3]: exact ones, and the Fisher information, which is never indefinite."""

    losses: Float64
    sizes: Float64
    first: Float64
    exact: Float64
    definite: Float64


def losses(feedback: FeedbackModel, linear: Float64, outcome: npt.NDArray[np.generic]) -> Float64:
    """[V]: the negative log-likelihood of each outcome."""
    with torch.inference_mode():
        return _losses(feedback, torch.from_numpy(linear), outcome).numpy()


def gradient(feedback: FeedbackModel, linear: Float64, outcome: npt.NDArray[np.generic]) -> tuple[Float64, Float64]:
    """``losses`` [V], and their derivatives by the linear predictors [3, V]: several times as fast as ``curvature``."""
    loss, slope = np.empty(len(outcome)), np.empty_like(linear)
    for start in range(0, len(outcome), CHUNK):
        of = slice(start, start + CHUNK)
        x = torch.from_numpy(linear[:, of]).requires_grad_()
        each = _losses(feedback, x, outcome[of])
        (slope[:, of],) = torch.autograd.grad(each.sum(), x)
        loss[of] = each.detach()
    return loss, slope


def curvature(feedback: FeedbackModel, linear: Float64, outcome: npt.NDArray[np.generic]) -> tuple[Float64, Float64]:
    """The derivatives of ``losses`` by the linear predictors [3, V], and the second derivatives [3, 3, V]."""
    if feedback.of_values:
        x = torch.from_numpy(linear).requires_grad_()
        (first,) = torch.autograd.grad(_losses(feedback, x, outcome).sum(), x, create_graph=True)
        second = [torch.autograd.grad(row.sum(), x, retain_graph=True)[0] for row in first]
        return first.detach().numpy(), torch.stack(second).numpy()
    _, slope, bend = pair_derivatives(feedback, linear[0], linear[1], linear[2] if feedback.has_eta else None)
    came = -outcome_shares(feedback, outcome.astype(np.int64))
    by = [0, 1, 3]  # without the ground
    return np.einsum("vk,vki->iv", came, slope[:, :, by]), np.einsum("vk,vkij->ijv", came, bend[:, :, by][:, :, :, by])


def information(feedback: FeedbackModel, linear: Float64, outcome: npt.NDArray[np.generic]) -> Information:
    """Losses and derivatives of which every digit counts, also of outcomes of probability 1 - 1e-100, which weights of 1e9 and
    priors far away bring out."""
    if feedback.of_values:
        loss, value = losses(feedback, linear, outcome), np.asarray(outcome, np.float64)
        predictor = linear[0] - linear[1]
        with np.errstate(over="ignore", invalid="ignore"):
            mean = np.exp(predictor) if feedback.counts else predictor
            bend = mean if feedback.counts else np.ones(len(mean))
            second = bend[:, None, None] * np.outer(OF_VALUES, OF_VALUES)
            first = (mean - value)[:, None] * OF_VALUES
            return Information(loss, _sizes(feedback, loss, linear, value), first, second, second)
    shares = outcome_shares(feedback, outcome.astype(np.int64))
    log_p, slopes, bends = pair_derivatives(feedback, linear[0], linear[1], linear[2] if feedback.has_eta else None)
    first, fisher, away = sums_of_derivatives(shares, log_p, slopes, bends)
    of = np.ix_(range(len(log_p)), (0, 1, 3), (0, 1, 3))  # without the ground
    loss = -np.where(shares > 0, shares * log_p, 0.0).sum(1)
    return Information(loss, _sizes(feedback, loss, linear, outcome), first[:, (0, 1, 3)], (fisher - away)[of], fisher[of])


def outcome_shares(feedback: FeedbackModel, outcome: Int64) -> Float64:
    """[V, K]: the share that a vote counts for each of the feedback model's K outcomes: bt-tie halves ties, models without
    "both bad" count it as a tie. Raises ValueError for a tie where there are none."""
    k = len(feedback.outcomes)
    tie = outcome >= Outcome.TIE
    if tie.any() and not feedback.has_ties:
        raise ValueError(f"outcome: the feedback model {feedback.name!r} knows no ties; leave them out or use 'bt-tie'")
    shares = np.eye(k)[np.minimum(outcome, k - 1)]
    if feedback.ties_as_half:
        shares[tie] = 0.5
    return shares


def check(feedback: FeedbackModel, outcome: npt.NDArray[np.generic], weight: Float64) -> None:
    """Raises ValueError for outcomes [V] that the feedback model does not know, and for weights [V] that are negative, not
    finite, or beside which others would be lost."""
    values = outcome.dtype.kind == "f"
    if values != feedback.of_values and len(outcome):
        raise ValueError(
            f"outcome: expected {'values' if feedback.of_values else 'votes'} for {feedback.name}, got {outcome.dtype}"
        )
    if not (np.isfinite(weight) & (weight >= 0)).all():
        raise ValueError(f"weight: expected finite numbers of at least 0, got {weight.min():g}")
    heaviest = float(weight.max(initial=0.0))
    if heaviest > HEAVIEST:
        raise ValueError(f"weight: expected at most {HEAVIEST:g} for a vote, got {heaviest:g}; divide all weights")
    if not values:
        if len(outcome) and not set(np.unique(outcome).tolist()) <= set(Outcome):
            raise ValueError(f"outcome: expected {', '.join(map(str, map(int, Outcome)))}, got {np.unique(outcome)}")
        outcome_shares(feedback, outcome.astype(np.int64))
        return
    found = outcome.astype(np.float64)
    if not np.isfinite(found).all():
        raise ValueError("outcome: expected finite values")
    if feedback.counts and ((found < 0) | (found % 1 != 0)).any():
        raise ValueError(f"outcome: expected counts (0, 1, 2 ...) for {feedback.name}")


def sizes(feedback: FeedbackModel, linear: Float64, outcome: npt.NDArray[np.generic]) -> Float64:
    """[V]: of the numbers that ``losses`` are computed from, by which their rounding goes."""
    return _sizes(feedback, losses(feedback, linear, outcome), linear, outcome)


def _sizes(feedback: FeedbackModel, loss: Float64, linear: Float64, outcome: npt.NDArray[np.generic]) -> Float64:
    if feedback.of_values:
        predictor = linear[0] - linear[1]
        return loss + 2 * np.abs(outcome.astype(np.float64) * predictor) if feedback.counts else loss
    # log P near 0 is a difference of numbers of the size of the predictors, and as wrong as these.
    found: Float64 = loss + 1 + np.abs(linear).max(0)
    return found


def _losses(feedback: FeedbackModel, x: Tensor, outcome: npt.NDArray[np.generic]) -> Tensor:
    return -feedback.log_likelihood(x[0], x[1], x[2] if feedback.has_eta else None, torch.from_numpy(outcome))

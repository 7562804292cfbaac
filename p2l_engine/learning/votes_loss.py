"""The loss of all votes at the outputs of a head, with its derivatives: what a search for the best head evaluates."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from p2l_engine.feedback import FeedbackModel, Outcome
from p2l_engine.learning import likelihood
from p2l_engine.native import votes as core
from p2l_engine.votes import Votes

Float64 = npt.NDArray[np.float64]


def votes_loss(feedback: FeedbackModel, votes: Votes, outputs: Float64) -> tuple[float, Float64]:
    """The weighted sum of the votes' negative log-likelihoods at the head's outputs [P, K], and its derivatives [P, K].

    The native core computes it where no coefficients are further apart than it can tell, torch for values and all others.
    """
    m = len(votes.models)
    theta, eta = outputs[:, :m], outputs[:, m] if feedback.has_eta else None
    if not feedback.rao_kupper or not _near(feedback, theta, eta):
        return _differentiated(feedback, votes, theta, eta)
    excess, by_eta = (None, None) if eta is None else _excess(feedback, eta)
    if not feedback.has_ties and bool((votes.outcome >= Outcome.TIE).any()):
        raise ValueError(f"outcome: the feedback model {feedback.name!r} knows no ties; leave them out or use 'bt-tie'")
    a, b, outcome = (np.ascontiguousarray(each, np.int64) for each in (votes.a, votes.b, votes.outcome))
    of = core.VoteArrays(votes.bounds, a, b, outcome, np.ascontiguousarray(votes.weight, np.float64))
    outcomes, half_ties = len(feedback.outcomes), feedback.ties_as_half
    loss, slope, by_lambda = core.votes_loss(theta, excess, feedback.grounded, of, outcomes, half_ties)
    if by_eta is not None:
        slope = np.concatenate([slope, (by_lambda * by_eta)[:, None]], 1)
    return float(loss.sum()), slope


def _near(feedback: FeedbackModel, theta: Float64, eta: Float64 | None) -> bool:
    """Whether the native core can tell all coefficients of a prompt apart from 0 and from infinity."""
    at = np.zeros((len(theta), int(feedback.grounded)))
    span = np.ptp(np.concatenate([theta, at], 1), 1)
    return bool((span < core.WIDEST).all()) and (eta is None or bool((eta < core.WIDEST).all()))


def _excess(feedback: FeedbackModel, eta: Float64) -> tuple[Float64, Float64]:
    """lambda - 1 of tie parameters [P], and its derivative."""
    at = torch.from_numpy(eta).requires_grad_()
    log_lambda = feedback.log_lambda(at)
    (slope,) = torch.autograd.grad(log_lambda.sum(), at)
    found = log_lambda.detach().numpy()
    return np.expm1(found), np.exp(found) * slope.numpy()


def _differentiated(feedback: FeedbackModel, votes: Votes, theta: Float64, eta: Float64 | None) -> tuple[float, Float64]:
    """The same by torch, at any coefficients."""
    m, of, weight = theta.shape[1], votes.prompt, votes.weight
    k = m + (eta is not None)
    tie = np.zeros(len(votes)) if eta is None else eta[of]
    losses, slope = likelihood.gradient(feedback, np.stack([*votes.sides(theta), tie]), votes.outcome)
    slope *= weight
    row, paired = of * k, votes.b >= 0
    place, by = [row + votes.a, (row + votes.b)[paired]], [slope[0], slope[1, paired]]
    if eta is not None:
        place, by = [*place, row + m], [*by, slope[2]]
    by_output = np.asarray(np.bincount(np.concatenate(place), np.concatenate(by), len(theta) * k), np.float64)
    return float(weight @ losses), by_output.reshape(len(theta), k)

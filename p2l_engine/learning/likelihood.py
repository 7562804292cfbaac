"""The loss of votes (or values) at their linear predictors, with its exact first and second derivatives.

The linear predictors of a vote are theta_a, theta_b and eta: linear [3, V]. theta_b is 0 for values of one model; eta is not
read where the feedback model has none.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from p2l_engine.feedback import FeedbackModel
from p2l_engine.leaderboard.losses import pair_derivatives
from p2l_engine.learning.objective import outcome_shares

Float64 = npt.NDArray[np.float64]


def losses(feedback: FeedbackModel, linear: Float64, outcome: npt.NDArray[np.generic]) -> Float64:
    """[V]: the negative log-likelihood of each outcome."""
    return _losses(feedback, torch.from_numpy(linear), outcome).numpy()


def gradient(feedback: FeedbackModel, linear: Float64, outcome: npt.NDArray[np.generic]) -> Float64:
    """[3, V]: the derivatives of ``losses`` by the linear predictors."""
    return curvature(feedback, linear, outcome)[0]


def curvature(feedback: FeedbackModel, linear: Float64, outcome: npt.NDArray[np.generic]) -> tuple[Float64, Float64]:
    """``gradient`` [3, V], and the second derivatives [3, 3, V]."""
    if feedback.of_values:
        x = torch.from_numpy(linear).requires_grad_()
        (first,) = torch.autograd.grad(_losses(feedback, x, outcome).sum(), x, create_graph=True)
        second = [torch.autograd.grad(row.sum(), x, retain_graph=True)[0] for row in first]
        return first.detach().numpy(), torch.stack(second).numpy()
    _, slope, bend = pair_derivatives(feedback, linear[0], linear[1], linear[2] if feedback.has_eta else None)
    came = -outcome_shares(feedback, outcome.astype(np.int64))
    by = [0, 1, 3]  # without the ground
    return np.einsum("vk,vki->iv", came, slope[:, :, by]), np.einsum("vk,vkij->ijv", came, bend[:, :, by][:, :, :, by])


def _losses(feedback: FeedbackModel, x: Tensor, outcome: npt.NDArray[np.generic]) -> Tensor:
    return -feedback.log_likelihood(x[0], x[1], x[2] if feedback.has_eta else None, torch.from_numpy(outcome))

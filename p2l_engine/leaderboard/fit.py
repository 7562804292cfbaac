"""The leaderboard that best explains expected (or counted) outcomes: maximum likelihood by Newton's method, in float64."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from p2l_engine.feedback import FeedbackModel
from p2l_engine.leaderboard.connected import components
from p2l_engine.leaderboard.outcomes import pair_count, pairs

Float64 = npt.NDArray[np.float64]

TOLERANCE = 1e-10  # of the gradient, for a mean weight of 1 a pair
STALLED = 1e-8  # of the gradient, where rounding keeps loss and gradient from getting smaller
ITERATIONS = 200
SMALL_STEP = 0.1


class Fit(NamedTuple):
    """theta [M], of mean 0 where only differences count; eta, or None; loss: the mean negative log-likelihood; iterations."""

    theta: Float64
    eta: float | None
    loss: float
    iterations: int


def fit(
    feedback: FeedbackModel,
    outcomes: npt.ArrayLike,
    n_models: int,
    start: Fit | None = None,
    ridge: float = 0.0,
) -> Fit:
    """The coefficients under which ``outcomes`` are likeliest: the paper's (3), for any feedback model of votes.

    outcomes [K, M (M - 1) / 2]: how often (or with what weight) each outcome came for each pair, in the order of
    ``leaderboard.pairs``. start: a fit to begin from. ridge: the penalty on theta^2 and eta^2, in units of the mean weight of a
    pair; it bounds models that always win. Raises ValueError for outcomes that are negative, not finite or all 0, and, without
    a ridge, where models are unconnected or unbounded; ArithmeticError where Newton's method does not converge.
    """
    counts = np.asarray(outcomes, np.float64)
    if counts.shape != (len(feedback.outcomes), pair_count(n_models)):
        raise ValueError(
            f"outcomes: expected [{len(feedback.outcomes)}, {pair_count(n_models)}] for {feedback.name} and {n_models} models, "
            f"got {list(counts.shape)}"
        )
    if not (np.isfinite(counts).all() and (counts >= 0).all() and counts.sum() > 0):
        raise ValueError("outcomes: expected finite numbers >= 0, not all of them 0")
    if not ridge and not feedback.grounded:
        _check_bounded(counts, n_models)
    problem = _problem(feedback, counts, n_models)
    total = counts.sum()
    mean = total / pair_count(n_models)
    x = np.zeros(problem.size)
    if start is not None:
        x[:n_models] = start.theta
        if start.eta is not None:
            x[n_models:] = max(start.eta, feedback.least_eta)
    free = not feedback.grounded  # then theta is known up to a shift
    penalty = ridge * mean
    value, gradient, curvature = problem(x, penalty)
    last = np.inf, np.inf
    for iteration in range(ITERATIONS):
        gradient, curvature = _free(feedback, x, gradient, curvature)
        state = value, float(np.abs(gradient).max())
        stalled = state[0] == last[0] and state[1] >= last[1]
        if state[1] <= (STALLED if stalled else TOLERANCE) * mean:
            theta = x[:n_models] - (x[:n_models].mean() if free else 0.0)
            return Fit(theta, float(x[n_models]) if problem.size > n_models else None, float(value / total), iteration)
        if stalled:
            break
        last = state
        step = _step(curvature, gradient, n_models if free and not penalty else 0)
        x, value, gradient, curvature = _along(problem, x, step, value, gradient, penalty, curvature, feedback.least_eta)
    raise ArithmeticError(
        f"fit: no optimum after {iteration + 1} iterations (gradient {np.abs(gradient).max():.1e}): as where nothing ties, "
        "or nothing is bad; give a ridge, such as 1e-6"
    )


def _check_bounded(counts: Float64, n_models: int) -> None:
    """A finite optimum exists where every model has a chain of wins or ties to every other (Ford, 1957): where the graph of
    wins is strongly connected."""
    a, b = pairs(n_models)
    beats = np.zeros((n_models, n_models), dtype=bool)
    tied = counts[2:].sum(0) > 0
    beats[a, b], beats[b, a] = (counts[0] > 0) | tied, (counts[1] > 0) | tied
    if components(beats).any():
        raise ValueError("outcomes: expected weights that connect all models; some have no chain of pairs to the others")
    if components(beats, "strong").any():
        raise ValueError("outcomes: some models always win or always lose against others, so that their coefficients have no "
                         "bound; give a ridge, such as 1e-6")  # fmt: skip


def refit(feedback: FeedbackModel, samples: npt.ArrayLike, n_models: int, whole: Fit, ridge: float = 0.0) -> list[Fit]:
    """The fits of many samples [B, K, M (M - 1) / 2], such as bootstrap samples, of what ``whole`` was fitted to.

    Each is one Newton step from the optimum ``whole``, with an error of the order of the step squared; where the step is above
    SMALL_STEP, the fit continues to the sample's own optimum.
    """
    found: list[Fit] = []
    start = np.append(whole.theta, [] if whole.eta is None else [whole.eta])
    parts = None
    for counts in np.asarray(samples, np.float64):
        problem = _problem(feedback, counts, n_models)
        if isinstance(problem, _Ties):  # what depends only on the point is the same for all samples
            parts = problem.parts(start) if parts is None else parts
            value, gradient, curvature = problem.summed(problem.counts, *parts)
        else:
            value, gradient, curvature = problem.at(start)
        penalty = ridge * counts.sum() / pair_count(n_models)
        gradient, curvature = gradient + penalty * start, curvature + penalty * np.eye(problem.size)
        gradient, curvature = _free(feedback, start, gradient, curvature)
        step = _step(curvature, gradient, 0 if feedback.grounded or penalty else n_models)
        if np.abs(step).max() > SMALL_STEP:
            found.append(fit(feedback, counts, n_models, whole, ridge))
            continue
        x = _onto(start + step, n_models, feedback.least_eta)
        theta = x[:n_models] - (0.0 if feedback.grounded else x[:n_models].mean())
        found.append(Fit(theta, None if whole.eta is None else float(x[n_models]), value / counts.sum(), 1))
    return found


def _problem(feedback: FeedbackModel, counts: Float64, n_models: int) -> _Problem:
    return _Ties(feedback, counts, n_models) if feedback.has_eta else _Logistic(counts, n_models)


def _step(curvature: Float64, gradient: Float64, shift: int) -> Float64:
    """Newton's step, damped where the Hessian is not positive definite; ``shift`` > 0 fixes the mean of the first ``shift``
    entries."""
    scale = float(np.abs(np.diag(curvature)).max()) or 1.0
    if shift:
        curvature = curvature.copy()
        curvature[:shift, :shift] += scale / shift
    damping = 0.0
    while True:
        try:
            factor = np.linalg.cholesky(curvature + damping * np.eye(len(curvature)))
        except np.linalg.LinAlgError:
            damping = max(4 * damping, 1e-10 * scale)
            if damping > 1e6 * scale:
                raise ArithmeticError("fit: the Hessian is singular at every damping; give a ridge, such as 1e-6") from None
            continue
        return -np.linalg.solve(factor.T, np.linalg.solve(factor, gradient))


def _along(
    problem: _Problem,
    x: Float64,
    step: Float64,
    value: float,
    gradient: Float64,
    penalty: float,
    curvature: Float64,
    least_eta: float,
) -> tuple[Float64, float, Float64, Float64]:
    """Backtracking line search: the first of shorter and shorter steps that lowers the loss enough (Armijo)."""
    longest = np.abs(step).max()
    length = min(1.0, 10.0 / longest) if longest > 0 else 1.0  # far from the optimum the quadratic model is poor
    for _ in range(60):
        to = _onto(x + length * step, problem.n_models, least_eta)
        there = problem(to, penalty)
        # At the optimum the loss is flat up to rounding: there a smaller gradient is progress.
        flat = abs(there[0] - value) <= 1e-12 * abs(value) and np.abs(there[1]).max() < np.abs(gradient).max()
        if there[0] <= value + 1e-4 * float(gradient @ (to - x)) or flat:
            return to, *there
        length /= 2
    return x, value, gradient, curvature


def _free(feedback: FeedbackModel, x: Float64, gradient: Float64, curvature: Float64) -> tuple[Float64, Float64]:
    """Gradient and Hessian with eta frozen if it is at its active lower bound, where rk's loss has a kink."""
    if not feedback.has_eta or x[-1] > feedback.least_eta or gradient[-1] < 0:
        return gradient, curvature
    gradient, curvature = gradient.copy(), curvature.copy()
    gradient[-1] = curvature[-1] = curvature[:, -1] = 0.0
    curvature[-1, -1] = float(np.abs(np.diag(curvature)).max()) or 1.0
    return gradient, curvature


def _onto(x: Float64, n_models: int, least_eta: float) -> Float64:
    x[n_models:] = np.maximum(x[n_models:], least_eta)
    return x


class _Problem(ABC):
    """Loss, gradient and Hessian at x [size]: theta, and eta where there is one."""

    size: int
    n_models: int

    def __call__(self, x: Float64, penalty: float) -> tuple[float, Float64, Float64]:
        value, gradient, curvature = self.at(x)
        return value + penalty / 2 * float(x @ x), gradient + penalty * x, curvature + penalty * np.eye(self.size)

    @abstractmethod
    def at(self, x: Float64) -> tuple[float, Float64, Float64]:
        """Loss, gradient and Hessian without the penalty."""


class _Logistic(_Problem):
    """bt and bt-tie: -sum of A log s(d) + B log s(-d), d = theta_a - theta_b; the Hessian is a graph's Laplacian."""

    def __init__(self, counts: Float64, n_models: int) -> None:
        self.size = self.n_models = n_models
        self.a, self.b = pairs(n_models)
        self.first, self.second = counts[0], counts[1]

    def at(self, x: Float64) -> tuple[float, Float64, Float64]:
        d = x[self.a] - x[self.b]
        both = self.first + self.second
        value = float((self.first * np.logaddexp(0, -d) + self.second * np.logaddexp(0, d)).sum())
        p = np.exp(-np.logaddexp(0, -d))
        slope, bend = both * p - self.first, both * p * (1 - p)
        gradient: Any = np.bincount(self.a, slope, self.size) - np.bincount(self.b, slope, self.size)
        curvature = np.zeros((self.size, self.size))
        curvature[self.a, self.b] = curvature[self.b, self.a] = -bend
        np.fill_diagonal(curvature, -curvature.sum(1))
        return value, gradient, curvature


class _Ties(_Problem):
    """rk, rk-reparam and grk: a pair's loss depends on theta_a, theta_b and eta, and is differentiated by torch."""

    def __init__(self, feedback: FeedbackModel, counts: Float64, n_models: int) -> None:
        self.size, self.n_models = n_models + 1, n_models
        self.entries = np.stack([*pairs(n_models), np.full(pair_count(n_models), n_models)], 1)
        self.counts = counts.T
        self.feedback = feedback

    def at(self, x: Float64) -> tuple[float, Float64, Float64]:
        value, slope, bend = self.parts(x)
        return self.summed(self.counts, value, slope, bend)

    def parts(self, x: Float64) -> tuple[Float64, Float64, Float64]:
        """For each pair and outcome: -log P [.., K], its gradient [.., K, 3] and its Hessian [.., K, 3, 3]."""
        outcomes, pairs = len(self.feedback.outcomes), len(self.entries)
        # A row for each outcome and pair. A row's loss depends on that row alone, so that the gradient of their sum holds each
        # row's gradient: four calls of autograd, however many outcomes there are.
        with torch.inference_mode(False), torch.enable_grad():
            local = torch.from_numpy(x[self.entries]).repeat(outcomes, 1).requires_grad_()
            log_p = self.feedback.log_probabilities(*local.unbind(1)).view(outcomes, pairs, -1)
            losses = -torch.cat([log_p[k, :, k] for k in range(outcomes)])
            slope = _gradient(losses, local, create_graph=True)
            bend = torch.stack([_gradient(of, local) for of in slope.unbind(1)], 1)
        return (
            losses.detach().view(outcomes, pairs).T.numpy(),
            slope.detach().view(outcomes, pairs, 3).transpose(0, 1).numpy(),
            bend.detach().view(outcomes, pairs, 3, 3).transpose(0, 1).numpy(),
        )

    def summed(self, counts: Float64, value: Float64, slope: Float64, bend: Float64) -> tuple[float, Float64, Float64]:
        """Loss, gradient and Hessian over all pairs with counts [M (M - 1) / 2, K]."""
        size, entries = self.size, self.entries
        rows = (entries[:, :, None] * size + entries[:, None, :]).ravel()
        gradient: Any = np.bincount(entries.ravel(), np.einsum("pk,pki->pi", counts, slope).ravel(), size)
        curvature: Any = np.bincount(rows, np.einsum("pk,pkij->pij", counts, bend).ravel(), size * size).reshape(size, size)
        return float((counts * value).sum()), gradient, curvature


def _gradient(each: Tensor, local: Tensor, create_graph: bool = False) -> Tensor:
    """The gradient of each entry in its own row of ``local``; zero where the entry does not depend on it."""
    if not each.requires_grad:
        return torch.zeros_like(local)
    (found,) = torch.autograd.grad(each.sum(), local, retain_graph=True, create_graph=create_graph, materialize_grads=True)
    return found

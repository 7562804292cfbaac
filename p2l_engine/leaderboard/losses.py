"""The negative log-likelihood of outcomes of pairs: its value, and its derivatives as a network of models (``network``).

Saturated pairs hold what they know in probabilities of 1e-100, beside one of almost 1 whose derivatives are differences of
numbers near 1. As sum over k of P_k grad log P_k = 0, derivatives need the probable outcome only as what the others are
measured against, and every digit of the small probabilities counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from p2l_engine.feedback import FeedbackModel, Outcome
from p2l_engine.leaderboard.network import SINGULAR, IndefiniteError, eliminate, solve_flows, solve_nodes
from p2l_engine.leaderboard.outcomes import pair_count, pairs

Float64 = npt.NDArray[np.float64]

ROUNDING = 1e-14  # of a loss, relative to the sum of the absolute values of its terms
CHUNK = 512  # pairs differentiated at once: they stay in the cache
EDGES = ((0, 1), (0, 2), (1, 2))  # of a pair's a, b and ground


@dataclass(frozen=True, slots=True)
class Quadratic:
    """A loss near a point, up to second order. value: the loss there; noise: how far rounding may move it.

    flows, weights, cross [M + 1, M + 1]: first derivatives, second derivatives and mixed ones with eta, along the edges between
    models; the last node is the ground, at coefficient 0. slope, bend: first and second derivative by eta; None where it is not
    free. shifts: only differences count, so that steps have the mean 0; semidefinite: it has no negative curvature.
    """

    value: float
    noise: float
    flows: Float64
    weights: Float64
    cross: Float64
    slope: float | None
    bend: float
    shifts: bool
    semidefinite: bool

    @property
    def gradient(self) -> Float64:
        """[M], or [M + 1] with eta."""
        return np.append(self.flows.sum(1)[:-1], [] if self.slope is None else [self.slope])

    def step(self, farthest: float = np.inf) -> Float64:
        """Newton's step, or the best one that moves eta no farther than this. Raises IndefiniteError where the loss has no
        minimum of second order."""
        stars = eliminate(self.weights, self.semidefinite)
        x = -solve_flows(stars, self.flows)
        if self.slope is None:
            return self._centred(x[:-1])
        along = solve_flows(stars, self.cross)
        eta = min(max((self.slope + self._across(x)) * self._each_slope(along), -farthest), farthest)
        return np.append(self._centred((x - along * eta)[:-1]), eta)

    def response(self, gradients: Float64) -> Float64:
        """[M (+ 1), B]: the steps that gradients [M (+ 1), B] would cause in place of this loss's own."""
        n = len(self.weights) - 1
        stars = eliminate(self.weights, self.semidefinite)
        x = -solve_nodes(stars, np.pad(gradients[:n], [(0, 1), (0, 0)]))
        if self.slope is None:
            return self._centred(x[:-1])
        along = solve_flows(stars, self.cross)
        eta = (gradients[n] + self.cross.sum(1) @ x) * self._each_slope(along)
        return np.concatenate([self._centred((x - along[:, None] * eta)[:-1]), eta[None]])

    def _across(self, x: Float64) -> float:
        return float((np.triu(self.cross) * (x[:, None] - x)).sum())

    def _each_slope(self, along: Float64) -> float:
        """By how much eta moves for each unit of its slope; 0 where the coefficients can undo whatever it does."""
        bend = self.bend - self._across(along)
        if bend < -SINGULAR * abs(self.bend) and not self.semidefinite:
            raise IndefiniteError("the quadratic form has no minimum")
        return -1 / bend if bend > SINGULAR * self.bend else 0.0

    def _centred(self, step: Float64) -> Float64:
        return step - step.mean(0) if self.shifts else step


class Loss:
    """-sum of counts [K, M (M - 1) / 2] times log-probabilities, + ridge / 2 (|theta|^2 + eta^2), as a function of x [size]:
    theta, and eta where there is one."""

    def __init__(self, feedback: FeedbackModel, counts: Float64, n_models: int, ridge: float = 0.0) -> None:
        self.feedback, self.n_models, self.ridge = feedback, n_models, ridge
        self.size = n_models + feedback.has_eta
        self.counts = counts.T
        self.a, self.b = pairs(n_models)

    def at(self, x: Float64, expected: bool = False, free: bool = True) -> Quadratic:
        """The loss near x. expected: with the Fisher information, which is never indefinite, in place of the Hessian; free:
        whether eta may move."""
        log_p, slope, bend = self._derivatives(x)
        first, fisher, away = sums_of_derivatives(self.counts, log_p, slope, bend)
        second = fisher if expected else fisher - away
        return self._quadratic(x, self.counts * -log_p, first, second, free, expected)

    def value(self, x: Float64) -> float:
        """Of the loss at x, without derivatives."""
        return float((self.counts * -self._log_probabilities(x)).sum()) + self.ridge / 2 * float(x @ x)

    def distance(self, x: Float64) -> float:
        """The value of ``toward`` x, without derivatives."""
        return float((self._apart(self._log_probabilities(x)) ** 2).sum() / 2) + self.ridge / 2 * float(x @ x)

    def toward(self, x: Float64) -> Quadratic:
        """Near x, half the squares of the log-ratios of probabilities less those of counts, for outcomes that came. Where
        counts are what some x expects, the optimum is this x, and Gauss and Newton's steps reach it however saturated."""
        log_p, slope, _ = self._derivatives(x)
        apart = self._apart(log_p)
        slope = np.where(self.counts[:, :, None] > 0, _less(slope, self.counts.argmax(1)), 0.0)
        first = np.einsum("pk,pki->pi", apart, slope)
        second = np.einsum("pki,pkj->pij", slope, slope)
        return self._quadratic(x, apart**2 / 2, first, second, True, True)

    def _apart(self, log_p: Float64) -> Float64:
        """[P, K]: the log-ratios of probabilities less those of counts, to the outcome that came most; 0 for those that never
        came."""
        came = self.counts > 0
        log_counts = np.log(np.where(came, self.counts, 1.0))
        return np.where(came, _less((log_p - log_counts)[:, :, None], self.counts.argmax(1))[:, :, 0], 0.0)

    def gradients(self, x: Float64, samples: Float64) -> Float64:
        """[size, B]: for each of the counts [B, K, M (M - 1) / 2], without the ridge."""
        _, slope, _ = self._derivatives(x)
        m, found = self.n_models, np.zeros((len(samples), self.size))
        each = -np.einsum("bkp,pki->bpi", samples, slope)
        table = np.zeros((len(samples), m, m))
        table[:, self.a, self.b], table[:, self.b, self.a] = each[:, :, 0], each[:, :, 1]
        found[:, :m] = table.sum(2)
        found[:, m:] = each[:, :, 3].sum(1)[:, None]
        return found.T

    def _quadratic(
        self, x: Float64, terms: Float64, first: Float64, second: Float64, free: bool, semidefinite: bool
    ) -> Quadratic:
        """From the terms of the loss, and each pair's derivatives [P, 4] and [P, 4, 4] by a, b, ground and eta."""
        m, ridge = self.n_models, self.ridge
        weight = np.stack([-second[:, i, j] for i, j in EDGES], 1)
        weights, flows = self._table(weight, True), self._table(_along(first, weight), False)
        weights[:m, m] += ridge
        weights[m, :m] += ridge
        flows[:m, m] += ridge * x[:m]
        flows[m, :m] -= ridge * x[:m]
        cross, slope, bend = np.zeros_like(flows), None, 0.0
        if self.feedback.has_eta and free:
            cross = self._table(_along(second[:, :, 3], weight), False)
            slope, bend = float(first[:, 3].sum() + ridge * x[m]), float(second[:, 3, 3].sum() + ridge)
        penalty = ridge / 2 * float(x @ x)
        noise = ROUNDING * (float(np.abs(terms).sum()) + float(self.counts.sum()) + penalty)
        shifts = not self.feedback.grounded and not ridge
        return Quadratic(float(terms.sum()) + penalty, noise, flows, weights, cross, slope, bend, shifts, semidefinite)

    def _table(self, edges: Float64, symmetric: bool) -> Float64:
        """[M + 1, M + 1] of each pair's three edges [P, 3]."""
        m, sign = self.n_models, 1.0 if symmetric else -1.0
        table = np.zeros((m + 1, m + 1))
        table[self.a, self.b], table[self.b, self.a] = edges[:, 0], sign * edges[:, 0]
        table[:m, m] = np.bincount(self.a, edges[:, 1], m) + np.bincount(self.b, edges[:, 2], m)
        table[m, :m] = sign * table[:m, m]
        return table

    def _log_probabilities(self, x: Float64) -> Float64:
        """log P [P, K] of each pair's outcomes."""
        theta = torch.from_numpy(x[: self.n_models])
        eta = torch.tensor(x[-1], dtype=torch.float64) if self.feedback.has_eta else None
        with torch.inference_mode():
            found = self.feedback.log_probabilities(theta[self.a], theta[self.b], eta)
        return found[:, : len(self.feedback.outcomes)].numpy()

    def _derivatives(self, x: Float64) -> tuple[Float64, Float64, Float64]:
        """log P [P, K] of each pair's outcomes, its gradient [P, K, 4] and its Hessian [P, K, 4, 4] by a, b, ground and eta."""
        eta = np.full(len(self.a), x[-1]) if self.feedback.has_eta else None
        return pair_derivatives(self.feedback, x[self.a], x[self.b], eta)


def pair_derivatives(feedback: FeedbackModel, a: Float64, b: Float64, eta: Float64 | None) -> tuple[Float64, Float64, Float64]:
    """For P pairs of coefficients a, b [P] and tie parameters eta [P]: log P [P, K] of the K outcomes, its gradient [P, K, 4]
    and its Hessian [P, K, 4, 4] by a, b, ground and eta."""
    if feedback.rao_kupper and not feedback.has_eta and not feedback.grounded:
        return _bradley_terry(a - b)
    if not feedback.rao_kupper:
        return _differentiated(feedback, a, b, eta)
    count, k = len(a), len(feedback.outcomes)
    log_p, slope, bend = np.empty((count, k)), np.empty((count, k, 4)), np.empty((count, k, 4, 4))
    for start in range(0, count, CHUNK):
        some = slice(start, start + CHUNK)
        for i, of in enumerate(feedback.expanded(a[some], b[some], None if eta is None else eta[some])):
            log_p[some, i], slope[some, i], bend[some, i] = of.value, of.slope.T, np.moveaxis(of.bend, 2, 0)
    return log_p, slope, bend


def sums_of_derivatives(counts: Float64, log_p: Float64, slope: Float64, bend: Float64) -> tuple[Float64, Float64, Float64]:
    """For counts [P, K] and ``pair_derivatives``: the gradient [P, n] of the negative log-likelihood, its Fisher information
    [P, n, n], and what is subtracted from this to give the Hessian."""
    p, total = np.exp(log_p), counts.sum(1, keepdims=True)
    likeliest = p.argmax(1)
    slope, bend = _less(slope, likeliest), _less(bend, likeliest)
    excess = counts - total * p
    excess[np.arange(len(p)), likeliest] = 0.0
    p[np.arange(len(p)), likeliest] = 0.0
    first = -np.einsum("pk,pki->pi", excess, slope)
    mean = np.einsum("pk,pki->pi", p, slope)
    fisher = total[:, :, None] * (np.einsum("pk,pki,pkj->pij", p, slope, slope) - mean[:, :, None] * mean[:, None, :])
    return first, fisher, np.einsum("pk,pkij->pij", excess, bend)


def _less(values: Float64, likeliest: npt.NDArray[np.int64]) -> Float64:
    """Values [P, K, ...] of outcomes less that of the likeliest one."""
    index = likeliest.reshape(-1, *[1] * (values.ndim - 1))
    return values - np.take_along_axis(values, index, 1)


def _along(sums: Float64, weight: Float64) -> Float64:
    """Flows [P, 3] along a pair's edges whose sums at a, b and the ground are those given, [P, 3 or 4]: none along the lightest
    edge, so that each other one is the sum at one end, and no light edge gets the rounding of a heavy one."""
    zero = np.zeros(len(sums))
    a, b, ground = sums[:, 0], sums[:, 1], sums[:, 2]
    without = np.stack([[zero, a, b], [a, zero, -ground], [-b, -ground, zero]])
    found: Float64 = without[np.abs(weight).argmin(1), :, np.arange(len(sums))]
    return found


def _bradley_terry(d: Float64) -> tuple[Float64, Float64, Float64]:
    log_p = -np.stack([np.logaddexp(0, -d), np.logaddexp(0, d)], 1)
    p = np.exp(log_p)
    slope, bend = np.zeros((len(d), 2, 4)), np.zeros((len(d), 2, 4, 4))
    slope[:, 0, 0], slope[:, 0, 1] = p[:, 1], -p[:, 1]
    slope[:, 1, 0], slope[:, 1, 1] = -p[:, 0], p[:, 0]
    bend[:, :, 0, 0] = bend[:, :, 1, 1] = -(p[:, :1] * p[:, 1:])
    bend[:, :, 0, 1] = bend[:, :, 1, 0] = p[:, :1] * p[:, 1:]
    return log_p, slope, bend


def _differentiated(feedback: FeedbackModel, a: Float64, b: Float64, eta: Float64 | None) -> tuple[Float64, Float64, Float64]:
    """By torch, for any feedback model of votes, however its formula is written."""
    outcomes, count = len(feedback.outcomes), len(a)
    zeros = np.zeros(count)
    point = np.stack([a, b, zeros, zeros if eta is None else eta], 1)
    # A row for each outcome and pair. A row's log-probability depends on that row alone, so that the gradient of their sum
    # holds each row's gradient: five calls of autograd, however many outcomes there are.
    with torch.inference_mode(False), torch.enable_grad():
        local = torch.from_numpy(point).repeat(outcomes, 1).requires_grad_()
        first, second, ground, tie = local.unbind(1)
        every = feedback.log_probabilities(first, second, tie if feedback.has_eta else None, ground).view(
            outcomes, count, len(Outcome)
        )
        log_p = torch.cat([every[k, :, k] for k in range(outcomes)])
        slope = _gradient(log_p, local, create_graph=True)
        bend = torch.stack([_gradient(of, local) for of in slope.unbind(1)], 1)
    return (
        log_p.detach().view(outcomes, count).T.numpy(),
        slope.detach().view(outcomes, count, 4).transpose(0, 1).numpy(),
        bend.detach().view(outcomes, count, 4, 4).transpose(0, 1).numpy(),
    )


def _gradient(each: Tensor, local: Tensor, create_graph: bool = False) -> Tensor:
    """The gradient of each entry in its own row of ``local``; zero where the entry does not depend on it."""
    if not each.requires_grad:
        return torch.zeros_like(local)
    (found,) = torch.autograd.grad(each.sum(), local, retain_graph=True, create_graph=create_graph, materialize_grads=True)
    return found


def mean_weight(counts: Float64, n_models: int) -> float:
    """The mean weight of a pair, of counts [K, M (M - 1) / 2]."""
    return float(counts.sum()) / pair_count(n_models)

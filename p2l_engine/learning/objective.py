"""The negative log-posterior of rows of the head, given votes; and its minimum.

Every free row m is w_m = mean_m + B L_m u_m with u_m ~ N(0, I): B [D + 1, r] is the basis, L_m [r, r] the factor of its prior.
A prompt enters through its features B' x, [r], and through the coefficients at the means, [M].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.linalg import cho_factor, cho_solve

from p2l_engine.feedback import FeedbackModel, Outcome
from p2l_engine.leaderboard.losses import pair_derivatives, sums_of_derivatives
from p2l_engine.votes import Votes

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

ROUNDING = 1e-14  # of a sum, relative to the sum of the sizes of what its terms are computed from
MOST_STEPS = 500
HEAVIEST = 1e9  # of a vote: beyond it float64 no longer sees the prior, or other votes, beside it


@dataclass(frozen=True, slots=True)
class Local:
    """The objective near a point: its value and rounding's part of it, its gradient [F, r], and second derivatives of each
    vote's loss by its two models' coefficients [V, 2, 2]: exact ones, and the Fisher information, which is never indefinite."""

    value: float
    noise: float
    gradient: Float64
    exact: Float64
    definite: Float64


class Objective:
    """votes: on the M models of the columns of base. eta [P]: tie parameters, where the feedback model has them. base [P, M]:
    coefficients at the means. features [P, r]. factors: L_m of each free row, by column; the other rows stay as they are."""

    def __init__(
        self,
        feedback: FeedbackModel,
        votes: Votes,
        eta: Float64 | None,
        base: Float64,
        features: Float64,
        factors: Mapping[int, Float64],
    ) -> None:
        self.feedback, self.base, self.features = feedback, base, features
        self.free = sorted(factors)
        self.factors = np.stack([factors[m] for m in self.free]) if factors else np.zeros((0, 0, 0))
        slot = np.full(base.shape[1] + 1, -1)  # the last is for b = -1
        slot[self.free] = np.arange(len(self.free))
        # Votes on rows that are not free, or of weight 0, change nothing.
        touching: npt.NDArray[np.bool_] = ((slot[votes.a] >= 0) | (slot[votes.b] >= 0)) & (votes.weight > 0)
        self.prompt, self.weight = votes.prompt[touching], votes.weight[touching]
        self.outcome = votes.outcome[touching]
        self.sides = np.stack([votes.a[touching], votes.b[touching]], 1)
        self.slots = slot[self.sides]
        self.eta = None if eta is None or not feedback.has_eta else eta[self.prompt]
        self.counts = counts_of(feedback, self.outcome, self.weight)

    @property
    def shape(self) -> tuple[int, int]:
        """F free rows of r parameters."""
        return self.factors.shape[:2]

    def value(self, u: Float64) -> float:
        """Of the objective at u [F, r]."""
        theta = self._coefficients(u)
        if self.counts is None:
            linear = self._linear(theta)
            loss = self.weight * (
                (np.exp(linear) - self.outcome * linear) if self.feedback.counts else (linear - self.outcome) ** 2 / 2
            )
            return float(loss.sum() + (u * u).sum() / 2)
        import torch

        eta = None if self.eta is None else torch.from_numpy(self.eta)
        with torch.inference_mode():
            log_p = self.feedback.log_probabilities(torch.from_numpy(theta[:, 0]), torch.from_numpy(theta[:, 1]), eta).numpy()
        k = self.counts.shape[1]
        return float(np.where(self.counts > 0, -self.counts * log_p[:, :k], 0.0).sum() + (u * u).sum() / 2)

    def at(self, u: Float64) -> Local:
        """The objective near u [F, r]."""
        theta = self._coefficients(u)
        if self.counts is None:
            linear = self._linear(theta)
            if self.feedback.counts:
                mean = np.exp(linear)
                terms, slope, bend = mean - self.outcome * linear, mean - self.outcome, mean
                sizes = mean + np.abs(self.outcome * linear)
            else:
                terms, slope, bend = (linear - self.outcome) ** 2 / 2, linear - self.outcome, np.ones(len(linear))
                sizes = terms
            signs = np.where(self.sides >= 0, [1.0, -1.0], 0.0)
            terms, sizes = self.weight * terms, self.weight * sizes
            first = (self.weight * slope)[:, None] * signs
            exact = (self.weight * bend)[:, None, None] * signs[:, :, None] * signs[:, None, :]
            definite = exact
        else:
            log_p, slopes, bends = pair_derivatives(self.feedback, theta[:, 0], theta[:, 1], self.eta)
            first, fisher, away = sums_of_derivatives(self.counts, log_p, slopes, bends)
            terms = np.where(self.counts > 0, -self.counts * log_p, 0.0).sum(1)
            # log P near 0 is a difference of numbers of the size of theta, and as wrong as these.
            sizes = terms + self.weight * (1 + np.abs(theta).max(1))
            first, definite, exact = first[:, :2], fisher[:, :2, :2], (fisher - away)[:, :2, :2]
        gradient = u + self._back(first)
        noise = ROUNDING * (float(sizes.sum()) + float((u * u).sum()) / 2)
        return Local(float(terms.sum()) + float((u * u).sum()) / 2, noise, gradient, exact, definite)

    def hessian_times(self, second: Float64, x: Float64) -> Float64:
        """The Hessian of these second derivatives [V, 2, 2], times x [F, r]."""
        moved = np.concatenate([self.features @ self._scaled(x).T, np.zeros((len(self.features), 1))], 1)
        each = moved[self.prompt[:, None], self.slots]  # slot -1 is the column of zeros
        return x + self._back(np.einsum("vij,vj->vi", second, each))

    def blocks(self, second: Float64) -> Float64:
        """[F, r, r]: the Hessian's diagonal blocks."""
        found = np.empty_like(self.factors)
        weight = self._by_model(np.stack([second[:, 0, 0], second[:, 1, 1]], 1))
        for f, factor in enumerate(self.factors):
            rows = np.flatnonzero(weight[:, f])
            of = self.features[rows]
            found[f] = np.eye(len(factor)) + factor.T @ (of.T @ (weight[rows, f, None] * of)) @ factor
        return found

    def hessian(self, second: Float64) -> Float64:
        """[F r, F r]: the whole Hessian."""
        f, r = self.shape
        whole = np.zeros((f, r, f, r))
        for i, block in enumerate(self.blocks(second)):
            whole[i, :, i, :] = block
        both: npt.NDArray[np.bool_] = np.all(self.slots >= 0, axis=1)
        pairs = self.slots[both]
        for i, j in {(int(min(p)), int(max(p))) for p in pairs}:
            of = both.copy()
            of[both] = (pairs.min(1) == i) & (pairs.max(1) == j)
            x = self.features[self.prompt[of]]
            cross = self.factors[i].T @ (x.T @ (second[of, 0, 1, None] * x)) @ self.factors[j]
            whole[i, :, j, :] += cross
            whole[j, :, i, :] += cross.T
        return whole.reshape(f * r, f * r)

    def _scaled(self, u: Float64) -> Float64:
        """L u, [F, r]."""
        found: Float64 = np.einsum("fij,fj->fi", self.factors, u)
        return found

    def _coefficients(self, u: Float64) -> Float64:
        """[V, 2]: of each vote's models; 0 where it has only one."""
        moved = self.base.copy()
        moved[:, self.free] += self.features @ self._scaled(u).T
        theta = moved[self.prompt[:, None], self.sides]
        theta[self.sides < 0] = 0.0
        return theta

    def _linear(self, theta: Float64) -> Float64:
        return theta[:, 0] - theta[:, 1]

    def _by_model(self, each: Float64) -> Float64:
        """[P, F]: the sums over votes of each [V, 2]."""
        p, f = len(self.features), len(self.free)
        found = np.zeros(p * f)
        for side in (0, 1):
            of = self.slots[:, side] >= 0
            found += np.bincount(self.prompt[of] * f + self.slots[of, side], each[of, side], p * f)
        return found.reshape(p, f)

    def _back(self, each: Float64) -> Float64:
        """[F, r]: derivatives by the coefficients [V, 2] as derivatives by u."""
        found: Float64 = np.einsum("fji,jf->fi", self.factors, self.features.T @ self._by_model(each))
        return found


def counts_of(feedback: FeedbackModel, outcome: Int64 | Float64, weight: Float64) -> Float64 | None:
    """[V, K]: how much each vote counts for each outcome; None where values are observed. Raises ValueError for weights beside
    which others would be lost, and as ``outcome_shares`` does."""
    heaviest = float(weight.max(initial=0.0))
    if heaviest > HEAVIEST:
        raise ValueError(f"weight: expected at most {HEAVIEST:g} for a vote, got {heaviest:g}; divide all weights")
    if feedback.of_values:
        return None
    counts: Float64 = weight[:, None] * outcome_shares(feedback, outcome.astype(np.int64))
    return counts


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


@dataclass(frozen=True, slots=True)
class Minimum:
    """u [F, r], the objective near it, how many steps led there, and how far it still is, about, in prior deviations."""

    u: Float64
    local: Local
    steps: int
    distance: float


def minimise(objective: Objective, start: Float64 | None = None, tolerance: float = 1e-9) -> Minimum:
    """Newton's method with conjugate gradients, preconditioned by the Hessian's diagonal blocks.

    It ends where Newton's step is shorter than ``tolerance``, relative to 1 + |u|: the step's own quadratic form bounds its
    length, as the prior's curvature is 1 in every direction. Raises ArithmeticError where that takes too many steps.
    """
    u = np.zeros(objective.shape) if start is None else start.copy()
    local = objective.at(u)
    for step in range(MOST_STEPS):
        direction = _direction(objective, local)
        slope = float((direction * local.gradient).sum())
        distance = float(np.sqrt(max(-slope, 0.0)))
        if distance <= tolerance * (1 + float(np.linalg.norm(u))):
            return Minimum(u, local, step, distance)
        length = 1.0
        while objective.value(u + length * direction) > local.value + 1e-4 * length * slope + local.noise:
            length /= 2
            if length < 1e-12:
                raise ArithmeticError(f"the posterior's maximum was not reached: no descent at a distance of {distance:g}")
        u = u + length * direction
        local = objective.at(u)
    raise ArithmeticError(f"the posterior's maximum was not reached in {MOST_STEPS} steps: it is {distance:g} away")


def _direction(objective: Objective, local: Local) -> Float64:
    """An approximate Newton step, which descends; where the curvature is negative, the part that was found before."""
    size = float(np.linalg.norm(local.gradient))
    if size == 0:
        return np.zeros_like(local.gradient)
    factors = [cho_factor(block) for block in objective.blocks(local.definite)]

    def precondition(x: Float64) -> Float64:
        return np.stack([cho_solve(factor, row) for factor, row in zip(factors, x, strict=True)])

    x, residual = np.zeros_like(local.gradient), -local.gradient
    z = precondition(residual)
    p, rho = z, float((residual * z).sum())
    for k in range(max(20, residual.size)):
        ahead = objective.hessian_times(local.exact, p)
        bend = float((p * ahead).sum())
        if bend <= 0:
            return p if k == 0 else x
        alpha = rho / bend
        x, residual = x + alpha * p, residual - alpha * ahead
        if np.linalg.norm(residual) <= min(0.1, np.sqrt(size)) * size * 0.1:
            break
        z = precondition(residual)
        rho, before = float((residual * z).sum()), rho
        p = z + rho / before * p
    return x

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

from p2l_engine.feedback import FeedbackModel
from p2l_engine.learning import likelihood
from p2l_engine.votes import Votes

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

ROUNDING = 1e-14  # of a sum, relative to the sum of the sizes of what its terms are computed from
MOST_STEPS = 500


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
    coefficients at the means. features [P, r]. factors: L_m of each free row, by column; the other rows stay as they are.
    Raises ValueError as ``likelihood.check`` does."""

    def __init__(
        self,
        feedback: FeedbackModel,
        votes: Votes,
        eta: Float64 | None,
        base: Float64,
        features: Float64,
        factors: Mapping[int, Float64],
    ) -> None:
        likelihood.check(feedback, votes.outcome, votes.weight)
        self.feedback, self.base, self.features = feedback, base, features
        self.free = sorted(factors)
        self.factors = np.stack([factors[m] for m in self.free]) if factors else np.zeros((0, *2 * features.shape[1:]))
        slot = np.full(base.shape[1] + 1, -1)  # the last is for b = -1
        slot[self.free] = np.arange(len(self.free))
        # Votes on rows that are not free, or of weight 0, change nothing.
        touching: npt.NDArray[np.bool_] = ((slot[votes.a] >= 0) | (slot[votes.b] >= 0)) & (votes.weight > 0)
        self.prompt, self.weight = votes.prompt[touching], votes.weight[touching]
        self.outcome = votes.outcome[touching]
        self.sides = np.stack([votes.a[touching], votes.b[touching]], 1)
        self.slots = slot[self.sides]
        self.eta = None if eta is None or not feedback.has_eta else eta[self.prompt]

    @property
    def shape(self) -> tuple[int, int]:
        """F free rows of r parameters."""
        return self.factors.shape[:2]

    def value(self, u: Float64) -> float:
        """Of the objective at u [F, r]."""
        losses = likelihood.losses(self.feedback, self._linear(u), self.outcome)
        return float(self.weight @ losses + (u * u).sum() / 2)

    def at(self, u: Float64) -> Local:
        """The objective near u [F, r]."""
        near, weight = likelihood.information(self.feedback, self._linear(u), self.outcome), self.weight
        penalty = float((u * u).sum()) / 2
        gradient = u + self._back(weight[:, None] * near.first[:, :2])
        noise = ROUNDING * (float(weight @ near.sizes) + penalty)
        exact, definite = (weight[:, None, None] * of[:, :2, :2] for of in (near.exact, near.definite))
        return Local(float(weight @ near.losses) + penalty, noise, gradient, exact, definite)

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

    def _linear(self, u: Float64) -> Float64:
        """[3, V]: each vote's coefficients, 0 where it has only one model, and its tie parameter, 0 where there is none."""
        moved = self.base.copy()
        moved[:, self.free] += self.features @ self._scaled(u).T
        theta = moved[self.prompt[:, None], self.sides]
        theta[self.sides < 0] = 0.0
        return np.stack([theta[:, 0], theta[:, 1], np.zeros(len(theta)) if self.eta is None else self.eta])

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
    length, as the prior's curvature is 1 in every direction; where rounding hides what the step gains, its length itself is
    what counts. Raises ArithmeticError where that takes too many steps, and where the loss leaves float64.
    """
    u = np.zeros(objective.shape) if start is None else start.copy()
    with np.errstate(over="ignore", invalid="ignore"):
        local = objective.at(u)
        for step in range(MOST_STEPS):
            enough = tolerance * (1 + float(np.linalg.norm(u)))
            _check_finite(local.value, float(np.linalg.norm(local.gradient)))
            direction = _direction(objective, local)
            slope, size = float((direction * local.gradient).sum()), float(np.linalg.norm(direction))
            _check_finite(slope, size)
            distance = float(np.sqrt(max(-slope, 0.0)))
            if -slope <= local.noise:
                distance = min(distance, size)
            if distance <= enough:
                return Minimum(u, local, step, distance)
            length = 1.0
            while not objective.value(u + length * direction) <= local.value + 1e-4 * length * slope + local.noise:
                length /= 2
                if length * size < 1e-3 * enough:
                    raise ArithmeticError(f"the posterior's maximum was not reached: no descent at a distance of {distance:g}")
            u = u + length * direction
            local = objective.at(u)
    raise ArithmeticError(f"the posterior's maximum was not reached in {MOST_STEPS} steps: it is {distance:g} away")


def _check_finite(*numbers: float) -> None:
    if not np.isfinite(numbers).all():
        raise ArithmeticError(
            "the posterior's maximum was not reached: the votes' loss is beyond float64; are some values, or coefficients of "
            "the checkpoint, far beyond what the others are?"
        )


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

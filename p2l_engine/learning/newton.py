"""Maximum likelihood of coefficients that are linear in a few parameters, with Gaussian priors and lower bounds."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from p2l_engine.feedback import FeedbackModel
from p2l_engine.learning import likelihood

Float64 = npt.NDArray[np.float64]

STEPS = 200
HALVINGS = 60
ENOUGH = 1e-7  # of the log-likelihood, in nats: the step that promises less is the last one, and squares the error
ROUNDING = 1e-14  # of a sum, relative to the sum of the sizes of what its terms are computed from


@dataclass(frozen=True, slots=True)
class LinearFit:
    """The negative log-likelihood of V votes plus that of the prior, by k parameters.

    columns [3 V, k]: of theta_a, then of theta_b, then of eta; fixed [3, V]: the part that no parameter changes. outcome,
    weight [V].
    centre, precision [k]: of the independent Gaussian prior; least [k]: lower bounds.
    """

    feedback: FeedbackModel
    columns: csr_array
    fixed: Float64
    outcome: npt.NDArray[np.generic]
    weight: Float64
    centre: Float64
    precision: Float64
    least: Float64

    def of(self, rows: npt.NDArray[np.int64]) -> LinearFit:
        """Of these votes alone."""
        every = np.concatenate([rows + i * len(self.weight) for i in range(3)])
        return replace(
            self,
            columns=self.columns[every],
            fixed=self.fixed[:, rows],
            outcome=self.outcome[rows],
            weight=self.weight[rows],
        )

    def linear(self, x: Float64) -> Float64:
        """[3, V]: the linear predictors."""
        found: Float64 = (self.columns @ x).reshape(3, -1) + self.fixed
        return found

    def losses(self, x: Float64) -> Float64:
        """[V]: of each vote, without weight and prior."""
        return likelihood.losses(self.feedback, self.linear(x), self.outcome)

    def value(self, x: Float64) -> float:
        """Infinite where the losses are not finite."""
        total = self.weight @ self.losses(x) + 0.5 * self.precision @ (x - self.centre) ** 2
        return float(total) if np.isfinite(total) else np.inf

    def noise(self, x: Float64) -> float:
        """How far rounding may move ``value``."""
        sizes = likelihood.sizes(self.feedback, self.linear(x), self.outcome)
        return ROUNDING * float(self.weight @ sizes + 0.5 * self.precision @ (x - self.centre) ** 2)

    def scores(self, x: Float64) -> csr_array:
        """[V, k]: each vote's gradient."""
        by = likelihood.curvature(self.feedback, self.linear(x), self.outcome)[0] * self.weight
        return _placed(by[None]) @ self.columns

    def derivatives(self, x: Float64) -> tuple[Float64, Float64]:
        """The gradient [k] and the second derivatives [k, k]."""
        first, second = likelihood.curvature(self.feedback, self.linear(x), self.outcome)
        slope = self.precision * (x - self.centre) + self.columns.T @ (first * self.weight).ravel()
        bend = (self.columns.T @ (_placed(second * self.weight) @ self.columns)).toarray()
        return slope, (bend + bend.T) / 2 + np.diag(self.precision)


def _placed(blocks: Float64) -> csr_array:
    """[r V, 3 V] of r x 3 diagonal blocks [r, 3, V]."""
    r, _, v = blocks.shape
    columns = np.arange(v)[:, None] + v * np.arange(3)
    values = np.moveaxis(blocks, 1, 2).reshape(-1)
    return csr_array((values, np.tile(columns.ravel(), r), np.arange(0, 3 * r * v + 1, 3)), shape=(r * v, 3 * v))


def minimise(of: LinearFit, start: Float64) -> Float64:
    """The parameters [k] of the least value, by Newton's method, projected onto the bounds (Bertsekas, 1982). Raises
    ArithmeticError where it does not converge, and where the start is beyond float64."""
    x = np.maximum(start, of.least)
    if not len(x):
        return x
    value = of.value(x)
    for _ in range(STEPS):
        slope, bend = of.derivatives(x)
        if not (np.isfinite(value) and np.isfinite(slope).all() and np.isfinite(bend).all()):
            raise ArithmeticError("calibration: the votes' loss is beyond float64: are some coefficients far beyond 100?")
        free = ~((x <= of.least) & (slope > 0))
        step = np.zeros(len(x))
        step[free] = -_solve(bend[np.ix_(free, free)], slope[free])
        promised, noise = float(slope @ step), of.noise(x)
        if promised > -2 * max(ENOUGH, noise):
            last = np.maximum(x + step, of.least)
            return last if of.value(last) <= value + noise else x
        length = 1.0
        for _ in range(HALVINGS):
            to = np.maximum(x + length * step, of.least)
            new = of.value(to)
            if new <= value + 1e-4 * float(slope @ (to - x)) + noise:
                break
            length /= 2
        else:
            raise ArithmeticError(f"calibration: no optimum: no descent where {-promised:g} nats are promised")
        x, value = to, new
    raise ArithmeticError(
        f"calibration: no optimum after {STEPS} steps of Newton's method: are some coefficients far beyond 100?"
    )


def errors(of: LinearFit, x: Float64, groups: npt.NDArray[np.int64]) -> Float64:
    """[k]: the parameters' standard errors at the optimum where votes of one group (groups [V]) depend on each other (the
    sandwich estimator with clusters; Liang and Zeger, 1986); 0 at a bound."""
    _, bend = of.derivatives(x)
    free = x > of.least
    n = int(groups.max()) + 1
    member = csr_array((np.ones(len(groups)), (groups, np.arange(len(groups)))), shape=(n, len(groups)))
    by_group = (member @ of.scores(x)).toarray()[:, free]
    inverse = np.linalg.inv(_positive(bend[np.ix_(free, free)]))
    found = np.zeros(len(x))
    found[free] = np.sqrt(np.diag(inverse @ (by_group.T @ by_group) @ inverse) * n / max(n - 1, 1))
    return found


def _solve(bend: Float64, slope: Float64) -> Float64:
    return np.asarray(np.linalg.solve(_positive(bend), slope), np.float64)


def _positive(bend: Float64) -> Float64:
    """With eigenvalues of their absolute value, none near 0: a direction of descent where the ties' loss is not convex."""
    try:
        np.linalg.cholesky(bend)
        return bend
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(bend)
        values = np.maximum(np.abs(values), 1e-8 * max(float(np.abs(values).max(initial=0.0)), 1e-8))
        found: Float64 = (vectors * values) @ vectors.T
        return found

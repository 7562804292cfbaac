"""What is known of a row of the head before its first vote: a Gaussian prior, learned from the rows that are there.

Rows are described in a basis B [D + 1, r], r small: w = mean + B v. The functions B' x(z) of a prompt z are uncorrelated over
reference prompts, with variance 1 and mean 0, but for the first, the constant 1. So the covariance of v is in units of theta.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse.linalg import svds

Float64 = npt.NDArray[np.float64]

RANK = 128
SHRUNK = 0.7  # deviation of a new row along those of the head's rows, relative to theirs, which their own errors widen
SMALLEST = 1e-8  # of a direction's variance, relative to the largest: below it is rounding
LEAST_DEVIATION = 0.1  # of theta, of what a prior leaves open


@dataclass(frozen=True, slots=True)
class Basis:
    """matrix [D + 1, r]: the constant, directions in which the head's rows differ, principal directions of the hidden states.
    coordinates [M, r]: of the head's rows, around their mean. ridge [r]: the variance of each coordinate of a row in free
    directions, scaled to a mean of 1; 0 for the constant. It is half way, as a geometric mean, between that of independent,
    equally variable weights, for which few directions are nearly all, and one that is the same for each direction."""

    matrix: Float64
    coordinates: Float64
    ridge: Float64

    def features(self, hidden: npt.NDArray[np.floating]) -> Float64:
        """B' x, [P, r], of hidden states [P, D]."""
        return features(self.matrix, hidden)

    @classmethod
    def of(cls, hidden: npt.NDArray[np.floating], rows: Float64, rank: int = RANK, kept: Float64 | None = None) -> Basis:
        """From reference hidden states [N, D] and the head's rows [M, D + 1] (weights and bias). kept: the first columns.

        The covariance of few hidden states is shrunk towards a multiple of the identity (Ledoit and Wolf, 2004).
        """
        n, d = hidden.shape
        mean = hidden.mean(0, dtype=np.float64) if n else np.zeros(d)
        centred = (hidden - mean).astype(np.float64)
        shrinkage, level = _shrinkage(centred, float(mean @ mean) / d)

        def covariance_times(x: Float64) -> Float64:
            found: Float64 = (1 - shrinkage) * (centred.T @ (centred @ x)) / max(n, 1) + shrinkage * level * x
            return found

        away = (rows - rows.mean(0)).T
        matrix = np.eye(d + 1)[:, -1:] if kept is None else kept
        most = min(rank, d + 1)
        for some, size in ((away[:-1], (1 + most) // 2), (_principal(centred, most), most)):
            room, old = size - matrix.shape[1], matrix[:-1, 1:]
            least = SMALLEST * float((some * covariance_times(some)).sum(0).max(initial=0.0))
            if old.shape[1]:
                scaled = covariance_times(old)
                some = some - old @ np.linalg.lstsq(old.T @ scaled, scaled.T @ some, rcond=None)[0]
            more = _orthonormal(some, covariance_times, room, least)
            matrix = np.concatenate([matrix, np.concatenate([more, -(mean @ more)[None]])], 1)
        scaled = covariance_times(matrix[:-1])
        variance = np.maximum((matrix[:-1] * scaled).sum(0), 1e-300)
        coordinates = (away[:-1].T @ scaled) / variance
        coordinates[:, 0] = away[-1] + mean @ away[:-1]
        ridge = np.zeros(len(variance))
        ridge[1:] = np.sqrt((scaled[:, 1:] ** 2).sum(0)) / variance[1:]
        return cls(matrix, coordinates, ridge / max(ridge[1:].mean() if len(ridge) > 1 else 1.0, 1e-300))


def features(matrix: Float64, hidden: npt.NDArray[np.floating]) -> Float64:
    """matrix' [h; 1], [P, r], of hidden states [P, D]."""
    found: Float64 = hidden.astype(np.float64) @ matrix[:-1] + matrix[-1]
    return found


@dataclass(frozen=True, slots=True)
class Scales:
    """Of the covariance of a new row's coordinates. rows: how far it lies along the deviations of the head's rows, 1: as they
    do themselves; free: standard deviation of theta in other directions; level: standard deviation of its mean theta."""

    rows: float
    free: float
    level: float


def covariance(basis: Basis, scales: Scales) -> Float64:
    """[r, r]: of a new row's coordinates."""
    of = basis.coordinates.copy()
    of[:, 0] = 0.0
    found = scales.rows**2 * of.T @ of / max(len(of) - 1, 1)
    found[np.diag_indices(len(found))] += scales.free**2 * basis.ridge / max(basis.ridge.sum(), 1e-300)
    found[0, 0] += scales.level**2
    return found


def of_rows(basis: Basis) -> Scales:
    """What the head's rows say of each other: the deviation of their means, what is left of a row beside the others', and
    ``SHRUNK`` of their other deviations."""
    m = len(basis.coordinates)
    if m < 3:
        return Scales(1.0, 1.0, max(1.0, float(np.abs(basis.coordinates[:, 0]).max(initial=0.0))))
    left = []
    for i in range(m):
        others = np.delete(basis.coordinates[:, 1:], i, 0)
        away = basis.coordinates[i, 1:] - others.mean(0)
        span = np.linalg.svd(others - others.mean(0), full_matrices=False)[2][: m - 2]
        left.append(float(((away - span.T @ (span @ away)) ** 2).sum()))
    free, level = float(np.sqrt(np.mean(left))), float(basis.coordinates[:, 0].std(ddof=1))
    return Scales(SHRUNK, max(free, LEAST_DEVIATION), max(level, LEAST_DEVIATION))


def _shrinkage(centred: Float64, square: float) -> tuple[float, float]:
    """Ledoit and Wolf's intensity, and the mean variance, without the [D, D] covariance. square: of the mean's entries, on
    average; a single hidden state says nothing of variances, which are then a tenth of it."""
    n, d = centred.shape
    if n < 2:
        return 1.0, square / 10 if square else 1.0
    squares = (centred**2).sum(1)
    level = float(squares.sum() / (n * d))
    gram = centred @ centred.T if n <= d else centred.T @ centred
    of_covariance = float((gram**2).sum()) / n**2
    spread = of_covariance - d * level**2  # squared distance of the covariance from the multiple of the identity
    noise = (float((squares**2).sum()) / n - of_covariance) / n
    # At least 1 / n: of few hidden states the estimate may be 0, and directions that they do not have would count as certain.
    return (1.0 if spread <= 0 else float(np.clip(noise / spread, 1 / n, 1.0))), level


def _principal(centred: Float64, count: int) -> Float64:
    """[D, count]: principal directions; fewer where there are no more."""
    least = min(centred.shape)
    count = min(count, least)
    if count <= 0 or not centred.any():
        return np.zeros((centred.shape[1], 0))
    if least <= 1024 or count >= least:
        return np.linalg.svd(centred, full_matrices=False)[2][:count].T
    start = np.random.default_rng(0).normal(size=least)
    _, size, right = svds(centred, count, v0=start)
    found: Float64 = right[np.argsort(-size)].T
    return found


def _orthonormal(directions: Float64, covariance_times: Callable[[Float64], Float64], most: int, least: float) -> Float64:
    """[D, <= most]: directions of the same span, uncorrelated and with variance 1, those of most variance first, without those
    of no more than ``least``."""
    if directions.shape[1] == 0 or most <= 0:
        return directions[:, :0]
    variance, turned = np.linalg.eigh(directions.T @ covariance_times(directions))
    order = np.argsort(-variance)[:most]
    order = order[variance[order] > least]
    found: Float64 = directions @ turned[:, order] / np.sqrt(variance[order])
    return found

"""The expected calibration error: whether the likeliest outcome comes as often as its probability says."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from p2l_engine.bootstrap import LEVEL, student
from p2l_engine.evaluation.resampled import Resampled
from p2l_engine.reports import Figure

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

BINS = 15
MANY = 1e6  # degrees of freedom: Student's T is normal


def calibration_error(top: Float64, hit: Float64, weight: Float64, resampled: Resampled, level: float = LEVEL) -> Figure | None:
    """The mean over 15 bins of the likeliest outcome's probability, ``top`` [V], of its distance from how often that outcome
    came, ``hit`` [V], by weight [V]; None where no vote has a weight.

    Taken from few votes the distances of a perfectly calibrated predictor add up too: chance has no sign. The figure is the
    error under which the plain sum would be a median, and its interval holds the errors under which the sum would lie between
    the quantiles of ``level``: of errors divided over the bins as they were found, none below its standard error, plus the
    bootstrap's deviations of either sign.
    """
    total, place = resampled.sums(weight), bin_of(top, BINS)
    if not total[0] > 0:
        return None
    some = total > 0
    sums = np.stack([resampled.sums((top - hit) * weight * (place == k)) for k in np.unique(place)], 1)
    gaps = sums[some] / total[some, None]
    plain, weights = float(np.abs(gaps[0]).sum()), resampled.weights(weight)
    if weights.effective < 2 or len(gaps) < 2:
        return Figure(plain, 0.0, 1.0)
    chance = (gaps[1:] - gaps[0]) / np.sqrt(weights.expected)
    chance = np.concatenate([chance, -chance])
    heavier = float(student(level, weights.effective - 1) / student(level, MANY))
    part = np.copysign(np.maximum(np.abs(gaps[0]), np.sqrt((chance**2).mean(0))), gaps[0])
    part = part / np.abs(part).sum() if part.any() else np.full(gaps.shape[1], 1 / gaps.shape[1])
    value = _error_at(plain, part, chance, 0.5)
    low = min(_error_at(plain, part, heavier * chance, (1 + level) / 2), value)
    high = max(_error_at(plain, part, heavier * chance, (1 - level) / 2), value)
    return Figure(value, low, min(high, 1.0))


def _error_at(plain: float, part: Float64, chance: Float64, share: float) -> float:
    """The least error, divided over the bins by ``part``, under which no more than ``share`` of the sums with ``chance``
    [B, bins] are below the plain one."""
    low, high = 0.0, plain + float(np.abs(chance).sum(1).max())

    def reached(error: float) -> bool:
        return float(np.quantile(np.abs(error * part + chance).sum(1), share)) >= plain

    if reached(low):
        return low
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high


def hits(p: Float64, y: Int64) -> Float64:
    """Whether the likeliest outcome came; equally likely ones share the hit, so that a constant predictor is right by
    chance."""
    best = p.max(1, keepdims=True)
    level = p >= best * (1 - 1e-12)
    found: Float64 = level[np.arange(len(y)), y] / level.sum(1)
    return found


def bin_of(p: Float64, bins: int) -> Int64:
    """The bin of each probability, of ``bins`` of equal width."""
    return np.minimum((p * bins).astype(np.int64), bins - 1)

"""The bootstrap over prompts: how often each prompt is in each sample, and the interval of what the samples give.

Two ways to draw a sample of n prompts. ``with_replacement`` draws exactly n. ``poisson`` draws each prompt Poisson(1) times,
whatever the others do, so that prompts can be drawn as they arrive, in parts; the two agree for many prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from p2l_engine.arguments import probability

Float64 = npt.NDArray[np.float64]

LEVEL = 0.95  # of intervals


def with_replacement(n: int, samples: int, seed: int) -> Float64:
    """[1 + B, n]: how often each prompt is in the full set (once) and in each of B samples of n prompts."""
    times = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), samples)
    return np.concatenate([np.ones((1, n)), times])


def poisson(n: int, samples: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """[B, n]: how often each of the next n prompts is in each of B samples."""
    return rng.poisson(1.0, (samples, n))


def shares(counts: Float64, weights: npt.ArrayLike | None = None) -> Float64:
    """Counts [1 + B, n], times the prompts' weights [n], as shares that sum to 1 in each row. Samples that weigh nothing are
    left out. Raises ValueError where the full set, row 0, weighs nothing."""
    try:
        weighted = counts if weights is None else counts * np.asarray(weights, np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"weights: expected {counts.shape[1]} numbers, got {weights!r:.80} ({error})") from None
    total = weighted.sum(1, keepdims=True)
    if not total[0, 0] > 0:
        raise ValueError("weights: expected some prompts of a weight above 0")
    found: Float64 = weighted[total[:, 0] > 0] / total[total[:, 0] > 0]
    return found


@dataclass(frozen=True, slots=True)
class WeightSums:
    """What an interval of a weighted mean has to know of the weights w: sum w, sum w^2 and sum w^3, in units of the largest."""

    largest: float = 0.0
    powers: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @classmethod
    def of(cls, weights: npt.ArrayLike) -> WeightSums:
        """Of weights [n] >= 0."""
        w = np.asarray(weights, np.float64)
        largest = float(w.max(initial=0.0))
        unit = w / (largest or 1.0)
        square = unit * unit
        return cls(largest, (float(unit.sum()), float(square.sum()), float(square @ unit)))

    def __add__(self, other: WeightSums) -> WeightSums:
        largest = max(self.largest, other.largest)
        one, two = (of.largest / (largest or 1.0) for of in (self, other))
        (a, b, c), (x, y, z) = self.powers, other.powers
        return WeightSums(largest, (a * one + x * two, b * one**2 + y * two**2, c * one**3 + z * two**3))

    @property
    def effective(self) -> float:
        """How many prompts of equal weight say as much about a mean: (sum w)^2 / sum w^2 (Kish)."""
        return self.powers[0] ** 2 / (self.powers[1] or 1.0)

    @property
    def expected(self) -> float:
        """The bootstrap's expected variance of a mean of values of equal variance, relative to the true one: (n - 1) / n of
        equal weights, less of unequal ones, since the heaviest values are nearest to the mean."""
        total, squares, cubes = self.powers
        return 1 - 2 * cubes / (squares * total) + squares / total**2


def effective(weights: npt.ArrayLike) -> float:
    """``WeightSums.effective`` of weights [n]."""
    return WeightSums.of(weights).effective


def interval(
    value: npt.ArrayLike, deviations: npt.ArrayLike, weights: WeightSums | Sequence[WeightSums], level: float = LEVEL
) -> tuple[Float64, Float64]:
    """The ends of Student's interval at ``level`` of values [...] whose bootstrap samples are ``deviations`` [B, ...] away.

    weights: of the prompts that each value is computed from, or one for all values. Of n effective prompts, n - 1 degrees of
    freedom of a sample's variance are known, and B in B samples: 1 / df = 1 / (n - 1) + 1 / B. Infinite where n < 2, or without
    samples. Raises ValueError for a level outside (0, 1).
    """
    level = probability("level", level)
    centre, away = np.asarray(value, np.float64), np.asarray(deviations, np.float64)
    every = [weights] if isinstance(weights, WeightSums) else weights
    known = np.array([of.effective >= 2 * (1 - 1e-12) and len(away) > 0 for of in every])
    share = np.array([of.expected if some else 1.0 for of, some in zip(every, known, strict=True)])
    free = np.array([of.effective - 1 if some else 1.0 for of, some in zip(every, known, strict=True)])
    free = 1 / (1 / free + 1 / max(len(away), 1))
    if isinstance(weights, WeightSums):
        known, share, free = known[0], share[0], free[0]
    spread = np.sqrt((away**2).sum(0) / max(len(away), 1) / share)
    half = np.where(known, student(level, free) * spread, np.inf)
    return centre - half, centre + half


def share_interval(
    value: npt.ArrayLike,
    deviations: npt.ArrayLike,
    weights: WeightSums,
    level: float = LEVEL,
    of_hits: bool = False,
) -> tuple[Float64, Float64]:
    """As ``interval``, of means [...] of values in [0, 1]: Wilson's score interval (1927) of as many prompts as the bootstrap's
    spread amounts to. Near 0 and 1 a few values are skewed, and their mean is mostly wrong on the side that has room.

    of_hits: the values are 0 or 1, so that a sample in which all are alike does not say that the share is certain. (0, 1) where
    ``interval`` is infinite.
    """
    p = np.asarray(value, np.float64).clip(0, 1)
    _, half = interval(np.zeros_like(p), deviations, weights, level)
    known, room, least = np.isfinite(half), p * (1 - p), 0.0
    if of_hits and known.any():
        least = float(student(level, weights.effective - 1)) ** 2 / weights.effective
    spread = np.where(known, half, 0.0)
    some = (room > 0) & (spread > 0)
    a = np.where(some, spread**2 / np.where(some, room, 1.0), least)
    around = np.sqrt(a * room + a**2 / 4)
    low, high = (np.clip((p + a / 2 + sign * around) / (1 + a), 0, 1) for sign in (-1, 1))
    return np.where(known, np.minimum(low, p), 0.0), np.where(known, np.maximum(high, p), 1.0)


def student(level: float, freedom: npt.ArrayLike) -> Float64:
    """t [...] with P(-t < T < t) = level for Student's T with these degrees of freedom >= 1/2; to 1e-9 from 1 on.

    With T = sqrt(df) tan(u) the density of u is proportional to cos(u)^(df - 1): bisection on Gauss-Legendre integrals of it.
    """
    df = np.atleast_1d(np.asarray(freedom, np.float64))
    different, place = np.unique(df, return_inverse=True)
    nodes, weights = _legendre()
    found = []
    for of in different.tolist():
        area = level * math.sqrt(math.pi) / 2 * math.exp(math.lgamma(of / 2) - math.lgamma((of + 1) / 2))
        low, high = 0.0, min(math.pi / 2, 40 / math.sqrt(of))  # no T of many degrees of freedom is beyond 40
        for _ in range(60):
            u = (low + high) / 2
            found_area = u / 2 * float(weights @ np.cos(u / 2 * (nodes + 1)) ** (of - 1))
            low, high = (u, high) if found_area < area else (low, u)
        found.append(math.sqrt(of) * math.tan(low))
    return np.array(found)[place].reshape(np.shape(freedom))


@cache
def _legendre() -> tuple[Float64, Float64]:
    """Nodes and weights of the integrals: finding them takes longer than using them."""
    nodes, weights = np.polynomial.legendre.leggauss(80)
    return nodes, weights

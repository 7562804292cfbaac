"""The bootstrap over prompts: how often each prompt is in each sample, and the interval of what the samples give.

Two ways to draw a sample of n prompts. ``with_replacement`` draws exactly n. ``poisson`` draws each prompt Poisson(1) times,
whatever the others do, so that prompts can be drawn as they arrive, in parts; the two agree for many prompts.
"""

from __future__ import annotations

import math
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


def effective(weights: npt.ArrayLike) -> float:
    """How many prompts of equal weight say as much about a mean as prompts of these weights [n]: (sum w)^2 / sum w^2 (Kish)."""
    w = np.asarray(weights, np.float64)
    w = w / (w.max(initial=0.0) or 1.0)
    return float(w.sum() ** 2 / ((w**2).sum() or 1.0))


def interval(
    value: npt.ArrayLike, deviations: npt.ArrayLike, prompts: npt.ArrayLike, level: float = LEVEL
) -> tuple[Float64, Float64]:
    """The ends of Student's interval at ``level`` of values [...] whose bootstrap samples are ``deviations`` [B, ...] away.

    prompts [...]: how many (effective) prompts a value is computed from. Of n prompts, a sample's variance is (n - 1) / n of
    the sampling variance, of which n - 1 degrees of freedom are known, and B in B samples: 1 / df = 1 / (n - 1) + 1 / B.
    Infinite where there are fewer than two prompts, or no sample. Raises ValueError for a level outside (0, 1).
    """
    level = probability("level", level)
    centre, away = np.asarray(value, np.float64), np.asarray(deviations, np.float64)
    n = np.broadcast_to(np.asarray(prompts, np.float64), centre.shape)
    known = (n >= 2) & (len(away) > 0)
    free = 1 / (1 / np.where(known, n - 1, 1.0) + 1 / max(len(away), 1))
    spread = np.sqrt((away**2).sum(0) / max(len(away), 1) * n / np.where(known, n - 1, 1.0))
    half = np.where(known, student(level, free) * spread, np.inf)
    return centre - half, centre + half


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

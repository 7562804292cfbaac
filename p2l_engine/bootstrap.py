"""The bootstrap over prompts: how often each prompt is in each sample, and the interval of what the samples give.

Two ways to draw a sample of n prompts. ``with_replacement`` draws exactly n. ``poisson`` draws each prompt Poisson(1) times,
whatever the others do, so that prompts can be drawn as they arrive, in parts; the two agree for many prompts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

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
    weighted = counts if weights is None else counts * np.asarray(weights, np.float64)
    total = weighted.sum(1, keepdims=True)
    if not total[0, 0] > 0:
        raise ValueError("weights: expected some prompts of a weight above 0")
    found: Float64 = weighted[total[:, 0] > 0] / total[total[:, 0] > 0]
    return found


def interval(samples: npt.NDArray[Any], level: float = LEVEL) -> tuple[Float64, Float64]:
    """The ends of the interval of values [B, ...] at ``level``: their quantiles over the first axis."""
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high

"""Estimators of what a target policy earns, from rows that another policy chose, and their standard errors.

weight [n]: the target's probability of the logged choice over the logging policy's. Each estimator returns the value and its
influence [n]: n times what each row adds to it, up to first order. Arrays of ``fractions.Fraction`` give exact values.

- Inverse propensity (Horvitz and Thompson, 1952): unbiased; its spread grows with the weights.
- Self-normalised (Hajek, 1971; Swaminathan and Joachims, 2015): consistent, and never outside the rewards' range.
- Doubly robust (Robins, Rotnitzky and Zhao, 1994; Dudik, Langford and Li, 2011): unbiased where the propensities are right,
  and as precise as the prediction of the reward is good.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from p2l_engine.bootstrap import LEVEL, effective, student
from p2l_engine.reports import Figure

Int64 = npt.NDArray[np.int64]
Valued = tuple[Any, Any]  # the value, and its influence [n]


def ips(weight: Any, reward: Any) -> Valued:
    """Inverse propensity: the mean of weight * reward."""
    return _mean(weight * reward)


def snips(weight: Any, reward: Any) -> Valued:
    """Self-normalised: the rewards' mean under the weights. The influence is the jackknife's, n times what the value loses
    without the row: heavy rows draw the value to themselves. Raises ZeroDivisionError where all weights are 0."""
    total = weight.sum()
    if total == 0:
        raise ZeroDivisionError("weight: expected some above 0: the target policy takes none of the logged choices")
    value = (weight * reward).sum() / total
    others = total - weight
    return value, weight * (reward - value) * len(weight) / np.where(others == 0, total, others)


def doubly_robust(weight: Any, reward: Any, predicted: Any, direct: Any) -> Valued:
    """The mean of direct + weight * (reward - predicted). predicted [n]: the expected reward of the logged choice; direct [n]:
    of the target policy; neither may be fitted on the row itself."""
    return _mean(direct + weight * (reward - predicted))


def _mean(terms: Any) -> Valued:
    value = terms.sum() / len(terms)
    return value, terms - value


def standard_error(influence: npt.NDArray[np.float64], clusters: Sequence[Int64]) -> float:
    """Of a value with this influence [n], where rows of one cluster may depend on each other.

    clusters: labels [n] from 0 without gaps, of one kind of cluster (prompts) or of two (prompts and sessions), whose variances
    add up less that of their intersection (Cameron, Gelbach and Miller, 2011). Infinite where one kind has a single cluster.
    """
    if not clusters:
        clusters = [np.arange(len(influence))]
    parts = [_variance(influence, labels) for labels in clusters]
    total = max(parts)
    if len(clusters) == 2 and math.isfinite(total):
        first, second = clusters
        both = np.unique(first * (int(second.max()) + 1) + second, return_inverse=True)[1]
        total = max(total, sum(parts) - _variance(influence, both))
    return math.sqrt(total)


def freedom(weight: npt.NDArray[np.float64], clusters: Sequence[Int64]) -> float:
    """The degrees of freedom of a standard error: the effective rows, or clusters where they are fewer, less one. Few heavy
    ones say as little about their own spread as about the mean."""
    sums = [np.bincount(labels, weight) for labels in clusters if len(labels)]
    return min(effective(of) for of in (weight, *sums)) - 1


def figure(valued: Valued, weight: npt.NDArray[np.float64], clusters: Sequence[Int64], level: float = LEVEL) -> Figure:
    """The value with its interval: Student's, of the delta method's standard error."""
    value, influence = float(valued[0]), np.asarray(valued[1], np.float64)
    known = freedom(weight, clusters)
    error = standard_error(influence, clusters) if len(influence) > 1 and known >= 0.5 else math.inf
    if error == 0 or not math.isfinite(error):
        return Figure(value, value - error, value + error)
    half = float(student(level, known)) * error
    return Figure(value, value - half, value + half)


def _variance(influence: npt.NDArray[np.float64], labels: Int64) -> float:
    sums = np.bincount(labels, influence)
    if len(sums) < 2:
        return math.inf
    return len(sums) / (len(sums) - 1) * float((sums**2).sum()) / len(influence) ** 2

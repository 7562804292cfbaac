"""Strengths and weaknesses by category, and what changes when one model replaces another (the paper's 3.4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from p2l_engine.bootstrap import WeightSums, share_interval, shares, with_replacement
from p2l_engine.coefficients import Coefficients
from p2l_engine.evaluation.categories import rows_by_category
from p2l_engine.reports import CategoryStrengths, Figure, Preference, Replacement, Strengths

Float64 = npt.NDArray[np.float64]

ENOUGH = 5  # prompts, for a verdict


def by_category(
    coefficients: Coefficients,
    categories: Sequence[str],
    reference: str,
    bootstrap: int = 200,
    seed: int = 0,
    weights: npt.ArrayLike | None = None,
    models: Sequence[str] | None = None,
) -> Strengths:
    """Each model's win rate against ``reference`` in each category, with bootstrap intervals over prompts; for grounded models
    also its reliability, the mean of sigmoid(theta): how surely its answers are not bad (Figure 10).

    categories [N]: each prompt's; weights [N] >= 0: each prompt's, None: 1; models: those to measure, None: all. Raises
    ValueError for an unknown model, and for a category whose prompts have no weight.
    """
    theta, against = coefficients.theta.astype(np.float64), _column(coefficients, reference)
    names = coefficients.models if models is None else tuple(models)
    columns = np.array([_column(coefficients, name) for name in names])
    found: dict[str, CategoryStrengths] = {}
    for name, rows in rows_by_category(categories, len(coefficients), weights).items():
        samples = _samples(rows, bootstrap, seed, weights)
        shown = theta[np.ix_(rows, columns)]
        wins = dict(zip(names, _means(expit(shown - theta[rows, against][:, None]), samples), strict=True))
        reliability = dict(zip(names, _means(expit(shown), samples), strict=True)) if coefficients.feedback.grounded else None
        found[name] = CategoryStrengths(len(rows), wins, reliability)
    return Strengths(reference, found)


def replacement(
    coefficients: Coefficients,
    categories: Sequence[str] | None,
    old: str,
    new: str,
    bootstrap: int = 200,
    seed: int = 0,
    weights: npt.ArrayLike | None = None,
) -> Replacement:
    """The regression test: how often the new model's answer is preferred to the old one's, overall and by category (if any),
    the worst category first. weights [N] >= 0: of the prompts.

    The verdict is "better" or "worse" where the whole interval is above or below one half; otherwise, and for fewer than five
    prompts, it is "unclear".
    """
    theta = coefficients.theta.astype(np.float64)
    n = len(theta)
    gain = expit(theta[:, _column(coefficients, new)] - theta[:, _column(coefficients, old)])
    groups = [*rows_by_category(["all"] * n, n, weights).items()]
    groups += [*rows_by_category(categories, n, weights).items()] if categories else []
    entries = []
    for name, rows in groups:
        figure, *_ = _means(gain[rows][:, None], _samples(rows, bootstrap, seed, weights))
        entries.append(Preference(name, len(rows), figure.value, figure.low, figure.high, _verdict(figure, len(rows))))
    overall, *rest = entries
    return Replacement(old, new, overall, tuple(sorted(rest, key=lambda entry: entry.win_rate)))


def _verdict(rate: Figure, prompts: int) -> Literal["better", "worse", "unclear"]:
    if prompts < ENOUGH:
        return "unclear"
    return "better" if rate.low > 0.5 else "worse" if rate.high < 0.5 else "unclear"


def _column(coefficients: Coefficients, model: str) -> int:
    if model not in coefficients.models:
        raise ValueError(f"model: expected one of {', '.join(coefficients.models)}, got {model!r}")
    return coefficients.models.index(model)


def _samples(rows: npt.NDArray[np.int64], bootstrap: int, seed: int, weights: npt.ArrayLike | None) -> Float64:
    """[1 + B, n]: each of a category's prompts' share of the category, and of each bootstrap sample of it."""
    counts = with_replacement(len(rows), bootstrap, seed)
    return shares(counts, None if weights is None else np.asarray(weights, np.float64)[rows])


def _means(values: Float64, samples: Float64) -> list[Figure]:
    """values [n, K] in [0, 1] -> the mean of each column with its interval."""
    means = samples @ values
    low, high = share_interval(means[0], means[1:] - means[0], WeightSums.of(samples[0]))
    return [Figure(float(m), float(a), float(b)) for m, a, b in zip(means[0], low, high, strict=True)]

"""Strengths and weaknesses by category, and what changes when one model takes another's place (the paper's 3.4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import expit

from p2l_engine.coefficients import Coefficients
from p2l_engine.evaluation.categories import rows_by_category

Float64 = npt.NDArray[np.float64]

LEVEL = 0.95
ENOUGH = 5  # prompts, for a verdict


def by_category(
    coefficients: Coefficients,
    categories: Sequence[str],
    reference: str,
    bootstrap: int = 200,
    seed: int = 0,
    weights: npt.ArrayLike | None = None,
    models: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Each model's win rate against ``reference`` in each category, with bootstrap intervals over prompts; for grounded models
    also its reliability, the mean of sigmoid(theta): how surely its answers are not bad (Figure 10). weights [N] >= 0: the
    prompts'; models: those that are asked for, or all."""
    theta, place = coefficients.theta.astype(np.float64), _column(coefficients, reference)
    names = coefficients.models if models is None else tuple(models)
    asked = np.array([_column(coefficients, name) for name in names])
    report: dict[str, Any] = {"reference": reference, "categories": {}}
    for name, rows in rows_by_category(categories, len(coefficients), weights).items():
        samples = _samples(rows, bootstrap, seed, weights)
        shown = theta[np.ix_(rows, asked)]
        wins = _means(expit(shown - theta[rows, place][:, None]), samples)
        entry: dict[str, Any] = {"prompts": len(rows), "win_rate": _by_model(names, wins)}
        if coefficients.feedback.grounded:
            entry["reliability"] = _by_model(names, _means(expit(shown), samples))
        report["categories"][name] = entry
    return report


def replacement(
    coefficients: Coefficients,
    categories: Sequence[str] | None,
    old: str,
    new: str,
    bootstrap: int = 200,
    seed: int = 0,
    weights: npt.ArrayLike | None = None,
) -> dict[str, Any]:
    """The regression test: how often the new model's answer is preferred to the old one's, by category (where there are any),
    from the worst on. weights [N] >= 0: the prompts'.

    verdict: "better" or "worse" where the interval is above or below one half, else, and for fewer than five prompts,
    "unclear".
    """
    theta = coefficients.theta.astype(np.float64)
    gain = expit(theta[:, _column(coefficients, new)] - theta[:, _column(coefficients, old)])
    entries = []
    places = rows_by_category(["all"] * len(gain), len(gain), weights)
    for name, rows in [*places.items(), *(rows_by_category(categories, len(gain), weights) if categories else {}).items()]:
        (value, low, high), *_ = _means(gain[rows][:, None], _samples(rows, bootstrap, seed, weights))
        verdict = "better" if low > 0.5 else "worse" if high < 0.5 else "unclear"
        if len(rows) < ENOUGH:
            verdict = "unclear"
        entries.append(
            {"category": name, "prompts": len(rows), "win_rate": value, "low": low, "high": high, "verdict": verdict}
        )
    first, *rest = entries
    return {
        "old": old,
        "new": new,
        "overall": first,
        "categories": sorted(rest, key=lambda entry: float(str(entry["win_rate"]))),
    }


def _column(coefficients: Coefficients, model: str) -> int:
    if model not in coefficients.models:
        raise ValueError(f"model: expected one of {', '.join(coefficients.models)}, got {model!r}")
    return coefficients.models.index(model)


def _samples(rows: npt.NDArray[np.int64], bootstrap: int, seed: int, weights: npt.ArrayLike | None) -> Float64:
    """[1 + B, n]: each of a category's prompts' share of the whole, and of each bootstrap sample; samples of nothing but
    prompts without weight are left out."""
    n = len(rows)
    times = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), bootstrap)
    of = np.concatenate([np.ones((1, n)), times]) * (1.0 if weights is None else np.asarray(weights, np.float64)[rows])
    total = of.sum(1, keepdims=True)
    shares: Float64 = of[total[:, 0] > 0] / total[total[:, 0] > 0]
    return shares


def _means(values: Float64, samples: Float64) -> list[tuple[float, float, float]]:
    """values [N, K] -> the mean of each column, and the ends of its interval."""
    means = samples @ values
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return [(float(m), float(a), float(b)) for m, a, b in zip(means[0], low, high, strict=True)]


def _by_model(models: Sequence[str], figures: list[tuple[float, float, float]]) -> dict[str, dict[str, float]]:
    return {m: {"value": v, "low": a, "high": b} for m, (v, a, b) in zip(models, figures, strict=True)}

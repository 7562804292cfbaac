"""The predictors that are compared on votes: the P2L model, the marginal leaderboards, the constant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from p2l_engine.engine import Coefficients
from p2l_engine.evaluation.metrics import Figure, Prediction, calibration, difference, figures
from p2l_engine.leaderboard.fit import Fit
from p2l_engine.regression import feedback_model
from p2l_engine.votes import Votes

CATEGORY_AT_LEAST = 5  # prompts, for figures of its own


def predictions(
    coefficients: Coefficients, marginal: Fit | None, votes: Votes, by_category: Mapping[str, Fit] | None = None
) -> dict[str, Prediction]:
    """Of each predictor, on votes of the coefficients' prompts and models. ``category`` is told each prompt's category, and
    takes the marginal leaderboard where that category has none of its own."""
    feedback = coefficients.feedback
    found = {"p2l": Prediction.of(feedback, coefficients.theta, coefficients.eta, votes)}
    if marginal is not None:
        eta = None if marginal.eta is None else np.array([marginal.eta])
        found["marginal"] = Prediction.of(feedback, marginal.theta[None], eta, votes)
    if marginal is not None and by_category is not None and votes.category is not None:
        fits = [by_category.get(name, marginal) for name in votes.category]
        eta = None if marginal.eta is None else np.array([of.eta for of in fits])
        found["category"] = Prediction.of(feedback, np.stack([of.theta for of in fits]), eta, votes)
    return found | {"constant": Prediction.constant(len(feedback.outcomes), len(votes))}


def compare(of: dict[str, Prediction], votes: Votes, bootstrap: int, seed: int = 0) -> dict[str, Any]:
    """Figures of every predictor, overall and for each category of prompts, the P2L model's calibration curve, and how much
    less its log-loss is than the others'."""
    gains = {name: difference(of["p2l"], other, votes, bootstrap, seed) for name, other in of.items() if name != "p2l"}
    report: dict[str, Any] = {
        "overall": {name: _plain(figures(prediction, votes, bootstrap, seed)) for name, prediction in of.items()},
        "log_loss_below": _plain(gains),
        "calibration": calibration(of["p2l"], votes, bootstrap=bootstrap, seed=seed),
    }
    if votes.category is None:
        return report
    category = np.array(votes.category)
    report["categories"] = {}
    for name in sorted(set(votes.category)):
        prompts = np.flatnonzero(category == name)
        if len(prompts) < CATEGORY_AT_LEAST:
            continue
        some = votes.of(prompts.tolist())
        chosen = np.isin(votes.prompt, prompts)
        report["categories"][name] = {"prompts": len(prompts), "votes": len(some)} | {
            predictor: _plain(figures(prediction.of_votes(chosen), some, bootstrap, seed))
            for predictor, prediction in of.items()
        }
    return report


def value_figures(coefficients: Coefficients, votes: Votes) -> dict[str, float]:
    """For ols and poisson: the mean squared error of the predicted values beside that of the mean of all, and the rank
    correlation of the two."""
    from scipy.stats import spearmanr

    theta = coefficients.theta.astype(np.float64)[votes.prompt]
    rows = np.arange(len(votes))
    linear = theta[rows, votes.a] - np.where(votes.b < 0, 0.0, theta[rows, np.maximum(votes.b, 0)])
    predicted = np.exp(linear) if feedback_model(coefficients.feedback.name).name == "poisson" else linear
    value = votes.outcome.astype(np.float64)
    return {
        "squared_error": float(np.average((predicted - value) ** 2, weights=votes.weight)),
        "squared_error_of_the_mean": float(
            np.average((value - np.average(value, weights=votes.weight)) ** 2, weights=votes.weight)
        ),
        "rank_correlation": float(spearmanr(predicted, value).statistic),
    }


def _plain(of: Mapping[str, Figure | None]) -> dict[str, dict[str, float]]:
    return {
        name: {"value": figure.value, "low": figure.low, "high": figure.high}
        for name, figure in of.items()
        if figure is not None
    }

"""The predictors that are compared on votes: the P2L model, the marginal leaderboards, the constant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import torch

from p2l_engine.coefficients import Coefficients
from p2l_engine.evaluation.categories import rows_by_category
from p2l_engine.evaluation.metrics import Prediction, calibration, difference, figures, of_values
from p2l_engine.feedback import FeedbackModel
from p2l_engine.leaderboard.fit import Fit
from p2l_engine.reports import CategoryFigures, Figures, ValueFigures, VoteFigures
from p2l_engine.votes import Votes
from p2l_engine.votes.marginal import marginal_values

Float64 = npt.NDArray[np.float64]

CATEGORY_AT_LEAST = 5  # prompts, for figures of its own


def predictions(
    coefficients: Coefficients, marginal: Fit | None, votes: Votes, by_category: Mapping[str, Fit] | None = None
) -> dict[str, Prediction]:
    """Each predictor's, on votes of the coefficients' prompts and models. ``category`` knows each prompt's category: it takes
    that category's fit, or the marginal one where there is none."""
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


def compare(of: Mapping[str, Prediction], votes: Votes, bootstrap: int, seed: int = 0) -> VoteFigures:
    """Every predictor's figures, overall and for each category of prompts, the P2L model's calibration curve, and by how much
    its log-loss is below each other predictor's."""
    gains = {name: difference(of["p2l"], other, votes, bootstrap, seed) for name, other in of.items() if name != "p2l"}
    categories = None
    if votes.category is not None:
        categories = {
            name: CategoryFigures(
                len(some.prompts),
                votes=len(some),
                predictors={
                    predictor: figures(prediction.of_votes(chosen), some, bootstrap, seed)
                    for predictor, prediction in of.items()
                },
            )
            for name, chosen, some in _categories(votes)
        }
    return VoteFigures(
        {name: figures(prediction, votes, bootstrap, seed) for name, prediction in of.items()},
        {name: gain for name, gain in gains.items() if gain is not None},
        calibration(of["p2l"], votes, bootstrap=bootstrap, seed=seed),
        categories,
    )


def value_figures(
    coefficients: Coefficients, training: Votes | None, votes: Votes, bootstrap: int = 200, seed: int = 0
) -> ValueFigures:
    """For ols and poisson: ``metrics.of_values`` of the P2L model, of one regression for all prompts (``marginal``) where there
    are training votes, and of the mean value of the training votes, or else of these, as the ``constant``; overall and by
    category."""
    feedback = coefficients.feedback
    of = {"p2l": _linear(coefficients.theta.astype(np.float64), votes)}
    if training is not None:
        of["marginal"] = _linear(marginal_values(feedback, training)[None], votes)
    known = votes if training is None else training
    mean = np.average(known.outcome, weights=known.weight)
    of["constant"] = np.full(len(votes), np.log(max(mean, 1e-12)) if feedback.counts else mean)
    values = torch.from_numpy(votes.outcome.astype(np.float64))
    losses = {name: _loss(feedback, linear, values) for name, linear in of.items()}
    predicted = {name: np.exp(linear) if feedback.counts else linear for name, linear in of.items()}

    def figures_of(chosen: npt.NDArray[np.bool_], some: Votes) -> dict[str, Figures]:
        return {name: of_values(predicted[name][chosen], losses[name][chosen], some, bootstrap, seed) for name in of}

    overall = figures_of(np.ones(len(votes), bool), votes)
    if votes.category is None:
        return ValueFigures(overall)
    categories = {
        name: CategoryFigures(len(some.prompts), values=len(some), predictors=figures_of(chosen, some))
        for name, chosen, some in _categories(votes)
    }
    return ValueFigures(overall, categories)


def _categories(votes: Votes) -> Iterator[tuple[str, npt.NDArray[np.bool_], Votes]]:
    """Each category that is large enough: its name, a mask [V] of the votes on its prompts, and those votes."""
    assert votes.category is not None
    for name, prompts in rows_by_category(votes.category, len(votes.prompts)).items():
        if len(prompts) >= CATEGORY_AT_LEAST:
            yield name, np.isin(votes.prompt, prompts), votes.of(prompts.tolist())


def _linear(theta: Float64, votes: Votes) -> Float64:
    """[V]: theta_a - theta_b, or theta_a for a value of one model; theta [P, M], or [1, M] for all prompts."""
    row = votes.prompt if len(theta) > 1 else np.zeros(len(votes), np.int64)
    result: Float64 = theta[row, votes.a] - np.where(votes.b < 0, 0.0, theta[row, np.maximum(votes.b, 0)])
    return result


def _loss(feedback: FeedbackModel, linear: Float64, values: torch.Tensor) -> Float64:
    wide = torch.from_numpy(linear)
    return -feedback.log_likelihood(wide, torch.zeros_like(wide), None, values).numpy()

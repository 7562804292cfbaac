"""The predictors that are compared on votes: the P2L model, the marginal leaderboards, the constant."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from p2l_engine.coefficients import Coefficients
from p2l_engine.evaluation.categories import rows_by_category
from p2l_engine.evaluation.metrics import Prediction, calibration, difference, figures, of_values
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
    of = {"p2l": Prediction.of(feedback, coefficients.theta, None, votes)}
    if training is not None:
        of["marginal"] = Prediction.of(feedback, marginal_values(feedback, training)[None], None, votes)
    known = votes if training is None else training
    mean = np.average(known.outcome, weights=known.weight)
    of["constant"] = Prediction.of_linear(
        feedback, np.full(len(votes), np.log(max(mean, 1e-12)) if feedback.counts else mean), votes
    )

    def figures_of(chosen: npt.NDArray[np.bool_], some: Votes) -> dict[str, Figures]:
        parts = {name: prediction.of_votes(chosen) for name, prediction in of.items()}
        return {name: of_values(part, some, bootstrap, seed) for name, part in parts.items()}

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

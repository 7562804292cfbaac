"""Marginal leaderboards, from votes: one for all prompts, or one for each category. The baselines of every P2L model."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from p2l_engine.bootstrap import LEVEL, poisson
from p2l_engine.feedback import FeedbackModel, Outcome
from p2l_engine.leaderboard.fit import Fit, fit, refit
from p2l_engine.leaderboard.leaderboard import Leaderboard
from p2l_engine.leaderboard.outcomes import pair_count, pairs
from p2l_engine.votes.votes import Votes

RIDGE = 1e-6  # bounds models that always win


def outcome_counts(
    feedback: FeedbackModel, votes: Votes, prompt_weights: npt.ArrayLike | None = None
) -> npt.NDArray[np.float64]:
    """[K, M (M - 1) / 2]: the summed weight of the votes with each outcome, for each pair, in the order of
    ``leaderboard.pairs``.

    prompt_weights [P]: factors of the votes' weights. Outcomes that the feedback model does not tell apart are counted as in
    ``FeedbackModel.log_likelihood``: models without ties leave ties out, bt-tie halves them.
    """
    if votes.are_values or feedback.of_values:
        raise ValueError(f"votes: expected votes and a feedback model of votes, got values or {feedback.name!r}")
    m, known = len(votes.models), len(feedback.outcomes)
    weight = votes.weight if prompt_weights is None else votes.weight * np.asarray(prompt_weights, np.float64)[votes.prompt]
    a, b, outcome = np.minimum(votes.a, votes.b), np.maximum(votes.a, votes.b), votes.outcome.astype(np.int64)
    swapped = votes.a > votes.b
    outcome = np.where(
        swapped & (outcome == Outcome.A), Outcome.B, np.where(swapped & (outcome == Outcome.B), Outcome.A, outcome)
    )
    pair = a * (2 * m - a - 1) // 2 + b - a - 1
    counts = np.zeros((known, pair_count(m)))
    tied = outcome >= Outcome.TIE
    if known == 2:
        for k in (0, 1):
            counts[k] += np.bincount(pair, np.where(outcome == k, weight, 0.0), counts.shape[1])
            if feedback.ties_as_half:
                counts[k] += np.bincount(pair, np.where(tied, weight / 2, 0.0), counts.shape[1])
        return counts
    for k in range(known):
        counts[k] = np.bincount(pair, np.where(np.minimum(outcome, known - 1) == k, weight, 0.0), counts.shape[1])
    return counts


def marginal_fit(feedback: FeedbackModel, votes: Votes) -> Fit:
    """The maximum-likelihood leaderboard of the votes, with a small ridge."""
    return fit(feedback, outcome_counts(feedback, votes), len(votes.models), ridge=RIDGE)


def marginal_values(feedback: FeedbackModel, votes: Votes) -> npt.NDArray[np.float64]:
    """[M]: the maximum-likelihood theta of the values, one for all prompts, for ols and poisson."""
    from scipy.sparse import csr_matrix
    from sklearn.linear_model import PoissonRegressor, Ridge

    if not (votes.are_values and feedback.of_values):
        raise ValueError(f"votes: expected values and a feedback model of values, got votes or {feedback.name!r}")
    rows, pair = np.arange(len(votes)), votes.b >= 0
    entries = (np.concatenate([rows, rows[pair]]), np.concatenate([votes.a, votes.b[pair]]))
    signs = np.concatenate([np.ones(len(rows)), -np.ones(pair.sum())])
    design = csr_matrix((signs, entries), shape=(len(votes), len(votes.models)))
    if feedback.counts:
        regression = PoissonRegressor(alpha=RIDGE, fit_intercept=False, solver="newton-cholesky", max_iter=1000, tol=1e-8)
    else:
        regression = Ridge(alpha=RIDGE, fit_intercept=False, solver="sparse_cg", tol=1e-10)
    theta: npt.NDArray[np.float64] = regression.fit(design, votes.outcome, sample_weight=votes.weight).coef_
    return theta


def category_fits(feedback: FeedbackModel, votes: Votes, marginal: Fit) -> dict[str, Fit]:
    """``marginal_fit`` for each category of prompts. Each pair gets one additional vote in each category, divided as the
    marginal leaderboard expects, so that categories with few votes, and models that always win, stay near it. Raises ValueError
    for votes without categories."""
    if votes.category is None:
        raise ValueError("votes: expected prompts with categories, got none")
    m, known = len(votes.models), len(feedback.outcomes)
    a, b = (torch.from_numpy(marginal.theta[of]) for of in pairs(m))
    eta = None if marginal.eta is None else torch.full((len(a),), float(marginal.eta), dtype=torch.float64)
    expected = feedback.probabilities(a, b, eta)[:, :known].T.numpy()
    category = np.array(votes.category)
    return {
        name: fit(feedback, expected + outcome_counts(feedback, votes, category == name), m)
        for name in sorted(set(votes.category))
    }


def marginal_leaderboard(
    feedback: FeedbackModel, votes: Votes, bootstrap: int = 0, seed: int = 0, level: float = LEVEL
) -> Leaderboard:
    """``marginal_fit`` as a Leaderboard, with intervals over prompts at ``level`` from ``bootstrap`` samples (0: none)."""
    whole, rng = marginal_fit(feedback, votes), np.random.default_rng(seed)
    times = poisson(len(votes.prompts), bootstrap, rng)
    samples = refit(feedback, [outcome_counts(feedback, votes, each) for each in times], len(votes.models), whole, RIDGE)
    return Leaderboard.ranked(votes.models, whole.theta, samples=[s.theta for s in samples], level=level, eta=whole.eta)

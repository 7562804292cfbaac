"""Marginal leaderboards, from votes: one for all prompts, or one for each category. The baselines of every P2L model."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from p2l_engine.bootstrap import LEVEL, WeightSums, interval, poisson
from p2l_engine.feedback import FeedbackModel, Outcome
from p2l_engine.leaderboard.bounds import Bounds, bounds
from p2l_engine.leaderboard.fit import Fit, deviations, fit
from p2l_engine.leaderboard.leaderboard import Leaderboard
from p2l_engine.leaderboard.outcomes import pair_count, pairs
from p2l_engine.votes.votes import Votes

RIDGE = 1e-6  # bounds models that always win
FAR = 700.0  # coefficients whose probabilities are 0 and 1


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
    """``marginal_fit`` as a Leaderboard, with intervals over prompts at ``level`` from ``bootstrap`` samples (0: none).

    A model's interval knows as many prompts as have votes on it. A model that always won has no upper end, and one that always
    lost no lower end: only the ridge holds its coefficient. Its other end is where votes on as many prompts as it has, on
    models that are bounded, are all won (or lost) with probability (1 - level) / 2. Where only differences count, coefficients
    have the mean 0 over the models that are bounded, so that no other one moves them.
    """
    m, whole = len(votes.models), marginal_fit(feedback, votes)
    counts = outcome_counts(feedback, votes)
    held = bounds(feedback, counts, m)
    shift = whole.theta[held.anchor].mean() if not feedback.grounded and held.anchor.sum() > 1 else 0.0
    theta = whole.theta - shift
    if not bootstrap:
        return Leaderboard.ranked(votes.models, theta, eta=whole.eta)
    times = poisson(len(votes.prompts), bootstrap, np.random.default_rng(seed)) - 1
    away = deviations(feedback, counts, [outcome_counts(feedback, votes, each) for each in times], whole, RIDGE)
    if not feedback.grounded and held.anchor.any():
        away = away - away[held.anchor].mean(0)
    on = _weight_on(votes)
    low, high = interval(theta, away.T, [WeightSums.of(each) for each in on], level)
    for i in np.flatnonzero(~held.anchor):
        low[i], high[i] = -np.inf, np.inf
        if held.above[i] != held.below[i] and held.anchor.sum() > (not feedback.grounded):
            share = np.divide(1.0, on[i], out=np.zeros(len(on[i])), where=on[i] > 0)  # a prompt counts once
            end = _one_sided(feedback, outcome_counts(feedback, votes, share), whole, held, int(i), (1 - level) / 2) - shift
            # Votes that weigh less than the ridge leave the coefficient near 0, on the other side of this end.
            low[i], high[i] = (min(end, theta[i]), np.inf) if held.below[i] else (-np.inf, max(end, theta[i]))
    return Leaderboard.ranked(votes.models, theta, ends=(low, high), eta=whole.eta)


def _weight_on(votes: Votes) -> npt.NDArray[np.float64]:
    """[M, P]: the weight of the votes on each model and prompt."""
    m, p = len(votes.models), len(votes.prompts)
    first, second = (np.bincount(of * p + votes.prompt, votes.weight, m * p) for of in (votes.a, votes.b))
    return np.asarray(first + second, np.float64).reshape(m, p)


def _one_sided(
    feedback: FeedbackModel, counts: npt.NDArray[np.float64], whole: Fit, held: Bounds, model: int, chance: float
) -> float:
    """The coefficient at which the model's outcomes against bounded models are ``chance`` times as likely as at infinity;
    infinite where it has none."""
    a, b = pairs(len(whole.theta))
    some = ((a == model) & held.anchor[b]) | ((b == model) & held.anchor[a])
    sign = 1.0 if held.below[model] else -1.0
    eta = None if whole.eta is None else torch.tensor(whole.eta, dtype=torch.float64)

    def likelihood(at: float) -> float:
        theta = torch.from_numpy(np.where(np.arange(len(whole.theta)) == model, at, whole.theta))
        log_p = feedback.log_probabilities(theta[a[some]], theta[b[some]], eta).numpy().T
        return float((counts[:, some] * log_p[: len(counts)]).sum())

    if not counts[:, some].any():
        return -sign * np.inf
    most, near, far = likelihood(sign * FAR), sign * FAR, -sign * FAR
    if likelihood(far) > most + np.log(chance):
        return -sign * np.inf
    for _ in range(60):
        middle = (near + far) / 2
        near, far = (middle, far) if likelihood(middle) > most + np.log(chance) else (near, middle)
    return near

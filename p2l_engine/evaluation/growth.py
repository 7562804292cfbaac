"""How quickly the aggregated leaderboard of a few prompts approaches that of their category (the paper's 3.5, Figure 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from p2l_engine.coefficients import Coefficients
from p2l_engine.evaluation.categories import rows_by_category
from p2l_engine.feedback import FeedbackModel
from p2l_engine.leaderboard import Fit, OutcomeSums, fit
from p2l_engine.leaderboard.outcomes import probabilities
from p2l_engine.reports import Distance, Growth
from p2l_engine.votes import Votes
from p2l_engine.votes.marginal import marginal_fit

SIZES = (1, 2, 5, 10, 25, 50, 100, 250, 500, 1000, 2500)
ENOUGH, MOST = 50, 6  # prompts that a category needs to be shown, and the most categories that are


def distance(feedback: FeedbackModel, one: Fit, other: Fit) -> float:
    """The mean absolute difference, over all ordered pairs, of how often two leaderboards let the first model win."""
    wins = [
        probabilities(
            feedback, torch.from_numpy(fit.theta)[None], None if fit.eta is None else torch.tensor([fit.eta]).double()
        )
        for fit in (one, other)
    ]
    return float((wins[0] - wins[1])[0, :2].abs().mean())


def growth(
    coefficients: Coefficients,
    votes: Votes,
    training: Votes | None,
    sizes: Sequence[int] = SIZES,
    repeats: int = 10,
    seed: int = 0,
) -> Growth:
    """The L1 distance between the marginal leaderboard of ``votes`` and the aggregated leaderboard of n of their prompts, for
    each n in ``sizes``: ``repeats`` draws of n prompts each. With ``training`` votes, also the distance of their marginal
    leaderboard, which is as near as votes of that number come. All leaderboards are fitted under the coefficients' feedback
    model. Where the votes have categories, the same within the largest of them (at most 6, of 50 prompts or more), as in
    Figure 6."""
    overall = _approach(coefficients, votes, training, sizes, repeats, seed)
    if votes.category is None:
        return overall
    rows = rows_by_category(votes.category, len(votes.prompts))
    large = sorted((name for name in rows if len(rows[name]) >= ENOUGH), key=lambda name: -len(rows[name]))[:MOST]
    known = {} if training is None or training.category is None else rows_by_category(training.category, len(training.prompts))
    categories = {
        name: _approach(
            coefficients.rows(rows[name]),
            votes.of(rows[name].tolist()),
            training.of(known[name].tolist()) if training is not None and name in known else None,
            sizes,
            repeats,
            seed,
        )
        for name in large
    }
    return replace(overall, categories=categories)


def _approach(
    coefficients: Coefficients, votes: Votes, training: Votes | None, sizes: Sequence[int], repeats: int, seed: int
) -> Growth:
    feedback, rng, m = coefficients.feedback, np.random.default_rng(seed), len(coefficients.models)
    truth = marginal_fit(feedback, votes)
    distances: list[Distance] = []
    for n in sorted({min(size, len(coefficients)) for size in sizes}):
        found = []
        for _ in range(1 if n == len(coefficients) else repeats):
            chosen = np.sort(rng.choice(len(coefficients), n, replace=False))
            sums = OutcomeSums(feedback, coefficients.models)
            sums.add(coefficients.rows(chosen))
            found.append(distance(feedback, fit(feedback, sums.means[0], m), truth))
        distances.append(Distance(n, float(np.mean(found)), float(min(found)), float(max(found))))
    limit = distance(feedback, marginal_fit(feedback, training), truth) if training is not None and len(training) else None
    return Growth(tuple(distances), limit)

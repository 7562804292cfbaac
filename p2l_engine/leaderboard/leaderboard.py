"""Leaderboards: models from best to worst by coefficient, with win rates and, over sets of prompts, intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from p2l_engine import routing
from p2l_engine.arguments import instance, probability, whole_number
from p2l_engine.bootstrap import LEVEL, WeightSums, interval, poisson, shares
from p2l_engine.coefficients import Coefficients
from p2l_engine.leaderboard.fit import deviations, fit
from p2l_engine.leaderboard.outcomes import OutcomeSums, pair_count, pairs
from p2l_engine.reports import Standing
from p2l_engine.routing import arrays

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Leaderboard:
    """Models from best to worst. eta: the fitted tie parameter, for leaderboards over prompts under a tie model."""

    standings: tuple[Standing, ...]
    eta: float | None = None

    @classmethod
    def of(cls, coefficients: Coefficients, index: int = 0, opponents: npt.NDArray[Any] | None = None) -> Leaderboard:
        """The leaderboard of prompt ``index``. opponents [M] sums to 1; None: uniform over the models."""
        if isinstance(index, bool) or not isinstance(index, int | np.integer):
            raise TypeError(f"index: expected the number of a prompt, got {index!r}")
        if not -len(coefficients) <= index < len(coefficients):
            raise IndexError(f"index: expected a prompt of {len(coefficients)}, got {index}")
        if opponents is not None:
            opponents = arrays.opponents(opponents, (1, len(coefficients.models)), "opponents")
        theta = coefficients.theta[index].astype(np.float64)
        return cls.ranked(coefficients.models, theta, opponents, wins=not coefficients.feedback.of_values)

    @classmethod
    def over(
        cls,
        coefficients: Coefficients,
        weights: npt.ArrayLike | None = None,
        pair_weights: npt.ArrayLike | None = None,
        bootstrap: int = 0,
        seed: int = 0,
        level: float = LEVEL,
    ) -> Leaderboard:
        """The leaderboard over a set of prompts (paper, 2.1.1, (3)): what infinitely many votes on these prompts would give.
        For ols the mean of theta, for poisson the log of the mean rate. weights [N]: of the prompts; the others as in
        ``fitted``."""
        instance("coefficients", coefficients, Coefficients)
        whole_number("bootstrap", bootstrap, 0)
        whole_number("seed", seed, 0)
        probability("level", level)
        if coefficients.feedback.of_values:
            if pair_weights is not None:
                raise ValueError(f"pair_weights: {coefficients.feedback.name} compares no pairs")
            return cls._of_values(coefficients, weights, bootstrap, seed, level)
        sums = OutcomeSums(coefficients.feedback, coefficients.models, bootstrap, seed)
        sums.add(coefficients, weights)
        return cls.fitted(sums, pair_weights, level)

    @classmethod
    def fitted(cls, sums: OutcomeSums, pair_weights: npt.ArrayLike | None = None, level: float = LEVEL) -> Leaderboard:
        """The leaderboard of outcome probabilities summed over prompts.

        pair_weights [M, M], symmetric, >= 0: how often each pair meets (the paper's P_X); None: equally often. Where the sums
        hold bootstrap samples, standings have intervals at ``level``.
        """
        if not sums.weight[0] > 0:
            raise ValueError("weights: expected some prompts of a weight above 0")
        of_pairs = 1.0 if pair_weights is None else _pair_weights(pair_weights, len(sums.models))
        means = sums.sums[0] / sums.weight[0] * of_pairs
        whole = fit(sums.feedback, means, len(sums.models))
        if not sums.bootstrap:
            return cls.ranked(sums.models, whole.theta, eta=whole.eta)
        # Poisson(1) - 1 times each prompt's score, which is a sum over all prompts of 0: no sample is normalised, or empty.
        away = deviations(sums.feedback, means, (sums.sums[1:] - sums.sums[0]) / sums.weight[0] * of_pairs, whole)
        ends = interval(whole.theta, away.T, sums.weights, level)
        return cls.ranked(sums.models, whole.theta, ends=ends, eta=whole.eta)

    @classmethod
    def ranked(
        cls,
        models: Sequence[str],
        theta: Float64,
        opponents: npt.NDArray[Any] | None = None,
        ends: tuple[Float64, Float64] | None = None,
        eta: float | None = None,
        wins: bool = True,
    ) -> Leaderboard:
        """From coefficients theta [M]; opponents [M] as in ``of``; ends: the coefficients' intervals', each [M], infinite where
        nothing bounds a coefficient; wins: whether theta gives win rates."""
        q = np.full(len(theta), 1.0 / len(theta)) if opponents is None else opponents
        v = routing.win_rates(theta[None], q)[0].tolist() if wins else [None] * len(theta)
        none = np.full(len(theta), np.nan)
        low, high = ([x if math.isfinite(x) else None for x in of.tolist()] for of in ends or (none, none))
        order = np.argsort(-theta, kind="stable")
        standings = (Standing(r + 1, models[m], float(theta[m]), v[m], low[m], high[m]) for r, m in enumerate(order))
        return cls(tuple(standings), eta)

    @classmethod
    def _of_values(cls, c: Coefficients, weights: npt.ArrayLike | None, bootstrap: int, seed: int, level: float) -> Leaderboard:
        theta = c.theta.astype(np.float64)
        share = shares(np.ones((1, len(theta))), weights)[0]
        x = np.exp(theta) if c.feedback.counts else theta
        mean = share @ x
        # The logarithm's deviations are the relative ones of its argument.
        away, found = (x / mean - 1, np.log(mean)) if c.feedback.counts else (x - mean, mean)
        if not bootstrap:
            return cls.ranked(c.models, found, wins=False)
        times = poisson(len(theta), bootstrap, np.random.default_rng(seed)) - 1
        ends = interval(found, (times * share) @ away, WeightSums.of(share), level)
        return cls.ranked(c.models, found, ends=ends, wins=False)

    @property
    def best(self) -> str:
        """The first model's name."""
        return self.standings[0].model

    def coefficients(self, models: Sequence[str]) -> Float64:
        """[M] in the order of these names."""
        of = {standing.model: standing.coefficient for standing in self.standings}
        return np.array([of[model] for model in models])

    def __iter__(self) -> Iterator[Standing]:
        return iter(self.standings)

    def __len__(self) -> int:
        return len(self.standings)


def _pair_weights(weights: npt.ArrayLike, m: int) -> Float64:
    whole = arrays.to_float64("pair_weights", weights)
    if whole.shape != (m, m) or not (np.isfinite(whole).all() and (whole >= 0).all() and np.array_equal(whole, whole.T)):
        raise ValueError(f"pair_weights: expected [{m}, {m}] finite numbers >= 0, symmetric, got shape {list(whole.shape)}")
    of_pairs: Float64 = whole[pairs(m)]
    if not of_pairs.sum() > 0:
        raise ValueError("pair_weights: expected some pair of a weight above 0")
    scaled: Float64 = of_pairs * pair_count(m) / of_pairs.sum()
    return scaled

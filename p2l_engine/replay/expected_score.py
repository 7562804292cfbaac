"""What a reward is expected to be, for the doubly robust estimator: from win rates, mapped to the log's rewards.

The expected reward of model m on a prompt is a + b v + c_m: v, the model's win rate against all models of the checkpoint (theta
on the scale of probabilities), times a slope, and an offset for each model, shrunk to 0 as if ``PRIOR`` rows had said so. Where
no coefficients are known it is the mean of the model's rewards, shrunk to that of all. Fitted by least squares in ``FOLDS``
parts of the log: a row's prediction comes from the fit to the parts that it is not in (cross-fitting), so that it depends on no
reward of the row's own prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from p2l_engine.replay.mixture import Float64

FOLDS, PRIOR = 5, 10.0
AT_ONCE = 1 << 16  # prompts whose win rates are computed together
Integers = npt.NDArray[np.integer[Any]]
Rates = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True, eq=False)
class ExpectedScore:
    """level [F, U], slope [F]: of each part of the log and each model. rates [P, U]: win rates by prompt; None: unknown."""

    level: Float64
    slope: Float64
    rates: Rates | None

    @classmethod
    def fit(
        cls,
        reward: Float64,
        models: Integers,
        prompt: Integers,
        fold: Integers,
        n_models: int,
        rates: Rates | None = None,
    ) -> ExpectedScore:
        """From rows with rewards [n], of models [n] on prompts [n] in folds [n]."""
        v = np.zeros(len(reward)) if rates is None else _rate(rates, prompt, models)
        cell = fold * n_models + models

        def sums(of: Float64) -> Float64:
            each = np.bincount(cell, of, FOLDS * n_models).reshape(FOLDS, n_models)
            return np.asarray(each.sum(0) - each)

        n, y, x, xx, xy = (sums(of) for of in (np.ones(len(v)), reward, v, v * v, v * reward))
        kept = PRIOR / (n + PRIOR)  # of a model's own mean, what its shrunk offset leaves to a + b v
        # Offsets minimised out, the rest is a weighted regression on the models' means and the spread around them.
        a1, b1, c1 = n * kept, x * kept, y * kept
        mean = x / np.maximum(n, 1)
        s11, s1x, s1y = a1.sum(1), b1.sum(1), c1.sum(1)
        sxx = (xx - (1 - kept) * x * mean).sum(1)
        sxy = (xy - (1 - kept) * y * mean).sum(1)
        determinant = s11 * sxx - s1x**2
        usable = determinant > 1e-9 * np.maximum(s11 * np.maximum(sxx, s11), 1e-300)
        slope = np.where(usable, (s11 * sxy - s1x * s1y) / np.where(usable, determinant, 1.0), 0.0)
        constant = (s1y - slope * s1x) / np.maximum(s11, 1e-300)
        offset = (y - constant[:, None] * n - slope[:, None] * x) / (n + PRIOR)
        return cls(constant[:, None] + offset, slope, rates)

    def of(self, models: Integers, prompt: Integers, fold: Integers) -> Float64:
        """The expected rewards [n] or [n, W] of models [n] or [n, W] on prompts [n] in folds [n]."""
        if models.ndim == 2:
            prompt, fold = prompt[:, None], fold[:, None]
        found = self.level[fold, models]
        if self.rates is None:
            return np.asarray(found)
        return np.asarray(found + self.slope[fold] * _rate(self.rates, prompt, models))


def rates_of(theta: Rates, models: Sequence[str], names: Sequence[str], of_values: bool = False) -> npt.NDArray[np.float32]:
    """Bradley-Terry win rates [P, U] of the models ``names`` against all of the checkpoint's ``models``, equally weighted, from
    their theta [P, M]; NaN for a model that it does not know, and for prompts whose theta is not finite. of_values: they
    are theta itself."""
    from p2l_engine import routing

    m, place = len(models), {name: k for k, name in enumerate(models)}
    known = [column for column, name in enumerate(names) if name in place]
    columns = [place[names[column]] for column in known]
    found = np.full((len(theta), len(names)), np.nan, np.float32)
    for start in range(0, len(theta), AT_ONCE):
        some = theta[start : start + AT_ONCE].astype(np.float64)
        rows = np.flatnonzero(np.isfinite(some).all(1))
        v = some[rows] if of_values else routing.win_rates(some[rows], np.full(m, 1 / m))
        found[(start + rows)[:, None], known] = v[:, columns]
    return found


def _rate(rates: Rates, prompt: Integers, models: Integers) -> Float64:
    """Win rates; of models that the checkpoint does not know, 1/2: their offset says the rest."""
    v = rates[prompt, models].astype(np.float64)
    return np.asarray(np.where(np.isfinite(v), v, 0.5))

"""What a reward is expected to be, for the doubly robust estimator: from win rates, mapped to the log's rewards.

The expected reward of model m on a prompt is a + b v + c_m: v, the model's win rate against all models of the checkpoint (theta
on the scale of probabilities), times a slope, and an offset for each model, shrunk to 0 as if ``PRIOR`` rows had said so. Where
no coefficients are known it is the mean of the model's rewards, shrunk to that of all. Fitted by least squares in ``FOLDS``
parts of the log: a row's prediction comes from the fit to the parts that it is not in (cross-fitting), so that it depends on no
reward of the row's own prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from p2l_engine.replay.mixture import Float64

FOLDS, PRIOR = 5, 10.0
Integers = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True, eq=False)
class ExpectedScore:
    """level [F, U], slope [F]: of each part of the log and each model. rates [P, U]: win rates by prompt; None: unknown."""

    level: Float64
    slope: Float64
    rates: npt.NDArray[np.floating[Any]] | None

    @classmethod
    def fit(
        cls,
        reward: Float64,
        models: Integers,
        prompt: Integers,
        fold: Integers,
        n_models: int,
        rates: npt.NDArray[np.floating[Any]] | None = None,
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


def _rate(rates: npt.NDArray[np.floating[Any]], prompt: Integers, models: Integers) -> Float64:
    """Win rates; of models that the checkpoint does not know, 1/2: their offset says the rest."""
    v = rates[prompt, models].astype(np.float64)
    return np.asarray(np.where(np.isfinite(v), v, 0.5))

"""How many tokens each model will write: what the checkpoint foresees for the prompt, put right by what providers reported;
else the running mean of the reports, beginning at the catalog's expectation."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from p2l_engine.serve.model_entry import Model

Float64 = npt.NDArray[np.float64]

PRIOR = 20.0  # answers that the catalog's, or the checkpoint's, expectation counts as
MEMORY = 500.0  # answers over which the means run


class Expectations:
    """The expected output tokens of the K models."""

    def __init__(self, models: Mapping[str, Model], before: Expectations | None = None) -> None:
        """before: those of an earlier configuration, whose means are kept for models that this one still has."""
        self._names = list(models)
        self._index = {name: k for k, name in enumerate(self._names)}
        self._mean = np.array([model.tokens_out or 0.0 for model in models.values()])
        self._weight = np.full(len(self._names), PRIOR)
        # Means of what was written and of what had been foreseen, of the same answers: [2, K]; 0 before the first.
        self._compared = np.zeros((2, len(self._names)))
        self._pairs = np.full(len(self._names), PRIOR)
        for k, name in enumerate(self._names):
            if before is not None and name in before._index:
                old = before._index[name]
                self._mean[k], self._weight[k] = before._mean[old], before._weight[old]
                self._compared[:, k], self._pairs[k] = before._compared[:, old], before._pairs[old]

    def add(
        self, k: int, tokens_out: int, outputs: int = 1, foreseen: float | None = None, max_tokens: int | None = None
    ) -> None:
        """Model k wrote these tokens in so many answers of at most max_tokens. foreseen: of one, by the checkpoint; None or NaN
        where it knows nothing of the model."""
        written = tokens_out / outputs
        self._weight[k] = min(self._weight[k] + 1, MEMORY)
        self._mean[k] += (written - self._mean[k]) / self._weight[k]
        if foreseen is None or math.isnan(foreseen):
            return
        expected = foreseen if max_tokens is None else min(foreseen, max_tokens)
        if not self._compared[1, k]:
            self._compared[:, k] = expected
        self._pairs[k] = min(self._pairs[k] + 1, MEMORY)
        self._compared[:, k] += (np.array([written, expected]) - self._compared[:, k]) / self._pairs[k]

    def tokens_out(self, max_tokens: int | None, outputs: int = 1, foreseen: Float64 | None = None) -> Float64:
        """The expected output tokens [K] of a request whose answers may have max_tokens each. foreseen [K]: what the checkpoint
        expects of an answer to this prompt (``Plan.foreseen``), NaN of models of which it knows nothing."""
        mean = self._mean
        if foreseen is not None:
            written, expected = self._compared
            ratio = np.divide(written, expected, out=np.ones_like(written), where=expected > 0)
            mean = np.where(np.isnan(foreseen), mean, foreseen * ratio)
        return (mean if max_tokens is None else np.minimum(mean, max_tokens)) * outputs

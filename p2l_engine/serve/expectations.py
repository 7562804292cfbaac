"""How many tokens each model will write: the running mean of what providers reported, beginning at the catalog's."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from p2l_engine.serve.model_entry import Model

PRIOR = 20.0  # answers that the catalog's expectation counts as
MEMORY = 500.0  # answers over which the mean runs


class Expectations:
    """The expected output tokens of the K models."""

    def __init__(self, models: Mapping[str, Model], before: Expectations | None = None) -> None:
        """before: those of an earlier configuration, whose means are kept for models that this one still has."""
        self._names = list(models)
        self._index = {name: k for k, name in enumerate(self._names)}
        self._mean = np.array([model.tokens_out or 0.0 for model in models.values()])
        self._weight = np.full(len(self._names), PRIOR)
        for k, name in enumerate(self._names):
            if before is not None and name in before._index:
                old = before._index[name]
                self._mean[k], self._weight[k] = before._mean[old], before._weight[old]

    def add(self, k: int, tokens_out: int, outputs: int = 1) -> None:
        """Model k wrote these tokens in so many answers."""
        self._weight[k] = min(self._weight[k] + 1, MEMORY)
        self._mean[k] += (tokens_out / outputs - self._mean[k]) / self._weight[k]

    def tokens_out(self, max_tokens: int | None, outputs: int = 1) -> npt.NDArray[np.float64]:
        """The expected output tokens [K] of a request whose answers may have max_tokens each."""
        mean = self._mean if max_tokens is None else np.minimum(self._mean, max_tokens)
        return mean * outputs

"""The probabilities with which rows choose models, sparse: a policy mixes few of many models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Mixture:
    """N rows that mix up to W models: indices [N, W], and probabilities [N, W], 0 where an entry is unused."""

    indices: npt.NDArray[np.int32]
    probabilities: Float64

    @classmethod
    def single(cls, models: npt.NDArray[np.integer[Any]]) -> Mixture:
        """Each row's model [N] with probability 1."""
        return cls(models.astype(np.int32)[:, None], np.ones((len(models), 1)))

    def __len__(self) -> int:
        return len(self.indices)

    def take(self, rows: Any) -> Mixture:
        """Some of the rows, by their numbers or a mask."""
        return Mixture(self.indices[rows], self.probabilities[rows])

    def renumbered(self, columns: npt.NDArray[np.integer[Any]]) -> Mixture:
        """Model k becomes columns[k]."""
        return Mixture(columns[self.indices].astype(np.int32), self.probabilities)

    def averaged(self, cells: npt.NDArray[np.integer[Any]], firsts: npt.NDArray[np.integer[Any]]) -> Mixture:
        """The mean mixture [C] of the rows of each cell. cells [N]: each row's; firsts [C]: a row of each cell.

        A budget over a batch may split the last prompt that it can afford, and of equal ones only some: their mean is as good,
        and does not depend on the rows' order.
        """
        like = firsts[cells]
        differs = ((self.indices != self.indices[like]) | (self.probabilities != self.probabilities[like])).any(1)
        split = np.unique(cells[differs])
        rows = np.flatnonzero(np.isin(cells, split))
        models = int(self.indices.max(initial=0)) + 1
        place = np.searchsorted(split, cells[rows])[:, None] * models + self.indices[rows]
        sums = np.bincount(place.ravel(), self.probabilities[rows].ravel(), len(split) * models).reshape(len(split), models)
        found = self.take(firsts)
        width = max(int((sums > 0).sum(1).max(initial=0)), self.indices.shape[1])
        beside = ((0, 0), (0, width - found.indices.shape[1]))
        indices, p = np.pad(found.indices, beside), np.pad(found.probabilities, beside)
        order = np.argsort(-sums, axis=1, kind="stable")[:, :width]
        means = np.take_along_axis(sums, order, 1)
        short = width - order.shape[1]
        indices[split] = np.pad(order, ((0, 0), (0, short)))
        p[split] = np.pad(means / np.maximum(means.sum(1, keepdims=True), 1e-300), ((0, 0), (0, short)))
        return Mixture(indices, p)

    def of(self, models: npt.NDArray[np.integer[Any]]) -> Float64:
        """The probability of one model for each row [N], or of several [N, K]."""
        wanted = models.reshape(len(self), -1)
        found = np.zeros(wanted.shape)
        for entry in range(self.indices.shape[1]):
            same = self.indices[:, entry : entry + 1] == wanted
            found += np.where(same, self.probabilities[:, entry : entry + 1], 0.0)
        return found.reshape(models.shape)

    def mean(self, values: Float64) -> Float64:
        """The expectation [N] of values of the entries' models [N, W]; those of unused entries do not matter."""
        return np.asarray(np.where(self.probabilities > 0, self.probabilities * values, 0.0).sum(1))

    def shares(self, models: int) -> Float64:
        """The mean probability of each of so many models."""
        sums = np.bincount(self.indices.ravel(), self.probabilities.ravel(), models)
        return sums / max(len(self), 1)

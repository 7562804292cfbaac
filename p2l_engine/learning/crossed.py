"""Which candidate predicts votes best that it has not seen: cross-validation over prompts, conversations whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from p2l_engine.coefficients import Coefficients
from p2l_engine.learning.candidates import Candidate, Design
from p2l_engine.learning.newton import minimise
from p2l_engine.votes import Votes

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Judged:
    """A candidate's mean loss of a vote that it has not seen, by how much it is above the best candidate's, and the standard
    error of that difference over conversations."""

    candidate: Candidate
    loss: float
    above_best: float
    error: float


class Crossed:
    """Fits of every candidate without each fold, and without each two folds.

    fold, conversation [P]: of the votes' prompts. ``at[c]``: candidate c's parameters of all votes; ``without[c][k]``: of those
    outside fold k.
    """

    def __init__(
        self,
        wanted: Sequence[Candidate],
        c: Coefficients,
        votes: Votes,
        fold: Int64,
        conversation: Int64,
        progress: Callable[[int], object] | None = None,
    ) -> None:
        self.candidates, self.designs = tuple(wanted), [Design(candidate, c, votes) for candidate in wanted]
        self.votes, self.folds = votes, int(fold.max()) + 1
        self._fold, self._group = fold[votes.prompt], conversation[votes.prompt]
        self._pairs = list(combinations(range(self.folds), 2))
        v = len(votes)
        self.at: list[Float64] = []
        self.without: list[list[Float64]] = []
        self.losses = np.empty((len(self.designs), v))  # [C, V]: of votes under the fit without their fold
        self._nested = np.empty((self.folds, len(self.designs), v))  # of the fit without fold k and their own
        for i, design in enumerate(self.designs):
            whole = minimise(design.objective, design.start)
            single = [self._fit(design, (k,), whole) for k in range(self.folds)]
            self.at.append(whole)
            self.without.append(single)
            for k in range(self.folds):
                self.losses[i, self._fold == k] = self._loss(design, k, single[k])
            for j, k in self._pairs:
                found = self._fit(design, (j, k), single[j])
                self._nested[k, i, self._fold == j] = self._loss(design, j, found)
                self._nested[j, i, self._fold == k] = self._loss(design, k, found)
            if progress is not None:
                progress(1)

    def judged(self) -> tuple[int, tuple[Judged, ...]]:
        """The candidate that is chosen, by the one-standard-error rule: the simplest whose loss is above the best one's by no
        more than the standard error of the difference (Breiman et al., 1984); and every candidate's figures."""
        return self._judge(self.losses, np.arange(len(self.votes)))

    def held_out(self) -> list[int]:
        """For each fold, the candidate that the other folds choose without it: what the whole procedure, its choice included,
        does to votes that it has not seen."""
        return [self._judge(self._nested[k], np.flatnonzero(self._fold != k))[0] for k in range(self.folds)]

    def _judge(self, losses: Float64, rows: Int64) -> tuple[int, tuple[Judged, ...]]:
        weight, group = self.votes.weight[rows], self._group[rows]
        means = losses[:, rows] @ weight / weight.sum()
        best = int(means.argmin())
        found = []
        for candidate, mean, of in zip(self.candidates, means.tolist(), losses[:, rows], strict=True):
            above, error = mean_and_error(of - losses[best, rows], weight, group)
            found.append(Judged(candidate, mean, above, error))
        chosen = next(i for i, one in enumerate(found) if one.above_best <= one.error)
        return chosen, tuple(found)

    def _fit(self, design: Design, excluded: Iterable[int], start: Float64) -> Float64:
        rows = np.flatnonzero(~np.isin(self._fold, list(excluded)))
        return minimise(design.objective.of(rows), start)

    def _loss(self, design: Design, fold: int, x: Float64) -> Float64:
        return design.objective.of(np.flatnonzero(self._fold == fold)).losses(x)


def mean_and_error(values: Float64, weight: Float64, group: Int64) -> tuple[float, float]:
    """The weighted mean of values [V] and its standard error where those of one group (group [V]) depend on each other."""
    total = weight.sum()
    mean = float(values @ weight / total)
    by_group = np.bincount(group, (values - mean) * weight)
    n = len(np.unique(group))
    return mean, float(np.sqrt((by_group**2).sum() * n / max(n - 1, 1)) / total)

"""A batch under rows over it, and its groups of equal prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from p2l_engine.routing.arrays import Float64
from p2l_engine.routing.rounding import ordered
from p2l_engine.routing.surplus import Surplus
from p2l_engine.routing.values import ArrayValues, Values

Mask = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.intp]

ROUNDING = 1e-15  # relative: of the places where a group's models change


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Prompts under batch rows, with their usable models [N, M] (None: all); weights [N]: how many equal prompts each stands
    for."""

    values: Values
    rows: tuple[Surplus, ...]
    usable: Mask | None
    weights: Float64

    @classmethod
    def of_all(cls, values: Values, rows: Sequence[Surplus], usable: Mask | None) -> Batch:
        """Every prompt with weight 1."""
        return cls(values, tuple(rows), usable, np.ones(values.shape[0] or 0))

    def __len__(self) -> int:
        return len(self.weights)

    def of(self, prompts: Indices, weights: Float64 | None = None) -> Batch:
        """These prompts, with their values in memory."""
        mask = None if self.usable is None else self.usable[prompts]
        rows = tuple(row.of(prompts) for row in self.rows)
        return Batch(ArrayValues(self.values.take(prompts)), rows, mask, self.weights[prompts] if weights is None else weights)

    def used(self, prompts: Indices, choice: npt.NDArray[np.int32], weights: Float64) -> Float64:
        """The weighted sum of what these prompts' chosen models use of each row beyond the least, [K]."""
        counts = np.bincount(choice, weights, minlength=self.values.shape[1])
        sums = []
        for row in self.rows:
            if row.row.shared:
                above = 0.0 if len(row.least) == 1 else weights @ (row.least[prompts] - row.base)
                sums.append(float(counts @ (row.row.amounts - row.base) - above))
            else:
                sums.append(float(weights @ (row.row.amounts[prompts, choice] - row.least[prompts])))
        return np.array(sums)


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """Equal prompts: the first of each group [G], the groups' sizes [G], and the group of every prompt [N]."""

    first: Indices
    sizes: Float64
    group: Indices

    def spread(self, indices: npt.NDArray[np.int32], probabilities: Float64) -> tuple[npt.NDArray[np.int32], Float64]:
        """From the groups' policies [G, W] to those of the prompts [N, W], in the prompts' order within a group. A prompt gets
        a single model where possible; of a group that mixes j models, at most j - 1 prompts are mixed."""
        # By rising probability: the last one, whose amounts are small, takes the rounding of the others.
        rising = np.argsort(probabilities, axis=1, kind="stable")
        indices, probabilities = np.take_along_axis(indices, rising, 1), np.take_along_axis(probabilities, rising, 1)
        order = np.argsort(self.group, kind="stable")
        starts = np.concatenate([[0], np.cumsum(self.sizes)[:-1]])
        place = np.empty(len(self.group))
        place[order] = np.arange(len(order)) - starts[self.group[order]]
        ends = np.cumsum(probabilities, axis=1) * self.sizes[:, None]
        ends[:, -1] = self.sizes
        ends, begins = ends[self.group], np.concatenate([np.zeros((len(ends), 1)), ends[:, :-1]], axis=1)[self.group]
        shares = np.clip(np.minimum(ends, place[:, None] + 1) - np.maximum(begins, place[:, None]), 0.0, 1.0)
        shares[shares <= ROUNDING * ends] = 0.0
        return ordered(indices[self.group], shares / shares.sum(axis=1, keepdims=True))


def equal_prompts(batch: Batch) -> Groups | None:
    """Groups of prompts with equal values, amounts and allowed models; None if grouping would save less than half the prompts.

    The best models of equal prompts change at the same dual prices: ungrouped, nearly all would be open in the LP.
    """
    m = batch.values.shape[1]
    rng = np.random.default_rng(m)
    keys, start = np.empty(len(batch)), 0
    mixers = rng.normal(size=(2 + len(batch.rows), m))
    for v in batch.values.chunks():
        some = slice(start, start + len(v))
        key = v @ mixers[0]
        if batch.usable is not None:
            key = key + batch.usable[some] @ mixers[1]
        for mixer, row in zip(mixers[2:], batch.rows, strict=True):
            if not row.row.shared:
                key = key + row.row.of(some).amounts @ mixer
        keys[some] = key
        start += len(v)
    if _distinct(keys) > len(batch) / 2:
        return None
    _, first, group, sizes = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
    # Keys may collide: check that equal keys are equal prompts.
    start = 0
    for v in batch.values.chunks():
        some = slice(start, start + len(v))
        of = first[group[some]]
        if not (v == batch.values.take(of)).all():
            return None
        if batch.usable is not None and (batch.usable[some] != batch.usable[of]).any():
            return None
        if any((row.amounts[some] != row.amounts[of]).any() for row in (beyond.row for beyond in batch.rows) if not row.shared):
            return None
        start += len(v)
    return Groups(first, sizes.astype(np.float64), group)


def _distinct(keys: Float64) -> int:
    """How many different numbers there are."""
    ordered = np.sort(keys)
    return int(np.count_nonzero(ordered[1:] != ordered[:-1])) + min(len(keys), 1)

"""A batch under rows over it, and its groups of equal prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from p2l_engine.routing.arrays import Float64
from p2l_engine.routing.rounding import ordered
from p2l_engine.routing.scratch import Scratch, parts
from p2l_engine.routing.surplus import Surplus
from p2l_engine.routing.values import ArrayValues, SomeValues, Values

Mask = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.intp]

IN_MEMORY = 1 << 20  # prompts whose values are read once
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
        return cls(values, tuple(rows), usable, values.scratch.full(values.shape[0] or 0, 1.0))

    def __len__(self) -> int:
        return len(self.weights)

    def of(self, prompts: Indices, weights: Float64 | None = None) -> Batch:
        """These prompts, with their values in memory, unless there are many and those of the batch are on disk."""
        mask = None if self.usable is None else self.usable[prompts]
        rows = tuple(row.of(prompts) for row in self.rows)
        on_disk = self.values.scratch.folder is not None and len(prompts) > IN_MEMORY
        values = SomeValues(self.values, prompts) if on_disk else ArrayValues(self.values.take(prompts))
        return Batch(values, rows, mask, self.weights[prompts] if weights is None else weights)

    def used(self, prompts: Indices | None, choice: npt.NDArray[np.int32], weights: Float64) -> Float64:
        """The weighted sum of what these prompts (None: all) use of each row beyond the least with their chosen models, [K]."""
        sums = np.zeros(len(self.rows))
        for some in parts(len(choice)):
            of: Any = some if prompts is None else prompts[some]
            chosen, weight = choice[some], weights[some]
            counts = np.bincount(chosen, weight, minlength=self.values.shape[1])
            for k, row in enumerate(self.rows):
                if row.row.shared:
                    above = 0.0 if len(row.least) == 1 else weight @ (row.least[of] - row.base)
                    sums[k] += float(counts @ (row.row.amounts - row.base) - above)
                else:
                    own = np.take_along_axis(row.row.of(of).amounts, chosen[:, None], 1)[:, 0]
                    sums[k] += float(weight @ (own - row.least[of]))
        return sums


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """Equal prompts: the first of each group [G], the groups' sizes [G], and the group of every prompt [N]. scratch:
    where the policies of all prompts are to be."""

    first: Indices
    sizes: Float64
    group: Indices
    scratch: Scratch

    def spread(self, indices: npt.NDArray[np.int32], probabilities: Float64) -> tuple[npt.NDArray[np.int32], Float64]:
        """From the groups' policies [G, W] to those of the prompts [N, W], in the prompts' order within a group. A prompt gets
        a single model where possible; of a group that mixes j models, at most j - 1 prompts are mixed."""
        n, width = len(self.group), indices.shape[1]
        found = self.scratch.empty((n, width), np.int32), self.scratch.empty((n, width), np.float64)
        seen = self.scratch.full(len(self.sizes), 0.0)  # prompts of each group
        for some in parts(n):
            group = self.group[some]
            # By rising probability: the last one, whose amounts are small, takes the rounding of the others.
            rising = np.argsort(probabilities[group], axis=1, kind="stable")
            models = np.take_along_axis(indices[group], rising, 1)
            shares = np.take_along_axis(probabilities[group], rising, 1)
            order = np.argsort(group, kind="stable")
            kinds, begins, counts = np.unique(group[order], return_index=True, return_counts=True)
            place = np.empty(len(group))
            place[order] = np.arange(len(order)) - np.repeat(begins, counts) + np.repeat(seen[kinds], counts)
            seen[kinds] += counts
            ends = np.cumsum(shares, axis=1) * self.sizes[group][:, None]
            ends[:, -1] = self.sizes[group]
            begin = np.concatenate([np.zeros((len(ends), 1)), ends[:, :-1]], axis=1)
            own = np.clip(np.minimum(ends, place[:, None] + 1) - np.maximum(begin, place[:, None]), 0.0, 1.0)
            own[own <= ROUNDING * ends] = 0.0
            found[0][some], found[1][some] = ordered(models, own / own.sum(axis=1, keepdims=True))
        return found


def equal_prompts(batch: Batch) -> Groups | None:
    """Groups of prompts with equal values, amounts and allowed models; None if grouping would save less than half the prompts.

    The best models of equal prompts change at the same dual prices: ungrouped, nearly all would be open in the LP.
    """
    m = batch.values.shape[1]
    rng = np.random.default_rng(m)
    keys, start = batch.values.scratch.empty(len(batch), np.float64), 0
    mixers = rng.normal(size=(2 + len(batch.rows), m))
    for v in batch.values.chunks():
        some = slice(start, start + len(v))
        key = _mixed(v, mixers[0])
        if batch.usable is not None:
            key = key + _mixed(batch.usable[some], mixers[1])
        for mixer, row in zip(mixers[2:], batch.rows, strict=True):
            if not row.row.shared:
                key = key + _mixed(row.row.of(some).amounts, mixer)
        keys[some] = key
        start += len(v)
    found = _equal(keys, batch.values.scratch)
    if found is None:
        return None
    first, group = found.first, found.group
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
    return found


def _mixed(rows: npt.NDArray[Any], by: Float64) -> Float64:
    """rows @ by, [n]: of equal rows the same bits, wherever they are, of which BLAS is not sure."""
    return np.asarray((rows * by).sum(axis=1))


def _equal(keys: Float64, scratch: Scratch) -> Groups | None:
    """Groups of equal keys [N], in the keys' order; None where there are more than N / 2."""
    n = len(keys)
    ordered = scratch.empty(n, np.float64)
    ordered[:] = keys
    ordered.sort()
    different = scratch.column(np.float64)
    last, count = np.nan, 0
    for some in parts(n):
        of = ordered[some]
        of = of[np.concatenate([[last], of[:-1]]) != of]
        last, count = ordered[some.stop - 1], count + len(of)
        if count > n / 2:
            return None
        different.add(of)
    kinds = different.array()
    group, first, sizes = scratch.empty(n, np.intp), scratch.empty(count, np.intp), scratch.full(count, 0.0)
    for some in reversed(list(parts(n))):
        group[some] = np.searchsorted(kinds, keys[some])
        backwards = group[some][::-1]
        first[backwards] = np.arange(some.start, some.stop)[::-1]  # the last one that is written stays
        np.add.at(sizes, backwards, 1.0)
    return Groups(first, sizes, group, scratch)

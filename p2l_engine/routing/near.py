"""The prompts of a batch that are nearest to a change of their best model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from p2l_engine.routing.arrays import Float64
from p2l_engine.routing.scratch import PART, Scratch, parts

Indices = npt.NDArray[np.intp]
Choice = npt.NDArray[np.int32]

DIGIT = 16  # bits of a lead by which it is found in a histogram


@dataclass(frozen=True, slots=True, eq=False)
class Near:
    """The ``count`` prompts of the smallest leads: marked [N], and the largest lead of theirs. One byte a prompt."""

    marked: npt.NDArray[np.bool_]
    count: int
    most: float

    @classmethod
    def of(cls, lead: Float64, count: int, scratch: Scratch) -> Near:
        """Of the leads [N], each >= 0; 1 <= count <= N. The first ones among equals."""
        marked, most = scratch.empty(len(lead), np.bool_), _smallest(lead, count)
        left = count - sum(int(np.count_nonzero(lead[some] < most)) for some in parts(len(lead)))
        for some in parts(len(lead)):
            marked[some] = lead[some] < most
            equal = np.flatnonzero(lead[some] == most)[:left]
            marked[some][equal] = True
            left -= len(equal)
        return cls(marked, count, most)

    def prompts(self) -> Indices:
        """All of them, in order."""
        return np.concatenate([some.start + np.flatnonzero(self.marked[some]) for some in parts(len(self.marked))])

    def sample(self, size: int, rng: np.random.Generator) -> Indices:
        """So many different ones, in order; size <= count."""
        places, found, before = np.sort(rng.choice(self.count, size, replace=False)), list[Indices](), 0
        for some in parts(len(self.marked)):
            here = some.start + np.flatnonzero(self.marked[some])
            first, end = np.searchsorted(places, (before, before + len(here)))
            found.append(here[places[first:end] - before])
            before += len(here)
        return np.concatenate(found)


def changed(best: Choice, before: Choice, lead: Float64, most: int) -> Indices:
    """The prompts whose best model [N] is another than before, at most so many: those with the smallest lead."""
    found = np.zeros(0, np.intp)
    for some in parts(len(best)):
        found = np.concatenate([found, some.start + np.flatnonzero(best[some] != before[some])])
        if len(found) > most:
            found = found[np.argsort(lead[found], kind="stable")[:most]]
    return found


def _smallest(lead: Float64, count: int) -> float:
    """The count-th smallest: by a histogram for each digit of its bits, which sort as positive numbers do."""
    if len(lead) <= PART:
        return float(np.partition(lead, count - 1)[count - 1])
    prefix, left = 0, count
    for shift in range(64 - DIGIT, -1, -DIGIT):
        counts = np.zeros(1 << DIGIT, np.int64)
        for some in parts(len(lead)):
            bits = np.abs(lead[some]).view(np.uint64) >> np.uint64(shift)
            bits = bits[bits >> np.uint64(DIGIT) == np.uint64(prefix >> DIGIT)] if shift + DIGIT < 64 else bits
            counts += np.bincount((bits & np.uint64(counts.size - 1)).astype(np.intp), minlength=counts.size)
        up_to = np.cumsum(counts)
        digit = int(np.searchsorted(up_to, left))
        left -= int(up_to[digit] - counts[digit])
        prefix = (prefix | digit) << (DIGIT if shift else 0)
    return float(np.array(prefix, np.uint64).view(np.float64))

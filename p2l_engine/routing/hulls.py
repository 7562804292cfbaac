"""The prompts' upper concave hulls, and the exact solution under one row over the batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from p2l_engine.native import routing as native
from p2l_engine.routing import rounding, scratch
from p2l_engine.routing.arrays import Float64
from p2l_engine.routing.scratch import Scratch
from p2l_engine.routing.values import Values

TOGETHER = 64  # chunks whose hulls become one array: of smaller ones that are freed, the process keeps the memory


@dataclass(frozen=True, slots=True, eq=False)
class Hulls:
    """Upper hulls of N prompts in the plane of amount and value, concatenated.

    Prompt n's vertices, by rising amount and value, are offsets[n] to offsets[n + 1] (int64 [N + 1]) of models (int32), cost
    and value (float64), 20 bytes a vertex. scratch: where policies are to be.
    """

    offsets: npt.NDArray[np.int64]
    models: npt.NDArray[np.int32]
    cost: Float64
    value: Float64
    scratch: Scratch = field(default_factory=Scratch)

    @classmethod
    def of(cls, values: Values, amounts: Any, allowed: npt.NDArray[np.bool_] | None = None) -> Hulls:
        """One pass over the values, by chunks. amounts [M] or [N, M]; allowed [N, M]."""
        together = TOGETHER if values.scratch.folder is None else 1
        columns: Any = [values.scratch.column(kind) for kind in (np.int32, np.int32, np.float64, np.float64)]
        parts, start = list[tuple[Any, ...]](), 0

        def add() -> None:
            for column, of in zip(columns, zip(*parts, strict=True), strict=bool(parts)):
                column.add(np.concatenate(of))
            parts.clear()

        for v in values.chunks():
            some = slice(start, start + len(v))
            per_model = amounts if amounts.ndim == 1 else np.ascontiguousarray(amounts[some], np.float64)
            parts.append(native.hulls(v, per_model, None if allowed is None else allowed[some]))
            start += len(v)
            if len(parts) == together:
                add()
        add()
        sizes = columns.pop(0).array()
        models, cost, value = (columns.pop(0).array() for _ in range(3))  # never two of all of them in memory
        offsets = values.scratch.empty(len(sizes) + 1, np.int64)
        offsets[0] = 0
        for some in scratch.parts(len(sizes)):
            np.cumsum(sizes[some], dtype=np.int64, out=offsets[1:][some])
            offsets[1:][some] += offsets[some.start]
        return cls(offsets, models, cost, value, values.scratch)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def smallest(self) -> float:
        """The smallest feasible mean amount: every prompt at its first vertex."""
        return rounding.mean(self._least()) if len(self) else 0.0

    def _least(self) -> Float64:
        """The least amount of every prompt."""
        least = self.scratch.empty(len(self), np.float64)
        for some in scratch.parts(len(self)):
            least[some] = self.cost[self.offsets[some]]
        return least

    def within(self, bound: float) -> tuple[npt.NDArray[np.int32], Float64, Float64, Float64, float]:
        """The best policies of a mean amount <= bound, at least ``smallest``; at most one prompt is mixed.

        indices [N, 2], probabilities [N, 2], value [N], cost [N] and the dual price of the bound.
        """
        n, new = len(self), self.scratch.empty
        slack = np.inf if bound == np.inf else float(n * np.longdouble(bound) - self._least().sum(dtype=np.longdouble))
        found = new((n, 2), np.int32), new((n, 2), np.float64), new(n, np.float64), new(n, np.float64)
        for _ in range(rounding.CORRECTIONS):
            price, left = native.select_steps(self.offsets, self.cost, self.value, max(slack, 0.0))
            native.take_steps(self.offsets, self.models, self.cost, self.value, price, left, found)
            over = self._lowered(*found, bound)
            if not over or slack <= 0:
                break
            slack -= over
        return (*found, price)

    def _lowered(
        self, indices: npt.NDArray[np.int32], probabilities: Float64, value: Float64, cost: Float64, bound: float
    ) -> float:
        """Lowers the mixed prompt's share of its second vertex, in place, until the mean is within the bound: sums over many
        prompts round. Returns the sum by which it still exceeds it."""
        mixed = np.concatenate(
            [some.start + np.flatnonzero(probabilities[some, 1]) for some in scratch.parts(len(cost))] or [np.zeros(0, int)]
        )
        for _ in range(rounding.CORRECTIONS):
            over = rounding.excess(cost, bound)
            if not over or not len(mixed):
                return over
            i = int(mixed[0])
            models = self.models[self.offsets[i] : self.offsets[i + 1]]
            at = int(self.offsets[i]) + int(np.argmax(models == indices[i, 0]))
            before, step = float(probabilities[i, 1]), float(self.cost[at + 1] - self.cost[at])
            share = min(before - over / step, float(np.nextafter(before, 0.0)))
            if share <= 0:
                return over
            probabilities[i] = 1 - share, share
            cost[i] = self.cost[at] + share * step
            value[i] = self.value[at] + share * (self.value[at + 1] - self.value[at])
        return rounding.excess(cost, bound)

    def steps(self) -> tuple[Float64, Float64, Float64]:
        """Every step of every hull by falling slope: slope, extra amount, extra value."""
        inner = np.ones(len(self.cost), bool)
        inner[self.offsets[:-1]] = False
        extra_cost, extra_value = np.diff(self.cost, prepend=0.0)[inner], np.diff(self.value, prepend=0.0)[inner]
        with np.errstate(over="ignore"):  # of the smallest costs: an infinite slope comes first, as it should
            slope = extra_value / extra_cost
        order = np.argsort(-slope, kind="stable")
        return slope[order], extra_cost[order], extra_value[order]

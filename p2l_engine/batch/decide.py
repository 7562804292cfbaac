"""From coefficients to the rows of the output: policies, the draws from them, and one table a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from p2l_engine.batch.deduplicator import NOWHERE, Unit
from p2l_engine.coefficients import Coefficients
from p2l_engine.router import Router
from p2l_engine.routing import Policies
from p2l_engine.routing.arrays import Float64
from p2l_engine.routing.values import Values
from p2l_engine.tables.rows import Unroutable

POLICY = pa.list_(pa.struct([("model", pa.string()), ("probability", pa.float64())]))
OURS = ("model", "policy", "expected_cost", "win_rate", "score", "theta", "eta", "error")


class Decided(NamedTuple):
    """A block's output, how many of its rows could be routed, and the sum of their expected costs."""

    table: pa.Table
    routed: int
    spend: float


class Decider:
    """Decisions for blocks whose coefficients are there.

    take: the engine's outputs [n, K] that references [n] point to. budget, price, stored (None: not at all): as in ``Asked``,
    of which stored is the type of written coefficients.
    """

    def __init__(
        self,
        router: Router,
        take: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float32]],
        budget: float | None = None,
        price: float | None = None,
        stored: Literal["float16", "float32"] | None = None,
    ) -> None:
        self.router, self.take = router, take
        self.budget, self.price, self.stored = budget, price, stored
        self.names = pa.array(router.names)

    def coefficients(self, references: npt.NDArray[np.int64]) -> Coefficients:
        engine, outputs = self.router.engine, self.take(references)
        theta, eta = engine.head.split(outputs)
        return Coefficients(np.ascontiguousarray(theta), None if eta is None else eta.copy(), engine.models, engine.feedback)

    def routable(self, unit: Unit) -> tuple[npt.NDArray[np.bool_], list[str | None]]:
        """[rows] which rows can be routed, and why the others cannot."""
        why = [prompt.why if isinstance(prompt, Unroutable) else None for prompt in unit.block.prompts]
        can = unit.references != NOWHERE
        bad = np.flatnonzero(can)[~np.isfinite(self.take(unit.references[can])).all(axis=1)]
        for row in bad.tolist():
            can[row], why[row] = False, "the backbone gave coefficients that are not finite"
        return can, why

    def decide(self, unit: Unit, policies: Policies | None = None) -> Decided:
        """The block's rows of the output. policies: of its routable rows, where they were found over the batch."""
        can, why = self.routable(unit)
        references, back = np.unique(unit.references[can], return_inverse=True)
        once = self.coefficients(references)
        coefficients = once.rows(back)
        if policies is None:
            v = self.router.win_rates(once)
            price = self.price
            each = self.router.solve(v, self.budget) if price is None else at_price(v, self.router.costs, price)
            scores = self.router.scores(once, each, v)[back]
            policies = Policies(each.indices[back], each.probabilities[back], each.value[back], each.cost[back])
        else:
            scores = self.router.scores(coefficients, policies, self.router.win_rates(coefficients))
        found = self._columns(unit, can, coefficients, policies, scores)
        row = np.full(len(can), -1)
        row[can] = np.arange(can.sum())
        places = pa.array(np.where(can, row, 0), mask=~can)
        kept = unit.block.kept
        columns = dict(zip(kept.column_names, kept.columns, strict=True))
        columns |= {name: column.take(places) for name, column in found.items()} | {"error": pa.array(why, pa.string())}
        table = pa.table(list(columns.values()), names=list(columns))
        return Decided(table, int(can.sum()), float(policies.cost.sum()))

    def _columns(
        self, unit: Unit, can: npt.NDArray[np.bool_], coefficients: Coefficients, policies: Policies, scores: Float64
    ) -> dict[str, pa.Array]:
        indices, p = policies.indices, policies.probabilities
        used = p > 0
        chosen = indices[np.arange(len(p)), p.argmax(1)] if len(p) else np.zeros(0, np.int64)
        rows = np.flatnonzero(can)
        for i in np.flatnonzero(used.sum(1) > 1).tolist():
            turns = unit.block.prompts[rows[i]]
            assert not isinstance(turns, Unroutable)
            chosen[i] = self.router.draw(turns, indices[i].tolist(), p[i].tolist())
        mixed = pa.StructArray.from_arrays(
            [self.names.take(pa.array(indices[used])), pa.array(p[used])], fields=list(POLICY.value_type)
        )
        offsets = pa.array(np.concatenate([[0], used.sum(1).cumsum()]).astype(np.int32))
        found = {
            "model": self.names.take(pa.array(chosen)),
            "policy": pa.ListArray.from_arrays(offsets, mixed, type=POLICY),
            "expected_cost": pa.array(policies.cost),
            "win_rate": pa.array(policies.value),
            "score": pa.array(scores),
        }
        if self.stored:
            kind = np.dtype(self.stored)
            flat = pa.array(coefficients.theta.astype(kind).ravel())
            found["theta"] = pa.FixedSizeListArray.from_arrays(flat, coefficients.theta.shape[1])
            if coefficients.eta is not None:
                found["eta"] = pa.array(coefficients.eta.astype(kind))
        return found


def at_price(v: Float64, costs: Float64, price: float) -> Policies:
    """For each prompt the model of the highest win rate less price times cost; of equal ones the cheapest."""
    order = np.argsort(costs, kind="stable")
    best = order[(v - price * costs)[:, order].argmax(1)]
    rows = np.arange(len(v))
    indices = np.stack([best, best], axis=1).astype(np.int32)
    probabilities = np.tile([1.0, 0.0], (len(v), 1))
    return Policies(indices, probabilities, v[rows, best], costs[best], "price", "win rate less cost at a price that was given")


class SpilledRates(Values):
    """Win rates [N, K] of rows whose coefficients are spilled, computed when they are needed.

    references: of the rows that can be routed, block by block.
    """

    def __init__(self, decider: Decider, references: Sequence[npt.NDArray[np.int64]]) -> None:
        self.decider, self.blocks = decider, list(references)
        self.references = np.concatenate([np.zeros(0, np.int64), *self.blocks])
        self.shape = (len(self.references), len(decider.router.names))

    def chunks(self) -> Iterator[Float64]:
        for references in self.blocks:
            if len(references):
                yield self._rates(references)

    def take(self, prompts: Any) -> Float64:
        return self._rates(self.references[prompts])

    def _rates(self, references: npt.NDArray[np.int64]) -> Float64:
        once, back = np.unique(references, return_inverse=True)
        return np.ascontiguousarray(self.decider.router.win_rates(self.decider.coefficients(once))[back])

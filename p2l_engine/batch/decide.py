"""From coefficients to output rows: policies, draws from them, and one table per block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from p2l_engine.batch.blocks import Unroutable
from p2l_engine.batch.deduplicator import NO_REFERENCE, DeduplicatedBlock
from p2l_engine.coefficients import Coefficients
from p2l_engine.constraints import Constraints
from p2l_engine.router import Router
from p2l_engine.routing import Policies
from p2l_engine.routing.arrays import Float64
from p2l_engine.routing.problem import of_models
from p2l_engine.routing.rounding import highest
from p2l_engine.routing.values import Values

POLICY = pa.list_(pa.struct([("model", pa.string()), ("probability", pa.float64())]))
OUTPUT_COLUMNS = (
    "model",
    "policy",
    "expected_cost",
    "win_rate",
    "score",
    "expected_tokens",
    "expected_seconds",
    "theta",
    "eta",
    "deviation",
    "error",
)


class DecidedBlock(NamedTuple):
    """A block's output table, the number of its rows that could be routed, and the sum of their expected costs."""

    table: pa.Table
    routed: int
    spend: float


class Decider:
    """Decides blocks whose coefficients have been computed.

    take: from references [n] to the engine's outputs [n, K]. budget: per prompt. budget, price, coefficients: as in
    ``BatchConfig``; coefficients is the type in which theta, eta and deviation are written, None to leave them out.
    """

    def __init__(
        self,
        router: Router,
        take: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float32]],
        budget: float | None = None,
        price: float | None = None,
        coefficients: Literal["float16", "float32"] | None = None,
    ) -> None:
        self.router, self.take = router, take
        self.budget, self.price, self.written_type = budget, price, coefficients
        self.names = pa.array(router.names)
        self._costs_vary = router.costs_vary

    def coefficients(self, references: npt.NDArray[np.int64]) -> Coefficients:
        """Coefficients of references [n], which may hold numbers that are not finite."""
        return self.router.engine.split(self.take(references))

    def costs(self, references: npt.NDArray[np.int64]) -> Float64:
        """Costs of references [n], [K] or [n, K]: see ``Chooser.costs_of``."""
        return self.router.costs_of(self.coefficients(references))

    def routable(self, block: DeduplicatedBlock) -> tuple[npt.NDArray[np.bool_], list[str | None]]:
        """Whether each row can be routed [rows], and the reason where it cannot."""
        reasons = [prompt.why if isinstance(prompt, Unroutable) else None for prompt in block.block.prompts]
        routable = block.references != NO_REFERENCE
        not_finite = np.flatnonzero(routable)[~np.isfinite(self.take(block.references[routable])).all(axis=1)]
        for row in not_finite.tolist():
            turns = block.block.prompts[row]
            assert not isinstance(turns, Unroutable)
            why = self.router.engine.encoder.problem(turns)
            routable[row], reasons[row] = False, why or "the backbone gave coefficients that are not finite"
        if self.budget is not None and self._costs_vary:
            rows = np.flatnonzero(routable)
            least = self.costs(block.references[rows]).min(axis=1)
            for i in np.flatnonzero(least > highest(self.budget)).tolist():
                routable[rows[i]] = False
                reasons[rows[i]] = f"the cheapest model is expected to cost {least[i]:.6g}, more than the budget"
        return routable, reasons

    def decide(self, block: DeduplicatedBlock, policies: Policies | None = None) -> DecidedBlock:
        """The block's output rows. policies: of its routable rows, if they were solved over the whole batch."""
        routable, reasons = self.routable(block)
        references, inverse = np.unique(block.references[routable], return_inverse=True)
        unique = self.coefficients(references)
        coefficients = unique.rows(inverse)
        if policies is None:
            v, costs = self.router.win_rates(unique), self.router.costs_of(unique)
            solved = (
                self.router.solve(v, Constraints(self.budget), costs) if self.price is None else at_price(v, costs, self.price)
            )
            scores = self.router.scores(unique, solved, v)[inverse]
            policies = solved.of(inverse)
        else:
            scores = self.router.scores(coefficients, policies, self.router.win_rates(coefficients))
        found = self._columns(block, routable, coefficients, policies, scores)
        index = np.where(routable, routable.cumsum() - 1, 0)
        take = pa.array(index, mask=~routable)  # null where a row was not routed
        kept = block.block.kept
        columns = dict(zip(kept.column_names, kept.columns, strict=True))
        columns |= {name: column.take(take) for name, column in found.items()} | {"error": pa.array(reasons, pa.string())}
        table = pa.table(list(columns.values()), names=list(columns))
        return DecidedBlock(table, int(routable.sum()), float(policies.cost.sum()))

    def _columns(
        self,
        block: DeduplicatedBlock,
        routable: npt.NDArray[np.bool_],
        coefficients: Coefficients,
        policies: Policies,
        scores: Float64,
    ) -> dict[str, pa.Array]:
        """Output columns of the routable rows."""
        indices, p = policies.indices, policies.probabilities
        used = p > 0
        chosen = indices[np.arange(len(p)), p.argmax(1)] if len(p) else np.zeros(0, np.int64)
        rows = np.flatnonzero(routable)
        for i in np.flatnonzero(used.sum(1) > 1).tolist():
            turns = block.block.prompts[rows[i]]
            assert not isinstance(turns, Unroutable)
            chosen[i] = self.router.draw(turns, indices[i].tolist(), p[i].tolist())
        pairs = pa.StructArray.from_arrays(
            [self.names.take(pa.array(indices[used])), pa.array(p[used])], fields=list(POLICY.value_type)
        )
        offsets = pa.array(np.concatenate([[0], used.sum(1).cumsum()]).astype(np.int32))
        columns = {
            "model": self.names.take(pa.array(chosen)),
            "policy": pa.ListArray.from_arrays(offsets, pairs, type=POLICY),
            "expected_cost": pa.array(policies.cost),
            "win_rate": pa.array(policies.value),
            "score": pa.array(scores),
        }
        for name, of in zip(("tokens", "seconds"), self.router.usage_of(coefficients, indices, p), strict=True):
            if of is not None:
                columns[f"expected_{name}"] = pa.array(of)
        if self.written_type:
            dtype = np.dtype(self.written_type)
            columns["theta"] = _lists(coefficients.theta.astype(dtype))
            if coefficients.eta is not None:
                columns["eta"] = pa.array(coefficients.eta.astype(dtype))
            if coefficients.deviation is not None:
                columns["deviation"] = _lists(coefficients.deviation.astype(dtype))
        return columns


def _lists(rows: npt.NDArray[np.floating[Any]]) -> pa.FixedSizeListArray:
    """A matrix [n, M] as n lists."""
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])


def at_price(v: Float64, costs: Float64, price: float) -> Policies:
    """For each prompt, the model with the highest v [N, K] - price * costs, [K] or [N, K]; the cheapest one among equals."""
    rows, order = np.arange(len(v)), np.argsort(costs, axis=-1, kind="stable")
    if costs.ndim == 1:
        best = order[(v - price * costs)[:, order].argmax(1)]
    else:
        best = order[rows, np.take_along_axis(v - price * costs, order, 1).argmax(1)]
    indices = np.stack([best, best], axis=1).astype(np.int32)
    probabilities = np.tile([1.0, 0.0], (len(v), 1))
    why = "highest win rate less cost at the given price"
    mixed = of_models(costs, indices)
    return Policies(indices, probabilities, v[rows, best], mixed[:, 0].copy(), "price", why, mixed_costs=mixed)


class SpilledWinRates(Values):
    """Win rates [N, K] computed from spilled coefficients each time they are read.

    references: of the routable rows of each block, in order.
    """

    def __init__(self, decider: Decider, references: Sequence[npt.NDArray[np.int64]]) -> None:
        self.decider, self.blocks = decider, list(references)
        self.references = np.concatenate([np.zeros(0, np.int64), *self.blocks])
        self.shape = (len(self.references), len(decider.router.names))

    def chunks(self) -> Iterator[Float64]:
        for references in self.blocks:
            if len(references):
                yield self._win_rates(references)

    def take(self, prompts: Any) -> Float64:
        return self._win_rates(self.references[prompts])

    def _win_rates(self, references: npt.NDArray[np.int64]) -> Float64:
        unique, inverse = np.unique(references, return_inverse=True)
        return np.ascontiguousarray(self.decider.router.win_rates(self.decider.coefficients(unique))[inverse])

"""From coefficients to output rows: policies, draws from them, and one table per block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from p2l_engine.batch.blocks import Unroutable
from p2l_engine.batch.columns import EXPLORED, KEPT, USAGE
from p2l_engine.batch.deduplicator import NO_REFERENCE, DeduplicatedBlock
from p2l_engine.coefficients import Coefficients
from p2l_engine.constraints import UNCONSTRAINED, Constraints
from p2l_engine.router import Router
from p2l_engine.routing import Policies
from p2l_engine.routing.arrays import Float64
from p2l_engine.routing.problem import of_models
from p2l_engine.routing.rounding import highest

POLICY = pa.list_(pa.struct([("model", pa.string()), ("probability", pa.float64())]))
KEY = 16  # bytes of a ``Chooser.draw_key``


class DecidedBlock(NamedTuple):
    """A block's output table, the number of its rows that could be routed, and the sum of their expected costs."""

    table: pa.Table
    routed: int
    spend: float


class Decider:
    """Decides blocks whose coefficients have been computed.

    take: from references [n] to the engine's outputs [n, K]. budget: per prompt. budget, price, coefficients: as in
    ``BatchConfig``; coefficients is the type in which theta, eta and deviation are written, None to leave them out.
    constraints: over the batch, which policies that were solved over it hold.
    """

    def __init__(
        self,
        router: Router,
        take: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float32]],
        budget: float | None = None,
        price: float | None = None,
        coefficients: Literal["float16", "float32"] | None = None,
        constraints: Constraints = UNCONSTRAINED,
    ) -> None:
        self.router, self.take, self.constraints = router, take, constraints
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
        for row, problem in block.block.problems.items():
            routable[row], reasons[row] = False, reasons[row] or problem.why
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

    def keys(self, block: DeduplicatedBlock, routable: npt.NDArray[np.bool_], tokens: Sequence[str | None] | None) -> bytes:
        """What the routable rows' coefficients are drawn by, ``KEY`` bytes for each; none where the router does not explore.
        tokens: of all rows."""
        if self.router.explore is None:
            return b""
        rows = np.flatnonzero(routable).tolist()
        return b"".join(self.router.draw_key(_turns(block, i), tokens[i] if tokens else None) for i in rows)

    def decide(
        self, block: DeduplicatedBlock, policies: Policies | None = None, tokens: Sequence[str | None] | None = None
    ) -> DecidedBlock:
        """The block's output rows. policies: of its routable rows, if they were solved over the whole batch. tokens: what rows
        are drawn by where the router explores, beside their prompts; None: by these alone."""
        routable, reasons = self.routable(block)
        if self.router.explore is not None:
            return self._explored(block, routable, reasons, policies, tokens)
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
        found = self._columns(block, routable, policies, scores)
        usage = self.router.usage_of(coefficients, policies.indices, policies.probabilities)
        found |= {name: pa.array(of) for name, of in zip(USAGE, usage, strict=True) if of is not None}
        found |= self._written(coefficients)
        return _decided(block, routable, reasons, found, float(policies.cost.sum()))

    def _explored(
        self,
        block: DeduplicatedBlock,
        routable: npt.NDArray[np.bool_],
        reasons: list[str | None],
        policies: Policies | None,
        tokens: Sequence[str | None] | None,
    ) -> DecidedBlock:
        """``decide`` of a router that explores: one decision for each prompt and token, or for each row of ``policies``."""
        rows = np.flatnonzero(routable).tolist()
        each = [(_turns(block, i), tokens[i] if tokens else None) for i in rows]
        first = {key: i for i, key in reversed(list(enumerate(each)))} if policies is None else {}
        kept = sorted(first.values()) if policies is None else list(range(len(rows)))
        inverse = np.searchsorted(kept, [first[key] for key in each]) if policies is None else np.arange(len(rows))
        coefficients = self.coefficients(block.references[rows])
        chosen = coefficients.rows(np.array(kept, np.int64))
        turns, draws = [list(each[i][0]) for i in kept], [each[i][1] for i in kept]
        if self.price is not None:
            found = [self.router.at_price(chosen.row(i), turns[i], self.price, draws[i]) for i in range(len(kept))]
        else:
            constraints = Constraints(self.budget) if policies is None else self.constraints
            found = self.router.decide(chosen, turns, constraints, draws, policies) if turns else []
        decisions = [found[i] for i in inverse.tolist()]
        policy = [[{"model": name, "probability": p} for name, p in one.policy.items()] for one in decisions]
        columns = {"model": pa.array([one.model for one in decisions], pa.string()), "policy": pa.array(policy, POLICY)}
        usage = () if coefficients.usage is None else USAGE[:1] if coefficients.usage.seconds is None else USAGE
        for name in ("expected_cost", "win_rate", "score", *usage, *EXPLORED):
            columns[name] = pa.array([getattr(one, name) for one in decisions], pa.float64())
        spend = float(sum(one.expected_cost for one in decisions))
        return _decided(block, routable, reasons, columns | self._written(coefficients), spend)

    def _written(self, coefficients: Coefficients) -> dict[str, pa.Array]:
        """The column of what was kept, where there is a shrinkage, and those of coefficients, where they are wanted."""
        columns = {} if coefficients.kept is None else {KEPT: pa.array(coefficients.kept)}
        if self.written_type:
            dtype = np.dtype(self.written_type)
            columns["theta"] = _lists(coefficients.theta.astype(dtype))
            if coefficients.eta is not None:
                columns["eta"] = pa.array(coefficients.eta.astype(dtype))
            if coefficients.deviation is not None:
                columns["deviation"] = _lists(coefficients.deviation.astype(dtype))
        return columns

    def _columns(
        self,
        block: DeduplicatedBlock,
        routable: npt.NDArray[np.bool_],
        policies: Policies,
        scores: Float64,
    ) -> dict[str, pa.Array]:
        """Output columns of the routable rows."""
        indices, p = policies.indices, policies.probabilities
        used = p > 0
        chosen = indices[np.arange(len(p)), p.argmax(1)] if len(p) else np.zeros(0, np.int64)
        rows = np.flatnonzero(routable)
        for i in np.flatnonzero(used.sum(1) > 1).tolist():
            chosen[i] = self.router.draw(_turns(block, rows[i]), indices[i].tolist(), p[i].tolist())
        pairs = pa.StructArray.from_arrays(
            [self.names.take(pa.array(indices[used])), pa.array(p[used])], fields=list(POLICY.value_type)
        )
        offsets = pa.array(np.concatenate([[0], used.sum(1).cumsum()]).astype(np.int32))
        return {
            "model": self.names.take(pa.array(chosen)),
            "policy": pa.ListArray.from_arrays(offsets, pairs, type=POLICY),
            "expected_cost": pa.array(policies.cost),
            "win_rate": pa.array(policies.value),
            "score": pa.array(scores),
        }


def _decided(
    block: DeduplicatedBlock,
    routable: npt.NDArray[np.bool_],
    reasons: list[str | None],
    found: dict[str, pa.Array],
    spend: float,
) -> DecidedBlock:
    """The output table: kept columns, those of the routable rows, and the reasons why others could not be routed."""
    index = np.where(routable, routable.cumsum() - 1, 0)
    take = pa.array(index, mask=~routable)  # null where a row was not routed
    kept = block.block.kept
    columns = dict(zip(kept.column_names, kept.columns, strict=True))
    columns |= {name: column.take(take) for name, column in found.items()} | {"error": pa.array(reasons, pa.string())}
    table = pa.table(list(columns.values()), names=list(columns))
    return DecidedBlock(table, int(routable.sum()), spend)


def _turns(block: DeduplicatedBlock, row: int) -> tuple[str, ...]:
    """The user turns of a row that can be routed."""
    turns = block.block.prompts[row]
    assert not isinstance(turns, Unroutable)
    return turns


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

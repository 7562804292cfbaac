"""The cost and win rate of a batch under every budget at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from p2l_engine.routing import arrays, rounding
from p2l_engine.routing.arrays import Array, Float64
from p2l_engine.routing.hulls import Hulls
from p2l_engine.routing.problem import Problem, check_summable
from p2l_engine.routing.values import Values


@dataclass(frozen=True, slots=True, eq=False)
class Frontier:
    """The best mean value for every mean cost: a concave polygon.

    cost [S] and value [S], both rising: its vertices, from every prompt at its cheapest to every prompt at its best. price [S]:
    the dual price just below that vertex, value per unit of cost (inf at the first). model_cost and model_value [M]: of every
    model alone, all below the curve; NaN for a model that some prompts may not use.
    """

    cost: Float64
    value: Float64
    price: Float64
    model_cost: Float64
    model_value: Float64

    def at(self, budget: float | Array) -> Any:
        """The best mean value within a mean budget, [...] as budget: NaN below the smallest feasible one."""
        limit, smallest = np.asarray(budget, float), self.cost[0]
        limit = np.where((limit < smallest) & (rounding.highest(limit) >= smallest), smallest, limit)
        value = np.where(limit == smallest, self.value[0], np.interp(limit, self.cost, self.value, left=np.nan))
        return value if value.ndim else float(value)

    def thinned(self, points: int = 1000) -> Frontier:
        """At most ``points`` vertices, spread evenly over cost and value, for a plot."""
        if len(self.cost) <= points:
            return self
        reach = _share(self.cost) + _share(self.value)
        keep = np.unique(np.searchsorted(reach, np.linspace(reach[0], reach[-1], points)).clip(0, len(reach) - 1))
        return Frontier(self.cost[keep], self.value[keep], self.price[keep], self.model_cost, self.model_value)


def frontier(v: Array | Values, costs: Array, allowed: Array | None = None) -> Frontier:
    """The frontier of a batch: v [N, M] or LazyWinRates, costs [M] or [N, M], allowed [N, M]; N >= 1.

    Sums the steps of all prompts' hulls by falling slope: O(N M) for the hulls and one sort of their steps. The same optima as
    ``solve_batch_budget``'s (paper, (6) over a batch).
    """
    if costs is None:
        raise ValueError("costs: expected the models' costs, got None")
    problem = Problem(v, costs, allowed=allowed)
    check_summable("costs", problem.amounts)
    sums = _ModelSums(problem)
    hulls = Hulls.of(sums, problem.amounts, problem.mask)
    if not len(hulls):
        raise ValueError("v: expected at least one prompt, got none")
    slope, extra_cost, extra_value = hulls.steps()
    first = hulls.offsets[:-1]
    # Equal slopes make one step.
    ends = np.append(np.flatnonzero(np.diff(slope)), len(slope) - 1) if len(slope) else np.zeros(0, np.intp)
    cost = np.concatenate([[hulls.cost[first].sum()], hulls.cost[first].sum() + np.cumsum(extra_cost)[ends]])
    value = np.concatenate([[hulls.value[first].sum()], hulls.value[first].sum() + np.cumsum(extra_value)[ends]])
    n = len(hulls)
    cost /= n
    cost[0] = hulls.smallest
    return Frontier(cost, value / n, np.concatenate([[np.inf], slope[ends]]), sums.cost / n, sums.value / n)


class _ModelSums(Values):
    """A problem's values; reading them also sums up each model's cost and value, so that one pass serves both."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.shape = problem, problem.values.shape
        self.cost, self.value = np.zeros(self.shape[1]), np.zeros(self.shape[1])

    def chunks(self) -> Any:
        start = 0
        for v in self.problem.values.chunks():
            some = slice(start, start + len(v))
            costs = self.problem.amounts
            self.value += v.sum(axis=0)
            self.cost += arrays.to_float64("costs", costs[some]).sum(axis=0) if costs.ndim == 2 else len(v) * costs
            if self.problem.mask is not None:
                barred = ~self.problem.mask[some].all(axis=0)
                self.value[barred], self.cost[barred] = np.nan, np.nan
            start += len(v)
            yield v

    def take(self, prompts: Any) -> Float64:
        return self.problem.values.take(prompts)


def _share(rising: Float64) -> Float64:
    """A rising curve rescaled to 0 to 1."""
    return np.asarray((rising - rising[0]) / (rising[-1] - rising[0] or 1.0))

"""What routing decides: each prompt's models and their probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from p2l_engine.routing import arrays, realised
from p2l_engine.routing.arrays import Array, Float64


@dataclass(frozen=True, slots=True, eq=False)
class Policies:
    """The policies of N prompts.

    indices [N, W] int32: the models each policy mixes, W >= 2; an unused entry repeats the first model.
    probabilities [N, W]: rows sum to 1, 0 where unused. value [N]: expected value. cost [N]: expected cost.
    solver and why: which solver found them, and why that one. prices {row: dual price}: what one more unit of a batch row's
    bound (a dollar of mean cost, 1.0 of share) adds to the mean value, >= 0; for min_share, what one unit less adds.
    gap: an upper bound on the mean value lost to the optimum; 0 where the solver is exact. mixed_costs [N, W]: the costs of the
    models in indices; ``variance`` and ``cost_bound`` follow from them.
    """

    indices: Any
    probabilities: Any
    value: Any
    cost: Any
    solver: str = "frontier"
    why: str = "one row for each prompt: its upper hull is exact"
    prices: Mapping[str, float] = field(default_factory=dict)
    gap: float = 0.0
    mixed_costs: Any = None

    def of(self, prompts: Any) -> Policies:
        """The policies of some of the prompts: a slice, or indices."""
        names = ("indices", "probabilities", "value", "cost") + (() if self.mixed_costs is None else ("mixed_costs",))
        return replace(self, **{name: getattr(self, name)[prompts] for name in names})

    @property
    def variance(self) -> Any:
        """The variance of each prompt's cost over the draw of its model [N]; 0 where a single model has probability 1."""
        return arrays.like(realised.variance(*self._draws()), self.cost)

    def cost_bound(self, delta: float, draws: Array | None = None) -> float:
        """A total cost that the draws of all prompts stay within with probability at least 1 - delta, delta in (0, 1).

        The least of Cantelli's, Bernstein's and Hoeffding's bounds and of the sum of every prompt's most expensive model
        (``realised.total_bound``). Draws are independent, except where ``draws`` [N] has equal whole numbers: a Router draws
        alike for prompts of equal user turns. It bounds what the draws add to the expected costs, not what a request costs
        beyond the cost that its model was given. Raises ValueError for other arguments.
        """
        return realised.total_bound(*self._draws(), delta, draws)

    def _draws(self) -> tuple[Float64, Float64]:
        if self.mixed_costs is None:
            raise ValueError("mixed_costs: expected the costs of the models in indices, got None; make Policies with them")
        return arrays.to_float64("mixed_costs", self.mixed_costs), arrays.to_float64("probabilities", self.probabilities)

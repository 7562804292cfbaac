"""What policies must satisfy: the constraints of a batch of prompts, by the models' names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt

from p2l_engine.routing.arrays import Float64
from p2l_engine.routing.problem import Problem, Resource, Scope, Share
from p2l_engine.routing.values import Values

Budget = float | Sequence[float] | npt.NDArray[np.floating[Any]]
Shares = Mapping[str | tuple[str, ...], float]


@dataclass(frozen=True, slots=True, eq=False)
class Constraints:
    """The constraints on the policies of N prompts over K models.

    budget: an upper bound on the expected cost of each prompt's policy (budget_scope "prompt": one number, or one per prompt)
    or on their mean (scope "batch": one number), in the catalog's unit; None: no budget. max_share and min_share {name, or
    tuple of names: share in [0, 1]}: bounds on the mean probability of a model, or of a group, over the batch. resources:
    further bounds, with amounts over the K models. allowed [N, K]: which models each prompt may use; None: all. Checked when
    they are used.
    """

    budget: Budget | None = None
    budget_scope: Scope = "prompt"
    max_share: Shares | None = None
    min_share: Shares | None = None
    resources: Sequence[Resource] = ()
    allowed: npt.NDArray[np.bool_] | None = None

    @property
    def only_prompt_budgets(self) -> bool:
        """Whether there is at most a budget for each prompt, and no other constraint."""
        others = self.max_share or self.min_share or self.resources or self.allowed is not None
        return self.budget_scope == "prompt" and not others

    @property
    def limits(self) -> Any:
        """The budget as a number, an array or None."""
        return (
            self.budget if self.budget is None or isinstance(self.budget, bool | str | int | float) else np.asarray(self.budget)
        )

    def problem(self, v: Float64 | Values, costs: Float64, names: Sequence[str]) -> Problem:
        """The routing problem of win rates v [N, K] and costs [K] over the K models of ``names``.

        Raises ValueError and TypeError, naming the constraint that is wrong.
        """
        shares = self._shares(names)
        return Problem(v, costs, self.limits, self.budget_scope, self.resources, shares, self.allowed)

    def _shares(self, names: Sequence[str]) -> list[Share]:
        bounds: dict[tuple[str, ...], dict[str, float]] = {}
        for argument, key, given in (("max_share", "at_most", self.max_share), ("min_share", "at_least", self.min_share)):
            if given is not None and not isinstance(given, Mapping):
                raise TypeError(f"{argument}: expected a mapping of names to shares, got {type(given).__name__}")
            for some, share in dict[Any, Any](given or {}).items():
                group = (some,) if isinstance(some, str) else some
                if not isinstance(group, tuple):
                    raise TypeError(f"{argument}: expected a model's name, or a tuple of names, got {some!r}")
                unknown = [str(name) for name in group if name not in names]
                if unknown:
                    raise ValueError(f"{argument}: expected models of the catalog, got {', '.join(unknown)}")
                if isinstance(share, bool) or not isinstance(share, Real):
                    raise TypeError(f"{argument} of {', '.join(group)}: expected a share in [0, 1], got {share!r}")
                value = float(share)
                if not 0 <= value <= 1:
                    raise ValueError(f"{argument} of {', '.join(group)}: expected a share in [0, 1], got {share!r}")
                bounds.setdefault(group, {})[key] = value
        return [Share([names.index(n) for n in group], name=", ".join(group), **bound) for group, bound in bounds.items()]


UNCONSTRAINED = Constraints()

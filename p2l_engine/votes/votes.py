"""Votes in memory, grouped by prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Votes:
    """V votes on P prompts and M models, sorted by prompt.

    prompts: the P different prompts as tuples of user turns. models: the M names. prompt [V]: each vote's index in prompts.
    a, b [V]: its models' indices; b is -1 for feedback on a single model. outcome [V]: an Outcome (int64), or the value that
    ols and poisson models observe (float64). weight [V]: >= 0. category [P]: the prompts' categories, or None. timestamp [V]:
    seconds since 1970, or None.
    """

    prompts: tuple[tuple[str, ...], ...]
    models: tuple[str, ...]
    prompt: Integers
    a: Integers
    b: Integers
    outcome: Integers | Floats
    weight: Floats
    category: tuple[str, ...] | None = None
    timestamp: Floats | None = None

    @classmethod
    def make(
        cls,
        prompts: Iterable[tuple[str, ...]],
        models: Iterable[str],
        prompt: Integers,
        a: Integers,
        b: Integers,
        outcome: Integers | Floats,
        weight: Floats | None = None,
        category: Iterable[str] | None = None,
        timestamp: Floats | None = None,
    ) -> Votes:
        """Sorted by prompt; weight None is 1 for each vote."""
        order = np.argsort(prompt, kind="stable")
        each = np.ones(len(prompt)) if weight is None else np.asarray(weight, np.float64)
        return cls(
            tuple(prompts), tuple(models), prompt[order], a[order], b[order], outcome[order], each[order],
            None if category is None else tuple(category), None if timestamp is None else timestamp[order],
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.prompt)

    @property
    def are_values(self) -> bool:
        """Whether the outcomes are values (for ols and poisson) instead of votes."""
        return self.outcome.dtype.kind == "f"

    @property
    def bounds(self) -> Integers:
        """[P + 1]: prompt p has the votes bounds[p] to bounds[p + 1]."""
        return np.searchsorted(self.prompt, np.arange(len(self.prompts) + 1)).astype(np.int64)

    def sides(self, theta: npt.NDArray[Any]) -> tuple[Floats, Floats]:
        """[V] each: the coefficients of the votes' models a and b, of theta [P, M], or [1, M] for all prompts; 0 for b where
        there is no second model."""
        of_prompt = np.broadcast_to(theta, (len(self.prompts), len(self.models)))
        a, b = (of_prompt[self.prompt, side].astype(np.float64) for side in (self.a, self.b))
        return a, np.where(self.b < 0, 0.0, b)

    def of(self, prompts: Iterable[int]) -> Votes:
        """Only these prompts, in this order; all models are kept."""
        chosen, bounds = list(prompts), self.bounds
        rows = [np.arange(bounds[p], bounds[p + 1]) for p in chosen]
        index = np.concatenate(rows) if rows else np.zeros(0, np.int64)
        renumbered = np.repeat(np.arange(len(chosen)), [len(r) for r in rows]).astype(np.int64)
        return replace(
            self._rows(index),
            prompts=tuple(self.prompts[p] for p in chosen),
            prompt=renumbered,
            category=None if self.category is None else tuple(self.category[p] for p in chosen),
        )

    def among(self, models: Sequence[str]) -> Votes:
        """Only the votes on these models, in this order, without prompts that have no votes left. Raises ValueError for models
        that the votes are not on."""
        missing = sorted(set(models) - set(self.models))
        if missing:
            raise ValueError(f"models: expected some of those that the votes are on, got {', '.join(missing)}")
        column = np.full(len(self.models) + 1, -1)  # the last is for b = -1
        column[[self.models.index(name) for name in models]] = np.arange(len(models))
        votes = self.where((column[self.a] >= 0) & ((self.b < 0) | (column[self.b] >= 0)))
        return replace(votes, models=tuple(models), a=column[votes.a], b=column[votes.b])

    def where(self, kept: npt.NDArray[np.bool_]) -> Votes:
        """Only the votes where kept [V] is true, without prompts that have no votes left."""
        votes = self._rows(np.flatnonzero(kept))
        return votes.of(np.unique(votes.prompt).tolist())

    def _rows(self, index: Integers) -> Votes:
        return replace(
            self,
            prompt=self.prompt[index],
            a=self.a[index],
            b=self.b[index],
            outcome=self.outcome[index],
            weight=self.weight[index],
            timestamp=None if self.timestamp is None else self.timestamp[index],
        )

"""The leaderboard of a prompt: the models by their coefficients, with their win rates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from p2l_engine import routing
from p2l_engine.engine import Coefficients


@dataclass(frozen=True, slots=True)
class Place:
    """One line of a leaderboard: rank from 1, the model, its coefficient, its win rate against the opponents."""

    rank: int
    model: str
    coefficient: float
    win_rate: float


@dataclass(frozen=True, slots=True)
class Leaderboard:
    """Models from best to worst on one prompt."""

    places: tuple[Place, ...]

    @classmethod
    def of(cls, coefficients: Coefficients, index: int = 0, opponents: npt.NDArray[Any] | None = None) -> Leaderboard:
        """The leaderboard of prompt ``index``. opponents [M] sums to 1; None is uniform over the models."""
        if not -len(coefficients) <= index < len(coefficients):
            raise IndexError(f"index: expected a prompt of {len(coefficients)}, got {index}")
        theta = coefficients.theta[index].astype(np.float64)[None]
        q = np.full(theta.shape[1], 1.0 / theta.shape[1]) if opponents is None else opponents
        v = routing.win_rates(theta, q)[0]
        order = np.argsort(-theta[0], kind="stable")
        models = coefficients.models
        return cls(tuple(Place(r + 1, models[m], float(theta[0, m]), float(v[m])) for r, m in enumerate(order)))

    @property
    def best(self) -> str:
        """The first model's name."""
        return self.places[0].model

    def __iter__(self) -> Iterator[Place]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

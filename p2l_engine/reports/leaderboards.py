"""Leaderboards over prompts, and how near those of few prompts come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from p2l_engine.jsonable import NULL, null_with


@dataclass(frozen=True, slots=True)
class Standing:
    """One line of a leaderboard: rank from 1, the model, its coefficient, its win rate against the opponents (None for models
    of values, ols and poisson), and the ends of the coefficient's bootstrap interval: None where none were computed, and where
    nothing bounds the coefficient (a single prompt; a model that always wins has no upper end)."""

    rank: int
    model: str
    coefficient: float
    win_rate: float | None = field(metadata=NULL)
    low: float | None = field(default=None, metadata=NULL)
    high: float | None = field(default=None, metadata=NULL)

    @property
    def interval(self) -> str:
        """In words; empty where it has no end."""
        if self.low is None or self.high is None:
            return "" if self.low is self.high else f"up to {self.high:.3f}" if self.low is None else f"from {self.low:.3f}"
        return f"{self.low:.3f} to {self.high:.3f}"


@dataclass(frozen=True, slots=True)
class Leaderboards:
    """Leaderboards over the prompts: aggregated from coefficients, overall and by category; marginal, counted from votes, with
    the rank correlations of the two (None where they are undefined, as for equal coefficients)."""

    aggregated: tuple[Standing, ...]
    categories: Mapping[str, tuple[Standing, ...]] | None = None
    marginal: tuple[Standing, ...] | None = None
    spearman: float | None = field(default=None, metadata=null_with("marginal"))
    kendall: float | None = field(default=None, metadata=null_with("marginal"))

    @property
    def middle(self) -> str:
        """The model in the middle of the aggregated leaderboard."""
        return self.aggregated[len(self.aggregated) // 2].model


@dataclass(frozen=True, slots=True)
class Distance:
    """The L1 distance of leaderboards over ``prompts`` random prompts from the marginal one: its mean, least and greatest."""

    prompts: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Growth:
    """Distances for growing numbers of prompts; that of the training votes' marginal leaderboard; the same by category."""

    distances: tuple[Distance, ...]
    marginal_of_training: float | None = None
    categories: Mapping[str, Growth] | None = None

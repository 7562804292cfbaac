"""Figures on votes and values, with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from p2l_engine.jsonable import SPREAD


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure and the ends of its bootstrap interval."""

    value: float
    low: float
    high: float


Figures = Mapping[str, Figure]  # by the figure's name, such as log_loss


@dataclass(frozen=True, slots=True)
class Counts:
    """How many votes on how many prompts."""

    prompts: int
    votes: int


@dataclass(frozen=True, slots=True)
class CategoryFigures:
    """Every predictor's figures on one category's prompts, and how many votes (or values) there are."""

    prompts: int
    votes: int | None = None
    values: int | None = None
    predictors: Mapping[str, Figures] = field(default_factory=dict, metadata=SPREAD)


@dataclass(frozen=True, slots=True)
class Calibration:
    """The calibration curve of the likeliest outcome's probability, one point for each non-empty bin: the mean predicted
    probability, how often that outcome came, the bin's weight in votes, and the ends of the interval of ``came`` over prompts
    (None in files of earlier versions)."""

    predicted: tuple[float, ...]
    came: tuple[float, ...]
    weight: tuple[float, ...]
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class VoteFigures:
    """Figures on votes by predictor (p2l, marginal, category, constant), overall and by category; by how much the P2L model's
    log-loss is below each other predictor's; its calibration curve."""

    overall: Mapping[str, Figures]
    log_loss_below: Figures
    calibration: Calibration
    categories: Mapping[str, CategoryFigures] | None = None


@dataclass(frozen=True, slots=True)
class ValueFigures:
    """Figures on values (ols and poisson) by predictor (p2l, marginal, constant), overall and by category."""

    overall: Mapping[str, Figures]
    categories: Mapping[str, CategoryFigures] | None = None

"""Strengths by category, and what replacing a model changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from p2l_engine.reports.figures import Figures


@dataclass(frozen=True, slots=True)
class CategoryStrengths:
    """By model: its win rate against the reference and, for grounded feedback models, its reliability."""

    prompts: int
    win_rate: Figures
    reliability: Figures | None = None


@dataclass(frozen=True, slots=True)
class Strengths:
    """Strengths and weaknesses by category, measured against the model ``reference``."""

    reference: str
    categories: Mapping[str, CategoryStrengths]


@dataclass(frozen=True, slots=True)
class Preference:
    """How often the new model is preferred to the old one on a category's prompts, with its interval, and the verdict."""

    category: str
    prompts: int
    win_rate: float
    low: float
    high: float
    verdict: Literal["better", "worse", "unclear"]


@dataclass(frozen=True, slots=True)
class Replacement:
    """What changes when the model ``new`` replaces ``old``: overall, and by category, the worst first."""

    old: str
    new: str
    overall: Preference
    categories: tuple[Preference, ...]

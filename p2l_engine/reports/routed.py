"""Routing by true scores, without a budget and under budgets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from p2l_engine.jsonable import SPREAD


@dataclass(frozen=True, slots=True)
class Choice:
    """The mean true score of what one way of choosing takes, and its gain over the best single model in hundredths."""

    mean_score: float
    points_over_best_single: float
    standard_error_points: float


@dataclass(frozen=True, slots=True)
class TaskScores:
    """Mean true scores on one task's prompts: of each model, and of each way of choosing."""

    prompts: int
    models: Mapping[str, float]
    choices: Mapping[str, float] = field(default_factory=dict, metadata=SPREAD)


@dataclass(frozen=True, slots=True)
class BudgetChoice(Choice):
    """A router under a budget."""

    mean_cost: float


@dataclass(frozen=True, slots=True)
class BudgetSingle:
    """The best single model within a budget."""

    model: str
    mean_score: float
    mean_cost: float


@dataclass(frozen=True, slots=True)
class Score:
    """A mean true score."""

    mean_score: float


@dataclass(frozen=True, slots=True)
class ScoreAndCost(Score):
    """And the mean cost."""

    mean_cost: float


@dataclass(frozen=True, slots=True)
class BudgetTask:
    """One task's prompts under a budget over all tasks: each router, and the best single model within it."""

    prompts: int
    best_single: Score
    routers: Mapping[str, ScoreAndCost] = field(default_factory=dict, metadata=SPREAD)


@dataclass(frozen=True, slots=True)
class BudgetRow:
    """Under one mean cost: routers batch (one budget over the batch), prompt (one for each prompt), oracle and probes."""

    budget: float
    best_single: BudgetSingle
    tasks: Mapping[str, BudgetTask] | None = None
    routers: Mapping[str, BudgetChoice] = field(default_factory=dict, metadata=SPREAD)


@dataclass(frozen=True, slots=True)
class Budgets:
    """A row for each budget; the unit of costs."""

    unit: str
    rows: tuple[BudgetRow, ...]


@dataclass(frozen=True, slots=True)
class RoutingFigures:
    """Routing by true scores: ways of choosing without a budget, overall and by task; single models; routers under budgets."""

    best_single_model: str
    choices: Mapping[str, Choice]
    models: Mapping[str, float]
    tasks: Mapping[str, TaskScores] | None = None
    budgets: Budgets | None = None

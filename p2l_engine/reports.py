"""What an evaluation and a survey find, as dataclasses, and their JSON: what ``p2l-engine eval --json`` and
``p2l-engine strengths --json`` write, and a checkpoint's ``evaluation.json`` (see ``jsonable``). Imports only the standard
library.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from p2l_engine.jsonable import NULL, SPREAD, null_with


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure and the ends of its bootstrap interval."""

    value: float
    low: float
    high: float


Figures = Mapping[str, Figure]  # by the figure's name, such as log_loss


@dataclass(frozen=True, slots=True)
class Subject:
    """The checkpoint that the figures describe. head: a digest of its head; None in files of earlier versions."""

    models: tuple[str, ...]
    feedback: str
    dtype: str
    head: str | None = None


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


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseReport:
    """What an evaluation and a survey share. clusters: each prompt's, where categories were found by clustering; choices: by
    category, each model's share of the prompts, in the order of the checkpoint's models."""

    checkpoint: Subject
    bootstrap: int
    clusters: tuple[str, ...] | None = None
    leaderboards: Leaderboards
    strengths: Strengths | None = None
    choices: Mapping[str, tuple[float, ...]] | None = None
    replacements: tuple[Replacement, ...] | None = None

    def ranked(self, models: Collection[str]) -> list[str]:
        """These models in the order of the aggregated leaderboard."""
        return [standing.model for standing in self.leaderboards.aggregated if standing.model in models]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation(BaseReport):
    """The figures of a checkpoint on held-out votes or values."""

    held_out: Counts
    training: Counts | None = None
    votes: VoteFigures | None = None
    value_figures: ValueFigures | None = None
    growth: Growth | None = None
    routing: RoutingFigures | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey(BaseReport):
    """What a checkpoint predicts for prompts without votes. weighted: whether the prompts have weights."""

    prompts: int
    weighted: bool

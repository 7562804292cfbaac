"""A whole evaluation, and a survey of prompts without votes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from p2l_engine.reports.dtypes import DtypeFigures
from p2l_engine.reports.figures import Counts, ValueFigures, VoteFigures
from p2l_engine.reports.leaderboards import Growth, Leaderboards
from p2l_engine.reports.routed import RoutingFigures
from p2l_engine.reports.strengths import Replacement, Strengths


@dataclass(frozen=True, slots=True)
class Subject:
    """The checkpoint that the figures describe. head: a digest of its head; None in files of earlier versions."""

    models: tuple[str, ...]
    feedback: str
    dtype: str
    head: str | None = None


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
    """The figures of a checkpoint on held-out votes or values. dtypes: of several dtypes, float32 first."""

    held_out: Counts
    training: Counts | None = None
    votes: VoteFigures | None = None
    value_figures: ValueFigures | None = None
    growth: Growth | None = None
    routing: RoutingFigures | None = None
    dtypes: tuple[DtypeFigures, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey(BaseReport):
    """What a checkpoint predicts for prompts without votes. weighted: whether the prompts have weights."""

    prompts: int
    weighted: bool

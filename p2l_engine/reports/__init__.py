"""What an evaluation and a survey find, as dataclasses, and their JSON: what ``p2l-engine eval --json`` and
``p2l-engine strengths --json`` write, and a checkpoint's ``evaluation.json`` (see ``jsonable``). Imports only the standard
library.
"""

from p2l_engine.reports.dtypes import DtypeFigures
from p2l_engine.reports.figures import Calibration, CategoryFigures, Counts, Figure, Figures, ValueFigures, VoteFigures
from p2l_engine.reports.leaderboards import Distance, Growth, Leaderboards, Standing
from p2l_engine.reports.report import BaseReport, Evaluation, Subject, Survey
from p2l_engine.reports.routed import (
    BudgetChoice,
    BudgetRow,
    Budgets,
    BudgetSingle,
    BudgetTask,
    Choice,
    RoutingFigures,
    Score,
    ScoreAndCost,
    TaskScores,
)
from p2l_engine.reports.strengths import CategoryStrengths, Preference, Replacement, Strengths

__all__ = [
    "BaseReport",
    "BudgetChoice",
    "BudgetRow",
    "BudgetSingle",
    "BudgetTask",
    "Budgets",
    "Calibration",
    "CategoryFigures",
    "CategoryStrengths",
    "Choice",
    "Counts",
    "Distance",
    "DtypeFigures",
    "Evaluation",
    "Figure",
    "Figures",
    "Growth",
    "Leaderboards",
    "Preference",
    "Replacement",
    "RoutingFigures",
    "Score",
    "ScoreAndCost",
    "Standing",
    "Strengths",
    "Subject",
    "Survey",
    "TaskScores",
    "ValueFigures",
    "VoteFigures",
]

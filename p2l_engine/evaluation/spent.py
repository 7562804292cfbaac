"""What a budget really spends, on prompts whose answers are known: models look best where their costs are expected too low."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from p2l_engine import routing
from p2l_engine.chooser import Chooser
from p2l_engine.coefficients import Coefficients

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class HeldBudget:
    """Of a budget over a batch of ``prompts``, whose answers by ``models`` are known. factor: by what it is to be divided so
    that it is kept, 1 at least; holds: the budget so divided. Money in the catalog's unit."""

    budget: float
    prompts: int
    models: tuple[str, ...]
    factor: float
    holds: float


def answered(chooser: Chooser, real: Float64) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Which of the chooser's models have answers, and the prompts that all of these have answered.

    real [N, M]: what answers took, NaN where there is none. Raises ValueError where no prompt or fewer than two models are
    left, and where the catalog has no prices for their tokens.
    """
    of_catalog = real[:, [chooser.models.index(name) for name in chooser.names]]
    some = np.flatnonzero(~np.isnan(of_catalog).all(axis=0))
    rows = np.flatnonzero(~np.isnan(of_catalog[:, some]).any(axis=1))
    if len(some) < 2 or not len(rows):
        names = ", ".join(chooser.names[k] for k in some[:5].tolist()) or "none of its models"
        raise ValueError(
            f"answers: expected prompts that all models of the catalog with answers have answered, two models at least, got "
            f"{len(rows) if len(some) else 0} of {names}{' ...' if len(some) > 5 else ''}"
        )
    if np.isnan(chooser.catalog.prices[:, some]).all():
        raise ValueError("catalog: expected prices for tokens (usd_per_m_in, usd_per_m_out) of models with answers, got none")
    return some, rows


def held_budget(chooser: Chooser, coefficients: Coefficients, expected: Float64, real: Float64, budget: float) -> HeldBudget:
    """By what a mean budget of a prompt is to be divided, see ``routing.overspending``: of the models and prompts ``answered``.

    coefficients: of N prompts, with usage. expected, real [N, M]: output tokens, predicted for prompts that they were not
    learned from (``length_report.crossed``), and of the answers, NaN where there is none. Raises ValueError, also for a budget
    below what the cheapest models really cost.
    """
    some, rows = answered(chooser, real)
    these = coefficients.rows(rows)
    value = chooser.win_rates(these)[:, some]
    costs, paid = (_costs(chooser, these, tokens[rows])[:, some] for tokens in (expected, real))
    factor = routing.overspending(value, costs, paid, budget)
    return HeldBudget(budget, len(rows), tuple(chooser.names[k] for k in some.tolist()), factor, budget / factor)


def _costs(chooser: Chooser, these: Coefficients, tokens: Float64) -> Float64:
    """What answers of so many tokens cost [N, K]."""
    if these.usage is None:
        raise ValueError("coefficients: expected those of a checkpoint with lengths, got some without usage")
    return chooser.costs_of(replace(these, usage=replace(these.usage, tokens_out=tokens.astype(np.float32))))

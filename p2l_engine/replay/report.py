"""What a replay found, as frozen dataclasses that ``jsonable`` writes."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from p2l_engine.reports import Figure, Figures

ESTIMATORS = ("dr", "snips", "ips")  # the first is what tables and plots show
Verdict = Literal["exact", "judged", "refused"]


@dataclass(frozen=True, slots=True)
class PolicyReplay:
    """One policy. value and cost: by estimator (exact; or dr, snips, ips), none where the log cannot judge it, or costs are not
    known. expected_cost: the mean of its catalog's costs, in that catalog's unit. shares: of its choices, by model. reasons:
    why it was refused.

    effective_rows, heaviest_share, largest_weight, mean_weight, taken, unsupported: as in ``support.Support``.
    """

    name: str
    verdict: Verdict
    value: Figures = field(default_factory=dict)
    cost: Figures = field(default_factory=dict)
    expected_cost: float | None = None
    shares: Mapping[str, float] = field(default_factory=dict)
    effective_rows: float | None = None
    taken: float | None = None
    heaviest_share: float | None = None
    largest_weight: float | None = None
    mean_weight: float | None = None
    unsupported: Mapping[str, float] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    unit: str | None = None


@dataclass(frozen=True, slots=True)
class ReplayReport:
    """rows: decisions of policies, or prompts of a matrix; with_reward: those with feedback; real_costs: those whose cost was
    really spent, the other known costs are expected ones; of: what the value is; level: of the intervals; left_out: what was
    not used, by reason; estimated: decisions whose propensity is an estimate."""

    rows: int
    with_reward: int
    with_cost: int
    real_costs: int
    prompts: int
    of: Literal["score", "preference"]
    level: float
    policies: tuple[PolicyReplay, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)
    estimated: int = 0


def shown_figure(figures: Figures) -> Figure | None:
    """The figure that tables and plots show: the exact one, or the first estimator's; None where there is none."""
    return next((figures[name] for name in ("exact", *ESTIMATORS) if name in figures), None)


def csv_text(report: ReplayReport) -> str:
    """A row for each policy and estimator; a refused policy has one row without value."""
    written = io.StringIO()
    rows = csv.writer(written, lineterminator="\n")
    names = ("value", "value_low", "value_high", "cost", "cost_low", "cost_high")
    rows.writerow(("policy", "verdict", "estimator", *names, "expected_cost", "effective_rows", "taken", "shares", "reasons"))
    for of in report.policies:
        shares = ";".join(f"{name}={share:.6g}" for name, share in of.shares.items())
        for estimator in of.value or ("",):
            figures = [figure for side in (of.value, of.cost) for figure in _cells(side.get(estimator))]
            rest = ["" if x is None else repr(x) for x in (of.expected_cost, of.effective_rows, of.taken)]
            rows.writerow((of.name, of.verdict, estimator, *figures, *rest, shares, "; ".join(of.reasons)))
    return written.getvalue()


def _cells(figure: Figure | None) -> tuple[str, str, str]:
    return ("", "", "") if figure is None else (repr(figure.value), repr(figure.low), repr(figure.high))

"""Replays policies on logged decisions or on a matrix of scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from p2l_engine.arguments import probability
from p2l_engine.bootstrap import LEVEL, effective
from p2l_engine.catalog import Catalog
from p2l_engine.coefficients import Coefficients
from p2l_engine.replay import target as targets
from p2l_engine.replay.estimators import Int64, Valued, doubly_robust, figure, ips, snips
from p2l_engine.replay.expected_score import ExpectedScore, Rates, rates_of
from p2l_engine.replay.logged import LoggedDecisions, ScoreMatrix, Turns
from p2l_engine.replay.mixture import Float64, Mixture
from p2l_engine.replay.policies import PolicySpec
from p2l_engine.replay.report import PolicyReplay, ReplayReport
from p2l_engine.replay.support import EFFECTIVE, depends_on_choice, judge
from p2l_engine.replay.target import CannotChoose, Target
from p2l_engine.reports import Figures

ROUGH = 0.2  # of propensities, the mean standard error beyond which it is said


class Checkpoints(Protocol):
    """Where coefficients come from. Both take a checkpoint's name, None for the default one."""

    def coefficients(self, checkpoint: str | None, prompts: Sequence[Turns]) -> Coefficients:
        """Of these prompts, in order; the same prompts are asked for each time."""
        ...

    def catalog(self, checkpoint: str | None) -> Catalog | None:
        """The checkpoint's own, or the one to use instead."""
        ...


def replay(
    log: LoggedDecisions | ScoreMatrix,
    policies: Sequence[PolicySpec],
    checkpoints: Checkpoints | None = None,
    leave_out: bool = False,
    level: float = LEVEL,
) -> ReplayReport:
    """What each policy would have earned and cost on the log.

    checkpoints: None where no policy needs coefficients. leave_out: whether models that only the catalog or only the checkpoint
    knows are left out, instead of an error. level: of the intervals. Raises ValueError for policies that name unknown models
    or need what the log lacks, or where no row has feedback; what the log cannot judge is refused in the report.
    """
    level = probability("level", level)
    if isinstance(log, ScoreMatrix):
        return _exact(log, policies, checkpoints, leave_out, level)
    judged = ~np.isnan(log.reward)
    if not judged.any():
        raise ValueError(
            f"the log's {len(log):,} decisions have no feedback: expected scores or preferences (feedback.parquet), a file of "
            "scores (--scores), or a column 'reward'"
        )
    rates = log.rates
    reader = next((spec for spec in policies if spec.routed), None)
    if reader is not None:
        read = _coefficients(log, reader, checkpoints)
        rates = rates_of(read.theta, read.models, log.models, read.feedback.of_values)
    scene = _Scene(log, judged, log.clusters, log.fold, rates, level)
    found = [_judged(spec, scene, checkpoints, leave_out) for spec in policies]
    known = ~np.isnan(log.cost)
    return ReplayReport(
        len(log), int(judged.sum()), int(known.sum()), int((known & log.real).sum()), len(log.keys),
        "preference" if log.of == "preference" else "score", level, tuple(found), dict(log.left_out),
        int((log.error > 0).sum()),
    )  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class _Scene:
    """What all policies share. judged [N]: rows with a reward."""

    log: LoggedDecisions
    judged: npt.NDArray[np.bool_]
    clusters: list[Int64]
    fold: Int64
    rates: Rates | None
    level: float

    def figures(self, reward: Float64, target: Target, weight: Float64, rates: Rates | None) -> Figures:
        """By estimator, over the rows where the reward [N] is known; none where these are too few for an interval."""
        log, rows = self.log, np.flatnonzero(~np.isnan(reward))
        if not len(rows):
            return {}
        if rates is not None and len(target.names) > rates.shape[1]:
            rates = np.pad(rates, ((0, 0), (0, len(target.names) - rates.shape[1])), constant_values=np.nan)
        y, w, chosen, prompt, fold = reward[rows], weight[rows], log.chosen[rows], log.prompt[rows], self.fold[rows]
        model = ExpectedScore.fit(y, chosen, prompt, fold, len(target.names), rates)
        mixture = target.mixture.take(rows)
        direct = mixture.mean(model.of(mixture.indices, prompt, fold))
        found: dict[str, Valued] = {
            "dr": doubly_robust(w, y, model.of(chosen, prompt, fold), direct),
            "snips": snips(w, y),
            "ips": ips(w, y),
        }
        clusters = [np.unique(labels[rows], return_inverse=True)[1] for labels in self.clusters]
        figures = {name: figure(valued, w, clusters, self.level) for name, valued in found.items()}
        return figures if all(math.isfinite(of.low) for of in figures.values()) else {}


def _judged(spec: PolicySpec, scene: _Scene, checkpoints: Checkpoints | None, leave_out: bool) -> PolicyReplay:
    log = scene.log
    try:
        target = _target(spec, log, checkpoints, leave_out)
    except CannotChoose as error:
        return PolicyReplay(spec.name, "refused", reasons=(str(error),))
    taken = target.mixture.of(log.chosen)
    weight = np.ones(len(log)) if spec.logged else taken / log.propensity
    support = judge(
        target.mixture, weight, taken, scene.judged, log.chosen, None if spec.logged else log.logged, log.known,
        target.names, scene.clusters,
    )  # fmt: skip
    value: Figures = {}
    cost: Figures = {}
    why = () if spec.logged else _estimated(log, weight)
    if not support.reasons:
        value = scene.figures(log.reward, target, weight, scene.rates)
        cost, no_cost = _costs(scene, target, weight)
        why += no_cost
        earned = log.reward[scene.judged & (weight > 0)]
        if earned.min() == earned.max():
            why += (
                f"all {len(earned):,} rewards of its choices are {earned[0]:g}: of how they vary nothing is known, and the "
                "value's interval is too narrow",
            )
    return PolicyReplay(
        spec.name, "refused" if support.reasons else "judged", value, cost, target.expected_cost, _shares(target),
        support.effective, support.taken, support.heaviest, support.largest, support.mean_weight, support.unsupported,
        support.reasons, support.warnings + why, target.unit,
    )  # fmt: skip


def _estimated(log: LoggedDecisions, weight: Float64) -> tuple[str, ...]:
    """A warning where much of the weight has propensities that are known roughly: they are unbiased, but for models that none
    of their draws would have chosen."""
    total = float(weight.sum())
    error = float((weight * log.error / log.propensity).sum()) / total if total > 0 else 0.0
    if error <= ROUGH:
        return ()
    return (f"the propensities of its rows are estimates, with a standard error of up to {error:.0%} of them on average",)


def _costs(scene: _Scene, target: Target, weight: Float64) -> tuple[Figures, tuple[str, ...]]:
    """The cost's figures; or none, and why."""
    known = ~np.isnan(scene.log.cost)
    if not known.any():
        return {}, ()
    if (size := effective(weight[known])) < EFFECTIVE:
        return {}, (f"no cost: it is known for {size:.1f} effective rows, expected {EFFECTIVE:g} at least",)
    if (uneven := depends_on_choice(weight, known, scene.clusters)) is not None:
        return {}, (f"no cost: {uneven}: whether it is known depends on the model",)
    return scene.figures(scene.log.cost, target, weight, None), ()


def _exact(
    matrix: ScoreMatrix, policies: Sequence[PolicySpec], checkpoints: Checkpoints | None, leave_out: bool, level: float
) -> ReplayReport:
    """The values on the matrix's prompts are exact; their intervals are for prompts of the same kind."""
    n, found = len(matrix), []
    if n < 2:
        raise ValueError(f"expected a matrix of two prompts at least, got {n}")
    for spec in policies:
        try:
            if spec.logged:
                raise CannotChoose("a matrix of scores has no logging policy")
            target = _target(spec, matrix, checkpoints, leave_out)
        except CannotChoose as error:
            found.append(PolicyReplay(spec.name, "refused", reasons=(str(error),)))
            continue
        shares = _shares(target)
        lacking = {name: share for name, share in shares.items() if name not in matrix.models}
        if lacking:
            why = f"the matrix has no scores of {', '.join(lacking)}"
            found.append(
                PolicyReplay(spec.name, "refused", {}, {}, target.expected_cost, shares, reasons=(why,), unit=target.unit)
            )
            continue
        value, cost = (_mean_of(of, target.mixture, level) for of in (matrix.scores, matrix.costs))
        found.append(PolicyReplay(spec.name, "exact", value, cost, target.expected_cost, shares, unit=target.unit))
    costs = 0 if matrix.costs is None else n
    return ReplayReport(n, n, costs, costs, n, "score", level, tuple(found), dict(matrix.left_out))


def _mean_of(of: Float64 | None, mixture: Mixture, level: float) -> Figures:
    if of is None:
        return {}
    each = mixture.mean(of[np.arange(len(of))[:, None], np.minimum(mixture.indices, of.shape[1] - 1)])
    return {"exact": figure(ips(np.ones(len(each)), each), np.ones(len(each)), [], level)}


def _target(spec: PolicySpec, log: LoggedDecisions | ScoreMatrix, checkpoints: Checkpoints | None, leave_out: bool) -> Target:
    if spec.logged and isinstance(log, LoggedDecisions):
        return Target(log.models, Mixture.single(log.chosen), None)
    if not spec.routed:
        return targets.always(spec, log.models, len(log), _catalog(spec, checkpoints))
    coefficients = _coefficients(log, spec, checkpoints)
    catalog = _catalog(spec, checkpoints)
    if catalog is None:
        raise ValueError(f"{spec.name}: the checkpoint has no catalog.yaml: name a catalog")
    prompt = log.prompt if isinstance(log, LoggedDecisions) else np.arange(len(log))
    allowed = log.allowed if isinstance(log, LoggedDecisions) else None
    return targets.routed(spec, coefficients, prompt, catalog, log.models, allowed, leave_out)


def _catalog(spec: PolicySpec, checkpoints: Checkpoints | None) -> Catalog | None:
    if spec.catalog is not None:
        return Catalog.from_yaml(spec.catalog)
    return None if checkpoints is None else checkpoints.catalog(spec.checkpoint)


def _coefficients(log: LoggedDecisions | ScoreMatrix, spec: PolicySpec, checkpoints: Checkpoints | None) -> Coefficients:
    if checkpoints is None:
        raise ValueError(f"{spec.name}: expected a checkpoint, which its choices follow from")
    lacking = sum(turns is None for turns in log.texts)
    if lacking:
        raise ValueError(
            f"{spec.name}: its choices follow from the prompts' texts, which {lacking:,} of {len(log.texts):,} prompts lack: "
            "let the server log them (serve.log_prompts: true) or the batch run keep them (--keep prompt), or replay only "
            "'logged' and 'always'"
        )
    return checkpoints.coefficients(spec.checkpoint, [turns for turns in log.texts if turns is not None])


def _shares(target: Target) -> dict[str, float]:
    shares = target.mixture.shares(len(target.names))
    return {target.names[k]: float(shares[k]) for k in np.argsort(-shares, kind="stable") if shares[k] > 0}

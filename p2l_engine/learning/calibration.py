"""Calibration of a checkpoint on own votes: which map of its coefficients makes its probabilities come true."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from p2l_engine.coefficients import Coefficients
from p2l_engine.evaluation.metrics import Prediction, calibration, difference, figures, of_values
from p2l_engine.evaluation.resampled import Resampled
from p2l_engine.feedback import Outcome
from p2l_engine.learning import likelihood
from p2l_engine.learning.candidates import KINDS as KINDS
from p2l_engine.learning.candidates import CoefficientMap, candidates, knots_of, shown
from p2l_engine.learning.candidates import Kind as Kind
from p2l_engine.learning.crossed import Crossed
from p2l_engine.learning.newton import errors
from p2l_engine.reports import Calibration, Figure, Figures
from p2l_engine.votes import Votes, conversations, folds

Float64 = npt.NDArray[np.float64]

FOLDS = 5
LEAST_VOTES, LEAST_CONVERSATIONS = 100, 20
BINS = 10  # of values' reliability


@dataclass(frozen=True, slots=True)
class Estimate:
    """A parameter and its standard error over conversations (0 where it is at a bound)."""

    value: float
    error: float


@dataclass(frozen=True, slots=True)
class CandidateLoss:
    """A candidate's mean loss of a vote that it has not seen, how far that is above the best one's, and the standard error of
    this difference."""

    candidate: str
    loss: float
    above_best: float
    error: float


@dataclass(frozen=True, slots=True)
class CalibrationReport:
    """What ``calibrate`` found.

    chosen: the candidate. candidates: all of them, simplest first. parameters: those of the chosen map. before, after: figures
    of votes that neither the map nor its choice has seen; gain: by how much the log-loss fell. curve_before, curve_after: of
    the likeliest outcome's probability, or of values by tenths of the prediction.
    """

    feedback: str
    votes: int
    prompts: int
    conversations: int
    folds: int
    chosen: str
    candidates: tuple[CandidateLoss, ...]
    parameters: Mapping[str, Estimate]
    before: Figures
    after: Figures
    gain: Figure | None
    curve_before: Calibration
    curve_after: Calibration


def among_known(votes: Votes, models: tuple[str, ...]) -> tuple[Votes, int]:
    """The votes on these models alone, by their columns, and the number of others. Raises ValueError where none is left."""
    known = [name for name in models if name in votes.models]
    if not known:
        raise ValueError(
            f"votes: expected some on the checkpoint's models, {_some(models)}, got votes on {_some(votes.models)}: "
            "are the names spelt alike?"
        )
    kept = votes.among(known)
    if not len(kept):
        raise ValueError(
            f"votes: expected some between two models of the checkpoint, which knows only {_some(known)} of theirs"
        )
    column = np.array([models.index(name) for name in known])
    paired = np.where(kept.b < 0, -1, column[np.maximum(kept.b, 0)])
    return replace(kept, models=models, a=column[kept.a], b=paired), len(votes) - len(kept)


def calibrate(
    c: Coefficients,
    votes: Votes,
    kinds: tuple[Kind, ...] = KINDS,
    bootstrap: int = 200,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> tuple[CoefficientMap, CalibrationReport]:
    """The map of the coefficients that is chosen by cross-validation over conversations, with the one-standard-error rule in
    favour of the simpler one, fitted to all votes by maximum likelihood of the checkpoint's feedback model; and what it does to
    held-out votes, with intervals over prompts from ``bootstrap`` samples.

    c: of the votes' prompts, in their order; votes: on its models (``among_known``). kinds: of the candidates. progress: called
    with 1 after each candidate (``candidates(kinds)``). Raises ValueError for votes that are too few, or that say nothing of
    which model is better.
    """
    kinds = tuple(kind for kind in KINDS if kind in kinds)
    if not kinds:
        raise ValueError(f"kinds: expected some of {', '.join(KINDS)}")
    _check_fit(c, votes)
    if not (votes.weight > 0).all():
        some = votes.weight > 0
        c, votes = c.rows(np.unique(votes.prompt[some])), votes.where(some)
    conversation = _checked(votes)
    fold = folds(votes, FOLDS, seed)
    bends = kinds == ("isotonic",) or len(knots_of(shown(c, votes))) >= 3
    wanted = tuple(one for one in candidates(kinds) if one.kind != "isotonic" or bends)
    crossed = Crossed(wanted, c, votes, fold, conversation, progress)
    best, judged = crossed.judged()
    design, x = crossed.designs[best], crossed.at[best]
    spread = errors(design.objective, x, conversation[votes.prompt]) if len(x) else np.zeros(0)
    after = _held_out(crossed, c, fold)
    both = [Prediction.of(c.feedback, theta, eta, votes) for theta, eta in ((c.theta, c.eta), after)]
    of_before, of_after = (_figures(one, votes, bootstrap, seed) for one in both)
    curve_before, curve_after = (_curve(one, votes, bootstrap, seed) for one in both)
    parameters = {name: Estimate(*pair) for name, *pair in zip(design.names, x.tolist(), spread.tolist(), strict=True)}
    report = CalibrationReport(
        c.feedback.name, len(votes), len(votes.prompts), int(conversation.max()) + 1, FOLDS, str(wanted[best]),
        tuple(CandidateLoss(str(one.candidate), one.loss, one.above_best, one.error) for one in judged),
        parameters, of_before, of_after, difference(both[1], both[0], votes, bootstrap, seed), curve_before, curve_after,
    )  # fmt: skip
    return design.map_of(x), report


def _check_fit(c: Coefficients, votes: Votes) -> None:
    if len(c) != len(votes.prompts) or c.models != votes.models:
        raise ValueError(
            f"c: expected coefficients of the votes' {len(votes.prompts)} prompts and models, got {len(c)} of {_some(c.models)}"
        )
    for name, each in (("theta", c.theta), ("eta", c.eta)):
        if each is not None and not np.isfinite(each).all():
            first = tuple(np.argwhere(~np.isfinite(each))[0].tolist())
            raise ValueError(f"c: expected finite coefficients, got {name} {each[first]} for prompt {first[0]}")
    if votes.are_values != c.feedback.of_values:
        raise ValueError(f"votes: expected {'values' if c.feedback.of_values else 'votes'} for {c.feedback.name}")
    likelihood.check(c.feedback, votes.outcome, votes.weight)


def _checked(votes: Votes) -> npt.NDArray[np.int64]:
    """The conversation of each prompt [P]."""
    conversation = conversations(votes)
    found = len(np.unique(conversation)) if len(votes) else 0
    if len(votes) < LEAST_VOTES or found < LEAST_CONVERSATIONS:
        raise ValueError(
            f"votes: too few: expected at least {LEAST_VOTES} of a weight above 0, on at least {LEAST_CONVERSATIONS} prompts "
            f"that begin differently, got {len(votes)} on {found}"
        )
    if not votes.are_values:
        if not (votes.outcome <= Outcome.B).any():
            raise ValueError("votes: all are ties, which do not say how much better one model is: expected some with a winner")
        if (votes.a == votes.b).all():
            raise ValueError("votes: expected some between two models, got each model against itself")
    return conversation


def _held_out(crossed: Crossed, c: Coefficients, fold: npt.NDArray[np.int64]) -> tuple[Float64, Float64 | None]:
    """theta [P, M] and eta [P] of each fold by the map that the other folds choose and fit."""
    theta, eta = c.theta.astype(np.float64), None if c.eta is None else c.eta.astype(np.float64)
    for k, chosen in enumerate(crossed.held_out()):
        rows = np.flatnonzero(fold == k)
        mapped = crossed.designs[chosen].map_of(crossed.without[chosen][k])
        theta[rows], new = mapped(c.rows(rows))
        if eta is not None and new is not None:
            eta[rows] = new
    return theta, eta


def _figures(of: Prediction, votes: Votes, bootstrap: int, seed: int) -> Figures:
    if votes.are_values:
        return of_values(of, votes, bootstrap, seed)
    return figures(of, votes, bootstrap, seed)


def _curve(of: Prediction, votes: Votes, bootstrap: int, seed: int) -> Calibration:
    if not votes.are_values:
        return calibration(of, votes, bootstrap=bootstrap, seed=seed)
    predicted, resampled, weight = of.probabilities[:, 0], Resampled.of(votes, bootstrap, seed), votes.weight
    place = np.searchsorted(np.quantile(predicted, np.linspace(0, 1, BINS + 1)[1:-1]), predicted, "right")
    rows = []
    for k in np.unique(place):
        some = weight * (place == k)
        came = resampled.ratio(votes.outcome * some, some)
        mean = float(votes.outcome @ some / some.sum())
        ends = (came.low, came.high) if came is not None else (mean, mean)
        rows.append((float(predicted @ some / some.sum()), mean, float(some.sum()), *ends))
    return Calibration(*zip(*rows, strict=True))


def _some(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

"""New models and new votes for a head whose backbone stays as it is: the posterior of its rows, at its maximum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from p2l_engine.backbone.head import Head
from p2l_engine.backbone.uncertainty import Uncertainty
from p2l_engine.feedback import FeedbackModel
from p2l_engine.learning.objective import Minimum, Objective, minimise
from p2l_engine.learning.prior import RANK, Basis, Scales, covariance, of_rows
from p2l_engine.votes import Votes

Float64 = npt.NDArray[np.float64]

KNOWN_VOTES = 36_000  # what a row of a trained head counts for, unless its posterior is known
INFORMATION = 0.2  # of a vote about theta: between a Bradley-Terry vote's 1/4 at equal strength and less elsewhere
STEPS = (0.25, 0.5, 2.0, 4.0)  # factors of the prior's scales that are compared
NARROWER = 0.5  # deviation of a model that is like another, relative to one that is not
LARGEST = 8192  # free parameters up to which the posterior's covariance is exact


@dataclass(frozen=True, slots=True)
class NewModel:
    """A model to be added. like: the known model that it resembles, whose row is then its prior mean; None: the mean of the
    rows. level: its mean theta over the reference prompts, before any vote; None: as its prior mean has it."""

    name: str
    like: str | None = None
    level: float | None = None


@dataclass(frozen=True, slots=True)
class Adapted:
    """head and models: the new ones. uncertainty: the posterior of the rows that were learned. new, moved: names of the models
    that were added, and of known ones whose rows votes moved. scales: of the new rows' prior. minimum: where the search
    ended."""

    head: Head
    models: tuple[str, ...]
    uncertainty: Uncertainty | None
    new: tuple[str, ...]
    moved: tuple[str, ...]
    scales: Scales | None
    minimum: Minimum


def adapt(
    head: Head,
    models: Sequence[str],
    feedback: FeedbackModel,
    votes: Votes,
    hidden: npt.NDArray[np.float32],
    new: Sequence[NewModel] = (),
    uncertainty: Uncertainty | None = None,
    reference: npt.NDArray[np.float32] | None = None,
    known_votes: float = KNOWN_VOTES,
    rank: int = RANK,
    scales: Scales | None = None,
) -> Adapted:
    """The head with the ``new`` models; their rows, and those of known models that votes touch, are at the posterior's maximum.

    models: the head's. votes: on these and new models. hidden [P, D]: of the votes' prompts. uncertainty: the posterior of the
    head's rows where it is known; other rows that votes touch have independent coordinates in the basis, as precise as
    ``known_votes`` votes make them. reference [N, D]: hidden states that say how prompts vary, None: hidden. rank: r, the size
    of the basis, unless there is one already. scales: of the new rows' prior; None: chosen by the evidence of the votes
    (Laplace's approximation, the known rows fixed), starting from what the head's rows say of each other.

    Raises ArithmeticError where the maximum is not reached.
    """
    names = (*models, *(model.name for model in new))
    m, d = len(models), head.weight.shape[1]
    old = torch.cat([head.weight, head.bias[:, None]], 1).double().cpu().numpy()
    rows, eta_row = old[:m], old[m] if head.has_eta else None
    given = None if uncertainty is None else uncertainty.basis.double().cpu().numpy()
    reference = hidden if reference is None else reference
    basis = Basis.of(reference, rows, rank, given)
    mean = reference.mean(0, dtype=np.float64) if len(reference) else np.zeros(d)
    means = np.concatenate([rows, np.empty((len(new), d + 1))])
    for i, model in enumerate(new):
        means[m + i] = rows[models.index(model.like)] if model.like is not None else rows.mean(0)
        if model.level is not None:
            means[m + i, -1] += model.level - (mean @ means[m + i, :-1] + means[m + i, -1])
    column = np.array([names.index(name) for name in votes.models] + [-1], np.int64)
    votes = replace(votes, models=names, a=column[votes.a], b=column[votes.b])
    wide = hidden.astype(np.float64)
    base = wide @ means[:, :-1].T + means[:, -1]
    eta = None if eta_row is None else wide @ eta_row[:-1] + eta_row[-1]
    x = basis.features(hidden)
    touched = np.zeros(len(names), bool)
    used = votes.weight > 0
    touched[votes.a[used]] = True
    touched[votes.b[used & (votes.b >= 0)]] = True
    added = range(m, len(names))
    narrow = {m + i: NARROWER if model.like is not None else 1.0 for i, model in enumerate(new)}
    if scales is None:
        scales = of_rows(basis)
        if new and touched[m:].any():
            scales = _by_evidence(feedback, votes, eta, base, x, basis, narrow, scales, 1 / math.sqrt(2 * max(m - 1, 1)))
    factors = {i: narrow[i] * _factor(covariance(basis, scales)) for i in added}
    prior = np.sqrt(np.diag(covariance(basis, scales)))
    factors |= {i: _known(uncertainty, models[i], prior, known_votes) for i in np.flatnonzero(touched[:m]).tolist()}
    objective = Objective(feedback, votes, eta, base, x, factors)
    minimum = minimise(objective)
    posterior = _posterior(objective, minimum)
    moved = means.copy()
    for f, i in enumerate(objective.free):
        moved[i] += basis.matrix @ (objective.factors[f] @ minimum.u[f])
    return Adapted(
        _head(head, moved, objective.free, m),
        names,
        _merged(uncertainty, basis.matrix, prior, names, objective.free, posterior),
        tuple(names[i] for i in added),
        tuple(names[i] for i in objective.free if i < m),
        scales if new else None,
        minimum,
    )


def _known(uncertainty: Uncertainty | None, name: str, prior: Float64, known_votes: float) -> Float64:
    """[r, r]: the factor of a known row's prior. Directions that the basis lacked when its posterior was computed are as the
    prior of a new row has them: deviations [r]."""
    if uncertainty is None or name not in uncertainty.models:
        same: Float64 = np.eye(len(prior)) / np.sqrt(INFORMATION * known_votes)
        return same
    return _grown(uncertainty.factors[uncertainty.models.index(name)].double().cpu().numpy(), prior)


def _grown(factor: Float64, prior: Float64) -> Float64:
    found: Float64 = np.diag(prior)
    found[: len(factor), : len(factor)] = factor
    return found


def _by_evidence(
    feedback: FeedbackModel,
    votes: Votes,
    eta: Float64 | None,
    base: Float64,
    x: Float64,
    basis: Basis,
    narrow: dict[int, float],
    start: Scales,
    sure: float,
) -> Scales:
    """The scales of most evidence, one after the other. start: those before any vote, sure: the standard deviation of their
    logarithms: few votes cannot tell a wide prior from a narrow one, and all won would be best explained by the widest."""

    def evidence(scales: Scales) -> float:
        factor = _factor(covariance(basis, scales))
        objective = Objective(feedback, votes, eta, base, x, {i: each * factor for i, each in narrow.items()})
        minimum = minimise(objective, tolerance=1e-4)
        blocks = objective.blocks(minimum.local.definite)
        far = np.log(astuple(scales)) - np.log(astuple(start))
        return -minimum.local.value - float(np.linalg.slogdet(blocks)[1].sum()) / 2 - float((far**2).sum()) / (2 * sure**2)

    best, most = start, evidence(start)
    for name in ("level", "free", "rows"):
        around = best
        for step in STEPS:
            scales = replace(around, **{name: getattr(around, name) * step})
            found = evidence(scales)
            if found > most:
                best, most = scales, found
    return best


def _factor(matrix: Float64) -> Float64:
    """Cholesky's factor of a covariance, of which rounding may have left a direction without variance."""
    least = 1e-10 * max(float(np.trace(matrix)) / len(matrix), 1e-12)
    return np.asarray(np.linalg.cholesky(matrix + least * np.eye(len(matrix))), np.float64)


def _posterior(objective: Objective, minimum: Minimum) -> list[Float64]:
    """[r, r] for each free row: the factor of its coordinates' covariance, the other rows integrated out; beyond LARGEST
    parameters, the other rows held."""
    f, r = objective.shape
    found = []
    if f * r > LARGEST:
        inverses = [np.linalg.inv(block) for block in objective.blocks(minimum.local.exact)]
    else:
        whole = np.linalg.inv(objective.hessian(minimum.local.exact)).reshape(f, r, f, r) if f else np.zeros((0, 0, 0, 0))
        inverses = [whole[i, :, i, :] for i in range(f)]
    for factor, inverse in zip(objective.factors, inverses, strict=True):
        found.append(_factor(factor @ ((inverse + inverse.T) / 2) @ factor.T))
    return found


def _head(head: Head, rows: Float64, changed: Sequence[int], m: int) -> Head:
    """The head with these rows; those of known models that did not change keep their bits."""
    learned = torch.from_numpy(rows).float()
    weight, bias = learned[:, :-1].clone(), learned[:, -1].clone()
    same = [i for i in range(m) if i not in set(changed)]
    weight[same], bias[same] = head.weight.cpu()[same], head.bias.cpu()[same]
    tail = slice(m, m + head.has_eta)
    return Head(torch.cat([weight, head.weight.cpu()[tail]]), torch.cat([bias, head.bias.cpu()[tail]]), len(rows))


def _merged(
    old: Uncertainty | None,
    matrix: Float64,
    prior: Float64,
    names: tuple[str, ...],
    free: Sequence[int],
    posterior: Sequence[Float64],
) -> Uncertainty | None:
    """The posterior of all rows that have one."""
    found = {} if old is None else dict(zip(old.models, old.factors.double().cpu().numpy(), strict=True))
    found |= {names[i]: factor for i, factor in zip(free, posterior, strict=True)}
    if not found:
        return None
    kept = tuple(name for name in names if name in found)
    factors = np.stack([_grown(found[name], prior) for name in kept])
    return Uncertainty(torch.from_numpy(matrix).float(), torch.from_numpy(factors).float(), kept, names)

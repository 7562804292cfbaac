"""New models and new votes for a head whose backbone stays as it is: the posterior of its rows, at its maximum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np
import numpy.typing as npt

from p2l_engine.backbone.head import Head
from p2l_engine.backbone.uncertainty import Uncertainty
from p2l_engine.feedback import FeedbackModel
from p2l_engine.learning.objective import Minimum, Objective, minimise
from p2l_engine.learning.prior import RANK, Scales, of_rows
from p2l_engine.learning.rows import KNOWN_VOTES, HeadRows, NewModel, cholesky
from p2l_engine.votes import Votes

Float64 = npt.NDArray[np.float64]

STEPS = (0.25, 0.5, 2.0, 4.0)  # factors of the prior's scales that are compared
LARGEST = 3072  # free parameters up to which the posterior's covariance is exact: inverting 8192 takes half a minute


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

    Raises ValueError as ``HeadRows.of`` and ``HeadRows.check`` do, and for votes that the feedback model does not know;
    ArithmeticError where the maximum is not reached.
    """
    reference = hidden if reference is None else reference
    rows = HeadRows.of(head, models, new, reference, uncertainty, known_votes, rank)
    rows.check(votes, hidden, feedback)
    m, names = rows.known, rows.names
    column = np.array([names.index(name) for name in votes.models] + [-1], np.int64)
    votes = replace(votes, models=names, a=column[votes.a], b=column[votes.b])
    base, eta = rows.coefficients(hidden)
    x = rows.basis.features(hidden)
    touched = np.zeros(len(names), bool)
    used = votes.weight > 0
    touched[votes.a[used]] = True
    touched[votes.b[used & (votes.b >= 0)]] = True
    if scales is None:
        scales = of_rows(rows.basis)
        if new and touched[m:].any():
            scales = _by_evidence(feedback, votes, eta, base, x, rows, scales)
    factors = rows.new_factors(scales)
    factors |= {i: rows.known_factor(i, scales) for i in np.flatnonzero(touched[:m]).tolist()}
    objective = Objective(feedback, votes, eta, base, x, factors)
    minimum = minimise(objective)
    moved = rows.means.copy()
    for f, i in enumerate(objective.free):
        moved[i] += rows.basis.matrix @ (objective.factors[f] @ minimum.u[f])
    return Adapted(
        rows.head(head, moved, objective.free),
        names,
        rows.merged(scales, objective.free, posterior(objective, minimum)),
        names[m:],
        tuple(names[i] for i in objective.free if i < m),
        scales if new else None,
        minimum,
    )


def _by_evidence(
    feedback: FeedbackModel,
    votes: Votes,
    eta: Float64 | None,
    base: Float64,
    x: Float64,
    rows: HeadRows,
    start: Scales,
) -> Scales:
    """The scales of most evidence, one after the other. start: those before any vote; their logarithms are known to 1 / sqrt(2
    (M - 1)) from M rows: few votes cannot tell a wide prior from a narrow one, and all won is best explained by the widest."""
    sure = 1 / math.sqrt(2 * max(rows.known - 1, 1))

    def evidence(scales: Scales) -> float:
        objective = Objective(feedback, votes, eta, base, x, rows.new_factors(scales))
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


def posterior(objective: Objective, minimum: Minimum, largest: int = LARGEST) -> list[Float64]:
    """[r, r] for each free row: the factor of its coordinates' covariance, the other rows integrated out; beyond ``largest``
    parameters, the other rows held."""
    f, r = objective.shape
    found = []
    if f * r > largest:
        inverses = [np.linalg.inv(block) for block in objective.blocks(minimum.local.exact)]
    else:
        whole = np.linalg.inv(objective.hessian(minimum.local.exact)).reshape(f, r, f, r) if f else np.zeros((0, 0, 0, 0))
        inverses = [whole[i, :, i, :] for i in range(f)]
    for factor, inverse in zip(objective.factors, inverses, strict=True):
        found.append(cholesky(factor @ ((inverse + inverse.T) / 2) @ factor.T))
    return found

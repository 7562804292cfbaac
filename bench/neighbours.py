"""A residual of neighbours on top of a model that joined: a Gaussian process on the prompts of its votes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.linalg import block_diag
from scipy.spatial.distance import cdist

from p2l_engine.backbone.head import Head
from p2l_engine.feedback import FeedbackModel
from p2l_engine.learning.adapt import Adapted
from p2l_engine.learning.objective import Objective, minimise
from p2l_engine.learning.rows import HeadRows, NewModel
from p2l_engine.votes import Votes

Float64 = npt.NDArray[np.float64]

LANDMARKS = 400  # prompts whose kernels span the residual, at most
DEVIATIONS = (0.2, 0.4, 0.8)  # of the residual
LENGTHS = (0.125, 0.5)  # squared, of the residual's kernel, relative to the median squared distance of two prompts


def residual_of(
    head: Head,
    models: Sequence[str],
    feedback: FeedbackModel,
    votes: Votes,
    train: Float64,
    test: Float64,
    known: Float64,
    eta: Float64 | None,
    adapted: Adapted,
) -> Float64:
    """What a Gaussian process on the votes' prompts, beside the linear row and learned together with it, changes of the new
    model's theta on each test prompt, [N]. Its kernel is Gaussian in the distance of standardised hidden states; its deviation
    and length have the most evidence (Laplace's approximation), and where none has more than the row alone, nothing changes.

    head: before ``adapted``. models: the new one last. train [T, D]: hidden states of the votes' prompts; test [N, D]: others.
    known [T, M], eta [T]: as ``adapted`` has them."""
    assert adapted.scales is not None
    rows = HeadRows.of(head, models[:-1], [NewModel(models[-1])], train.astype(np.float32))
    m = rows.known
    base = np.concatenate([known[:, :m], train @ rows.means[m, :-1, None] + rows.means[m, -1]], 1)
    linear, other = (rows.basis.features(of) for of in (train, test))
    factor = rows.new_factors(adapted.scales)[m]
    centre, spread = train.mean(0), train.std(0)
    near, far = ((of - centre) / spread for of in (train, test))
    landmarks = near[np.random.default_rng(0).permutation(np.unique(votes.prompt))[:LANDMARKS]]
    apart = cdist(near[:LANDMARKS], near[:LANDMARKS], "sqeuclidean")
    middle = float(np.median(apart[np.triu_indices(len(apart), 1)]))

    def learned(x: Float64, y: Float64, of: Float64) -> tuple[float, Float64]:
        """The evidence, and theta on the test prompts less its prior mean."""
        objective = Objective(feedback, votes, eta, base, x, {m: of})
        least = minimise(objective, tolerance=1e-4)
        size = np.linalg.slogdet(objective.blocks(least.local.definite))[1].sum() / 2
        return -least.local.value - float(size), y @ (of @ least.u[0])

    most, alone = learned(linear, other, factor)
    best = alone
    for length in LENGTHS:
        inside, x, y = (np.exp(-cdist(of, landmarks, "sqeuclidean") / (2 * length * middle)) for of in (landmarks, near, far))
        value, vector = np.linalg.eigh(inside)
        kept = value > 1e-8 * value[-1]
        half = vector[:, kept] / np.sqrt(value[kept])
        for deviation in DEVIATIONS:
            both = block_diag(factor, deviation * np.eye(int(kept.sum())))
            found, theta = learned(np.concatenate([linear, x @ half], 1), np.concatenate([other, y @ half], 1), both)
            if found > most:
                most, best = found, theta
    return best - alone

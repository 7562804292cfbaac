"""The head of greatest posterior probability over a backbone that stays as it is: found without learning rates and epochs.

Hidden states h [D] after the final norm are standardised over the training prompts, z = (h - mean) / spread. The rows of the
head are independent of each other but for a part that all models share: w_m = c + v_m, where the entries of c and v_m are
normal with the variance deviation^2 / D. So ``deviation`` is, in units of theta, how far a prompt of ordinary length |z|^2 = D
moves a model from its mean, before any vote. The tie parameter's row has the same prior; offsets are nearly free. Where the
head also reads topics, what a topic adds to a model has a variance of its own.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import OptimizeResult, minimize

from p2l_engine.backbone.head import Head
from p2l_engine.backbone.shrinkage import Shrinkage
from p2l_engine.backbone.topics import Topics
from p2l_engine.feedback import FeedbackModel
from p2l_engine.learning.rows import INFORMATION
from p2l_engine.learning.shrinkage import marginal_outputs
from p2l_engine.learning.votes_loss import votes_loss
from p2l_engine.votes import Votes

logger = logging.getLogger(__name__)

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

OFFSET = 10.0  # the prior's standard deviation of offsets, in units of theta
MOST_STEPS = 1000
STEPS_PER_LINE = 10
TOLERANCE = 1e-7  # of the objective, relative: what a step gains at the end


@dataclass(frozen=True, slots=True)
class FittedHead:
    """head: for hidden states as they are, and what is known of topics beside them. deviation: of its prior. losses: the
    validation votes' mean loss by deviation."""

    head: Head
    deviation: float
    losses: dict[float, float]


@dataclass(frozen=True, slots=True, eq=False)
class FittedLayers:
    """What follows the backbone: the head, and topics and shrinkage where they are wanted."""

    best: FittedHead
    topics: Topics | None
    shrinkage: Shrinkage | None


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the head reads of P prompts: hidden states [P, D], and the probabilities [P, T] of topics, None for none."""

    hidden: Float32
    topics: Float32 | None = None

    def together(self) -> Float32:
        """[P, D + T]."""
        return self.hidden if self.topics is None else np.concatenate([self.hidden, self.topics], 1)


@dataclass(frozen=True, slots=True)
class TopicsPrior:
    """Of the last ``count`` columns of z, probabilities of topics. deviation: of what one adds to theta, before any vote."""

    count: int
    deviation: float


NO_TOPICS = TopicsPrior(0, 1.0)


@dataclass(frozen=True, slots=True)
class HeadObjective:
    """The negative log-posterior of a head's standardised parameters, given votes on the prompts z [P, D]."""

    feedback: FeedbackModel
    votes: Votes
    z: Float64
    deviation: float
    topics: TopicsPrior = NO_TOPICS

    @property
    def rows(self) -> int:
        """K + 1: the models' own parts, the tie parameter's where there is one, and the part that the models share."""
        return len(self.votes.models) + self.feedback.has_eta + 1

    @property
    def scale(self) -> Float64:
        """[D + 1]: the prior's deviations of a row's weights and offset."""
        t = self.topics
        d = self.z.shape[1] - t.count
        return np.concatenate([np.full(d, self.deviation / math.sqrt(d)), np.full(t.count, t.deviation), [OFFSET]])

    @property
    def lengths(self) -> Float64:
        """[K + 1, D + 1]: about how far each parameter may move at ordinary curvature, on which the search's speed depends: it
        steps in these units. Exact where entries of z are uncorrelated and all votes know as much."""
        m = len(self.votes.models)
        each = 2 * float(self.votes.weight.sum()) / m * INFORMATION
        bend = each * self.scale**2 * np.append((self.z**2).mean(0), 1.0)
        of_row = np.append(np.full(self.rows - 1, 1.0), m)
        return np.asarray(1 / np.sqrt(1 + of_row[:, None] * bend))

    def head(self, x: Float64) -> Float64:
        """[K, D + 1]: weights and offsets for z, of parameters x [(K + 1) (D + 1)], which are normal with variance 1."""
        u = x.reshape(self.rows, -1)
        of = u[:-1].copy()
        of[: len(self.votes.models)] += u[-1]
        return np.asarray(of * self.scale)

    def __call__(self, x: Float64) -> tuple[float, Float64]:
        """The objective at x, and its gradient."""
        head, m = self.head(x), len(self.votes.models)
        loss, by_output = votes_loss(self.feedback, self.votes, self.z @ head[:, :-1].T + head[:, -1])
        by_head = np.concatenate([by_output.T @ self.z, by_output.sum(0)[:, None]], 1) * self.scale
        gradient = np.concatenate([by_head, by_head[:m].sum(0)[None]])
        return loss + float(x @ x) / 2, gradient.ravel() + x


def fit(
    feedback: FeedbackModel,
    votes: Votes,
    z: Float64,
    deviation: float,
    start: Float64 | None = None,
    topics: TopicsPrior = NO_TOPICS,
) -> tuple[Float64, Float64]:
    """The head [K, D + 1] of greatest posterior probability for z [P, D], and its parameters, for a next ``start``.

    Raises ArithmeticError where the search ends before its tolerance.
    """
    objective = HeadObjective(feedback, votes, z, deviation, topics)
    x = np.zeros(objective.rows * (z.shape[1] + 1)) if start is None else start
    steps = count(1)

    def progress(intermediate_result: OptimizeResult) -> None:
        if (step := next(steps)) % STEPS_PER_LINE == 0:
            logger.info("deviation %g: step %d, objective %.1f", deviation, step, intermediate_result.fun)

    lengths = objective.lengths.ravel()

    def even(y: Float64) -> tuple[float, Float64]:
        value, gradient = objective(y * lengths)
        return value, gradient * lengths

    options = {"maxiter": MOST_STEPS, "maxcor": 20, "ftol": TOLERANCE, "gtol": 0.0}
    found = minimize(even, x / lengths, jac=True, method="L-BFGS-B", callback=progress, options=options)
    # Where no step gains anything any more, as where it starts at the optimum, rounding may end the search: its steps are of
    # about unit curvature, so that half the gradient's square is what was left to gain.
    if not found.success and found.jac @ found.jac / 2 > TOLERANCE * max(1.0, abs(found.fun)):
        raise ArithmeticError(f"the head's optimum was not reached in {found.nit} steps: {found.message}")
    logger.info("deviation %g: the optimum in %d steps, %s", deviation, found.nit, found.message)
    return objective.head(found.x * lengths), found.x * lengths


def at_marginal(feedback: FeedbackModel, votes: Votes, width: int) -> Float64:
    """Parameters of the head for z [P, width] that has one leaderboard, the likeliest, for all prompts: near the optimum, as
    prompts move models less than models differ."""
    outputs = marginal_outputs(feedback, votes)
    u = np.zeros((len(outputs) + 1, width + 1))
    u[:-1, -1] = outputs / OFFSET
    return u.ravel()


def best(
    feedback: FeedbackModel,
    training: Votes,
    inputs: Inputs,
    chosen_on: tuple[Votes, Inputs] | None,
    deviations: Sequence[float],
    leaderboards: float = 1.0,
) -> FittedHead:
    """The head whose prior has the one of these deviations with which the validation votes ``chosen_on`` are likeliest.

    inputs: of the training prompts; with the validation votes come those of their prompts, None where there is one deviation.
    leaderboards: the prior's deviation of what a topic adds to theta. Raises as ``fit``."""
    hidden = inputs.hidden
    mean, spread = hidden.mean(0, dtype=np.float64), np.maximum(hidden.std(0, dtype=np.float64), 1e-9)
    # Turned so that its entries are uncorrelated, as the search wants them; the prior is the same in every direction.
    z = (hidden - mean) / spread
    turn = np.linalg.eigh(z.T @ z)[1]
    d, prior = len(turn), NO_TOPICS if inputs.topics is None else TopicsPrior(inputs.topics.shape[1], leaderboards)

    def read(of: Inputs) -> Float64:
        turned = (of.hidden - mean) / spread @ turn
        return turned if of.topics is None else np.concatenate([turned, of.topics], 1)

    z, losses, heads = read(inputs), {}, {}
    start = at_marginal(feedback, training, z.shape[1])
    for deviation in sorted(deviations, reverse=True):
        heads[deviation], start = fit(feedback, training, z, deviation, start, prior)
        if chosen_on is not None:
            votes, unseen = chosen_on
            outputs = read(unseen) @ heads[deviation][:, :-1].T + heads[deviation][:, -1]
            losses[deviation] = votes_loss(feedback, votes, outputs)[0] / float(votes.weight.sum())
            logger.info("deviation %g: validation log-loss %.4f", deviation, losses[deviation])
    chosen = min(losses, key=losses.__getitem__) if losses else deviations[0]
    of_states, of_topics, offset = np.split(heads[chosen], [d, z.shape[1]], axis=1)
    of_states = of_states @ turn.T / spread
    weight = torch.from_numpy(np.concatenate([of_states, of_topics], 1)).float()
    bias = torch.from_numpy(offset[:, 0] - of_states @ mean).float()
    return FittedHead(Head(weight, bias, len(training.models)), chosen, losses)

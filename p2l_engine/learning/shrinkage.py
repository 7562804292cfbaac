"""How much of a prompt's own coefficients to keep: distances to the training prompts, and the share that votes ask for."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from p2l_engine.backbone.head import Head
from p2l_engine.backbone.shrinkage import FILE, Shrinkage
from p2l_engine.checkpoint import Checkpoint
from p2l_engine.checkpoint.rewrite import rewrite
from p2l_engine.feedback import FeedbackModel
from p2l_engine.learning import likelihood
from p2l_engine.votes import Votes, conversations, folds
from p2l_engine.votes.marginal import marginal_fit, marginal_values

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

RANK = 48  # directions in which training prompts vary most
LEAST_PROMPTS = 100  # of training, and of votes
PARTS = 5
QUANTILES = (0.9, 0.95, 0.98, 0.99)  # of training prompts' distances: candidates of the radius, so that most keep all
POWERS = (1.0, 2.0, 4.0, 8.0)
LEAST_SPREAD = 1e-3  # of a dimension or direction, relative to the widest: divisors stay away from 0


@dataclass(frozen=True, slots=True)
class ShrinkageReport:
    """What ``fit`` found. radius, power: of the shrinkage, None where none is better by a standard error. kept: the mean share
    that is kept on the votes' prompts. before, after: the log-loss of a vote that neither the shrinkage nor its choice has
    seen; gain: by how much it fell, and its standard error over conversations. by_part: of each part that was left out, its
    prompts, mean share and gain with its standard error."""

    votes: int
    prompts: int
    radius: float | None
    power: float | None
    kept: float
    before: float
    after: float
    gain: float
    gain_error: float
    by_part: dict[str, tuple[int, float, float, float]]


def marginal_outputs(feedback: FeedbackModel, votes: Votes) -> Float64:
    """[K]: the head's outputs that are one leaderboard for all prompts, of maximum likelihood on these votes."""
    if feedback.of_values:
        return marginal_values(feedback, votes)
    found = marginal_fit(feedback, votes)
    return found.theta if found.eta is None else np.append(found.theta, found.eta)


def of_training(head: Head, outputs: Float64, hidden: Float32, seed: int = 0) -> tuple[Shrinkage, Float64]:
    """A shrinkage that keeps all of the training prompts' states ``hidden`` [T, D], and each one's distance [T] from the
    others: the covariance of four parts of five measures the fifth.

    outputs [K]: of the head, at the anchor. Raises ValueError for fewer than LEAST_PROMPTS prompts.
    """
    if len(hidden) < LEAST_PROMPTS:
        raise ValueError(f"training: expected at least {LEAST_PROMPTS} prompts, got {len(hidden)}")
    wide = hidden.astype(np.float64)
    part = np.random.default_rng([seed, 3]).permutation(len(wide)) % PARTS
    away = np.empty(len(wide))
    for k in range(PARTS):
        others = _gaussian(wide[part != k], np.zeros(wide.shape[1]))
        away[part == k] = others.distance(torch.from_numpy(hidden[part == k])).double().numpy()
    found = _gaussian(wide, anchor(head, outputs, wide))
    return replace(found, radius=max(float(away.max()), found.radius)), away


def anchor(head: Head, outputs: Float64, hidden: Float64) -> Float64:
    """[D]: of the hidden states at which the head has these outputs [K], the one that is nearest to the mean of ``hidden``
    [T, D] by their covariance; where there is none (K > D), the one whose outputs are nearest."""
    weight, bias = head.weight.double().cpu().numpy(), head.bias.double().cpu().numpy()
    mean = hidden.mean(0)
    covariance = np.cov(hidden.T) + 1e-6 * max(float(hidden.var(0).mean()), 1e-12) * np.eye(hidden.shape[1])
    across = covariance @ weight.T
    found: Float64 = mean + across @ np.linalg.lstsq(weight @ across, outputs - weight @ mean - bias, rcond=1e-10)[0]
    return found


def _gaussian(hidden: Float64, at: Float64) -> Shrinkage:
    """Probabilistic PCA of standardised states [T, D], whose root mean square distance is 1; radius and power are 1."""
    t, d = hidden.shape
    spread = hidden.std(0)
    spread = np.maximum(spread, LEAST_SPREAD * max(float(spread.max()), 1e-12))
    z = (hidden - hidden.mean(0)) / spread
    variances, directions = np.linalg.eigh(z.T @ z / t)
    variances, directions = np.maximum(variances[::-1], 0), directions[:, ::-1]
    rank = max(1, min(RANK, d - 1, t // 2))
    rest = variances[rank:].mean() if rank < d else variances[-1]
    rest = max(float(rest), LEAST_SPREAD**2 * float(variances[0]), 1e-12)
    deviations = np.sqrt(np.maximum(variances[:rank], rest))
    arrays = (at, hidden.mean(0), spread, np.ascontiguousarray(directions[:, :rank]), deviations)
    least = float(np.float32(math.sqrt(rest)))
    anchored, centre, wide, basis, along = (torch.from_numpy(each).float() for each in arrays)
    return Shrinkage(anchored, centre, wide, basis, along.clamp_min(least), least, 1.0, 1.0)


def fit(
    start: Shrinkage,
    away: Float64,
    head: Head,
    feedback: FeedbackModel,
    votes: Votes,
    hidden: Float32,
    source: npt.NDArray[np.str_] | None = None,
    seed: int = 0,
) -> tuple[Shrinkage | None, ShrinkageReport]:
    """``start`` with the radius and power that make votes likeliest; None where that is better than none by less than a
    standard error over conversations.

    away [T]: distances of training prompts, whose quantiles are the radii that are compared. votes: on the head's models, of
    prompts that were not trained on; hidden [P, D]: of these prompts, before any shrinkage. source [P]: the parts for which
    radius and power are chosen by the others; None: five parts at random. Raises ValueError for fewer than LEAST_PROMPTS
    prompts, and for a single source.
    """
    if len(votes.prompts) < LEAST_PROMPTS:
        raise ValueError(f"votes: expected at least {LEAST_PROMPTS} prompts, got {len(votes.prompts)}")
    part = np.array([str(k + 1) for k in folds(votes, PARTS, seed)]) if source is None else source
    names = sorted(set(part.tolist()))
    if len(names) < 2:
        raise ValueError(f"source: expected two sources at least, got {names[0]!r} alone")
    states = torch.from_numpy(hidden)
    distances = start.distance(states).double().numpy()
    compared = candidates(start, away)
    shares = [np.ones(len(distances))] + [share(one, distances) for one in compared]
    losses = np.stack([losses_of(start, head, feedback, votes, states, kept) for kept in shares])  # [candidates + 1, V]
    weight, conversation = votes.weight, conversations(votes)[votes.prompt]
    of_vote = part[votes.prompt]
    chosen = np.zeros(len(votes), np.int64)
    for name in names:
        chosen[of_vote == name] = _choice(losses, weight * (of_vote != name), conversation)
    held = losses[chosen, np.arange(len(votes))]
    gain, error = mean_and_error(losses[0] - held, weight, conversation)
    by_part = {}
    for name in names:
        own, kept = of_vote == name, shares[int(chosen[of_vote == name][0])] if (of_vote == name).any() else shares[0]
        by_part[name] = (
            int((part == name).sum()), float(kept[part == name].mean()),
            *mean_and_error((losses[0] - held)[own], weight[own], conversation[own]),
        )  # fmt: skip
    best = _choice(losses, weight, conversation)
    found = None if best == 0 else compared[best - 1]
    before, after = (float(weight @ of / weight.sum()) for of in (losses[0], held))
    report = ShrinkageReport(
        len(votes), len(votes.prompts), None if found is None else found.radius, None if found is None else found.power,
        float(shares[best].mean()), before, after, gain, error, by_part,
    )  # fmt: skip
    return found, report


def candidates(start: Shrinkage, away: Float64) -> list[Shrinkage]:
    """``start`` with each radius and power that are compared. away [T]: the training prompts' distances."""
    return [replace(start, radius=max(float(np.quantile(away, q)), 1e-6), power=power) for q in QUANTILES for power in POWERS]


def share(of: Shrinkage, distances: Float64) -> Float64:
    """s [N] at these distances [N]."""
    found: Float64 = np.minimum(1.0, (of.radius / np.maximum(distances, 1e-300)) ** of.power)
    return found


def losses_of(of: Shrinkage, head: Head, feedback: FeedbackModel, votes: Votes, hidden: torch.Tensor, kept: Float64) -> Float64:
    """[V]: the loss of each vote where the share ``kept`` [P] of each prompt's own outputs is kept."""
    weight, bias = head.weight.double().cpu(), head.bias.double().cpu()
    own, at = (torch.nn.functional.linear(x.double(), weight, bias).numpy() for x in (hidden, of.anchor.cpu()[None]))
    out = at + kept[:, None] * (own - at)
    eta = out[:, -1] if head.has_eta else np.zeros(len(out))
    linear = np.stack([*votes.sides(out[:, : head.n_models]), eta[votes.prompt]])
    return likelihood.losses(feedback, linear, votes.outcome)


def mean_and_error(gain: Float64, weight: Float64, conversation: npt.NDArray[np.int64]) -> tuple[float, float]:
    """The weighted mean of gains [V], and its standard error over conversations [V]; 0 and infinite where nothing weighs."""
    total = weight.sum()
    if not total > 0:
        return 0.0, math.inf
    mean = float(weight @ gain / total)
    sums = np.bincount(conversation, weight * (gain - mean))
    count = len(np.unique(conversation))
    return mean, float(np.sqrt((sums**2).sum() * count / max(count - 1, 1)) / total)


def _choice(losses: Float64, weight: Float64, conversation: npt.NDArray[np.int64]) -> int:
    """The candidate of least loss; 0, which keeps all, where that is not better than 0 by a standard error."""
    best = int((losses @ weight).argmin())
    gain, error = mean_and_error(losses[0] - losses[best], weight, conversation)
    return best if gain > error else 0


def write(source: Checkpoint, target: Path, found: Shrinkage, report: ShrinkageReport) -> None:
    """Writes ``source`` with this shrinkage, and what it was fitted to in training_config.json, to the folder ``target``.
    Raises what ``checkpoint.rewrite`` raises."""
    record = {
        "votes": report.votes, "prompts": report.prompts, "radius": report.radius, "power": report.power,
        "held_out_log_loss": {"before": report.before, "after": report.after},
    }  # fmt: skip
    rewrite(source, target, source.head, training={"shrinkage": record}, files={FILE: found.write})

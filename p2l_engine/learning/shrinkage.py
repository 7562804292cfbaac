"""How much of a prompt's own coefficients to keep: distances to the training prompts, and the share that votes ask for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from scipy.cluster.vq import kmeans2
from scipy.linalg import eigh
from scipy.special import expit

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
Int64 = npt.NDArray[np.int64]

LEAST_PROMPTS = 100  # of training, and of votes
LEAST_OF_KIND = 5  # prompts; those of smaller kinds do not count
CLUSTERS, OF_CLUSTER = 64, 20  # where kinds are not known: at most so many, of so many prompts in the mean
PARTS = 5
QUANTILES = (0.7, 0.8, 0.9, 0.95, 0.98)  # of training prompts' distances: candidates of where half is kept
WIDTHS = (0.1, 0.3, 1.0)  # candidates of the width, in units of the distances' upper half
GRID = [(quantile, width) for quantile in QUANTILES for width in WIDTHS]
RANK = 32  # directions, at most, in which kinds are most apart
RIDGE = 0.03  # the share of a sphere in the covariance within kinds


@dataclass(frozen=True, slots=True)
class ShrinkageReport:
    """What ``fit`` found. middle, width: of the shrinkage, None where none is better by a standard error. kept: the mean share
    that is kept on the votes' prompts. before, after: the log-loss of a vote that neither the shrinkage nor its choice has
    seen; gain: by how much it fell, and its standard error over conversations. by_part: of each part that was left out, its
    prompts, mean share and gain with its standard error."""

    votes: int
    prompts: int
    middle: float | None
    width: float | None
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


def of_training(
    head: Head, outputs: Float64, read: Float32, size: int, kinds: Sequence[str] | None = None, seed: int = 0
) -> tuple[Shrinkage, Float64]:
    """A shrinkage that keeps all of what the head reads of the training prompts, ``read`` [T, W], and each one's distance [T]
    from the others: kinds that are learned from four parts of five measure the fifth.

    outputs [K]: of the head, at the anchor. size: D, of the hidden states in ``read``, which are its first columns. kinds [T]:
    of the prompts, such as their tasks; None, or fewer than two kinds of enough prompts: clusters of hidden states. Raises
    ValueError for fewer than LEAST_PROMPTS prompts.
    """
    check_enough(len(read))
    wide = read.astype(np.float64)
    states, none = np.ascontiguousarray(wide[:, :size]), np.zeros(wide.shape[1])
    label = kinds_of(states, kinds, seed)
    part = np.random.default_rng([seed, 3]).permutation(len(wide)) % PARTS
    away = np.empty(len(wide))
    for k in range(PARTS):
        others = _discriminants(states[part != k], label[part != k], none)
        away[part == k] = others.distance(torch.from_numpy(read[part == k])).double().numpy()
    found = _discriminants(states, label, anchor(head, outputs, wide))
    spread = upper_half(away)
    return replace(found, middle=float(away.max()) + 20 * spread, width=spread), away


def check_enough(prompts: int) -> None:
    """Raises ValueError where there are fewer training prompts than LEAST_PROMPTS."""
    if prompts < LEAST_PROMPTS:
        raise ValueError(f"training: expected at least {LEAST_PROMPTS} prompts for a shrinkage, got {prompts}")


def kinds_of(states: Float64, kinds: Sequence[str] | None, seed: int = 0) -> Int64:
    """[T]: the number of each prompt's kind, -1 for kinds of fewer than LEAST_OF_KIND prompts; by k-means on standardised
    ``states`` [T, D] where no two kinds are left."""
    if kinds is not None:
        _, label, count = np.unique(np.asarray(kinds), return_inverse=True, return_counts=True)
        enough = count >= LEAST_OF_KIND
        if enough.sum() > 1:
            return np.asarray(np.where(enough, np.cumsum(enough) - 1, -1)[label], np.int64)
    different, prompt = np.unique((states - states.mean(0)) / spread_of(states), axis=0, return_inverse=True)
    clusters = min(CLUSTERS, len(states) // OF_CLUSTER, len(different))
    _, label = kmeans2(different, clusters, minit="++", seed=np.random.default_rng([seed, 4]))
    return np.asarray(np.unique(label[prompt], return_inverse=True)[1], np.int64)


def upper_half(away: Float64) -> float:
    """How wide the upper half of these distances is: from the median to the 95% quantile."""
    return max(float(np.quantile(away, 0.95) - np.median(away)), 1e-6)


def spread_of(states: Float64) -> Float64:
    """[D]: standard deviations, away from 0 where a dimension does not vary."""
    spread = states.std(0)
    return np.asarray(np.maximum(spread, 1e-3 * max(float(spread.max()), 1e-12)), np.float64)


def anchor(head: Head, outputs: Float64, hidden: Float64) -> Float64:
    """[D]: of the hidden states at which the head has these outputs [K], the one that is nearest to the mean of ``hidden``
    [T, D] by their covariance; where there is none (K > D), the one whose outputs are nearest."""
    weight, bias = head.weight.double().cpu().numpy(), head.bias.double().cpu().numpy()
    mean = hidden.mean(0)
    covariance = np.cov(hidden.T) + 1e-6 * max(float(hidden.var(0).mean()), 1e-12) * np.eye(hidden.shape[1])
    across = covariance @ weight.T
    found: Float64 = mean + across @ np.linalg.lstsq(weight @ across, outputs - weight @ mean - bias, rcond=1e-10)[0]
    return found


def _discriminants(states: Float64, label: Int64, at: Float64) -> Shrinkage:
    """Linear discriminants of states [T, D] of these kinds [T]; where all prompts are of one kind, of one centre."""
    mean, spread = states.mean(0), spread_of(states)
    z, label = ((states - mean) / spread)[label >= 0], np.unique(label[label >= 0], return_inverse=True)[1]
    count = np.bincount(label)
    member = np.zeros((len(count), len(z)))
    member[label, np.arange(len(z))] = 1 / count[label]
    centres = member @ z
    apart = z - centres[label]
    within = apart.T @ apart / len(z)
    within = (1 - RIDGE) * within + RIDGE * max(float(np.trace(within)) / len(within), 1e-9) * np.eye(len(within))
    among = (centres.T * count) @ centres / len(z)
    rank = max(1, min(RANK, len(count) - 1, len(within)))
    between, directions = eigh(among, within, subset_by_index=[len(within) - rank, len(within) - 1])
    directions /= spread[:, None]
    arrays = (at, directions, mean @ directions, np.maximum(between, 0), centres @ (directions * spread[:, None]))
    anchored, along, offset, variances, of_kinds = (torch.from_numpy(np.ascontiguousarray(each)).float() for each in arrays)
    return Shrinkage(anchored, along, offset, variances, of_kinds, 0.0, 1.0)


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
    """``start`` with the middle and width that make votes likeliest; None where that is better than none by less than a
    standard error over conversations.

    away [T]: distances of training prompts, of whose quantiles the middle is one. votes: on the head's models, of prompts that
    were not trained on; hidden [P, W]: what the head reads of these prompts, before any shrinkage. source [P]: the parts for
    which middle and width are chosen by the others; None: five parts at random. Raises ValueError for fewer than LEAST_PROMPTS
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
        len(votes), len(votes.prompts), None if found is None else found.middle, None if found is None else found.width,
        float(shares[best].mean()), before, after, gain, error, by_part,
    )  # fmt: skip
    return found, report


def candidates(start: Shrinkage, away: Float64) -> list[Shrinkage]:
    """``start`` with each quantile and width of GRID. away [T]: the training prompts' distances."""
    return [at_quantile(start, away, quantile, width) for quantile, width in GRID]


def at_quantile(start: Shrinkage, away: Float64, quantile: float, width: float) -> Shrinkage:
    """``start`` that keeps half at this quantile of the training prompts' distances ``away`` [T]. width: in units of
    ``upper_half``."""
    return replace(start, middle=float(np.quantile(away, quantile)), width=width * upper_half(away))


def share(of: Shrinkage, distances: Float64) -> Float64:
    """s [N] at these distances [N]."""
    return np.asarray(expit((of.middle - distances) / of.width))


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
        "votes": report.votes, "prompts": report.prompts, "middle": report.middle, "width": report.width,
        "held_out_log_loss": {"before": report.before, "after": report.after},
    }  # fmt: skip
    rewrite(source, target, source.head, training={"shrinkage": record}, files={FILE: found.write})

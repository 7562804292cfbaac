"""Whether traffic has changed between two periods, which models gained by it, and whether the checkpoint is still calibrated.

Sessions are what is exchanged: prompts of one session resemble each other, so that only whole sessions are independent. A
session in one period may come in the other one; of a session in both, the two parts change places. The permutation tests are
exact at every size where sessions of the two periods are alike (Hemerik and Goeman, 2018), parts of one session as well: in
distribution as large. Where the later period has more prompts, so that its parts are larger, they reject less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.spatial.distance import cdist
from scipy.special import expit
from scipy.stats import f as f_distribution

from p2l_engine.bootstrap import LEVEL, effective, student
from p2l_engine.coefficients import Coefficients
from p2l_engine.evaluation.metrics import Prediction
from p2l_engine.learning.candidates import Candidate, Design
from p2l_engine.votes import Votes, conversations

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

PERMUTATIONS = 1999
LEAST_SESSIONS = 5  # in each period
MOST_PROMPTS = 3000  # whose distances are compared, at random
AT_ONCE = 100  # permutations


@dataclass(frozen=True, slots=True)
class Gain:
    """By how much a model's mean win rate against all others (for values: its mean theta) rose, with the ends of its interval
    over sessions, and the p-value that holds for all models together."""

    model: str
    gain: float
    low: float
    high: float
    p: float


@dataclass(frozen=True, slots=True)
class Change:
    """From one period to a later one. distance: the energy distance of the coefficients, 0 where their distributions are equal;
    p: of the hypothesis that they are; gains: of all models, the greatest first."""

    sessions: tuple[int, int]
    distance: float
    p: float
    gains: tuple[Gain, ...]


@dataclass(frozen=True, slots=True)
class StillCalibrated:
    """Of a period's votes: their log-loss, what it would be if the checkpoint's probabilities were true (None for values), and
    the p-value of the hypothesis that no temperature improves it."""

    votes: int
    conversations: int
    log_loss: float
    expected: float | None
    p: float


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """The prompts of two periods by session, and by its part in either period.

    of_prompt [N]: each prompt's part, from 0; late, session [G]: of the parts; counts: how many are in each period.
    """

    of_prompt: Int64
    late: npt.NDArray[np.bool_]
    session: Int64
    counts: tuple[int, int]

    @classmethod
    def of(cls, before: Int64, after: Int64) -> Parts:
        """From the sessions [N] of the prompts of each period."""
        _, session = np.unique(np.concatenate([before, after]), return_inverse=True)
        is_late = np.repeat([0, 1], [len(before), len(after)])
        found, of_prompt = np.unique(2 * session + is_late, return_inverse=True)
        late = found % 2 == 1
        return cls(of_prompt.astype(np.int64), late, (found // 2).astype(np.int64), (int((~late).sum()), int(late.sum())))

    def exchanged(self, times: int, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
        """[1 + B, G]: which parts are late: as they came, and with sessions exchanged at random."""
        both = np.flatnonzero(np.bincount(self.session)[self.session] == 2)  # a session's two parts are next to each other
        alone = np.setdiff1d(np.arange(len(self.late)), both)
        labels = np.tile(self.late, (1 + times, 1))
        for row in labels[1:]:
            row[alone] = rng.permutation(row[alone])
            row[both] ^= np.repeat(rng.random(len(both) // 2) < 0.5, 2)
        return labels

    def freedom(self) -> float:
        """The degrees of freedom of ``errors``: the effective sessions of the period with fewer of them, less one. A few long
        sessions say as little about their own spread as about the mean."""
        sizes = np.bincount(self.of_prompt)
        return max(min(effective(sizes[self.late == late]) for late in (False, True)) - 1, 0.5)

    def errors(self, shown: Float64) -> Float64:
        """[M]: the standard errors of late means less early ones, of values [N, M], over sessions."""
        late = self.late[self.of_prompt]
        away = np.empty_like(shown)
        for rows, sign in ((late, 1.0), (~late, -1.0)):
            away[rows] = sign * (shown[rows] - shown[rows].mean(0)) / rows.sum()
        sums = np.stack([np.bincount(self.session[self.of_prompt], column) for column in away.T], 1)
        n = min(self.counts)
        found: Float64 = np.sqrt((sums**2).sum(0) * n / (n - 1))
        return found


def change(
    before: Coefficients, after: Coefficients, sessions: tuple[Int64, Int64], permutations: int = PERMUTATIONS, seed: int = 0
) -> Change:
    """What has changed between the prompts of two periods. sessions [N]: of each period's prompts; a session may be in both.
    Raises ValueError where a period has fewer than five sessions."""
    parts = Parts.of(*sessions)
    if min(parts.counts) < LEAST_SESSIONS:
        early, late = parts.counts
        raise ValueError(f"sessions: expected at least {LEAST_SESSIONS} in each period, got {early} and {late}")
    rng = np.random.default_rng(seed)
    labels = parts.exchanged(permutations, rng)
    theta = np.concatenate([before.theta, after.theta]).astype(np.float64)
    level = theta if before.feedback.of_values or before.feedback.grounded else theta - theta.mean(1, keepdims=True)
    some = np.arange(len(theta))
    if len(some) > MOST_PROMPTS:
        some = np.sort(rng.choice(some, MOST_PROMPTS, replace=False))
    distance, p_change = _energy(level[some], parts.of_prompt[some], labels)
    shown = theta if before.feedback.of_values else win_rates(theta)
    moved, p_gain = _gains(shown, parts.of_prompt, labels)
    half = float(student(LEVEL, parts.freedom())) * parts.errors(shown)
    found = [
        Gain(name, float(moved[m]), float(moved[m] - half[m]), float(moved[m] + half[m]), float(p_gain[m]))
        for m, name in enumerate(before.models)
    ]
    return Change(parts.counts, distance, p_change, tuple(sorted(found, key=lambda gain: -gain.gain)))


def holm(p: Sequence[float]) -> list[float]:
    """p-values that hold for all of these hypotheses together (Holm, 1979), in their order."""
    order, n = np.argsort(p, kind="stable"), len(p)
    found = np.empty(n)
    found[order] = np.maximum.accumulate(np.asarray(p, np.float64)[order] * (n - np.arange(n))).clip(max=1)
    return [float(x) for x in found]


def still_calibrated(c: Coefficients, votes: Votes) -> StillCalibrated:
    """Whether the votes' log-loss has its least value at the checkpoint's own coefficients, among all temperatures (scale;
    shift of values; scale and offset of eta): the score test, with the scores' spread over conversations (Boos, 1992), by F.

    c: of the votes' prompts, in their order. Raises ValueError where there are too few conversations for it.
    """
    design = Design(Candidate("temperature"), c, votes)
    group = conversations(votes)[votes.prompt]
    n, k = len(np.unique(group)), len(design.start)
    if n <= k + LEAST_SESSIONS:
        raise ValueError(f"votes: expected more than {k + LEAST_SESSIONS} conversations in each period, got {n}")
    scores = design.objective.scores(design.start).toarray()
    sums = np.stack([np.bincount(group, column, int(group.max()) + 1) for column in scores.T], 1)[np.unique(group)]
    spread = np.cov(sums.T, ddof=1).reshape(k, k)
    mean = sums.mean(0)
    statistic = n * mean @ np.linalg.pinv(spread, hermitian=True) @ mean
    p = float(f_distribution.sf(statistic * (n - k) / (k * (n - 1)), k, n - k))
    loss = float(np.average(design.objective.losses(design.start), weights=votes.weight))
    return StillCalibrated(len(votes), n, loss, _expected(c, votes), p)


def win_rates(theta: Float64) -> Float64:
    """[N, M]: each model's mean win rate against the others, of decided votes."""
    n, m = theta.shape
    found = np.empty((n, m))
    for i in range(m):
        found[:, i] = (expit(theta[:, i : i + 1] - theta).sum(1) - 0.5) / max(m - 1, 1)
    return found


def _expected(c: Coefficients, votes: Votes) -> float | None:
    """The mean entropy of the votes' outcomes, ties divided as the feedback model counts them."""
    if c.feedback.of_values:
        return None
    p = Prediction.of(c.feedback, c.theta, c.eta, votes).probabilities[:, : len(c.feedback.outcomes)]
    entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(1)
    return float(np.average(entropy, weights=votes.weight))


def _energy(x: Float64, part: Int64, labels: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """The energy distance (Szekely and Rizzo, 2013) of prompts x [N, D] of these parts [N] under the first labels [1 + B, G],
    and its p-value under the others."""
    present, number = np.unique(part, return_inverse=True)
    g = len(present)
    by_row = np.zeros((g, len(x)))
    np.add.at(by_row, number, cdist(x, x))
    sums = np.zeros((g, g))
    np.add.at(sums.T, number, by_row.T)
    sizes, z = np.bincount(number).astype(np.float64), labels[:, present].astype(np.float64)
    late, every = z @ sums, sums.sum(1)
    n_late, total = z @ sizes, sizes.sum()
    both = (late * z).sum(1)  # distances among late prompts
    cross = z @ every - both
    among = every.sum() - 2 * cross - both
    n_early = total - n_late
    with np.errstate(invalid="ignore", divide="ignore"):
        found = 2 * cross / (n_late * n_early) - both / n_late**2 - among / n_early**2
    found = np.where((n_late > 0) & (n_early > 0), found, 0.0)
    return max(float(found[0]), 0.0), _p(found)


def _gains(shown: Float64, part: Int64, labels: npt.NDArray[np.bool_]) -> tuple[Float64, Float64]:
    """[M]: late mean minus early mean, and p-values by the greatest standardised one (Westfall and Young, 1993)."""
    g = labels.shape[1]
    sums = np.stack([np.bincount(part, column, g) for column in shown.T], 1)
    sizes = np.bincount(part, minlength=g).astype(np.float64)
    both = np.column_stack([sums, sizes])
    # A few at a time: as numbers, the labels of 50,000 sessions would be 800 MB.
    late = np.concatenate([labels[i : i + AT_ONCE].astype(np.float64) @ both for i in range(0, len(labels), AT_ONCE)])
    late, n_late = late[:, :-1], late[:, -1:]
    moved = late / n_late - (sums.sum(0) - late) / (sizes.sum() - n_late)
    spread = moved.std(0)
    size = np.abs(moved) / np.where(spread > 0, spread, np.inf)
    greatest = size.max(1)
    p = np.array([_p(np.append(own, greatest[1:])) for own in size[0]])
    return moved[0], p


def _p(statistics: Float64) -> float:
    """The share of [1 + B] statistics, the observed one first, that are no smaller than it, but for rounding."""
    near = statistics[0] - 1e-12 * max(1.0, abs(float(statistics[0])))
    return float((statistics >= near).mean())

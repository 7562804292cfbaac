"""Figures of predicted outcome probabilities on votes, and of predicted values, with bootstrap intervals over prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from p2l_engine.evaluation.calibration import BINS, bin_of, calibration_error, hits
from p2l_engine.evaluation.resampled import ANY, Range, Resampled
from p2l_engine.feedback import FeedbackModel, Outcome
from p2l_engine.reports import Calibration, Figure
from p2l_engine.votes import Votes

Float64 = npt.NDArray[np.float64]

RANGES: dict[str, Range] = {
    "log_loss": (0.0, np.inf),
    "cross_entropy": (0.0, np.inf),
    "brier": (0.0, 2.0),
    "tie_bias": (-1.0, 1.0),
    "bad_bias": (-1.0, 1.0),
}
RANGES_OF_VALUES: dict[str, Range] = {
    "squared_error": (0.0, np.inf),
    "absolute_error": (0.0, np.inf),
    "explained": (-np.inf, 1.0),
    "rank_correlation": (-1.0, 1.0),
}


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a predictor gives for V votes. probabilities [V, 4] of A, B, tie, both bad; or [V, 1], the predicted values,
    of a model of values. loss [V]: the negative log-likelihood of the outcome; known: how many of the four outcomes the
    predictor distinguishes. The others have probability 0, and count as the last known one."""

    probabilities: Float64
    loss: Float64
    known: int

    @classmethod
    def of(cls, feedback: FeedbackModel, theta: npt.NDArray[Any], eta: npt.NDArray[Any] | None, votes: Votes) -> Prediction:
        """From coefficients theta [P, M], eta [P] of the votes' prompts, or theta [1, M], eta [1] for all of them."""
        one, other = votes.sides(theta)
        if feedback.of_values:
            return cls.of_linear(feedback, one - other, votes)
        a, b = torch.from_numpy(one), torch.from_numpy(other)
        tie = None
        if eta is not None:
            tie = torch.from_numpy(np.broadcast_to(eta, len(votes.prompts))[votes.prompt].astype(np.float64))
        loss = -feedback.log_likelihood(a, b, tie, torch.from_numpy(votes.outcome))
        return cls(feedback.probabilities(a, b, tie).numpy(), loss.numpy(), len(feedback.outcomes))

    @classmethod
    def of_linear(cls, feedback: FeedbackModel, linear: Float64, votes: Votes) -> Prediction:
        """Of a model of values, from its linear predictor [V]."""
        x, value = torch.from_numpy(linear), torch.from_numpy(votes.outcome.astype(np.float64))
        loss = -feedback.log_likelihood(x, torch.zeros_like(x), None, value)
        return cls((np.exp(linear) if feedback.counts else linear)[:, None], loss.numpy(), 1)

    @classmethod
    def constant(cls, known: int, n_votes: int) -> Prediction:
        """Every outcome equally likely."""
        p = np.zeros((n_votes, len(Outcome)))
        p[:, :known] = 1 / known
        return cls(p, np.full(n_votes, np.log(known)), known)

    def of_votes(self, chosen: npt.NDArray[np.bool_]) -> Prediction:
        """Only these votes [V]."""
        return Prediction(self.probabilities[chosen], self.loss[chosen], self.known)


def figures(prediction: Prediction, votes: Votes, bootstrap: int = 200, seed: int = 0) -> dict[str, Figure]:
    """Every figure that this predictor and these votes allow, by weighted votes.

    log_loss: mean negative log-likelihood of a vote. cross_entropy, squared_error, accuracy_2: of decided votes only, of the
    probability of A given A or B. accuracy_3: A, B, or a tie of either kind. accuracy_4: all four. brier: squared distance of
    all probabilities from the outcome. ece: expected calibration error of the likeliest outcome's probability.
    tie_bias, bad_bias: predicted share minus observed share. tie_auc, bad_auc: area under the ROC curve.
    """
    p, y, weight = prediction.probabilities, votes.outcome.astype(np.int64), votes.weight
    came = np.minimum(y, prediction.known - 1)
    decided = (y <= Outcome.B).astype(np.float64)
    either = np.maximum(p[:, 0] + p[:, 1], np.finfo(np.float64).tiny)
    of_a = np.clip(p[:, 0] / either, 1e-300, 1.0)
    of_b = np.clip(p[:, 1] / either, 1e-300, 1.0)
    won = (y == Outcome.A).astype(np.float64)
    three = np.stack([p[:, 0], p[:, 1], p[:, 2] + p[:, 3]], 1)
    every = np.ones(len(y))
    # Most figures are ratios of two sums over votes: numerator and denominator of each.
    ratios: dict[str, tuple[Float64, Float64]] = {
        "log_loss": (prediction.loss, every),
        "cross_entropy": (-np.where(won > 0, np.log(of_a), np.log(of_b)) * decided, decided),
        "squared_error": ((of_a - won) ** 2 * decided, decided),
        "accuracy_2": (hits(p[:, :2], np.minimum(y, 1)) * decided, decided),
    }
    if prediction.known > 2:
        ratios["accuracy_3"] = (hits(three, np.minimum(y, 2)), every)
        ratios["tie_bias"] = (three[:, 2] - (y >= Outcome.TIE), every)
    if prediction.known > 3:
        ratios["accuracy_4"] = (hits(p, y), every)
        ratios["tie_bias"] = (p[:, 2] - (y == Outcome.TIE), every)
        ratios["bad_bias"] = (p[:, 3] - (y == Outcome.BOTH_BAD), every)
    if prediction.known > 2 or bool(decided.all()):
        ratios["brier"] = (((p[:, : prediction.known] - np.eye(prediction.known)[came]) ** 2).sum(1), every)
    resampled = Resampled.of(votes, bootstrap, seed)
    found = {
        name: resampled.share(top * weight, bottom * weight)
        if name.startswith("accuracy")
        else resampled.ratio(top * weight, bottom * weight, RANGES.get(name, (0.0, 1.0)))
        for name, (top, bottom) in ratios.items()
    }
    if prediction.known > 2 or bool(decided.all()):
        found["ece"] = calibration_error(p.max(1), hits(p, came), weight, resampled)
    for name, outcome in (("tie_auc", Outcome.TIE), ("bad_auc", Outcome.BOTH_BAD)):
        if prediction.known > outcome:
            found[name] = resampled.auc(p[:, outcome], came == outcome)
    return {name: figure for name, figure in found.items() if figure is not None}


def of_values(prediction: Prediction, votes: Votes, bootstrap: int = 200, seed: int = 0) -> dict[str, Figure]:
    """Figures of predicted values, for ols and poisson, by weighted values.

    log_loss: mean negative log-likelihood of a value. squared_error, absolute_error: means. explained: 1 minus the
    squared error divided by the values' variance, at most 1. bias: mean predicted value minus mean value. rank_correlation:
    Spearman's, of values whose weight is above 0.
    """
    predicted, value = prediction.probabilities[:, 0], votes.outcome.astype(np.float64)
    resampled = Resampled.of(votes, bootstrap, seed)
    error, centred = resampled.mean((predicted - value) ** 2), value - resampled.mean(value)[0]
    variance = resampled.mean(centred**2) - resampled.mean(centred) ** 2
    of = {
        "log_loss": resampled.mean(prediction.loss),
        "squared_error": error,
        "absolute_error": resampled.mean(np.abs(predicted - value)),
        "explained": 1 - error / np.where(variance > 0, variance, np.nan),
        "bias": resampled.mean(predicted - value),
        "rank_correlation": resampled.rank_correlation(predicted, value),
    }
    found = {name: resampled.figure(values, RANGES_OF_VALUES.get(name, ANY)) for name, values in of.items()}
    return {name: figure for name, figure in found.items() if figure is not None}


def calibration(prediction: Prediction, votes: Votes, bins: int = BINS, bootstrap: int = 200, seed: int = 0) -> Calibration:
    """The calibration curve of the likeliest outcome's probability."""
    p, came, of_votes = prediction.probabilities, votes.outcome.astype(np.int64), votes.weight
    if prediction.known == 2:  # models without ties predict decided votes only
        of_votes = np.where(came <= Outcome.B, of_votes, 0.0)
    came = np.minimum(came, prediction.known - 1)
    top, hit = p.max(1), hits(p, came)
    place = bin_of(top, bins)
    weight, confidence, right = (np.bincount(place, x, bins) for x in (of_votes, of_votes * top, of_votes * hit))
    some = weight > 0
    resampled = Resampled.of(votes, bootstrap, seed)
    in_bin = [of_votes * (place == k) for k in np.flatnonzero(some)]
    ends = [resampled.share(hit * of_bin, of_bin) for of_bin in in_bin]
    return Calibration(
        tuple((confidence[some] / weight[some]).tolist()),
        tuple((right[some] / weight[some]).tolist()),
        tuple(weight[some].tolist()),
        tuple(of.low if of else 0.0 for of in ends),
        tuple(of.high if of else 1.0 for of in ends),
    )


def difference(one: Prediction, other: Prediction, votes: Votes, bootstrap: int = 200, seed: int = 0) -> Figure | None:
    """The mean, over votes, of ``other``'s loss minus ``one``'s: positive where ``one`` predicts better."""
    return Resampled.of(votes, bootstrap, seed).ratio((other.loss - one.loss) * votes.weight, votes.weight)

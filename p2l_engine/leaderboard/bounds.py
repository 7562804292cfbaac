"""Which coefficients counted outcomes bound from above and from below; where there is no bound, only a ridge holds them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from p2l_engine.feedback import FeedbackModel
from p2l_engine.leaderboard.connected import components, reachable
from p2l_engine.leaderboard.outcomes import pairs

Bools = npt.NDArray[np.bool_]


class Bounds(NamedTuple):
    """above, below [M]: whether a model's outcomes bound its coefficient from there. anchor [M]: the models to which the others
    are compared: those bounded on both sides, the largest group of them where only differences count."""

    above: Bools
    below: Bools
    anchor: Bools


def bounds(feedback: FeedbackModel, counts: npt.NDArray[np.float64], n_models: int) -> Bounds:
    """Of outcomes [K, M (M - 1) / 2].

    Only a loss, a tie, or an answer called bad keeps a coefficient from growing, and only a win or a tie from falling. Where
    only differences count, a loss bounds a model as far as its winner is bounded; a group in which every model has a chain of
    losses to every other is bounded as a whole (Ford, 1957). Grounded models are compared to the fictitious bad model too.
    """
    a, b = pairs(n_models)
    n, ground = n_models + 1, n_models
    beats = np.zeros((n, n), dtype=bool)  # [x, y]: x holds y down
    tied = counts[2] > 0 if len(counts) > 2 else np.zeros(len(a), bool)
    beats[a, b], beats[b, a] = (counts[0] > 0) | tied, (counts[1] > 0) | tied
    if not feedback.grounded:
        group = components(beats[:-1, :-1], "strong")
        anchor = group == np.bincount(group).argmax()
        start = np.append(anchor, False)
        return Bounds(reachable(beats, start)[:-1], reachable(beats.T, start)[:-1], anchor)
    known_bad = len(counts) > 3
    low = counts[3] > 0 if known_bad else tied  # what is bad for both; rk-reparam's ties are that too
    high = tied if known_bad else np.zeros(len(a), bool)
    holds_up = np.zeros(n_models, dtype=bool)
    for of, won in ((a, counts[0] > 0), (b, counts[1] > 0)):
        beats[ground, of[low]] = True
        holds_up[of[won | high]] = True
    start = np.arange(n) == ground
    above = reachable(beats, start)[:-1]
    return Bounds(above, holds_up, above & holds_up)

"""Routers by the true scores of what they choose, and their curves of cost and quality: the rows of ``bench.routers``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bench.simple_routers import Float64, Scored

LEAST = 30  # prompts of a source, or of a task that was left out, for a row of its own


@dataclass(frozen=True, slots=True)
class RouterRow:
    """One router on one source, or on a task that was left out: mean true score, gain over the best single model in points, and
    its standard error. A prompt counts once for each source, and judge, that has scores on it. behind: the points by which the
    router that is compared with all others is above this one on the same prompts, and their standard error; NaN where there is
    none. share: of the training prompts, that were learned from; learned_from: how many these are, 0 where it is not said."""

    router: str
    source: str
    prompts: int
    score: float
    points: float
    error: float
    behind: float
    behind_error: float
    share: float = 1.0
    learned_from: int = 0


@dataclass(frozen=True, slots=True)
class LossRow:
    """The log-loss of a vote on prompts that were not learned from, and the mean share of their own coefficients that is kept.
    share, learned_from: as of a RouterRow."""

    router: str
    source: str
    prompts: int
    kept: float
    log_loss: float
    share: float = 1.0
    learned_from: int = 0


@dataclass(frozen=True, slots=True)
class CurveRow:
    """One router's cost-quality curve: its area; its score and cost where money has no price; its score at a fifth of the cost
    of the best single model; the cost at which it reaches that model's score, as a share of that model's, NaN where it never
    does; RouterArena's score."""

    router: str
    aiq: float
    score: float
    cost: float
    at_a_fifth: float
    reaches: float
    arena: float


def chosen(predicted: Float64, scores: Float64) -> npt.NDArray[np.int64]:
    """[N]: the model with the highest prediction among those that have a score. predicted: -inf for models that the router does
    not know. Raises ValueError where it knows none of them."""
    among = np.where(np.isfinite(scores), predicted, -np.inf)
    if unknown := int((among.max(1) == -np.inf).sum()):
        raise ValueError(
            f"{unknown:,} of {len(scores):,} prompts have no score of a model that the router knows: expected none"
        )
    return np.asarray(among.argmax(1))


def compare(
    predicted: Mapping[str, Float64], test: Scored, single: str = "source", ahead: str | None = None
) -> list[RouterRow]:
    """Each router's row for every source and for all together, and the oracle's. predicted: [N, M] for each router; single,
    ahead: those that others are compared with."""
    rows = np.arange(len(test.scores))
    got = {name: test.scores[rows, chosen(values, test.scores)] for name, values in predicted.items()}
    got["oracle"] = np.nanmax(test.scores, 1)
    return rows_of(got, test.sources(), single, ahead)


def rows_of(got: Mapping[str, Float64], part: npt.NDArray[np.str_], single: str, ahead: str | None = None) -> list[RouterRow]:
    """Each router's row for every part of the prompts that has enough of them, and for all together. got: the true scores [N]
    of what each chose; part [N]; single, ahead: those that others are compared with."""
    found = []
    parts = [name for name in sorted(set(part.tolist())) if (part == name).sum() >= LEAST]
    for source in ["all", *parts]:
        of = np.ones(len(part), bool) if source == "all" else part == source
        for name, score in got.items():
            gain = points(score[of] - got[single][of])
            behind = (math.nan, math.nan) if ahead is None else points(got[ahead][of] - score[of])
            found.append(RouterRow(name, source, int(of.sum()), float(score[of].mean()), *gain, *behind))
    return found


def points(gain: Float64) -> tuple[float, float]:
    """The mean of gains [N] in points, and its standard error."""
    error = 100 * float(gain.std(ddof=1)) / math.sqrt(len(gain)) if len(gain) > 1 else 0.0
    return 100 * float(gain.mean()), error


def curve(predicted: Float64, scores: Float64, costs: Float64) -> Float64:
    """[K, 2]: mean cost and mean true score at every price of money, by falling price. predicted, scores, costs [N, M]."""
    there = np.isfinite(scores)
    spread = np.where(there, costs, np.nan)
    known = predicted[np.isfinite(predicted)]
    scale = (known.max() - known.min()) / max(float(np.nanmedian(spread)), 1e-300)
    prices = np.concatenate([[0.0], scale * np.geomspace(1e-6, 1e6, 241)])
    rows, points = np.arange(len(scores)), []
    for price in prices:
        taken = chosen(predicted - price * costs, scores)
        points.append((costs[rows, taken].mean(), scores[rows, taken].mean()))
    return np.unique(np.array(points), axis=0)


def hull(points: Float64) -> Float64:
    """The vertices [K, 2] of the upper concave hull that does not fall, from the least cost on."""
    found: list[tuple[float, float]] = []
    for x, y in sorted(map(tuple, points.tolist())):
        if found and (y <= found[-1][1] and x >= found[-1][0]):
            continue
        while found and x <= found[-1][0]:
            found.pop()
        while len(found) > 1 and _below(found[-2], found[-1], (x, y)):
            found.pop()
        found.append((x, y))
    return np.array(found)


def _below(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    """Whether b is not above the line from a to c."""
    return (b[1] - a[1]) * (c[0] - a[0]) <= (c[1] - a[1]) * (b[0] - a[0])


def area(points: Float64, highest: float) -> float:
    """The area under a hull up to the cost ``highest``, where its last score holds, divided by ``highest``."""
    x, y = np.append(points[:, 0], max(highest, points[-1, 0])), np.append(points[:, 1], points[-1, 1])
    return float(np.trapezoid(y, x) / highest)


def score_at(points: Float64, cost: float) -> float:
    """The score of a hull at a cost, NaN below its least one."""
    return float(np.interp(cost, *points.T)) if cost >= points[0, 0] else math.nan


def cost_of(points: Float64, score: float) -> float:
    """The least cost at which a hull has a score, NaN where it never does."""
    return float(np.interp(score, points[:, 1], points[:, 0])) if score <= points[-1, 1] else math.nan


def arena(score: float, usd: float) -> float:
    """RouterArena's score of a mean score and the USD of 1,000 prompts."""
    cheap = (math.log2(200) - math.log2(min(max(usd, 0.0044), 200))) / (math.log2(200) - math.log2(0.0044))
    return 1.1 * score * cheap / (0.1 * score + cheap) if cheap else 0.0


def curves(
    predicted: Mapping[str, Float64], test: Scored, costs: Float64, single: str = "source"
) -> tuple[list[CurveRow], dict[str, Float64]]:
    """Each router's row, and their hulls; "mixture" is the curve of ``single``, the best model of a source at each price. costs
    [N, M] in USD a prompt."""
    rows = np.arange(len(test.scores))
    best = chosen(predicted[single], test.scores)
    single_cost, single_score = float(costs[rows, best].mean()), float(test.scores[rows, best].mean())
    routers = {name: values for name, values in predicted.items() if name != single} | {"mixture": predicted[single]}
    hulls = {name: hull(curve(values, test.scores, costs)) for name, values in routers.items()}
    highest = max(float(points[-1, 0]) for points in hulls.values())
    found = []
    for name, points in hulls.items():
        free = chosen(routers[name], test.scores)
        cost, score = float(costs[rows, free].mean()), float(test.scores[rows, free].mean())
        at, share = score_at(points, single_cost / 5), cost_of(points, single_score) / single_cost
        found.append(CurveRow(name, area(points, highest), score, cost, at, share, arena(score, 1000 * cost)))
    return found, hulls

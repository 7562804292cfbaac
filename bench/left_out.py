"""Routers on sources or tasks that they never saw: each is left out in turn, and predicted from all others.

The choice is among models that share enough of the remaining prompts with another one, as the pool's own rule has it, on
prompts where two of these have a score. The best single model ("single") is the one with the highest effect in the scores of
the remaining prompts: each score is the sum of an effect of its prompt and one of its model, fitted by least squares, as not
every source asked every model. For the same reason routers learn scores less the effect of their prompt: otherwise a model
that was asked easy questions alone would seem good.

Prompts that the left-out part shares with others (but for case, space and punctuation) are not learned from.

"head" is what training makes of the remaining prompts' votes; "shrunk" the same with coefficients that fall back to the one
leaderboard of these prompts the less a prompt is like their tasks, by the middle and width with which votes are likeliest: on
the other left-out parts, each counting alike, and as much on the remaining prompts that settings are chosen on, which the head
has not seen ("known" in the rows of log-losses); "configured" by the quantile and width of the config, if it has them;
"leaderboard" is that leaderboard for every prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bench.router_rows import LossRow, RouterRow, chosen, rows_of
from bench.simple_routers import Float64, Scored, predictions
from bench.trained_heads import CONFIGURED, LearnedHead, PoolVotes, Rows
from p2l_engine.votes.splits import folded

GROUPS = 10  # of tasks, which are left out together: each task is predicted by routers that never saw it


def groups_of(part: npt.NDArray[np.str_], by: str, seed: int = 0) -> npt.NDArray[np.int64]:
    """[N]: which prompts are left out together: those of one source; of tasks, a tenth of them, at random."""
    names, of = np.unique(part, return_inverse=True)
    if by == "source":
        return np.asarray(of, np.int64)
    order = np.random.default_rng(seed).permutation(len(names))
    return np.asarray(order[of] % GROUPS, np.int64)


def known_models(scores: Float64, least: int) -> Rows:
    """The models that share at least so many prompts with another one of them, by scores [N, M]."""
    there = np.isfinite(scores)
    known = np.ones(there.shape[1], bool)
    while True:
        shared = (there & known)[(there & known).sum(1) > 1].sum(0)
        if (shared >= least)[known].all():
            return np.flatnonzero(known)
        known &= shared >= least


def model_effects(scores: Float64) -> Float64:
    """[M]: the models' effects in scores [N, M], NaN where there is none. Their mean is 0 among models that prompts connect; a
    model without scores beside another's has 0."""
    scores = scores[np.isfinite(scores).sum(1) > 1]
    there = np.isfinite(scores).astype(np.float64)
    laplacian = np.diag(there.sum(0)) - there.T @ (there / there.sum(1, keepdims=True))
    gains = np.nansum(scores - np.nanmean(scores, 1, keepdims=True), 0)
    return np.asarray(np.linalg.pinv(laplacian, hermitian=True) @ gains)


def without_prompts(prompts: Scored, effects: Float64) -> Scored:
    """With scores less the effect of their prompt. effects [M]: of the models."""
    of_prompt = np.nanmean(prompts.scores - effects, 1, keepdims=True)
    return Scored(prompts.features, prompts.scores - of_prompt, prompts.source, prompts.task)


def left_out(
    heads: PoolVotes,
    every: Scored,
    parts: Sequence[Rows],
    texts: Sequence[str],
    by: str,
    advance: Callable[[str], object],
    min_prompts: int,
) -> tuple[list[RouterRow], list[LossRow]]:
    """Each router's rows for the tested prompts of every source or task, as learned from the others; gains are over the best
    single model. And the log-losses of the votes there, by the heads.

    parts: the numbers of the prompts to train on, to choose settings on, and to test; the last may be among the others. texts
    [N]: the prompts' first turns. by: "source" or "task". advance: called with a line on each part that is done. min_prompts:
    that a known model shares with another. Raises ValueError where no part can be left out.
    """
    part = every.sources() if by == "source" else every.task
    group, known_prompt = groups_of(part, by), np.unique([folded(text) for text in texts], return_inverse=True)[1]
    got: dict[str, list[Float64]] = {}
    of_part: list[npt.NDArray[np.str_]] = []
    unseen: list[Unseen] = []
    for left in np.unique(group[parts[2]]):
        test = parts[2][group[parts[2]] == left]
        seen = [rows[(group[rows] != left) & ~np.isin(known_prompt[rows], known_prompt[test])] for rows in parts[:2]]
        known = known_models(every.scores[seen[0]], min_prompts)
        rows = test[np.isfinite(every.scores[test][:, known]).sum(1) > 1]
        if not len(rows) or not len(seen[1]):
            advance(f"{', '.join(np.unique(part[test]))}: no prompts with scores of two models that are known")
            continue
        training, validation, new = (scored(among(every.of(of), known)) for of in (*seen, rows))
        effects = model_effects(training.scores)
        training, validation = (without_prompts(of, effects) for of in (training, validation))
        predicted = {"single": np.tile(effects, (len(rows), 1))} | predictions(training, validation, new)
        for name in ("source", "task") if by == "source" else ("task",):
            predicted.pop(name)  # they are not known
        for name, values in predicted.items():
            got.setdefault(name, []).append(score_of(values, new))
        got.setdefault("oracle", []).append(np.nanmax(new.scores, 1))
        of_part.append(part[rows])
        name = ", ".join(np.unique(part[rows])) if by == "source" else f"tasks, part {left + 1}"
        unseen.append(Unseen.of(name, heads.among(known).fit(*seen), rows, seen[1], known, new))
        advance(", ".join(np.unique(part[rows])))
    if not of_part:
        raise ValueError(f"--leave-out: expected two {by}s whose prompts have scores of two models in common, got none")
    losses: list[LossRow] = []
    by_way = np.array([one.losses for one in unseen])  # [parts, ways]
    compared = np.array([i for i, way in enumerate(unseen[0].ways[:-1]) if way != CONFIGURED])
    for k, one in enumerate(unseen):
        others = np.delete(by_way, k, 0).sum(0) / max(len(unseen) - 1, 1)
        chosen_way = int(compared[(others + one.known_losses)[compared].argmin()])
        rows_by = {"head": 0, "shrunk": chosen_way, "leaderboard": len(one.ways) - 1}
        if CONFIGURED in one.ways:
            rows_by["configured"] = one.ways.index(CONFIGURED)
        for name, way in rows_by.items():
            got.setdefault(name, []).append(one.scores[way])
            losses.append(LossRow(name, one.name, one.scores.shape[1], one.kept[way], one.losses[way]))
            losses.append(LossRow(name, f"known, without {one.name}", one.known, one.known_kept[way], one.known_losses[way]))
    best = (by_way + np.array([one.known_losses for one in unseen])).sum(0)[compared].argmin()
    advance(f"of least log-loss on all parts together: {unseen[0].ways[compared[best]]}")
    return rows_of({name: np.concatenate(of) for name, of in got.items()}, np.concatenate(of_part), "single"), losses


@dataclass(frozen=True, slots=True)
class Unseen:
    """A part that was left out. By each of the ways to fall back: the mean share of the prompts' own coefficients that is kept,
    the log-loss of a vote, and the true scores [ways, n] of what is chosen; known: how many prompts the other parts have that
    the head has not seen, and their shares and log-losses."""

    name: str
    ways: list[str]
    kept: list[float]
    losses: list[float]
    scores: Float64
    known: int
    known_kept: list[float]
    known_losses: list[float]

    @classmethod
    def of(cls, name: str, head: LearnedHead, rows: Rows, known: Rows, models: Rows, prompts: Scored) -> Unseen:
        """The prompts ``rows`` of the pool, and those of the other parts, among these models alone."""
        ways, kept, losses, scores = [], [], [], []
        for way in head.shrunk(rows):
            ways.append(way.way)
            kept.append(way.kept)
            losses.append(way.log_loss)
            scores.append(score_of(way.theta[:, models], prompts))
        of_known = list(head.shrunk(known))
        return cls(
            name, ways, kept, losses, np.stack(scores), len(known), [way.kept for way in of_known],
            [way.log_loss for way in of_known],
        )  # fmt: skip


def score_of(predicted: Float64, prompts: Scored) -> Float64:
    """[N]: the true scores of what is chosen."""
    return np.asarray(prompts.scores[np.arange(len(prompts.scores)), chosen(predicted, prompts.scores)])


def scored(prompts: Scored) -> Scored:
    """Those with a score."""
    return prompts.of(np.flatnonzero(np.isfinite(prompts.scores).any(1)))


def among(prompts: Scored, models: npt.NDArray[np.int64]) -> Scored:
    """With the scores of these models alone."""
    return Scored(prompts.features, prompts.scores[:, models], prompts.source, prompts.task)

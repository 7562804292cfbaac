"""Routers on the prompts of a pool that are not held out, each predicted by what was learned from the other folds.

Beside the simple routers: "head", what ``p2l_engine.train`` makes of the votes with this config; where it has topics, "task
predicted", the tasks' mean scores (shrunk to their source's, as if of 20 more prompts), mixed by the topics' probabilities; and
"ensemble", the sum of all of these but "source" and "task", which know what a router does not. Its weights have the least
squared error of how much better than others a model is on a prompt, among weights that are not negative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from scipy.optimize import nnls

from bench.router_rows import LossRow, RouterRow, compare
from bench.simple_routers import Float64, Scored, predictions
from bench.trained_heads import PoolVotes, Rows
from p2l_engine.backbone.topics import Topics
from p2l_engine.votes.splits import folds

INNER = 10  # of the other folds' prompts, one in as many is for choosing settings
PRIOR = 20  # prompts


def in_folds(
    heads: PoolVotes, every: Scored, rows: Rows, count: int, share: float, advance: Callable[[str], object]
) -> tuple[list[RouterRow], list[LossRow]]:
    """Each router's rows, with what "head" has over it, and the log-losses of the votes.

    every: the pool's prompts, with the features that simple routers read; rows: those that are not held out. share: of the
    other folds' prompts, which are learned from; a smaller share is part of a larger one. advance: called with a line on each
    fold. Raises ArithmeticError where a head's optimum is not reached."""
    votes, first = heads.votes_on(rows)
    rows = rows[first]
    part, order = folds(votes, count), np.random.default_rng(0).random(len(rows))
    predicted: dict[str, list[Float64]] = {}
    losses: dict[str, list[float]] = {}
    tested: list[Rows] = []
    kept: list[Float64] = []
    learned_from: list[int] = []
    for fold in range(count):
        rest, test = np.flatnonzero((part != fold) & (order < share)), rows[part == fold]
        inner = folds(votes.of(rest.tolist()), INNER)
        training, chosen_on = rest[inner > 0], rows[rest[inner == 0]]
        new = np.concatenate([chosen_on, test])
        found = predictions(every.of(rows[training]), every.of(chosen_on), every.of(new))
        head = heads.fit(rows[training], chosen_on)
        if head.topics is not None:
            p = head.reads(new)[:, heads.hidden.shape[1] :].astype(np.float64)
            category = votes.of(training.tolist()).category
            found["task predicted"] = p @ task_means(every.of(rows[training]), head.topics, category)
        found["head"] = head.theta(new)
        together = [values for name, values in found.items() if name not in ("source", "task")]
        weights = summed([values[: len(chosen_on)] for values in together], every.scores[chosen_on])
        found["ensemble"] = np.tensordot(weights, np.stack(together), 1)
        for name, values in found.items():
            predicted.setdefault(name, []).append(values[len(chosen_on) :])
        for name, loss in head.log_losses(test).items():
            losses.setdefault(name, []).append(loss)
        tested.append(test)
        kept.append(head.kept(test))
        learned_from.append(len(training))
        deviation = head.fitted.best.deviation
        advance(f"fold {fold + 1} of {count}: {len(training):,} prompts to learn from, deviation {deviation:g}")
    joined = {name: np.concatenate(of) for name, of in predicted.items()}
    found_rows = compare(joined, every.of(np.concatenate(tested)), ahead="head")
    mean_kept = {"head": float(np.concatenate(kept).mean()), "leaderboard": 0.0}
    of_votes = [LossRow(name, "all", len(rows), mean_kept[name], float(np.mean(of))) for name, of in losses.items()]
    size = round(float(np.mean(learned_from)))
    return (
        [replace(row, share=share, learned_from=size) for row in found_rows],
        [replace(row, share=share, learned_from=size) for row in of_votes],
    )


def summed(predicted: Sequence[Float64], scores: Float64) -> Float64:
    """[R]: the weights of R routers' predictions [N, M], at least 0, with which their sum differs least from the scores [N, M],
    NaN where there is none, both less their mean over the prompt's models."""
    there = np.isfinite(scores)

    def centred(of: Float64) -> Float64:
        of = np.where(there, of, np.nan)
        return np.asarray((of - np.nanmean(of, 1, keepdims=True))[there])

    return np.asarray(nnls(np.stack([centred(of) for of in predicted], 1), centred(scores))[0])


def task_means(known: Scored, topics: Topics, category: Sequence[str] | None) -> Float64:
    """[T, M]: each topic's mean scores, shrunk to those of its source, and these to the mean of all."""
    assert category is not None  # topics are of categories
    found = np.empty((len(topics.names), known.scores.shape[1]))
    overall = shrunk(known.scores, np.full(known.scores.shape[1], np.nanmean(known.scores)))
    of = np.array(category)
    for t, name in enumerate(topics.names):
        rows = of == name
        source = known.source == known.source[np.argmax(rows)]
        found[t] = shrunk(known.scores[rows], shrunk(known.scores[source], overall))
    return found


def shrunk(scores: Float64, towards: Float64) -> Float64:
    """[M]: the mean scores [N, M] of each model, with ``PRIOR`` more of ``towards`` [M]."""
    return np.asarray((np.nansum(scores, 0) + PRIOR * towards) / (np.isfinite(scores).sum(0) + PRIOR))

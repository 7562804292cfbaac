"""Routers on the prompts of a pool that are not held out, each predicted by what was learned from the other folds.

Beside the simple routers: "head", what ``p2l_engine.train`` makes of the votes with this config; and, where it has topics,
"task predicted", the tasks' mean scores (shrunk to their source's, as if of 20 more prompts), mixed by the topics'
probabilities.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from bench.router_rows import RouterRow, compare
from bench.simple_routers import Float64, Scored, predictions
from p2l_engine.backbone.topics import Topics
from p2l_engine.feedback import feedback_model
from p2l_engine.train import data, frozen
from p2l_engine.train.config import HeadOptimum, TrainConfig
from p2l_engine.votes.splits import folds

INNER = 10  # of the other folds' prompts, one in as many is for choosing settings
PRIOR = 20  # prompts


def in_folds(
    config: TrainConfig,
    wanted: HeadOptimum,
    prompts: Sequence[tuple[str, ...]],
    every: Scored,
    words: Float64,
    models: Sequence[str],
    simple_read_words: bool,
    count: int,
    advance: Callable[[str], object],
) -> list[RouterRow]:
    """Each router's rows. every: the pool's prompts, with hidden states as features; words [N, E] of them. models: of the
    scores' columns. simple_read_words: whether the simple routers read words too. advance: called with a line on each fold."""
    votes = data.load(config.model_copy(update={"validation": 0.0})).training
    part = folds(votes, count)
    first: dict[tuple[str, ...], int] = {}
    for row, prompt in enumerate(prompts):
        first.setdefault(prompt, row)
    place = np.array([first[prompt] for prompt in votes.prompts])
    both = np.hstack([every.features, words]) if simple_read_words else every.features
    features = Scored(both, every.scores, every.source, every.task)
    feedback, column = feedback_model(config.loss_type), [votes.models.index(model) for model in models]
    predicted: dict[str, list[Float64]] = {}
    tested: list[npt.NDArray[np.int64]] = []

    def known(of: npt.NDArray[np.int64]) -> frozen.Known:
        rows = place[of]
        of_words = words[rows].astype(np.float32) if wanted.topics is not None and wanted.topics.words else None
        return frozen.Known(votes.of(of.tolist()), every.features[rows].astype(np.float32), of_words)

    for fold in range(count):
        rest, test = np.flatnonzero(part != fold), np.flatnonzero(part == fold)
        inner = folds(votes.of(rest.tolist()), INNER)
        training, chosen_on = rest[inner > 0], rest[inner == 0]
        found = predictions(features.of(place[training]), features.of(place[chosen_on]), features.of(place[test]))
        learned, new = known(training), known(test)
        head, topics = frozen.fitted(feedback, wanted, learned, known(chosen_on))
        read = torch.from_numpy(new.hidden)
        if topics is not None:
            read = topics(read, None if new.words is None else torch.from_numpy(new.words))
            p = read[:, new.hidden.shape[1] :].double().numpy()
            found["task predicted"] = p @ task_means(every.of(place[training]), topics, learned.votes.category)
        found["head"] = head.head(read, None, 0.0).numpy()[:, column].astype(np.float64)
        for name, values in found.items():
            predicted.setdefault(name, []).append(values)
        tested.append(place[test])
        advance(f"fold {fold + 1} of {count}: {len(training):,} prompts to learn from, deviation {head.deviation:g}")
    return compare({name: np.concatenate(of) for name, of in predicted.items()}, every.of(np.concatenate(tested)))


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

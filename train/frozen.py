"""A run that trains the head alone, at its optimum: hidden states are computed once, and kept in the user's cache."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from p2l_engine.backbone.topics import Topics
from p2l_engine.checkpoint import Checkpoint
from p2l_engine.engine import Engine
from p2l_engine.evaluation import features
from p2l_engine.feedback import feedback_model
from p2l_engine.learning import hidden
from p2l_engine.train import optimum, topics
from p2l_engine.train.config import HeadOptimum, TrainConfig
from p2l_engine.train.optimum import Float32, Inputs
from p2l_engine.train.saving import write_head
from p2l_engine.votes import Splits, Votes

logger = logging.getLogger(__name__)


def train(config: TrainConfig, wanted: HeadOptimum, folder: Path, parts: Splits, inputs: Mapping[str, Any]) -> None:
    """Writes the checkpoint to ``folder``: the head, topics where they are wanted, and the settings of an adapter that changes
    nothing else of the backbone.

    An interrupted run goes on where the cache of hidden states ends. Raises ValueError for topics of votes without categories,
    CheckpointError for a backbone that cannot be read,
    ArithmeticError where the optimum is not reached, and OSError where the cache or the checkpoint cannot be written.
    """
    loaded = base(config)
    engine = Engine(loaded, dtype=config.dtype, max_tokens=config.max_length)
    known = _states(engine, parts.training, "training")
    of, reads = None, Inputs(known)
    if wanted.topics is not None:
        words = engine.words(parts.training.prompts) if wanted.topics.words else None
        of = topics.fit(known, _categories(parts.training), wanted.topics.deviation, words)
        reads = _inputs(of, known, words)
    chosen_on = None
    if parts.validation is not None:
        unseen = _states(engine, parts.validation, "validation")
        words = engine.words(parts.validation.prompts) if of is not None and of.of_words is not None else None
        chosen_on = parts.validation, Inputs(unseen) if of is None else _inputs(of, unseen, words)
    leaderboards = 1.0 if wanted.topics is None else wanted.topics.leaderboards
    feedback = feedback_model(config.loss_type)
    found = optimum.best(feedback, parts.training, reads, chosen_on, wanted.deviations, leaderboards)
    write_head(folder, loaded, found, of, config, parts, inputs)


def _inputs(of: Topics, hidden: Float32, words: Float32 | None) -> Inputs:
    known = None if words is None else torch.from_numpy(words)
    return Inputs(hidden, of.probabilities(torch.from_numpy(hidden), known).numpy())


def _categories(votes: Votes) -> Sequence[str]:
    if votes.category is None:
        raise ValueError("head_optimum: topics: expected votes with a category (or scores with a task), found neither column")
    return votes.category


def base(config: TrainConfig) -> Checkpoint:
    """The backbone before training, with the config's template and CLS token, and an empty head. Raises CheckpointError."""
    return features.frozen(config.pretrain_model_name, config.model_dump())


def _states(engine: Engine, votes: Votes, part: str) -> Float32:
    """[P, D]: what a head reads of the votes' prompts."""
    cache = hidden.cache_folder()
    logger.info("hidden states of %s %s prompts, kept in %s", f"{len(votes.prompts):,}", part, cache)
    columns = (
        TextColumn(f"{part} prompts"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=len(votes.prompts))
        return hidden.hidden_states(engine, votes.prompts, cache, lambda count: bar.advance(task, count))

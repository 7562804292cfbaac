"""A run that trains the head alone, at its optimum: hidden states are computed once, and kept in the user's cache."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from p2l_engine import checkpoint
from p2l_engine.backbone.topics import Topics
from p2l_engine.checkpoint import Checkpoint, fingerprint
from p2l_engine.checkpoint.files import read_json, read_tensors
from p2l_engine.engine import Engine
from p2l_engine.errors import CheckpointError
from p2l_engine.evaluation import features
from p2l_engine.feedback import FeedbackModel, feedback_model
from p2l_engine.learning import hidden, shrinkage
from p2l_engine.prompts.encode import PromptEncoder
from p2l_engine.train import optimum, topics
from p2l_engine.train.config import HeadOptimum, TrainConfig
from p2l_engine.train.optimum import FittedLayers, Float32, Inputs
from p2l_engine.train.saving import unseen_hashes, write_head
from p2l_engine.votes import Splits, Votes

logger = logging.getLogger(__name__)


def train(config: TrainConfig, wanted: HeadOptimum, folder: Path, parts: Splits, inputs: Mapping[str, Any]) -> None:
    """Writes the checkpoint to ``folder``: the head, topics and shrinkage where they are wanted, and the factors of the adapter
    that they were fitted over, if any.

    An interrupted run goes on where the cache of hidden states ends. Raises ValueError for topics of votes without categories,
    a shrinkage of too few prompts and an adapter that does not fit, CheckpointError for a backbone that cannot be read,
    ArithmeticError where the optimum is not reached, and OSError where the cache or the checkpoint cannot be written.
    """
    if wanted.topics is not None:
        _categories(parts.training)  # before hours of hidden states
    if (adapter := adapter_folder(config)) is not None:
        _check_unseen(adapter, parts)
    if wanted.shrinkage is not None:
        shrinkage.check_enough(len(parts.training.prompts))
    loaded = base(config)
    engine = Engine(loaded, dtype=config.dtype, max_tokens=config.max_length)
    reads_words = wanted.topics is not None and wanted.topics.words

    def known(votes: Votes, part: str) -> Known:
        return Known(votes, _states(engine, votes, part), engine.words(votes.prompts) if reads_words else None)

    chosen_on = None if parts.validation is None else known(parts.validation, "validation")
    found = fitted(feedback_model(config.loss_type), wanted, known(parts.training, "training"), chosen_on)
    write_head(folder, loaded, found, config, parts, inputs)


@dataclass(frozen=True, slots=True)
class Known:
    """Votes, and of their P prompts the hidden states [P, D], and the words [P, E] where topics should read them."""

    votes: Votes
    hidden: Float32
    words: Float32 | None

    def inputs(self, of: Topics | None) -> Inputs:
        """What a head reads beside these topics."""
        if of is None:
            return Inputs(self.hidden)
        words = None if self.words is None else torch.from_numpy(self.words)
        return Inputs(self.hidden, of.probabilities(torch.from_numpy(self.hidden), words).numpy())


def fitted(feedback: FeedbackModel, wanted: HeadOptimum, training: Known, chosen_on: Known | None) -> FittedLayers:
    """The head, and what is wanted beside it. Raises ValueError for topics of votes without categories and for a shrinkage of
    too few prompts, and ArithmeticError where an optimum is not reached."""
    of, leaderboards = None, 1.0
    if wanted.topics is not None:
        category = _categories(training.votes)
        of = topics.fit(training.hidden, category, wanted.topics.deviation, training.words)
        leaderboards = wanted.topics.leaderboards
    validation = None if chosen_on is None else (chosen_on.votes, chosen_on.inputs(of))
    reads = training.inputs(of)
    best = optimum.best(feedback, training.votes, reads, validation, wanted.deviations, leaderboards)
    if wanted.shrinkage is None:
        return FittedLayers(best, of, None)
    start, away = shrinkage.of_training(
        best.head, shrinkage.marginal_outputs(feedback, training.votes), reads.together(), training.hidden.shape[1],
        training.votes.category,
    )  # fmt: skip
    return FittedLayers(best, of, shrinkage.at_quantile(start, away, wanted.shrinkage.quantile, wanted.shrinkage.width))


def _categories(votes: Votes) -> Sequence[str]:
    if votes.category is None:
        raise ValueError("head_optimum: topics: expected votes with a category (or scores with a task), found neither column")
    return votes.category


def base(config: TrainConfig) -> Checkpoint:
    """The backbone as the head reads it, with the config's template and CLS token, and an empty head: before training, or with
    the optimum's adapter. Raises CheckpointError, and ValueError for an adapter that is not LoRA's over the same backbone, or
    was trained with another template, date or CLS token."""
    untrained = features.frozen(config.pretrain_model_name, config.model_dump())
    adapter = adapter_folder(config)
    if adapter is None:
        return untrained
    trained = _trained(adapter)
    recorded = read_json(trained.folder / "training_config.json", dict).get("inputs") or {}
    if recorded.get("backbone", fingerprint.of_backbone(trained.base)) != fingerprint.of_backbone(untrained.base):
        raise ValueError(
            f"head_optimum: adapter: expected one over {config.pretrain_model_name} ({untrained.base}), got {trained.folder}, "
            f"over {trained.base} or an earlier state of it"
        )
    ids = [PromptEncoder(each.tokenizer).encode(["a", "b"])[0].tolist() for each in (trained, untrained)]
    if ids[0] != ids[1]:
        raise ValueError(
            "chat_template, cls_token_if_none, date: expected those of the training_config.json in "
            f"{trained.folder}, which head_optimum's adapter was trained with: other tokens come of these"
        )
    return replace(
        untrained, folder=trained.folder, config=trained.config, weights=trained.weights, transformers=trained.transformers
    )


def adapter_folder(config: TrainConfig) -> Path | None:
    """The folder of head_optimum's adapter, None where there is none. Raises CheckpointError where it cannot be found."""
    if config.head_optimum is None or config.head_optimum.adapter is None:
        return None
    try:
        return checkpoint.find(config.head_optimum.adapter)
    except CheckpointError as error:
        raise CheckpointError(f"head_optimum: adapter: {error}") from error


def _trained(adapter: Path) -> Checkpoint:
    """The checkpoint of an adapter."""
    weights = adapter / "adapter_model.safetensors"
    if not (weights.is_file() and any(".lora_" in name for name in read_tensors(weights))):
        raise ValueError(f"head_optimum: adapter: expected a checkpoint with LoRA's factors, got {adapter}, which has none")
    if (adapter / "tokenizer.json").is_file():
        raise ValueError(f"head_optimum: adapter: expected one with the backbone's tokenizer, got {adapter}, which has its own")
    return checkpoint.load(adapter)


def _check_unseen(adapter: Path, parts: Splits) -> None:
    """Raises ValueError where the adapter's votes were split in another way: it may have been trained on prompts that this run
    holds out, or chooses by."""
    theirs = read_json(adapter / "training_config.json", dict).get("held_out_hashes") or {}
    for part, ours in unseen_hashes(parts).items():
        if theirs.get(part) != ours:
            raise ValueError(
                f"head_optimum: adapter: expected one that was trained without the same {part} prompts, got {adapter}: take "
                "its data, held_out, validation, split_by and split_seed"
            )


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

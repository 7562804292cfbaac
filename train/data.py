"""Reads, checks and splits the votes that a training config names."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from p2l_engine.feedback import Outcome, feedback_model
from p2l_engine.train.config import TrainConfig
from p2l_engine.votes import Splits, Summary, Votes, check_apart, read, split
from p2l_engine.votes.by_source import balanced, read_by_source

logger = logging.getLogger(__name__)


def load(config: TrainConfig) -> Splits:
    """The config's votes as training, validation and held-out parts.

    Logs a summary and the counts of invalid rows. Raises ValueError for unreadable votes, too many invalid rows, votes
    without any preference, and disconnected models if the config refuses them.
    """
    votes = _read(config, config.train_data_path)
    summary = Summary.of(votes)
    for line in summary.lines():
        logger.info("%s", line)
    if config.val_data_path:
        validation = _read(config, config.val_data_path, votes.models)
        check_apart(config.val_data_path, validation, votes)
        parts = Splits(votes, validation, None)
    else:
        parts = split(votes, config.held_out, config.validation, config.split_by, config.split_seed, config.train_share)
    if parts.training is not votes:
        summary = Summary.of(parts.training)
    if config.disconnected_models == "leave_out" and summary.disconnected:
        parts = _largest_component(parts, summary.disconnected)
        summary = Summary.of(parts.training)
    _check(config, parts.training, summary)
    if parts.validation is not None and not parts.validation.weight.sum() > 0:
        path = config.val_data_path or config.train_data_path
        raise ValueError(f"{path}: expected at least one validation vote with a weight above 0, got none")
    return parts


def _largest_component(parts: Splits, others: tuple[tuple[str, ...], ...]) -> Splits:
    """Without the votes on models of the other connected components."""
    excluded = {name for component in others for name in component}
    kept = parts.among([name for name in parts.training.models if name not in excluded])
    for name, part in kept._asdict().items():
        if part is not None and not len(part):
            raise ValueError(
                f"disconnected_models: leave_out leaves no votes in the {name.replace('_', '-')} part: give it more prompts"
            )
    votes = len(parts.training) - len(kept.training)
    logger.warning("disconnected_models: left out %d models and their %s training votes", len(excluded), f"{votes:,}")
    return kept


def _read(config: TrainConfig, path: str | list[str], models: tuple[str, ...] | None = None) -> Votes:
    feedback, training = feedback_model(config.loss_type), path == config.train_data_path
    key = "load_train_data_from_disk" if training else "load_val_data_from_disk"
    missing = [one for one in ([path] if isinstance(path, str) else path) if not Path(one).expanduser().is_dir()]
    if getattr(config, key) and missing:
        raise ValueError(f"{key}: expected a folder, found none at {missing[0]}")
    leave_out = config.leave_out if training else None  # validation data are read whole
    columns, share, weighted = config.columns, config.max_dropped, config.weighted_loss
    if config.sources:
        votes, source, dropped = read_by_source(
            path, config.sources, feedback, columns, share, leave_out, weighted, True, config.csv_escape
        )
        votes = balanced(votes, source, config.source_balance)
    else:
        votes, dropped = read(path, models, feedback, columns, share, leave_out, weighted, csv_escape=config.csv_escape)
    for line in dropped.lines():
        logger.warning("%s: left out %s", path, line)
    return votes


def _check(config: TrainConfig, votes: Votes, summary: Summary) -> None:
    path, feedback = config.train_data_path, feedback_model(config.loss_type)
    if not len(votes) or not votes.weight.sum() > 0:
        raise ValueError(f"{path}: expected at least one vote with a weight above 0 that this feedback model can use, got none")
    if len(votes.models) < 2:
        raise ValueError(f"{path}: expected votes on at least two models, got one: {votes.models[0]!r}")
    if not votes.are_values and not np.isin(votes.outcome, (Outcome.A, Outcome.B)).any():
        raise ValueError(f"{path}: expected votes that prefer one model; all {len(votes):,} are ties")
    if summary.disconnected and config.disconnected_models == "refuse":
        names = "; ".join(", ".join(component) for component in summary.disconnected)
        raise ValueError(
            f"{path}: no chain of votes connects these models to the others, so their coefficients cannot be compared: "
            f"{names}. Add votes, or set disconnected_models: leave_out (without these models), or disconnected_models: train"
            + (f" ('both bad' votes still anchor their absolute level in {feedback.name})" if feedback.grounded else "")
        )

"""The votes of a training config: read, reported on, split."""

from __future__ import annotations

import logging

import numpy as np

from p2l_engine.feedback import Outcome, feedback_model
from p2l_engine.train.config import TrainConfig
from p2l_engine.votes import Splits, Summary, Votes, check_apart, read, split

logger = logging.getLogger(__name__)


def load(config: TrainConfig) -> Splits:
    """Reads and splits; logs what was dropped and what is there. Raises ValueError for votes that nothing can be learnt
    from."""
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
    if config.islands == "leave_out" and summary.islands:
        parts = _on_mainland(parts, summary.islands)
        summary = Summary.of(parts.training)
    _check(config, parts.training, summary)
    return parts


def _on_mainland(parts: Splits, islands: tuple[tuple[str, ...], ...]) -> Splits:
    """Only the votes on models that a chain of training votes ties to the group with the most votes."""
    gone = {name for island in islands for name in island}
    kept = [name for name in parts.training.models if name not in gone]
    among = parts.among(kept)
    for name, part in among._asdict().items():
        if part is not None and not len(part):
            raise ValueError(f"islands: leave_out leaves no votes in the {name.replace('_', '-')} part: give it more prompts")
    votes = len(parts.training) - len(among.training)
    logger.warning("islands: left out %d models and their %s training votes", len(gone), f"{votes:,}")
    return among


def _read(config: TrainConfig, path: str | list[str], models: tuple[str, ...] | None = None) -> Votes:
    feedback = feedback_model(config.loss_type)
    leave_out = config.leave_out if path == config.train_data_path else None  # validation data are as they were made
    votes, dropped = read(path, models, feedback, config.columns, config.max_dropped, leave_out)
    for line in dropped.lines():
        logger.warning("%s: left out %s", path, line)
    return votes


def _check(config: TrainConfig, votes: Votes, summary: Summary) -> None:
    path, feedback = config.train_data_path, feedback_model(config.loss_type)
    if not len(votes) or not votes.weight.sum() > 0:
        raise ValueError(f"{path}: expected at least one vote of a weight above 0 that this feedback model can use, got none")
    if len(votes.models) < 2:
        raise ValueError(f"{path}: expected votes on at least two models, got one: {votes.models[0]!r}")
    if not votes.are_values and not np.isin(votes.outcome, (Outcome.A, Outcome.B)).any():
        raise ValueError(f"{path}: expected some votes that prefer a model; all {len(votes):,} are ties")
    if summary.islands and config.islands == "refuse":
        names = "; ".join(", ".join(island) for island in summary.islands)
        raise ValueError(
            f"{path}: no chain of votes ties these models to the others, so that their coefficients would mean nothing beside "
            f"theirs: {names}. Add votes, or set islands: leave_out (these models go), or islands: train"
            + (f" (for {feedback.name} their absolute level is still anchored by 'both bad')" if feedback.grounded else "")
        )

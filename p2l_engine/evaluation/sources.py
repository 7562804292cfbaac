"""Where the votes of an evaluation come from: the checkpoint's training config, or the user's files."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from p2l_engine.catalog import Catalog
from p2l_engine.engine import Engine
from p2l_engine.evaluation.report import Scores
from p2l_engine.tables.limits import MAX_DROPPED
from p2l_engine.tables.whole import Table
from p2l_engine.votes import Dropped, Votes, check_apart, prompts_hash, score_matrix, split
from p2l_engine.votes.by_source import balanced, read_by_source
from p2l_engine.votes.columns import has_scores, vote_table
from p2l_engine.votes.read import votes_of

logger = logging.getLogger(__name__)

Part = Literal["held-out", "validation"]


@dataclass(frozen=True, slots=True)
class Sources:
    """held_out: the votes to evaluate on; training: those that the checkpoint was trained on; true scores of the models; the
    training config; dropped: the invalid rows of held_out's file."""

    held_out: Votes
    training: Votes | None
    scores: Scores | None
    config: dict[str, Any]
    dropped: Dropped


def of_config(engine: Engine, part: Part, costs: Catalog | None) -> Sources:
    """The votes that ``training_config.json`` names, split as in training. costs: the catalog with the models' costs. Raises
    ValueError where nothing was held out, and where the file has changed since."""
    config = json.loads((engine.folder / "training_config.json").read_text(encoding="utf-8"))
    path = config.get("train_data_path")
    if not path:
        raise ValueError(f"{engine.folder}: its training config has no train_data_path: give votes to evaluate on (--votes)")
    columns, max_dropped = config.get("columns"), config.get("max_dropped", MAX_DROPPED)
    weighted = config.get("weighted_loss", True)
    leave_out, csv_escape, table = config.get("leave_out"), config.get("csv_escape"), None
    if by := config.get("sources"):
        votes, source, dropped = read_by_source(
            path, by, engine.feedback, columns, max_dropped, leave_out, weighted, True, csv_escape
        )
        votes = balanced(votes, source, config.get("source_balance", 1.0))
    else:
        table = vote_table(path, columns, leave_out, weighted, csv_escape=csv_escape)
        votes, dropped = votes_of(table, None, engine.feedback, max_dropped)
    if config.get("val_data_path"):
        if part != "validation":
            raise ValueError(f"{engine.folder}: trained with val_data_path, nothing was held out: use the part 'validation'")
        validation = vote_table(config["val_data_path"], columns, None, weighted, csv_escape=csv_escape)
        held_out, dropped = votes_of(validation, votes.models, engine.feedback, max_dropped)
        _check_unseen(config, part, held_out, config["val_data_path"], engine.folder)
        return Sources(held_out.among(engine.models), votes.among(engine.models), None, config, dropped)
    parts = split(
        votes, config.get("held_out", 0.0), config.get("validation", 0.0), config.get("split_by", "prompt"),
        config.get("split_seed", 0), config.get("train_share", 1.0),
    )  # fmt: skip
    if set(votes.models) != set(engine.models):  # disconnected models were left out
        parts = parts.among(engine.models)
    chosen = parts.held_out if part == "held-out" else parts.validation
    if chosen is None:
        raise ValueError(f"{engine.folder}: its training config has no {part} prompts: give votes to evaluate on (--votes)")
    _check_unseen(config, part, chosen, path, engine.folder)
    scores = scores_of(engine, (table, chosen), (table, parts.training), costs) if table else None
    return Sources(chosen, parts.training, scores, config, dropped)


def _check_unseen(config: dict[str, Any], part: Part, votes: Votes, path: str | Sequence[str], folder: Path) -> None:
    kept = (config.get("held_out_hashes") or {}).get(part)
    if kept is None:
        logger.warning(
            "%s: its training_config.json has no held_out_hashes, so it is not known whether its %s prompts were trained on",
            folder, part,
        )  # fmt: skip
    elif kept != prompts_hash(votes):
        raise ValueError(
            f"{path}: changed since {folder} was trained, or was split by a version that did not keep conversations together: "
            f"its {part} prompts may have been trained on; give votes to evaluate on (--votes)"
        )


def of_files(
    engine: Engine,
    held_out: str | Path,
    training: str | Path | None,
    costs: Catalog | None,
    max_dropped: float = MAX_DROPPED,
    columns: Mapping[str, str] | None = None,
    csv_escape: str | None = None,
) -> Sources:
    """The votes of these files, folders, globs or URIs, each read once. max_dropped, columns, csv_escape: as for
    ``votes.read``. Raises ValueError where the two share prompts."""
    table = vote_table(held_out, columns, csv_escape=csv_escape)
    votes, dropped = votes_of(table, engine.models, engine.feedback, max_dropped)
    if training is None:
        return Sources(votes, None, None, {}, dropped)
    known_table = vote_table(training, columns, csv_escape=csv_escape)
    known, _ = votes_of(known_table, engine.models, engine.feedback, max_dropped)
    check_apart(table.shown, votes, known)
    return Sources(votes, known, scores_of(engine, (table, votes), (known_table, known), costs), {}, dropped)


def scores_of(
    engine: Engine, held_out: tuple[Table, Votes], training: tuple[Table, Votes], costs: Catalog | None
) -> Scores | None:
    """The scores that the votes were made from, or None where they were made otherwise. held_out, training: each the table that
    was read, and those of its votes that are meant. costs: the catalog with the models' costs. Raises ValueError where the
    catalog lacks a model."""
    if engine.feedback.of_values or not (has_scores(held_out[0]) and has_scores(training[0])):
        return None
    matrices = []
    for table, votes in (held_out, training):
        prompts, models, matrix = score_matrix(table)
        row = {prompt: i for i, prompt in enumerate(prompts)}
        columns = [models.index(model) for model in engine.models]
        matrices.append(matrix[[row[prompt] for prompt in votes.prompts]][:, columns])
    prices = None
    if costs is not None:
        price = {model.name: model.cost for model in costs.models}
        missing = sorted(set(engine.models) - set(price))
        if missing:
            raise ValueError(
                f"catalog: expected a cost for each of the checkpoint's models, found none for {', '.join(missing)}"
            )
        prices = np.array([price[model] for model in engine.models])
    return Scores(matrices[0], matrices[1], prices, costs.unit if costs else "")

"""A checkpoint with what it has learned since its training, in a folder of its own."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from p2l_engine.backbone.head import Head
from p2l_engine.backbone.lengths import FILE as LENGTHS_FILE
from p2l_engine.backbone.lengths import LengthHead, LengthRows
from p2l_engine.backbone.uncertainty import FILE, Uncertainty
from p2l_engine.checkpoint import Checkpoint
from p2l_engine.checkpoint.files import read_json
from p2l_engine.checkpoint.rewrite import OF_ONE_HEAD, rewrite

RETIRED, ADAPTED = "retired", "adapted"  # keys of training_config.json: names, and what was learned each time
FEEDBACK = "feedback"  # in the record of what a service learned: see ``last_feedback``
LENGTHS = "lengths"  # and how many answers' lengths were learned from


def retired_models(folder: Path) -> tuple[str, ...]:
    """The names of the models that the checkpoint in this folder no longer has. Raises CheckpointError."""
    return tuple(read_json(folder / "training_config.json", dict).get(RETIRED, []))


def learned(folder: Path) -> list[dict[str, Any]]:
    """The records of what the checkpoint in this folder has learned, see ``write``. Raises CheckpointError."""
    return list(read_json(folder / "training_config.json", dict).get(ADAPTED, []))


def last_feedback(folder: Path) -> tuple[int, str | None]:
    """The last feedback, in a service's log, that the checkpoint in this folder was learned from: its number, and the id of its
    decision, by which the log is known; 0 for none. Raises CheckpointError."""
    found = [record[FEEDBACK] for record in learned(folder) if FEEDBACK in record]
    return (int(found[-1][0]), found[-1][1]) if found else (0, None)


def write(
    source: Checkpoint,
    target: Path,
    head: Head,
    models: Sequence[str],
    uncertainty: Uncertainty | None,
    drop: Collection[str] = (),
    record: Mapping[str, Any] | None = None,
    catalog: bytes | None = None,
) -> None:
    """Writes ``source`` with this head and its posterior to the folder ``target``, without the models ``drop``, whose names are
    kept as retired. record: what was learned, kept in training_config.json. catalog: the new catalog.yaml, None: the source's.

    Raises ValueError for a model to drop that is not there, or where none would be left; and as ``rewrite`` does.
    """
    unknown = [name for name in drop if name not in models]
    if unknown:
        raise ValueError(f"drop: expected models of the checkpoint ({', '.join(models)}), got {', '.join(unknown)}")
    kept = [i for i, name in enumerate(models) if name not in drop]
    if not kept:
        raise ValueError("drop: expected at least one model to stay, got the names of all")
    rows = [*kept, *range(head.n_models, head.width)]
    names = tuple(models[i] for i in kept)
    training = read_json(source.folder / "training_config.json", dict)
    entries: dict[str, Any] = {}
    if drop:
        entries[RETIRED] = [*training.get(RETIRED, []), *(name for name in models if name in drop)]
    if record:
        entries[ADAPTED] = [*training.get(ADAPTED, []), dict(record)]
    posterior = None if uncertainty is None else _without(uncertainty, names)
    files: dict[str, Any] = {FILE: None if posterior is None else posterior.write}
    if drop and source.lengths is not None:
        files[LENGTHS_FILE] = source.lengths.only(names).write
    if catalog is not None:
        files["catalog.yaml"] = catalog
    rewrite(source, target, Head(head.weight[rows], head.bias[rows], len(names)), names, entries, files)


def write_lengths(source: Checkpoint, target: Path, rows: Mapping[str, LengthRows], record: Mapping[str, Any]) -> None:
    """Writes ``source`` with these rows, by quantity, in place of those that it has, to the folder ``target``. record: what
    they were learned from, kept in training_config.json. Raises as ``rewrite`` does, and as ``LengthHead``."""
    lengths = LengthHead(source.models, **rows)
    kept = [source.folder / name for name in OF_ONE_HEAD]  # the head is the same
    files: dict[str, Any] = {path.name: path.read_bytes() for path in kept if path.is_file()}
    rewrite(source, target, source.head, training={LENGTHS: dict(record)}, files=files | {LENGTHS_FILE: lengths.write})


def _without(uncertainty: Uncertainty, names: tuple[str, ...]) -> Uncertainty | None:
    """The posterior of those of its models that have these names."""
    kept = [i for i, name in enumerate(uncertainty.models) if name in names]
    if not kept:
        return None
    factors, models = uncertainty.factors[torch.tensor(kept)], tuple(uncertainty.models[i] for i in kept)
    trained = tuple(name for name in uncertainty.trained if name in models)
    return replace(uncertainty, factors=factors, models=models, order=names, trained=trained)

"""A checkpoint as one folder in the published layout, adapters merged, with a model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from p2l_engine import checkpoint
from p2l_engine.backbone.lengths import FILE as LENGTHS_FILE
from p2l_engine.backbone.shrinkage import FILE as SHRINKAGE_FILE
from p2l_engine.backbone.theta_map import FILE as MAP_FILE
from p2l_engine.backbone.topics import FILE as TOPICS_FILE
from p2l_engine.backbone.uncertainty import FILE
from p2l_engine.checkpoint import card, fingerprint, huggingface
from p2l_engine.checkpoint.saving import write_json, write_tensors, write_whole
from p2l_engine.errors import CheckpointError
from p2l_engine.jsonable import from_json
from p2l_engine.reports import Evaluation


def export(source: str | Path | None, target: Path, evaluation: Path | None = None) -> None:
    """Writes ``source`` (a folder, a hub or built-in name, None for the default) to the folder ``target``: config, safetensors
    (the backbone in bfloat16, the head in its own dtype), tokenizer, model_list.json and training_config.json as lmarena/p2l's
    code reads them, and README.md.

    The same source gives the same bytes. evaluation: figures of ``p2l-engine eval --json`` for the card; None takes the
    source's own evaluation.json where it has one. Raises CheckpointError for a source that cannot be read and for figures of
    another checkpoint, ValueError where ``target`` is neither missing nor empty, OSError where it cannot be written. It is
    written atomically.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target}: expected a folder that does not exist yet, or an empty one")
    loaded = checkpoint.load(source)
    if loaded.theta_map is not None:
        raise CheckpointError(
            f"{loaded.folder}: {MAP_FILE}: a monotone map of theta, which lmarena/p2l's code cannot read: calibrate the "
            "checkpoint it came from with linear maps alone (p2l-engine calibrate --map temperature --map offsets --map both), "
            "and export that"
        )
    if loaded.topics is not None:
        raise CheckpointError(
            f"{loaded.folder}: {TOPICS_FILE}: the head reads topics beside hidden states, which lmarena/p2l's code cannot "
            "compute: train one without them (topics: null in the training config), and export that"
        )
    if loaded.shrinkage is not None:
        raise CheckpointError(
            f"{loaded.folder}: {SHRINKAGE_FILE}: shrinks the coefficients of prompts far from those of training, which "
            "lmarena/p2l's code cannot read: export the checkpoint it came from, or a copy of this one without that file"
        )
    training = json.loads((loaded.folder / "training_config.json").read_text(encoding="utf-8"))
    path = evaluation or loaded.folder / "evaluation.json"
    figures = _figures(path, must_exist=evaluation is not None)
    if figures is not None:
        _check_own(path, figures, loaded)
    try:
        readme = card.text(list(loaded.models), training, None if figures is None else from_json(Evaluation, figures))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"no card can be made of {loaded.folder / 'training_config.json'}{'' if figures is None else f' and {path}'}: "
            f"something is missing in them or has another type: {type(error).__name__}: {error}"
        ) from None

    def fill(work: Path) -> None:
        body = {f"model.{name}": weight.to(torch.bfloat16) for name, weight in loaded.weights.read().items()}
        # The head is small, and rows that were learned after training are not rounded: theta stays what it was.
        write_tensors(work / "model.safetensors", body | checkpoint.head_weights(loaded.folder), dtype=None)
        theirs, tokenizer = loaded.transformers()
        huggingface.write_config(work, theirs)
        huggingface.write_tokenizer(work, tokenizer)
        write_json(work / "model_list.json", list(loaded.models))
        write_json(work / "training_config.json", {"model_type": loaded.config.model_type} | training)
        (work / "README.md").write_text(readme, encoding="utf-8")
        if figures is not None:
            write_json(work / "evaluation.json", figures)
        if loaded.uncertainty is not None:  # which lmarena/p2l's code does not look for
            loaded.uncertainty.write(work / FILE)
        if loaded.lengths is not None:  # nor for this
            loaded.lengths.write(work / LENGTHS_FILE)
        catalog = loaded.folder / "catalog.yaml"
        if catalog.is_file():
            (work / "catalog.yaml").write_bytes(catalog.read_bytes())

    write_whole(target, fill, replace=False)


def _figures(path: Path, must_exist: bool) -> dict[str, Any] | None:
    if not must_exist and not path.is_file():
        return None
    try:
        figures = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: expected the JSON that 'p2l-engine eval --json' writes: {error}") from None
    if not isinstance(figures, dict) or not {"held_out", "checkpoint", "bootstrap"} <= set(figures):
        raise CheckpointError(f"{path}: expected the JSON that 'p2l-engine eval --json' writes, found something else")
    return figures


def _check_own(path: Path, figures: dict[str, Any], loaded: checkpoint.Checkpoint) -> None:
    of = figures["checkpoint"] if isinstance(figures["checkpoint"], dict) else {}
    own = {"models": list(loaded.models), "feedback": loaded.feedback.name, "head": fingerprint.of_head(loaded.head)}
    # Figures of earlier versions do not say which head they are of.
    other = [key for key in own if of.get(key) != own[key] and (key in of or key != "head")]
    if other:
        raise CheckpointError(
            f"{path}: expected figures of {loaded.folder}, found another checkpoint's, whose {' and '.join(other)} differ: "
            "evaluate this one (p2l-engine eval --json)"
        )

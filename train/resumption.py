"""Whether an interrupted or finished training run may be resumed: its config and inputs are kept with its states."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError, safe_open

from p2l_engine import checkpoint
from p2l_engine.checkpoint import fingerprint
from p2l_engine.checkpoint.saving import write_json
from p2l_engine.train.config import TrainConfig
from p2l_engine.train.frozen import adapter_folder
from p2l_engine.votes import Splits, Votes

logger = logging.getLogger(__name__)

RUN = "run.json"  # the run's config and inputs
IfPresent = Literal["refuse", "resume", "restart"]


def inputs_of(config: TrainConfig, parts: Splits, max_steps: int) -> dict[str, Any]:
    """The inputs of a run besides its config: hashes of the votes, the validation votes, the backbone and the adapter."""
    folder, files = adapter_folder(config), ("adapter_config.json", "adapter_model.safetensors")
    found = [] if folder is None else [folder / name for name in files if (folder / name).is_file()]
    return {
        "max_steps": max_steps,
        "votes": _fingerprint(parts.training),
        "validation": None if parts.validation is None else _fingerprint(parts.validation),
        "backbone": fingerprint.of_backbone(checkpoint.find(config.pretrain_model_name)),
        **({"adapter": {file.name: fingerprint.of_file(file) for file in found}} if found else {}),
    }


def last_state(state: Path, config: TrainConfig, inputs: dict[str, Any], if_present: IfPresent) -> str | None:
    """The run's state to resume from, in its folder ``state``; None to start.

    Raises ValueError where ``state`` exists and if_present is "refuse", or belongs to a run of another config or other inputs.
    """
    if state.exists() and if_present == "refuse":
        raise ValueError(f"{state}: a run of this name exists already: --resume continues it, --restart deletes it")
    if state.exists() and if_present == "resume":
        return _resume(state, _run(config, inputs))
    if if_present == "resume":
        logger.info("%s: no state to resume from: starting", state)
    return None


def begin(state: Path, config: TrainConfig, inputs: dict[str, Any]) -> None:
    """Makes the folder of the run's states, in place of any other: last, so that a run that is refused leaves none, and the
    states of the one before as they were."""
    shutil.rmtree(state, ignore_errors=True)
    state.mkdir(parents=True)
    write_json(state / RUN, _run(config, inputs))


def _run(config: TrainConfig, inputs: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a run; through JSON, so that it compares equal when it is read again."""
    kept = {"config": config.model_dump(), **inputs, "processes": os.environ.get("WORLD_SIZE", "1")}
    run: dict[str, Any] = json.loads(json.dumps(kept))
    return run


def check_finished(folder: Path, config: TrainConfig, inputs: dict[str, Any]) -> None:
    """Raises ValueError unless the checkpoint in ``folder`` is what this run would write."""
    try:
        before = json.loads((folder / "training_config.json").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder}: expected no folder yet, or this run's checkpoint: {error}") from None
    now = json.loads(json.dumps(config.model_dump())) | inputs
    # Checkpoints of earlier versions do not record their inputs.
    known = before | (before.get("inputs") or {key: inputs[key] for key in inputs})
    if isinstance(known.get("head_optimum"), dict):  # nor keys that came later
        known["head_optimum"] = {"adapter": None, **known["head_optimum"]}
    changed = _changed(known, now)
    if changed:
        raise ValueError(
            f"{folder}: expected no folder yet, found the checkpoint of another run, which differs in {changed}; "
            "--restart replaces it"
        )


def is_last(folder: Path) -> bool:
    """Whether a state is that of the run's last step."""
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    return int(state["global_step"]) >= int(state["max_steps"]) and (folder / "model.safetensors").is_file()


def _resume(state: Path, run: dict[str, Any]) -> str | None:
    try:
        before = json.loads((state / RUN).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{state}: expected {RUN}, the config of the run, and it cannot be read: {error}; --restart deletes the run"
        ) from None
    changed = _changed(*({**x["config"], **{key: x[key] for key in x if key != "config"}} for x in (before, run)))
    if changed:
        raise ValueError(
            f"{state}: cannot be resumed, since this changed: {changed}. Change it back, or delete the run with --restart"
        )
    folders = sorted(state.glob("checkpoint-*"), key=lambda folder: int(folder.name.rsplit("-", 1)[1]), reverse=True)
    whole = next((folder for folder in folders if _is_complete(folder)), None)
    for folder in folders[: folders.index(whole) if whole else None]:
        logger.warning("%s is incomplete: removed", folder)
        shutil.rmtree(folder)
    logger.info("resuming from %s" if whole else "no complete state yet: starting again in %s", whole or state)
    return None if whole is None else str(whole)


def _changed(before: dict[str, Any], now: dict[str, Any]) -> str:
    return "; ".join(f"{key}: was {before.get(key)!r:.60}, is {now[key]!r:.60}" for key in now if before.get(key) != now[key])


def _is_complete(folder: Path) -> bool:
    """Whether a state is complete: the Trainer writes trainer_state.json last."""
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        weights = folder / "model.safetensors"
        if weights.exists():
            with safe_open(weights, "pt"):
                pass
    except (OSError, json.JSONDecodeError, SafetensorError):
        return False
    return True


def _fingerprint(votes: Votes) -> str:
    """A hash of all that training reads of the votes."""
    digest = hashlib.sha256(json.dumps([votes.prompts, votes.models]).encode())
    for column in (votes.prompt, votes.a, votes.b, votes.outcome, votes.weight):
        digest.update(np.ascontiguousarray(column).tobytes())
    return digest.hexdigest()

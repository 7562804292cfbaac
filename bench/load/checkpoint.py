"""A checkpoint with random weights that is computed so fast that everything else can be seen."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from bench import subjects
from p2l_engine.checkpoint.saving import write_json, write_tensors

MODELS = 9


def write_tiny(folder: Path, models: int = MODELS) -> tuple[str, ...]:
    """Writes it, and returns the names of the models that it ranks."""
    found = subjects.checkpoint("tiny", models, torch.device("cpu"), torch.float32)
    config, tokenizer = subjects.ARCHITECTURES["tiny"](), subjects.tokenizer()
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tensors = {f"model.{name}": weight for name, weight in found.weights.read().items()}
    weight, bias = found.head.weight, found.head.bias
    tensors |= {"head.head.weight": weight[:models], "head.head.bias": bias[:models]}
    tensors |= {"head.eta_head.weight": weight[models:], "head.eta_head.bias": bias[models:]}
    write_tensors(folder / "model.safetensors", tensors)
    write_json(folder / "model_list.json", list(found.models))
    training = {"model_type": config.model_type, "head_type": "rk", "loss_type": "grk"}
    (folder / "training_config.json").write_text(json.dumps(training), encoding="utf-8")
    return found.models


def use(given: str | None, folder: Path) -> tuple[str, tuple[str, ...]]:
    """A checkpoint's name or folder, and the models that it ranks: a tiny one in ``folder`` where none is given."""
    if given is None:
        return str(folder / "tiny"), write_tiny(folder / "tiny")
    from p2l_engine import checkpoint

    return given, checkpoint.load(given).models

"""A trained model's checkpoint folder, in the published layout."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from p2l_engine.backbone.shrinkage import FILE as SHRINKAGE_FILE
from p2l_engine.backbone.topics import FILE as TOPICS_FILE
from p2l_engine.checkpoint import Checkpoint, huggingface, read_config
from p2l_engine.checkpoint.adapter import NEW_ROWS, PEFT_PREFIX
from p2l_engine.checkpoint.files import read_json, read_tensors
from p2l_engine.checkpoint.saving import write_json, write_tensors, write_whole
from p2l_engine.train.config import TrainConfig
from p2l_engine.train.model import P2LModel, bare, published_tensors
from p2l_engine.train.optimum import FittedLayers
from p2l_engine.votes import Splits, prompts_hash


def write(
    folder: Path,
    model: P2LModel,
    state: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    models: Sequence[str],
    config: TrainConfig,
    hashes: Mapping[str, str] | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> None:
    """Writes the checkpoint in bfloat16, in the published layout; for LoRA an adapter folder, which names its backbone.

    state: the whole model's state dict, gathered from all processes. hashes: ``unseen_hashes`` of the votes; inputs:
    ``resumption.inputs_of`` the run; training_config.json keeps both. The folder is written atomically. Raises OSError where it
    cannot be written, FloatingPointError for weights that are not finite; then nothing is kept.
    """

    def fill(work: Path) -> None:
        tensors = published_tensors(state, model.grown, config.lora is not None)
        decoder = bare(model.model)
        _describe(work, models, decoder.config.model_type, config, hashes, inputs)
        if config.lora is None:
            write_tensors(work / "model.safetensors", tensors)
            huggingface.write_config(work, decoder.config)
            huggingface.write_tokenizer(work, tokenizer)
            return
        write_tensors(work / "adapter_model.safetensors", tensors)
        adapted = (name.split(".lora_A.")[0] for name in tensors if ".lora_A." in name)
        # With their parents: the experts of a mixture may have modules of the same last names.
        modules = sorted({".".join(name.split(".")[-2:]) for name in adapted})
        layers = list(range(config.lora.first_layer, int(decoder.config.num_hidden_layers)))
        adapter = _adapter(folder, config, config.lora.r, config.lora.alpha, modules) | {"layers_to_transform": layers}
        write_json(work / "adapter_config.json", adapter)

    write_whole(folder, fill)


def write_head(
    folder: Path,
    base: Checkpoint,
    found: FittedLayers,
    config: TrainConfig,
    parts: Splits,
    inputs: Mapping[str, Any],
) -> None:
    """Writes a head over the backbone ``base``, with topics and shrinkage of what it reads, as an adapter folder with the
    factors of the base's own adapter, or none; the head in float32; else as ``write``."""
    best, head, m = found.best, found.best.head, found.best.head.n_models
    tensors = {"head.head.weight": head.weight[:m], "head.head.bias": head.bias[:m]}
    if head.has_eta:
        tensors |= {"head.eta_head.weight": head.weight[m:], "head.eta_head.bias": head.bias[m:]}
    tensors = {f"{PEFT_PREFIX}{name}": tensor.float() for name, tensor in tensors.items()}
    if base.folder != base.base:  # an adapter of its own
        own = read_tensors(base.folder / "adapter_model.safetensors")
        settings = read_json(base.folder / "adapter_config.json", dict)
        settings |= {"base_model_name_or_path": _from(folder, config.pretrain_model_name)}
        tensors |= {n: w for n, w in own.items() if not n.removeprefix(PEFT_PREFIX).startswith("head.")}
    else:
        settings, table = _adapter(folder, config, 1, 1, []), base.weights.read()["embed_tokens.weight"]
        if grown := len(table) - int(read_config(base.folder).vocab_size):
            tensors[f"{PEFT_PREFIX}{NEW_ROWS}"] = table[-grown:].float()
    optimum = {"deviation": best.deviation, "validation_log_loss": {f"{key:g}": loss for key, loss in best.losses.items()}}

    def fill(work: Path) -> None:
        model_type = str(base.config.model_type)
        _describe(work, parts.training.models, model_type, config, unseen_hashes(parts), inputs, {"optimum": optimum})
        write_tensors(work / "adapter_model.safetensors", tensors, None)
        write_json(work / "adapter_config.json", settings)
        if found.topics is not None:
            found.topics.write(work / TOPICS_FILE)
        if found.shrinkage is not None:
            found.shrinkage.write(work / SHRINKAGE_FILE)

    write_whole(folder, fill)


def unseen_hashes(parts: Splits) -> dict[str, str]:
    """By which ``p2l-engine eval`` knows the prompts that were not trained on."""
    unseen = {"held-out": parts.held_out, "validation": parts.validation}
    return {name: prompts_hash(votes) for name, votes in unseen.items() if votes is not None}


def _describe(
    work: Path,
    models: Sequence[str],
    model_type: str,
    config: TrainConfig,
    hashes: Mapping[str, str] | None,
    inputs: Mapping[str, Any] | None,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Writes model_list.json and training_config.json. more: what else the latter keeps."""
    write_json(work / "model_list.json", list(models))
    kept = {"model_type": model_type} | config.model_dump(mode="json")
    kept |= {"held_out_hashes": dict(hashes)} if hashes else {}
    write_json(work / "training_config.json", kept | ({"inputs": dict(inputs)} if inputs else {}) | dict(more or {}))


def _adapter(folder: Path, config: TrainConfig, rank: int, alpha: int, modules: list[str]) -> dict[str, Any]:
    """The content of adapter_config.json. modules: on which there are factors."""
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": _from(folder, config.pretrain_model_name),
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": modules,
        "bias": "none",
    }


def _from(folder: Path, backbone: str) -> str:
    """The backbone's name; a relative path starts at the adapter's folder, not where training ran."""
    path = Path(backbone)
    return os.path.relpath(path.resolve(), folder.resolve()) if path.is_dir() and not path.is_absolute() else backbone

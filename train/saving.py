"""A trained model's checkpoint folder, in the published layout."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from p2l_engine.checkpoint import huggingface
from p2l_engine.checkpoint.saving import write_json, write_tensors, write_whole
from p2l_engine.train.config import TrainConfig
from p2l_engine.train.model import P2LModel, bare, published_tensors


def write(
    folder: Path,
    model: P2LModel,
    state: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    models: Sequence[str],
    config: TrainConfig,
    held_out_hashes: Mapping[str, str] | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> None:
    """Writes the checkpoint in bfloat16, in the published layout; for LoRA an adapter folder, which names its backbone.

    state: the whole model's state dict, gathered from all processes. inputs: ``resumption.inputs_of`` the run, kept in
    training_config.json. The folder is written atomically. Raises OSError where it cannot be written, FloatingPointError for
    weights that are not finite; then nothing is kept.
    """

    def fill(work: Path) -> None:
        tensors = published_tensors(state, model.grown, config.lora is not None)
        write_json(work / "model_list.json", list(models))
        decoder = bare(model.model)
        hashes = {"held_out_hashes": dict(held_out_hashes)} if held_out_hashes else {}
        kept = config.model_dump(mode="json")
        made_of = {"inputs": dict(inputs)} if inputs else {}
        write_json(work / "training_config.json", {"model_type": decoder.config.model_type} | kept | hashes | made_of)
        if config.lora is None:
            write_tensors(work / "model.safetensors", tensors)
            huggingface.write_config(work, decoder.config)
            huggingface.write_tokenizer(work, tokenizer)
            return
        write_tensors(work / "adapter_model.safetensors", tensors)
        adapted = (name.split(".lora_A.")[0] for name in tensors if ".lora_A." in name)
        adapter = {
            "peft_type": "LORA",
            "base_model_name_or_path": _from(folder, config.pretrain_model_name),
            "r": config.lora.r,
            "lora_alpha": config.lora.alpha,
            # With their parents: the experts of a mixture may have modules of the same last names.
            "target_modules": sorted({".".join(name.split(".")[-2:]) for name in adapted}),
            "layers_to_transform": list(range(config.lora.first_layer, int(decoder.config.num_hidden_layers))),
            "bias": "none",
        }
        write_json(work / "adapter_config.json", adapter)

    write_whole(folder, fill)


def _from(folder: Path, backbone: str) -> str:
    """The backbone's name; a relative path starts at the adapter's folder, not where training ran."""
    path = Path(backbone)
    return os.path.relpath(path.resolve(), folder.resolve()) if path.is_dir() and not path.is_absolute() else backbone

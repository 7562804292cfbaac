"""A folder's config and tokenizer as transformers' objects: for training, export, and what only transformers can read.

They are written so that transformers 4, which lmarena/p2l's code runs on, reads them like transformers 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from p2l_engine.checkpoint.files import read_json
from p2l_engine.checkpoint.saving import write_json
from p2l_engine.errors import CheckpointError

OWN_KEYS = ("backend", "is_local", "local_files_only")  # how transformers 5 found a tokenizer, not what it is


def read_config(folder: Path) -> PretrainedConfig:
    """The decoder's config. Raises CheckpointError, also for models of several parts, such as those of texts and images."""
    path = folder / "config.json"
    read_json(path, dict)
    try:
        # False, not unset: unset, transformers may ask on the terminal whether to run a checkpoint's own code.
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each config's class checks its values in its own way
        raise CheckpointError(f"{path}: transformers cannot read it: {error}") from error
    if getattr(config, "rope_parameters", None):  # models do this when they are made: the lengths beside RoPE's own win
        config.standardize_rope_params()
    # Parts without tokens of their own, such as attn_config, are groups of settings.
    parts = [name for name in sorted(config.sub_configs) if hasattr(getattr(config, name, None), "vocab_size")]
    parts += ["encoder", "decoder"] if config.is_encoder_decoder else []
    if parts:
        raise CheckpointError(
            f"{path}: expected one decoder of text, found the model of several parts {config.model_type!r} "
            f"({', '.join(parts)}): save its text decoder alone"
        )
    for key in ("hidden_size", "num_hidden_layers", "vocab_size"):
        if not isinstance(getattr(config, key, None), int):
            raise CheckpointError(
                f"{path}: {key}: expected a number, as decoders of text have, found {config.model_type} without"
            )
    return config


def read_tokenizer(folder: Path, training: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer, with the chat template and the CLS token that ``training`` (a training config) gives it. Raises
    CheckpointError where it cannot be read, or has no CLS token or no chat template."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise CheckpointError(f"{folder}: the tokenizer cannot be read (tokenizer.json): {error}") from error
    if training.get("chat_template"):
        tokenizer.chat_template = training["chat_template"]
    if not tokenizer.cls_token and training.get("cls_token_if_none"):
        tokenizer.add_special_tokens({"cls_token": training["cls_token_if_none"]})
    if not tokenizer.cls_token:
        raise CheckpointError(f"{folder}: expected a tokenizer with a CLS token, found none (tokenizer_config.json)")
    if not tokenizer.chat_template:
        raise CheckpointError(f"{folder}: expected a tokenizer with a chat template, found none")
    return tokenizer


def write_config(folder: Path, config: PretrainedConfig) -> None:
    """Writes config.json for weights in bfloat16, with the keys of transformers 5 and those of 4: ``rope_parameters`` and
    ``rope_theta``, ``rope_scaling``; ``dtype`` and ``torch_dtype``.

    A RoPE that differs from layer to layer has no common spelling in transformers 4, and keeps the one of 5.
    """
    config.save_pretrained(folder)
    values = read_json(folder / "config.json", dict)
    values |= {"dtype": "bfloat16", "torch_dtype": "bfloat16"} | _rope_of_4(values.get("rope_parameters"))
    write_json(folder / "config.json", dict(sorted(values.items())))


def _rope_of_4(parameters: object) -> dict[str, Any]:
    """RoPE's parameters under the keys of transformers 4; none where they differ from layer to layer."""
    if not isinstance(parameters, Mapping) or any(isinstance(value, Mapping) for value in parameters.values()):
        return {}
    scaling = dict(parameters)
    top = {key: scaling.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in scaling}
    kind = scaling.get("rope_type", "default")
    if kind == "longrope" and "original_max_position_embeddings" in scaling:  # 4 reads it outside of rope_scaling
        top["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
    return top | {"rope_scaling": None if kind == "default" else scaling}


def write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes tokenizer.json and tokenizer_config.json, which hold all of the tokenizer: the chat template, and that long texts
    are cut on the left, since the CLS token is the last one.

    Tokens that the tokenizer puts around a text are dropped: the chat template writes them, and some readers would add them a
    second time. Raises CheckpointError for a tokenizer that is not built on the tokenizers library.
    """
    if not tokenizer.is_fast:
        raise CheckpointError(
            f"tokenizer: expected one that is built on the tokenizers library, got {type(tokenizer).__name__}: "
            "it has no tokenizer.json, so that the checkpoint could not be read"
        )
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    if tokenizer.num_special_tokens_to_add():
        core = read_json(folder / "tokenizer.json", dict)
        write_json(folder / "tokenizer.json", core | {"post_processor": None})
    config = read_json(folder / "tokenizer_config.json", dict)
    config = {key: value for key, value in config.items() if key not in OWN_KEYS}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "right", "truncation_side": "left"}
    if isinstance(config.get("extra_special_tokens"), list):  # a mapping, in transformers 4
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    write_json(folder / "tokenizer_config.json", dict(sorted(config.items())))

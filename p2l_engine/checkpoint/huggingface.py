"""A folder's config and tokenizer as transformers' objects: for training, export, and what only transformers can read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from p2l_engine.checkpoint.files import read_json
from p2l_engine.errors import CheckpointError


def read_config(folder: Path) -> PretrainedConfig:
    """The decoder's config. Raises CheckpointError."""
    read_json(folder / "config.json", dict)
    try:
        # False, not unset: unset, transformers may ask on the terminal whether to run a checkpoint's own code.
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: transformers cannot read it: {error}") from error
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

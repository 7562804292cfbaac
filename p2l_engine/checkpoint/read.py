"""Find and read a P2L checkpoint: the published folder layout, a hub name, or an adapter over another backbone.

Published layout (lmarena/p2l): config.json, model.safetensors or shards with their index, the tokenizer, model_list.json
(the M names in column order) and training_config.json (model_type, head_type, loss_type, optionally
linear_head_downsize_factor and head_config). Weights: ``model.*`` of transformers' bare decoder, ``head.head.*`` and, for rk
heads, ``head.eta_head.*``. An adapter folder holds, instead of model.safetensors, peft's adapter_config.json, which names the
backbone, and adapter_model.safetensors: LoRA factors, the whole head, and embeddings of new tokens. Weights are read with
safetensors only: nothing in a checkpoint is ever executed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from p2l_engine.backbone.head import Head
from p2l_engine.checkpoint import smollm2
from p2l_engine.checkpoint.adapter import NEW_ROWS, PEFT_PREFIX, field, merge
from p2l_engine.errors import CheckpointError
from p2l_engine.feedback import NAMES, FeedbackModel, feedback_model

DEFAULT = Path(__file__).parent.parent / "default"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A P2L checkpoint in memory, on the CPU, in the dtypes that its files hold (adapters merged in float32).

    weights: the bare decoder's, without the prefix ``model.``. models: the M names in column order.
    """

    folder: Path
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    models: tuple[str, ...]
    feedback: FeedbackModel
    weights: dict[str, Tensor]
    head: Head


def load(path_or_repo: str | Path | None = None) -> Checkpoint:
    """Reads a checkpoint: a local folder, else a hub repository's name; None is the built-in default.

    Raises CheckpointError, which says what is missing or of a wrong shape, expected and found.
    """
    folder = DEFAULT if path_or_repo is None else find(path_or_repo)
    models = _models(folder)
    training = _json(folder / "training_config.json", dict)
    feedback = _feedback(folder, training)
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        lora = _json(adapter, dict)
        base = find(str(field(adapter, lora, "base_model_name_or_path", str)))
        weights = decoder_weights(base)
        update = {n.removeprefix(PEFT_PREFIX): w for n, w in _read(folder / "adapter_model.safetensors").items()}
        weights = merge(folder, weights, update, lora)
        heads = update
    else:
        base = folder
        heads = _tensors(folder)
        weights = {n.removeprefix("model."): w for n, w in heads.items() if n.startswith("model.")}
    config = read_config(base)
    if adapter.is_file() and NEW_ROWS in heads:
        config.vocab_size = len(weights["embed_tokens.weight"])
    if not (folder / "tokenizer.json").is_file() and not adapter.is_file():
        raise CheckpointError(f"{folder}: expected the tokenizer's tokenizer.json, found none")
    tokenizer = read_tokenizer(folder if (folder / "tokenizer.json").is_file() else base, training)
    if len(tokenizer) > int(config.vocab_size):
        raise CheckpointError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, but the backbone's vocab_size is {config.vocab_size}: "
            "expected an embedding for every token, the CLS token among them"
        )
    head = Head.from_tensors(
        {n.removeprefix("head."): w for n, w in heads.items() if n.startswith("head.")},
        hidden=int(config.hidden_size), n_models=len(models), training=training, where=str(folder),
    )  # fmt: skip
    return Checkpoint(folder, config, tokenizer, models, feedback, weights, head)


def find(path_or_repo: str | Path) -> Path:
    """The local folder of a path, of the built-in backbone's name, or of a hub repository (downloaded when need be)."""
    name = str(path_or_repo)
    path = Path(path_or_repo).expanduser()
    if name and path.is_dir():
        return path
    if name == smollm2.NAME:
        return smollm2.folder()
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(f"checkpoint: expected a folder or a hub name like 'owner/name', found neither at {name!r}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(f"checkpoint: {name!r} is no folder here and could not be had from the hub: {first}") from error


def decoder_weights(folder: Path) -> dict[str, Tensor]:
    """The bare decoder's weights of a folder that holds a decoder, a language model or a P2L checkpoint."""
    return {n.removeprefix("model."): w for n, w in _tensors(folder).items() if not n.startswith(("lm_head.", "head."))}


def head_weights(folder: Path) -> dict[str, Tensor]:
    """The head's weights under their published names, layer by layer, of a checkpoint or an adapter."""
    adapter = folder / "adapter_model.safetensors"
    tensors = _read(adapter) if adapter.is_file() else _tensors(folder)
    return {n: w for name, w in tensors.items() if (n := name.removeprefix(PEFT_PREFIX)).startswith("head.")}


def _json(path: Path, kind: type) -> Any:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: expected the file {path.name}, found none") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: expected JSON: {error}") from None
    if not isinstance(value, kind):
        raise CheckpointError(f"{path}: expected a JSON {kind.__name__}, found {type(value).__name__}")
    return value


def read_config(folder: Path) -> PretrainedConfig:
    """The decoder's config. Raises CheckpointError."""
    _json(folder / "config.json", dict)
    try:
        # False, not unset: unset, transformers may ask on the terminal whether to run a checkpoint's own code.
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: transformers cannot read it: {error}") from error
    return config


def _models(folder: Path) -> tuple[str, ...]:
    names = _json(folder / "model_list.json", list)
    if not names or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{folder / 'model_list.json'}: expected a list of model names")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise CheckpointError(f"{folder / 'model_list.json'}: expected different names, found {', '.join(twice)} twice")
    return tuple(names)


def _feedback(folder: Path, training: dict[str, Any]) -> FeedbackModel:
    loss, head = training.get("loss_type"), training.get("head_type")
    if loss not in NAMES:
        raise CheckpointError(
            f"{folder / 'training_config.json'}: loss_type: expected one of {', '.join(NAMES)}, found {loss!r}"
        )
    if head not in ("bt", "rk"):
        raise CheckpointError(f"{folder / 'training_config.json'}: head_type: expected 'bt' or 'rk', found {head!r}")
    feedback = feedback_model(loss)
    if feedback.has_eta and head == "bt":
        raise CheckpointError(
            f"{folder / 'training_config.json'}: loss_type {loss!r} needs a tie parameter, but head_type 'bt' has none"
        )
    return feedback


def read_tokenizer(folder: Path, training: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer, with the chat template and the CLS and padding tokens that training gave it where it has none."""
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


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: expected the file {path.name}, found none") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged, truncated or no safetensors file: {error}; fetch it again") from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise CheckpointError(f"{path}: {name}: expected floating point, found {tensor.dtype}")
    return tensors


def _tensors(folder: Path) -> dict[str, Tensor]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return _read(single)
    if index.is_file():
        places = _json(index, dict).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
            raise CheckpointError(f"{index}: expected a 'weight_map' from key to file, found {places!r:.80}")
        tensors: dict[str, Tensor] = {}
        for shard in sorted(set(places.values())):
            tensors |= _read(folder / Path(shard).name)
        missing = sorted(set(places) - set(tensors))
        if missing:
            raise CheckpointError(f"{folder}: the shards lack {_some(missing)}, which {index.name} promises")
        return tensors
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    hint = f" ({_some(pickled)} is pickled and never read: convert it to safetensors)" if pickled else ""
    raise CheckpointError(f"{folder}: expected model.safetensors or model.safetensors.index.json, found neither{hint}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")

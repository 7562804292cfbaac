"""Find and read a P2L checkpoint: the published folder layout, a built-in or hub name, or an adapter over another backbone.

Published layout (lmarena/p2l): config.json, model.safetensors or shards with their index, the tokenizer, model_list.json
(the M names in column order) and training_config.json (model_type, head_type, loss_type, optionally
linear_head_downsize_factor and head_config). Weights: ``model.*`` of transformers' bare decoder, ``head.head.*`` and, for rk
heads, ``head.eta_head.*``. An adapter folder holds, instead of model.safetensors, peft's adapter_config.json, which names the
backbone, and adapter_model.safetensors: LoRA factors, the whole head, and embeddings of new tokens. A checkpoint that was
adapted to votes also has the posterior of its head's rows (``backbone.uncertainty``), one that was calibrated may have a
monotone map of theta (``backbone.theta_map``), one that knows its training prompts may shrink the coefficients of others
(``backbone.shrinkage``), one whose head also reads what a prompt is about has topics (``backbone.topics``), and one that has
learned from logged answers knows what these take (``backbone.lengths``). Weights are read with safetensors only: nothing in a
checkpoint is ever executed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import date as Date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from p2l_engine import arguments
from p2l_engine.backbone.families import DecoderConfig
from p2l_engine.backbone.head import Head
from p2l_engine.backbone.lengths import FILE as LENGTHS_FILE
from p2l_engine.backbone.lengths import LengthHead
from p2l_engine.backbone.rope import UnsupportedConfig
from p2l_engine.backbone.shrinkage import FILE as SHRINKAGE_FILE
from p2l_engine.backbone.shrinkage import Shrinkage
from p2l_engine.backbone.theta_map import FILE as MAP_FILE
from p2l_engine.backbone.theta_map import ThetaMap
from p2l_engine.backbone.topics import FILE as TOPICS_FILE
from p2l_engine.backbone.topics import Topics
from p2l_engine.backbone.uncertainty import FILE, Uncertainty
from p2l_engine.checkpoint import builtin, fingerprint
from p2l_engine.checkpoint.adapter import PEFT_PREFIX, Adapter
from p2l_engine.checkpoint.files import read_json, read_tensors, read_weights
from p2l_engine.checkpoint.lora import Lora, field
from p2l_engine.checkpoint.stored import StoredWeights, decoder_weights
from p2l_engine.checkpoint.tokenizer import NeedsTransformers, read_fast_tokenizer
from p2l_engine.errors import CheckpointError
from p2l_engine.feedback import NAMES, FeedbackModel, feedback_model
from p2l_engine.prompts.tokenizer import ChatTokenizer, TransformersTokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A P2L checkpoint, on the CPU.

    base: the folder of the backbone, which is another one for adapters. models: the M names in column order. transformers:
    reads the backbone's config and the tokenizer as transformers' objects, each time that it is called. uncertainty: the
    posterior of the head's rows, None where the folder has none. theta_map: what is applied to the head's theta, None: nothing.
    lengths: what answers are expected to take, None where the folder does not say. shrinkage: of hidden states before the head
    reads them, None: they stay as they are. topics: what the head reads beside hidden states, None: nothing.
    """

    folder: Path
    base: Path
    config: DecoderConfig | PretrainedConfig
    tokenizer: ChatTokenizer
    models: tuple[str, ...]
    feedback: FeedbackModel
    weights: StoredWeights
    head: Head
    transformers: Callable[[], tuple[PretrainedConfig, PreTrainedTokenizerBase]]
    uncertainty: Uncertainty | None = None
    theta_map: ThetaMap | None = None
    lengths: LengthHead | None = None
    shrinkage: Shrinkage | None = None
    topics: Topics | None = None


def load(path_or_repo: str | Path | None = None, date: str | Date | None = None) -> Checkpoint:
    """Reads a checkpoint, see ``find``; None is the built-in default.

    date: what the clock shows to a chat template that reads it; None: the ``date`` of training_config.json.

    Raises ValueError for text that is no date and for a date that the template does not read; CheckpointError, which names
    what is missing or has a wrong shape, with the expected and the found value.
    """
    if path_or_repo is not None:
        arguments.path("path_or_repo", path_or_repo)
    folder = builtin.folder(builtin.DEFAULT) if path_or_repo is None else find(path_or_repo)
    models = _models(folder)
    training = read_json(folder / "training_config.json", dict)
    if date is not None:
        training["date"] = str(date)
    feedback = _feedback(folder, training)
    adapter = folder / "adapter_config.json"
    named = field(adapter, read_json(adapter, dict), "base_model_name_or_path", str) if adapter.is_file() else None
    base = folder if named is None else _base(folder, named)
    files = fingerprint.of_weights(folder, base)  # before they are opened: what changes from here on has another one
    config = read_config(base)
    if named is None:
        heads = read_weights(folder)
        weights = StoredWeights.of(
            {n.removeprefix("model."): w for n, w in heads.items() if n.startswith("model.")}, None, files
        )
    else:
        lora, stored = Lora.read(adapter, read_json(adapter, dict)), decoder_weights(base)
        heads = {n.removeprefix(PEFT_PREFIX): w for n, w in read_tensors(folder / "adapter_model.safetensors").items()}
        changes = Adapter.of(folder, stored, heads, lora)
        weights = StoredWeights.of(stored, changes, files)
        if changes.new_rows is not None:
            config = with_vocabulary(config, len(stored["embed_tokens.weight"]) + len(changes.new_rows))
    if not (folder / "tokenizer.json").is_file() and not adapter.is_file():
        raise CheckpointError(f"{folder}: expected the tokenizer's tokenizer.json, found none")
    words = folder if (folder / "tokenizer.json").is_file() else base
    tokenizer = read_tokenizer(words, training, config.model_type)
    if date is not None and tokenizer.template.date is None:
        raise ValueError(
            f"date: expected none, because the chat template of {words} does not read the clock, got {str(date)!r}"
        )
    if len(tokenizer) > int(config.vocab_size):
        raise CheckpointError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, but the backbone's vocab_size is {config.vocab_size}: "
            "expected an embedding for every token, the CLS token among them"
        )
    topics = Topics.read(folder / TOPICS_FILE, int(config.hidden_size)) if (folder / TOPICS_FILE).exists() else None
    width = int(config.hidden_size) + (0 if topics is None else len(topics.names))  # of what the head reads
    head = Head.from_tensors(
        {n.removeprefix("head."): w for n, w in heads.items() if n.startswith("head.")},
        hidden=width, n_models=len(models), training=training, where=str(folder),
    )  # fmt: skip
    transformers = partial(as_transformers, base, words, training, int(config.vocab_size))
    uncertainty = Uncertainty.read(folder / FILE, width, models) if (folder / FILE).exists() else None
    theta_map = ThetaMap.read(folder / MAP_FILE, models) if (folder / MAP_FILE).exists() else None
    lengths = LengthHead.read(folder / LENGTHS_FILE, width, models) if (folder / LENGTHS_FILE).exists() else None
    shrinks = (folder / SHRINKAGE_FILE).exists()
    shrinkage = Shrinkage.read(folder / SHRINKAGE_FILE, int(config.hidden_size), width) if shrinks else None
    return Checkpoint(
        folder, base, config, tokenizer, models, feedback, weights, head, transformers, uncertainty, theta_map, lengths,
        shrinkage, topics,
    )  # fmt: skip


def as_transformers(
    base: Path, words: Path, training: Mapping[str, Any], vocabulary: int
) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """The config of the folder ``base``, with ``vocabulary`` tokens, and the tokenizer of the folder ``words`` (see
    ``read_tokenizer``), as transformers' objects. Raises CheckpointError."""
    from p2l_engine.checkpoint import huggingface

    config = huggingface.read_config(base)
    config.vocab_size = vocabulary
    return config, huggingface.read_tokenizer(words, training)


def read_config(folder: Path) -> DecoderConfig | PretrainedConfig:
    """The decoder's config: transformers' own where the decoder cannot be computed over packed tokens, which is logged.

    Raises CheckpointError.
    """
    try:
        return DecoderConfig.read(read_json(folder / "config.json", dict))
    except UnsupportedConfig:
        pass
    from p2l_engine.checkpoint import huggingface

    config = huggingface.read_config(folder)
    try:
        return DecoderConfig.read(config.to_dict())  # transformers may have put it right
    except UnsupportedConfig as reason:
        logger.warning("the backbone runs through transformers, not packed: %s", reason)
    return config


def read_tokenizer(folder: Path, training: Mapping[str, Any], model_type: str) -> ChatTokenizer:
    """The tokenizer, with the chat template, date and CLS token that ``training`` (a training config) gives it.

    model_type: of the backbone's config. It is read by transformers where that is needed, which is logged. Raises
    CheckpointError where it cannot be read, or has no CLS token or no chat template.
    """
    try:
        return read_fast_tokenizer(folder, model_type, training)
    except NeedsTransformers as reason:
        logger.info("transformers reads the tokenizer of %s: %s", folder, reason)
    from p2l_engine.checkpoint import huggingface

    return TransformersTokenizer(huggingface.read_tokenizer(folder, training), training.get("date"))


def with_vocabulary(config: DecoderConfig | PretrainedConfig, size: int) -> DecoderConfig | PretrainedConfig:
    """The config with a vocabulary of another size."""
    if isinstance(config, DecoderConfig):
        return replace(config, vocab_size=size)
    config.vocab_size = size
    return config


def find(path_or_repo: str | Path) -> Path:
    """The local folder of a path, else of a built-in name (``builtin.NAMES``) or a hub repository (downloaded when need be).

    Raises CheckpointError.
    """
    name = str(path_or_repo)
    path = Path(path_or_repo).expanduser()
    if name and path.is_dir():
        return path
    if builtin.is_builtin(name):
        return builtin.folder(name)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(
            f"checkpoint: expected a folder, a hub name like 'owner/name', or one of {', '.join(builtin.NAMES)}; found none of "
            f"these at {name!r}{builtin.nearest(name)}"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(f"checkpoint: {name!r} is no local folder, and the hub did not provide it: {first}") from error


def _base(folder: Path, name: str) -> Path:
    """The backbone that the adapter in ``folder`` names: a relative path starts there, else where the process runs."""
    beside = folder / Path(name).expanduser()
    return beside if beside.is_dir() else find(name)


def _models(folder: Path) -> tuple[str, ...]:
    names = read_json(folder / "model_list.json", list)
    if not names or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{folder / 'model_list.json'}: expected a list of model names")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise CheckpointError(f"{folder / 'model_list.json'}: expected different names, found {', '.join(twice)} twice")
    return tuple(names)


def _feedback(folder: Path, training: dict[str, Any]) -> FeedbackModel:
    loss, head = training.get("loss_type"), training.get("head_type")
    try:
        feedback = feedback_model(str(loss))
    except ValueError:
        raise CheckpointError(
            f"{folder / 'training_config.json'}: loss_type: expected one of {', '.join(NAMES)}, found {loss!r}"
        ) from None
    if head not in ("bt", "rk"):
        raise CheckpointError(f"{folder / 'training_config.json'}: head_type: expected 'bt' or 'rk', found {head!r}")
    if feedback.has_eta and head == "bt":
        raise CheckpointError(
            f"{folder / 'training_config.json'}: loss_type {loss!r} needs a tie parameter, but head_type 'bt' has none"
        )
    return feedback

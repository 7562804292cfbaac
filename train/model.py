"""The model in training: a transformers decoder under a coefficient head, and its loss over the votes of a batch."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedTokenizerBase
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from p2l_engine import checkpoint
from p2l_engine.backbone import mixing
from p2l_engine.backbone.packing import Packed
from p2l_engine.backbone.unpacked import positions
from p2l_engine.checkpoint import huggingface
from p2l_engine.checkpoint.adapter import NEW_ROWS, PEFT_PREFIX
from p2l_engine.checkpoint.stored import HEADS
from p2l_engine.engine import cpu
from p2l_engine.errors import CheckpointError
from p2l_engine.feedback import feedback_model
from p2l_engine.train.agreement import Alone
from p2l_engine.train.config import TrainConfig
from p2l_engine.train.forward import Forward, ways

logger = logging.getLogger(__name__)


# How the head's layers start, by the names of published configs: as nn.Linear does, or as nn.init's functions do.
INITS: dict[str, Callable[[Tensor], Any]] = {
    "zeros": lambda weight: None,
    "reset_params": lambda weight: None,
    "he_unif": lambda weight: nn.init.kaiming_uniform_(weight, nonlinearity="sigmoid"),
    "xavier_unif": nn.init.xavier_uniform_,
    "tiny_normal": nn.init.kaiming_normal_,
}


class CoefficientHead(nn.Module):
    """The head under its published weight names: ``head`` and, with ties, ``eta_head``."""

    def __init__(self, hidden: int, n_models: int, config: TrainConfig) -> None:
        super().__init__()
        factor = config.linear_head_downsize_factor
        inner = int(n_models // factor) if factor else 0
        if factor and inner < 1:
            raise ValueError(f"linear_head_downsize_factor: expected at most the {n_models} models, got {factor}")
        shared = nn.Linear(hidden, inner) if factor else None
        self.head: nn.Module = nn.Sequential(shared, nn.Linear(inner, n_models)) if shared else nn.Linear(hidden, n_models)
        if config.head_type == "rk":
            down = shared if config.head_config.get("eta_downsize") else None
            self.eta_head: nn.Module | None = nn.Sequential(down, nn.Linear(inner, 1)) if down else nn.Linear(hidden, 1)
        else:
            self.eta_head = None
        for module in self.modules():
            if isinstance(module, nn.Linear):
                INITS[config.init_type](module.weight)
                nn.init.zeros_(module.bias)
        if config.init_type != "zeros":
            return
        # The last layers start at zero: every model equal, the loss at its constant predictor's.
        for last in (self.head, self.eta_head):
            layer = last[-1] if isinstance(last, nn.Sequential) else last
            if isinstance(layer, nn.Linear):
                nn.init.zeros_(layer.weight)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """hidden [N, D] -> theta [N, M], eta [N] or None."""
        return _wide(self.head, hidden), None if self.eta_head is None else _wide(self.eta_head, hidden).squeeze(-1)


def _wide(head: nn.Module, hidden: Tensor) -> Tensor:
    """The head in float32, also where sharding stores its weights in half precision."""
    for layer in head if isinstance(head, nn.Sequential) else [head]:
        hidden = F.linear(hidden, layer.weight.float(), layer.bias.float())  # type: ignore[arg-type]
    return hidden


class P2LModel(nn.Module):
    """``model`` (bare decoder) and ``head``, named as in published checkpoints; ``hidden``: how the decoder computes a batch;
    ``grown``: new rows of its embedding; ``context``: the tokens that it computes at most, None for any number."""

    def __init__(
        self,
        decoder: nn.Module,
        head: CoefficientHead,
        hidden: Forward,
        loss_type: str,
        grown: int = 0,
        dropout: float = 0.0,
        context: int | None = None,
    ) -> None:
        super().__init__()
        self.model, self.head, self.hidden, self.grown, self.context = decoder, head, hidden, grown, context
        self.feedback = feedback_model(loss_type)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        packed: Packed,
        pairs: Tensor | None = None,
        outcome: Tensor | None = None,
        weight: Tensor | None = None,
        prompts: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """theta [N, M] and eta [N] of packed prompts; with votes (see ``batches.collate``) also ``loss``, the weighted sum of
        their negative log-likelihoods. One forward serves all votes of a prompt."""
        hidden = self.hidden(self.model, packed)
        with torch.autocast(hidden.device.type, enabled=False):
            theta, eta = self.head(self.dropout(hidden.float()))
            outputs = {"theta": theta} | ({} if eta is None else {"eta": eta})
            if pairs is None or outcome is None or weight is None:
                return outputs
            row, a, b = pairs.unbind(1)
            theta_b = torch.where(b < 0, 0.0, theta[row, b.clamp_min(0)])
            likelihood = self.feedback.log_likelihood(theta[row, a], theta_b, None if eta is None else eta[row], outcome)
            return {"loss": -(weight.to(likelihood.dtype) * likelihood).sum(), **outputs}


def bare(decoder: Any) -> Any:
    """The transformers decoder, also within peft's wrapping."""
    return decoder.base_model.model if hasattr(decoder, "peft_config") else decoder


def build(config: TrainConfig, n_models: int, fuse: bool = True) -> tuple[P2LModel, PreTrainedTokenizerBase]:
    """The model to train and its tokenizer, with the CLS and padding tokens that the config names.

    fuse: on a CPU, compute the layers of known families by the fused passes of ``fused``. Raises CheckpointError, and
    ValueError for a config that does not fit the backbone.
    """
    folder = checkpoint.find(config.pretrain_model_name)
    tokenizer = huggingface.read_tokenizer(folder, config.model_dump())
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": config.pad_token_if_none})
    frozen = config.lora is not None or config.train_head_only
    computed = dtype_of(config)
    # Trained weights stay float32, whatever the products' dtype.
    dtype = computed if frozen else torch.float32
    decoder = _decoder(folder, dtype, config.model_type)
    sharded = is_deepspeed_zero3_enabled()  # its weights are not here: nothing can be computed yet
    context = None if sharded else positions(decoder)
    alone = None if sharded else Alone(decoder, context)
    grown = len(tokenizer) - int(decoder.config.vocab_size)
    if grown > 0:
        if tokenizer.eos_token_id is None:
            raise CheckpointError(f"{folder}: expected a tokenizer with an end-of-sequence token, from which new ones start")
        # New tokens start as the end-of-sequence token, whose hidden state already summarises a whole turn.
        decoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        table = decoder.get_input_embeddings().weight
        with torch.no_grad():
            table[-grown:] = table[int(tokenizer.eos_token_id)]
    width = int(decoder.config.hidden_size)
    if config.lora is not None:
        layers = range(config.lora.first_layer, int(decoder.config.num_hidden_layers))
        if not layers:
            raise ValueError(f"lora.first_layer: expected less than the {decoder.config.num_hidden_layers} layers")
        pattern = rf"layers\.({'|'.join(map(str, layers))})\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
        settings = LoraConfig(
            r=config.lora.r, lora_alpha=config.lora.alpha, lora_dropout=config.lora.dropout, target_modules=pattern
        )
        decoder = get_peft_model(decoder, settings)
    elif config.train_head_only:
        decoder.requires_grad_(False)
    plain = bare(decoder)
    # The fused layers do not implement LoRA's dropout.
    fuse = fuse and not torch.cuda.is_available() and not (config.lora and config.lora.dropout)
    found = ways(plain.config, fuse, sharded or config.fsdp)
    if alone is None:
        hidden = Forward(plain, found[0], plain.config._attn_implementation)
        logger.warning("backbone: weights that are sharded as they are read are not compared with what inference computes")
    else:
        hidden = alone.agreeing(decoder, plain, found, computed if found[0] == "fused" else dtype)
    logger.info("backbone: %s, %s, %s", plain.config.model_type, str(computed).removeprefix("torch."), hidden.way)
    if config.gradient_checkpointing:
        # Newer transformers call it the first, older ones the second.
        enable = getattr(plain, "activation_checkpointing_enable", None) or plain.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    head = CoefficientHead(width, n_models, config)
    return P2LModel(decoder, head, hidden, config.loss_type, max(grown, 0), config.head_dropout, context), tokenizer


def _decoder(folder: Path, dtype: torch.dtype, model_type: str | None) -> Any:
    """The backbone in ``folder``. Raises CheckpointError unless its files hold all of its weights and no others, but for heads:
    transformers makes up those that are missing, at random; ValueError where it is no ``model_type``."""
    described = huggingface.read_config(folder)
    found = described.model_type
    if model_type not in (None, found):
        raise ValueError(f"model_type: expected {found!r}, which {folder} is, or no such key, got {model_type!r}")
    try:
        decoder, report = AutoModel.from_pretrained(
            folder, dtype=dtype, attn_implementation=mixing.attention(described), trust_remote_code=False,
            ignore_mismatched_sizes=True, output_loading_info=True,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: transformers cannot load the backbone: {error}") from error
    wrong = [f"no {name}" for name in sorted(report["missing_keys"])]
    wrong += [f"{name} of shape {[*theirs]} instead of {[*ours]}" for name, theirs, ours in sorted(report["mismatched_keys"])]
    wrong += [f"{name}, which it does not know" for name in sorted(report["unexpected_keys"]) if not name.startswith(HEADS)]
    wrong += report["error_msgs"]
    if wrong:
        raise CheckpointError(
            f"{folder}: expected the weights that config.json describes, found {'; '.join(wrong[:3])} ({len(wrong)} such); "
            "are files missing, or does config.json belong to another model?"
        )
    return decoder


def dtype_of(config: TrainConfig) -> torch.dtype:
    """The dtype of the products: the config's, else bfloat16 where the hardware multiplies it."""
    if config.dtype is not None:
        return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    return torch.bfloat16 if torch.cuda.is_available() or cpu.multiplies_bf16() else torch.float32


def published_tensors(state: Mapping[str, Tensor], grown: int, adapter: bool) -> dict[str, Tensor]:
    """The weights to save, under their published names, of a P2LModel's state dict; of an adapter only the factors (peft's
    names), the head and the ``grown`` new rows of the embedding."""
    if not adapter:
        return dict(state)
    kept = {name: weight for name, weight in state.items() if ".lora_" in name or name.startswith("head.")}
    if grown:
        kept[NEW_ROWS] = state["model.base_model.model.embed_tokens.weight"][-grown:]
    plain = {re.sub(r"^model[.]base_model[.]model[.]", "model.", name).replace(".default.", "."): w for name, w in kept.items()}
    return {f"{PEFT_PREFIX}{name}": weight for name, weight in plain.items()}

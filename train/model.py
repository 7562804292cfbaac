"""The model in training: a transformers decoder under a coefficient head, and its loss over the votes of a batch."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedTokenizerBase

from p2l_engine import checkpoint
from p2l_engine.backbone.packing import Packed
from p2l_engine.checkpoint import huggingface
from p2l_engine.checkpoint.adapter import NEW_ROWS, PEFT_PREFIX
from p2l_engine.engine import cpu
from p2l_engine.feedback import feedback_model
from p2l_engine.train import attention, fused
from p2l_engine.train.config import TrainConfig

logger = logging.getLogger(__name__)


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
                nn.init.zeros_(module.bias)
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
    """``model`` (bare decoder) and ``head``, named as in published checkpoints; ``grown``: new rows of its embedding."""

    def __init__(
        self,
        decoder: nn.Module,
        head: CoefficientHead,
        loss_type: str,
        grown: int = 0,
        fuse: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.model, self.head, self.grown, self.fused = decoder, head, grown, fuse
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
        positions = packed.positions.long()
        kept = {"layout": fused.layout_of(bare(self.model), positions, packed.runs())} if self.fused else {"packed": packed}
        ids = packed.tokens.long()[None]
        hidden = self.model(input_ids=ids, position_ids=positions[None], use_cache=False, **kept).last_hidden_state
        with torch.autocast(hidden.device.type, enabled=False):
            theta, eta = self.head(self.dropout(hidden[0].index_select(0, packed.last.long()).float()))
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
    decoder = AutoModel.from_pretrained(folder, dtype=dtype, attn_implementation=attention.register(), trust_remote_code=False)
    grown = len(tokenizer) - int(decoder.config.vocab_size)
    if grown > 0:
        # New tokens start as the end-of-sequence token, whose hidden state already summarises a whole turn.
        decoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        table = decoder.get_input_embeddings().weight
        with torch.no_grad():
            table[-grown:] = table[int(tokenizer.eos_token_id)]
    hidden = int(decoder.config.hidden_size)
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
    fuse = fuse and not torch.cuda.is_available() and fused.fusible(plain.config) and not (config.lora and config.lora.dropout)
    if fuse:
        fused.fuse(plain, computed)
    logger.info(
        "backbone: %s, %s, %s layers", plain.config.model_type, str(computed).removeprefix("torch."),
        "fused" if fuse else "transformers'",
    )  # fmt: skip
    if config.gradient_checkpointing:
        # Newer transformers call it the first, older ones the second.
        enable = getattr(plain, "activation_checkpointing_enable", None) or plain.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    head = CoefficientHead(hidden, n_models, config)
    return P2LModel(decoder, head, config.loss_type, max(grown, 0), fuse, config.head_dropout), tokenizer


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

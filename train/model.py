"""The model in training: a transformers decoder under a coefficient head, and its loss over the votes of a batch."""

from __future__ import annotations

import re
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedTokenizerBase

from p2l_engine import checkpoint
from p2l_engine.prompts import PromptEncoder
from p2l_engine.regression import feedback_model
from p2l_engine.train.config import TrainConfig


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
        return self.head(hidden), None if self.eta_head is None else self.eta_head(hidden).squeeze(-1)


class P2LModel(nn.Module):
    """``model`` (bare decoder) and ``head``, named as in published checkpoints; ``grown``: new rows of its embedding."""

    def __init__(self, decoder: nn.Module, head: CoefficientHead, loss_type: str, grown: int = 0) -> None:
        super().__init__()
        self.model, self.head, self.grown = decoder, head, grown
        self.feedback = feedback_model(loss_type)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, votes: Tensor | None = None) -> dict[str, Tensor]:
        """Right-padded prompts [N, T]; votes [V, 4]: row of the batch, model a, model b, outcome.

        One forward serves all votes of a prompt. Returns theta, eta and, with votes, the mean negative log-likelihood.
        """
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        last = hidden[torch.arange(len(hidden), device=hidden.device), attention_mask.sum(1) - 1]
        with torch.autocast(hidden.device.type, enabled=False):
            theta, eta = self.head(last.float())
            outputs = {"theta": theta} | ({} if eta is None else {"eta": eta})
            if votes is None:
                return outputs
            row, a, b, outcome = votes.unbind(1)
            likelihood = self.feedback.log_likelihood(theta[row, a], theta[row, b], None if eta is None else eta[row], outcome)
            return {"loss": -likelihood.mean(), **outputs}


def build(config: TrainConfig, n_models: int) -> tuple[P2LModel, PreTrainedTokenizerBase]:
    """The model to train and its tokenizer, with the CLS and padding tokens that the config names."""
    folder = checkpoint.find(config.pretrain_model_name)
    tokenizer = checkpoint.read_tokenizer(folder, config.model_dump())
    PromptEncoder(tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": config.pad_token_if_none})
    frozen = config.lora is not None or config.train_head_only
    dtype = torch.bfloat16 if frozen else torch.float32
    # torch's fused attention is slow backwards on CPUs: there plain products are twice as fast.
    attention = "sdpa" if torch.cuda.is_available() else "eager"
    decoder = AutoModel.from_pretrained(folder, dtype=dtype, attn_implementation=attention, trust_remote_code=False)
    grown = len(tokenizer) - int(decoder.config.vocab_size)
    if grown > 0:
        # New tokens start as the end-of-sequence token, which the backbone has learned to read a whole turn into.
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
    return P2LModel(decoder, CoefficientHead(hidden, n_models, config), config.loss_type, max(grown, 0)), tokenizer


def published_tensors(model: P2LModel, config: TrainConfig) -> dict[str, Tensor]:
    """The weights to save under their published names; for LoRA only the factors (peft's names) and the head."""
    prefix = "base_model.model." if config.lora else ""
    head = {f"{prefix}head.{name}": weight for name, weight in model.head.state_dict().items()}
    if config.lora is None:
        return {f"model.{name}": weight for name, weight in model.model.state_dict().items()} | head
    factors: dict[str, Any] = {
        f"{prefix}model.{re.sub(r'^base_model[.]model[.]', '', name).replace('.default.', '.')}": weight
        for name, weight in model.model.state_dict().items()
        if ".lora_" in name
    }
    if model.grown:
        embedding = model.model.get_submodule("base_model.model.embed_tokens").get_parameter("weight")
        factors[f"{prefix}model.embed_tokens.new_rows"] = embedding[-model.grown :]
    return factors | head

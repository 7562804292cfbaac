"""The backbone: packed tokens in, the hidden state of each prompt's last (CLS) token out.

Llama and Qwen2 decoders are computed here, over packed tokens; every other architecture goes through transformers' AutoModel,
padded: slower, same result.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor
from transformers import PretrainedConfig

from p2l_engine.backbone.packed import PackedDecoder
from p2l_engine.backbone.packing import Packed, Tokens
from p2l_engine.backbone.padded import PaddedDecoder

__all__ = ["Backbone", "PackedDecoder", "PaddedDecoder", "build"]

PACKED = ("llama", "qwen2")
STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # the others change with the length of the sequence

logger = logging.getLogger(__name__)


class Backbone(Protocol):
    """What the engine needs of a decoder.

    norm [D], eps: the final norm, which the head applies; None where the hidden states have been through it. prefix: the
    tokens whose keys and values prompts may share, None for none.
    """

    name: str
    norm: Tensor | None
    eps: float
    prefix: Tokens | None

    def __call__(self, packed: Packed) -> Tensor:
        """N prompts, packed with this prefix, on this device -> the hidden state of each one's last token [N, D]."""


def build(config: PretrainedConfig, weights: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> Backbone:
    """The packed decoder where this package knows the architecture, else transformers' own."""
    reason = _unsupported(config)
    if reason is None:
        return PackedDecoder(config, weights, device, dtype)
    logger.warning("the backbone runs through transformers, padded: %s", reason)
    return PaddedDecoder(config, weights, device, dtype)


def _unsupported(config: PretrainedConfig) -> str | None:
    if config.model_type not in PACKED:
        return f"architecture {config.model_type!r} is not one of {', '.join(PACKED)}"
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind not in STATIC_ROPE:
        return f"rope_type {kind!r} is not one of {', '.join(STATIC_ROPE)}"
    if config.model_type == "qwen2" and getattr(config, "use_sliding_window", False):
        return "it uses sliding-window attention"
    if config.hidden_act not in ("silu", "swish"):
        return f"its activation {config.hidden_act!r} is not silu"
    return None

"""The backbone: packed tokens in, the hidden state of each prompt's last (CLS) token out.

The families in ``families.FAMILIES`` are computed here, over packed tokens; every other architecture goes through transformers'
AutoModel, padded, or with prompts of one length at a time: slower, with the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from p2l_engine.backbone.families import DecoderConfig
from p2l_engine.backbone.packed import PackedDecoder, check_operations
from p2l_engine.backbone.packing import Packed, Tokens
from p2l_engine.backbone.ready import DecoderWeights
from p2l_engine.backbone.rope import UnsupportedConfig
from p2l_engine.native import panels

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["Backbone", "DecoderConfig", "DecoderWeights", "Keep", "PackedDecoder", "UnsupportedConfig", "build", "check_dtype"]


# Given what tensors depend on beside the checkpoint, and a function that makes them: these tensors, made now or earlier.
Keep = Callable[[str, Callable[[], dict[str, Tensor]]], Mapping[str, Tensor]]


class Backbone(Protocol):
    """What the engine needs of a decoder.

    norm [D], eps: the final norm, which the head applies; None where the hidden states have been through it. prefix: the
    tokens whose keys and values prompts may share, None for none. positions: the tokens of the longest prompt, None for any.
    embedding [V, E]: the input embeddings of the tokens, on the backbone's device.
    """

    name: str
    norm: Tensor | None
    eps: float
    prefix: Tokens | None
    positions: int | None
    embedding: Tensor

    def __call__(self, packed: Packed) -> Tensor:
        """N prompts, packed with this prefix, on this device -> the hidden state of each one's last token [N, D]."""


def build(
    config: DecoderConfig | PretrainedConfig,
    weights: Callable[[], Mapping[str, Tensor]],
    device: torch.device,
    dtype: torch.dtype,
    keep: Keep | None = None,
) -> Backbone:
    """The packed decoder, or transformers' own where the config is transformers'.

    weights: reads them, named as in transformers' bare model. keep: of a packed decoder's weights on a CPU; None: they are made
    anew. Raises CheckpointError for wrong weights, and ValueError for a dtype that it cannot use.
    """
    check_dtype(config, device, dtype)
    if isinstance(config, DecoderConfig):
        wide = _wide(dtype)
        level = panels.level(dtype) if device.type == "cpu" else -1

        def made() -> DecoderWeights:
            return DecoderWeights.of(config, weights(), device, wide, dtype if level >= 0 else None)

        if device.type == "cpu" and keep is not None:
            how = f"{dtype}, products at level {level}, layout {panels.LAYOUT}"
            ready = DecoderWeights.of_tensors(keep(how, lambda: made().tensors()))
        else:
            ready = made()
        return PackedDecoder(config, ready, device, wide)
    from p2l_engine.backbone.unpacked import UnpackedDecoder  # needs transformers

    return UnpackedDecoder(config, weights(), device, dtype)


def check_dtype(config: DecoderConfig | PretrainedConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Raises ValueError for a dtype in which a backbone of this config cannot be computed on the device."""
    if isinstance(config, DecoderConfig):
        check_operations(device, _wide(dtype) if device.type == "cpu" else dtype)
    elif dtype == torch.int8:
        raise ValueError(
            f"dtype: int8 is for decoders that are computed here (Llama, Qwen2), got {config.model_type!r}, which transformers "
            "computes: use bfloat16 or float32"
        )


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Of everything but the products' weights."""
    return torch.float32 if dtype == torch.int8 else dtype

"""Attention within each prompt of a packed batch, for every architecture of transformers whose attention can be replaced."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from p2l_engine.backbone.packing import Packed

NAME = "p2l_packed"


def register() -> str:
    """Makes ``packed_attention`` known to transformers, for the whole process; returns its name there."""
    AttentionInterface.register(NAME, packed_attention)
    return NAME


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed: Packed | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, heads, T, size] -> [1, T, heads, size].

    In half precision on CUDA one call of torch.nn.attention.varlen, else one call of torch's fused attention for each run of
    prompts of one length.
    """
    if packed is None:
        raise ValueError("packed: expected the batch that the tokens come from, got None")
    window = getattr(module, "sliding_window", None)
    if window is not None and max(packed.lengths) > window:
        raise ValueError(
            f"max_length: expected at most the architecture's sliding window of {window} tokens, got a prompt of "
            f"{max(packed.lengths)}"
        )
    query, key = query.to(value.dtype), key.to(value.dtype)  # rotary tables may be wider
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return _varlen(query, key, value, packed, scaling), None
    grouped, parts, start = query.shape[1] != key.shape[1], [], 0
    for run in packed.runs():
        tokens = slice(start, start + run.prompts * run.length)
        q, k, v = (x[0, :, tokens].unflatten(1, (run.prompts, run.length)).transpose(0, 1) for x in (query, key, value))
        a = F.scaled_dot_product_attention(q, k, v, None, dropout, run.length > 1, scale=scaling, enable_gqa=grouped)
        parts.append(a.transpose(1, 2).flatten(0, 1))
        start = tokens.stop
    return torch.cat(parts)[None], None


def _varlen(query: Tensor, key: Tensor, value: Tensor, packed: Packed, scaling: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    repeats = query.shape[1] // key.shape[1]
    q, k, v = (x[0].transpose(0, 1) for x in (query, *(y.repeat_interleave(repeats, 1) for y in (key, value))))
    out: Any = varlen_attn(
        q, k, v, packed.starts, packed.starts, packed.longest_own, packed.longest_own, scale=scaling, window_size=(-1, 0)
    )
    return out[None]  # type: ignore[no-any-return]

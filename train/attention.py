"""Causal attention within each prompt of a packed batch, for decoders of transformers that have no other (``mixing.packs``)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from p2l_engine.backbone.packing import Packed

NAME = "p2l_packed"
IGNORED = ("position_ids", "is_causal")  # arguments of attention that are used before it, or checked


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
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, heads, T, size] -> [1, T, heads, size].

    In half precision on CUDA one call of torch.nn.attention.varlen, else one call of torch's fused attention for each run of
    prompts of one length. Raises ValueError for what it does not compute: masks, windows within a prompt, attention to both
    sides, and any other term (soft caps, sinks, biases).
    """
    if packed is None:
        raise ValueError("packed: expected the batch that the tokens come from, got None")
    terms = [name for name, value in others.items() if name not in IGNORED and value is not None and value is not False]
    if attention_mask is not None:
        terms.append("attention_mask")
    if getattr(module, "is_causal", True) is False or others.get("is_causal") is False:
        terms.append("attention to both sides")
    if sliding_window is not None and packed.longest_own > sliding_window:
        terms.append(f"a sliding window of {sliding_window} tokens for a prompt of {packed.longest_own}")
    if terms:
        raise ValueError(f"packed attention: expected plain causal attention, got {', '.join(terms)}")
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

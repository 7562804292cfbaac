"""Causal attention within each prompt of a packed batch, by torch's own kernels: in float32 on GPUs.

Queries q [T, heads, size], or [N, heads, size] of the last tokens only; keys and values kv [R, 2, kv heads, size]. A query sees
the keys up to its own token. A prompt has as many keys as queries, plus the known ones before it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from p2l_engine.backbone.packing import Packed

LONGEST_MASKED = 128  # own tokens behind fewer known ones


def over_runs(q: Tensor, kv: Tensor, packed: Packed, last: bool, out: Tensor) -> Tensor:
    """One call for each run of prompts of equal length; fills and returns out [T or N, heads * size]."""
    grouped = q.shape[1] != kv.shape[2]
    row = key = 0
    for _, count, length, shared in packed.runs():
        queries, keys = (1 if last else length), length + shared
        rows, size = count * queries, q.shape[2]
        some = q[row : row + rows].view(count, queries, -1, size).transpose(1, 2)
        k, v = kv[key : key + count * keys].view(count, keys, 2, -1, size).permute(2, 0, 3, 1, 4)
        causal, mask, dummies = not last and length > 1, None, 0
        if causal and shared and length > max(LONGEST_MASKED, shared):
            # With a mask, torch computes all keys for all queries. Prepend dummy queries instead, so that its causal path
            # applies, which computes half of that: less, where they are fewer than the queries.
            some, dummies = F.pad(some, (0, 0, shared, 0)), shared
        elif causal and shared:
            mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(shared)
        a = F.scaled_dot_product_attention(some, k, v, mask, is_causal=causal and mask is None, enable_gqa=grouped)
        out[row : row + rows].view(count, queries, -1, size).copy_(a[:, :, dummies:].transpose(1, 2))
        row, key = row + rows, key + count * keys
    return out

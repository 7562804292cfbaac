"""Causal attention within each prompt of a packed batch, for short prompts, where a tile of 128 queries is mostly empty.

out[t, h] = sum_s softmax_s(q[t, h] . k[s, g] / sqrt(size)) v[s, g],   g the key head of h's group, s up to t's own place

One program takes BLOCK_Q queries of one prompt, for all heads that share one key head, and reads their keys and values once.
The softmax is computed as the keys come (Milakov and Gimelshein, 2018; Dao et al., 2022).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 64  # of a tile: queries times heads of a group


@triton.jit(do_not_specialize=["blocks"])
def _attention_kernel(  # type: ignore[no-untyped-def]
    q_ptr, q_row_stride, kv_ptr, starts_ptr, key_starts_ptr, out_ptr, scale, blocks,
    KEYS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr, LAST: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    prompt = tl.program_id(0) // blocks
    group = tl.program_id(1)
    key_start = tl.load(key_starts_ptr + prompt)
    n_keys = tl.load(key_starts_ptr + prompt + 1) - key_start
    if LAST:
        query_start, n_queries = prompt, 1
    else:
        query_start = tl.load(starts_ptr + prompt)
        n_queries = tl.load(starts_ptr + prompt + 1) - query_start
    first = (tl.program_id(0) % blocks) * BLOCK_Q
    if first >= n_queries:
        return
    row = tl.arange(0, BLOCK_Q * BLOCK_GROUP)
    query, member = first + row // BLOCK_GROUP, row % BLOCK_GROUP
    column = tl.arange(0, BLOCK_SIZE)
    here = ((query < n_queries) & (member < GROUP))[:, None] & (column < SIZE)[None, :]
    token = (query_start + query).to(tl.int64)
    head = group * GROUP + member
    q = tl.load(q_ptr + (token * q_row_stride + head * SIZE)[:, None] + column[None, :], mask=here, other=0.0)
    before = n_keys - n_queries
    highest = tl.full([BLOCK_Q * BLOCK_GROUP], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_Q * BLOCK_GROUP], tl.float32)
    out = tl.zeros([BLOCK_Q * BLOCK_GROUP, BLOCK_SIZE], tl.float32)
    for start in range(0, tl.minimum(n_keys, first + BLOCK_Q + before), BLOCK_KEYS):
        key = start + tl.arange(0, BLOCK_KEYS)
        at = (key_start + key).to(tl.int64) * (2 * KEYS * SIZE) + group * SIZE
        there = (key < n_keys)[:, None] & (column < SIZE)[None, :]
        k = tl.load(kv_ptr + at[:, None] + column[None, :], mask=there, other=0.0)
        v = tl.load(kv_ptr + KEYS * SIZE + at[:, None] + column[None, :], mask=there, other=0.0)
        score = tl.dot(q, tl.trans(k)) * scale
        score = tl.where(key[None, :] <= (query + before)[:, None], score, -float("inf"))  # key 0 is seen by all
        higher = tl.maximum(highest, tl.max(score, axis=1))
        weight = tl.exp2(score - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(weight, axis=1)
        out = tl.dot(weight.to(v.dtype), v, acc=out * shrink[:, None])
        highest = higher
    out /= total[:, None]
    tl.store(out_ptr + (token * (KEYS * GROUP * SIZE) + head * SIZE)[:, None] + column[None, :], out, mask=here)


def attention(q: Tensor, kv: Tensor, starts: Tensor, key_starts: Tensor, longest: int, last: bool = False) -> Tensor:
    """q [T, heads, size], or with ``last`` [N, heads, size], contiguous within a row; kv [R, 2, kv heads, size], contiguous.

    starts and key_starts [N + 1] int32: the offsets of the prompts in T and R; a prompt's first keys are those of a shared
    prefix, the others of its own tokens. longest: at least the most own tokens of a prompt. Returns [T or N, heads * size].
    """
    rows, heads, size = q.shape
    kv_heads = kv.shape[2]
    if q.dtype != kv.dtype or q.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"q, kv: expected bfloat16 or float16, one for both, got {q.dtype} and {kv.dtype}")
    if q.stride()[1:] != (size, 1) or not kv.is_contiguous():
        raise ValueError(f"q, kv: expected contiguous rows, got strides {q.stride()} and {kv.stride()}")
    if kv.shape[1:] != (2, kv_heads, size) or heads % kv_heads:
        raise ValueError(f"kv: expected [R, 2, kv heads, {size}], of which {heads} is a multiple, got {list(kv.shape)}")
    out = torch.empty((rows, heads * size), dtype=q.dtype, device=q.device)
    group, n = heads // kv_heads, len(starts) - 1
    block_group, block_size = triton.next_power_of_2(group), max(16, triton.next_power_of_2(size))
    block_q = max(1, (16 if last else ROWS) // block_group)  # 16 rows is the least that tensor cores take
    blocks = triton.cdiv(1 if last else longest, block_q)
    if rows and n:
        _attention_kernel[n * blocks, kv_heads](
            q, q.stride(0), kv, starts, key_starts, out, 1.4426950408889634 / size**0.5, blocks,
            KEYS=kv_heads, GROUP=group, SIZE=size, LAST=last, BLOCK_Q=block_q, BLOCK_GROUP=block_group,
            BLOCK_SIZE=block_size, BLOCK_KEYS=min(64, max(16, 4096 // block_size)), num_warps=1 if last else 4,
        )  # fmt: skip
    return out


def attention_reference(q: Tensor, kv: Tensor, starts: Tensor, key_starts: Tensor, longest: int, last: bool = False) -> Tensor:
    """The reference implementation: the weights in full, prompt by prompt, in q's dtype."""
    out = torch.empty((len(q), q.shape[1] * q.shape[2]), dtype=q.dtype, device=q.device)
    tokens, keys = starts.tolist(), key_starts.tolist()
    for i in range(len(tokens) - 1):
        rows = slice(i, i + 1) if last else slice(tokens[i], tokens[i + 1])
        n, m = rows.stop - rows.start, keys[i + 1] - keys[i]
        if n and m:
            k, v = kv[keys[i] : keys[i + 1]].repeat_interleave(q.shape[1] // kv.shape[2], 2).unbind(1)
            score = torch.einsum("nhd,mhd->hnm", q[rows], k) / q.shape[2] ** 0.5
            hidden = torch.ones(n, m, dtype=torch.bool, device=q.device).triu(m - n + 1)
            weight = score.masked_fill(hidden, -torch.inf).softmax(-1)
            out[rows] = torch.einsum("hnm,mhd->nhd", weight, v).flatten(1)
    return out

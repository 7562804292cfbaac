"""Rotary position embedding of queries in place, and of keys while they are copied to where attention reads them.

With x = (x1, x2), the two halves of a head, and the angle a_i = position * frequency_i of column i:
    x1 <- x1 cos a - x2 sin a,   x2 <- x2 cos a + x1 sin a          (Su et al., 2021, in the layout of transformers)

Attention reads each prompt's keys and values as one run. Where prompts share a prefix whose keys and values are computed
already, the prefix's rows are copied in front of each prompt's own: row r of the result comes from token ``sources[r]``, or
from row -1 - sources[r] of the prefix where that is negative.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rotary_kernel(  # type: ignore[no-untyped-def]
    x_ptr, x_row_stride, cos_ptr, sin_ptr, positions_ptr, sources_ptr, prefix_ptr, kv_ptr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_VALUES: tl.constexpr, BLOCK_HALF: tl.constexpr, HAS_PREFIX: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(sources_ptr + row).to(tl.int64)
    value = tl.arange(0, BLOCK_VALUES)
    width: tl.constexpr = 2 * HALF * KEYS  # of a token's keys, and of its values
    if source >= 0:
        position = tl.load(positions_ptr + source).to(tl.int64)
        half = tl.arange(0, BLOCK_HALF)
        cos = tl.load(cos_ptr + position * HALF + half, mask=half < HALF, other=0.0)[None, :]
        sin = tl.load(sin_ptr + position * HALF + half, mask=half < HALF, other=0.0)[None, :]
        head = tl.arange(0, BLOCK_HEADS)[:, None]
        at = head * (2 * HALF) + half[None, :]
        here = (head < QUERIES + KEYS) & (half[None, :] < HALF)
        x = x_ptr + source * x_row_stride + at
        first = tl.load(x, mask=here, other=0.0).to(tl.float32)
        second = tl.load(x + HALF, mask=here, other=0.0).to(tl.float32)
        turned = first * cos - second * sin
        turned_second = second * cos + first * sin
        if QUERIES > 0:
            query = here & (head < QUERIES)
            tl.store(x, turned, mask=query)
            tl.store(x + HALF, turned_second, mask=query)
        if KEYS > 0:
            key = here & (head >= QUERIES)
            kv = kv_ptr + row * (2 * width) + at - QUERIES * 2 * HALF
            tl.store(kv, turned, mask=key)
            tl.store(kv + HALF, turned_second, mask=key)
            v = tl.load(x_ptr + source * x_row_stride + (QUERIES + KEYS) * 2 * HALF + value, mask=value < width, other=0.0)
            tl.store(kv_ptr + row * (2 * width) + width + value, v, mask=value < width)
    elif HAS_PREFIX:
        old = prefix_ptr + (-1 - source) * (2 * width) + value
        k = tl.load(old, mask=value < width, other=0.0)
        v = tl.load(old + width, mask=value < width, other=0.0)
        tl.store(kv_ptr + row * (2 * width) + value, k, mask=value < width)
        tl.store(kv_ptr + row * (2 * width) + width + value, v, mask=value < width)


def rotary(
    x: Tensor,
    queries: int,
    keys: int,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    sources: Tensor,
    prefix: Tensor | None = None,
) -> Tensor:
    """x [T, (queries + 2 keys) S], heads of S columns: queries, keys, values -> keys and values [R, 2, keys, S].

    The queries of every token that ``sources`` names are turned in place; name each once. cos and sin [positions, S / 2]
    float32; positions [T] and sources [R] int32; prefix [P, 2, keys, S] (its keys already turned), needed where a source is
    negative. keys may be 0 (x has queries only; the result is empty) and so may queries.
    """
    _check(x, queries, keys, cos, sin, positions, sources, prefix)
    half = cos.shape[1]
    kv = torch.empty((len(sources), 2, keys, 2 * half), dtype=x.dtype, device=x.device)
    if len(sources):
        heads, values = triton.next_power_of_2(queries + keys), triton.next_power_of_2(max(1, 2 * half * keys))
        _rotary_kernel[(len(sources),)](
            x, x.stride(0), cos, sin, positions, sources, x if prefix is None else prefix, kv,
            QUERIES=queries, KEYS=keys, HALF=half, BLOCK_HEADS=heads, BLOCK_VALUES=values,
            BLOCK_HALF=triton.next_power_of_2(half), HAS_PREFIX=prefix is not None, num_warps=4,
        )  # fmt: skip
    return kv


def rotary_reference(
    x: Tensor,
    queries: int,
    keys: int,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    sources: Tensor,
    prefix: Tensor | None = None,
) -> Tensor:
    """The reference implementation, in x's dtype."""
    _check(x, queries, keys, cos, sin, positions, sources, prefix)
    heads = x.view(len(x), queries + 2 * keys, -1)
    c, s = (table[positions.long()][:, None].to(x.dtype) for table in (cos, sin))
    own = sources >= 0
    turned = heads[:, : queries + keys].clone()
    first, second = turned.chunk(2, dim=-1)
    turned = torch.cat((first * c - second * s, second * c + first * s), dim=-1)
    named = sources[own].long()
    heads[named, :queries] = turned[named, :queries]
    kv = torch.empty((len(sources), 2, keys, 2 * cos.shape[1]), dtype=x.dtype, device=x.device)
    kv[own, 0], kv[own, 1] = turned[named, queries:], heads[named, queries + keys :]
    if prefix is not None:
        kv[~own] = prefix[-1 - sources[~own].long()]
    return kv


def _check(
    x: Tensor, queries: int, keys: int, cos: Tensor, sin: Tensor, positions: Tensor, sources: Tensor, prefix: Tensor | None
) -> None:
    size = 2 * cos.shape[1]
    if queries < 0 or keys < 0 or queries + keys == 0:
        raise ValueError(f"queries, keys: expected numbers of heads >= 0, one at least, got {queries} and {keys}")
    if x.ndim != 2 or x.stride(1) != 1 or x.shape[1] != (queries + 2 * keys) * size:
        raise ValueError(f"x: expected [T, {(queries + 2 * keys) * size}] with contiguous rows, got {list(x.shape)}")
    if cos.shape != sin.shape or cos.dtype != torch.float32 or not (cos.is_contiguous() and sin.is_contiguous()):
        raise ValueError(f"cos, sin: expected equal shapes, contiguous float32, got {list(cos.shape)} and {list(sin.shape)}")
    if positions.shape != x.shape[:1] or positions.dtype != torch.int32 or not positions.is_contiguous():
        raise ValueError(f"positions: expected [{len(x)}] int32, got {list(positions.shape)} {positions.dtype}")
    if sources.ndim != 1 or sources.dtype != torch.int32 or not sources.is_contiguous():
        raise ValueError(f"sources: expected [R] int32, got {list(sources.shape)} {sources.dtype}")
    if prefix is not None and (prefix.shape[1:] != (2, keys, size) or prefix.dtype != x.dtype or not prefix.is_contiguous()):
        raise ValueError(f"prefix: expected [P, 2, {keys}, {size}] of {x.dtype}, contiguous, got {list(prefix.shape)}")

"""A decoder's steps between its matrix products, and their backward passes, on CPU tensors in one pass over memory each.

Tensors are contiguous float32 or bfloat16, all of one dtype; arithmetic is float32. Reference implementations:
``p2l_engine.kernels`` (rms_norm, swiglu, rotary, attention). All functions raise ValueError for other dtypes, devices, strides
and shapes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from p2l_engine.native.binding import check, lib, tensor, threads

DTYPES = (torch.float32, torch.bfloat16)
ELEMENTS_PER_THREAD = 4096  # below this a thread costs more than it saves
PRODUCTS_PER_THREAD = 1 << 18  # the same in attention, of queries' elements times keys


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor, delta: Tensor | None = None) -> Tensor:
    """out [T, D] = x / sqrt(mean(x^2) + eps) * weight [D], for x [T, D]; with delta [T, D], x += delta first, in place."""
    _check(x, x=x, weight=weight, delta=delta, out=out)
    if x.ndim != 2 or weight.shape != x.shape[1:] or out.shape != x.shape or (delta is not None and delta.shape != x.shape):
        raise ValueError(f"x: expected [T, D], weight [D] and delta [T, D], got {list(x.shape)} and {list(weight.shape)}")
    lib.p2l_rms_norm(_at(x), _at(delta), _at(weight), _at(out), *x.shape, eps, *_how(x))
    return out


def rms_norm_backward(x: Tensor, weight: Tensor, d_out: Tensor, dx: Tensor, eps: float, weight_needed: bool) -> Tensor | None:
    """Adds the gradient of ``rms_norm``'s x to dx [T, D], in place; returns that of its weight [D], or None if not needed."""
    _check(x, x=x, weight=weight, d_out=d_out, dx=dx)
    if x.ndim != 2 or weight.shape != x.shape[1:] or d_out.shape != x.shape or dx.shape != x.shape:
        raise ValueError(f"x, d_out, dx: expected [T, {len(weight)}] each, got {[list(t.shape) for t in (x, d_out, dx)]}")
    bf16, count = _how(x)
    shares = torch.zeros(count, x.shape[1]) if weight_needed else None
    lib.p2l_rms_norm_backward(_at(x), _at(weight), _at(d_out), _at(dx), tensor("float", shares), *x.shape, eps, bf16, count)
    return None if shares is None else shares.sum(0).to(weight.dtype)


def swiglu(gate_up: Tensor, out: Tensor) -> Tensor:
    """out [T, I] = silu(gate) * up, for gate_up [T, 2 I]: gate in the first I columns, up in the others."""
    _check(gate_up, gate_up=gate_up, out=out)
    if gate_up.ndim != 2 or gate_up.shape[1] % 2 or out.shape != (len(gate_up), gate_up.shape[1] // 2):
        raise ValueError(f"gate_up: expected [T, 2 I], got {list(gate_up.shape)}")
    lib.p2l_swiglu(_at(gate_up), _at(out), *out.shape, *_how(gate_up))
    return out


def swiglu_backward(gate_up: Tensor, d_out: Tensor, d_gate_up: Tensor, out: Tensor) -> None:
    """Writes the gradient of ``swiglu``'s input to d_gate_up [T, 2 I], and recomputes its out [T, I]."""
    _check(gate_up, gate_up=gate_up, d_out=d_out, d_gate_up=d_gate_up, out=out)
    if d_gate_up.shape != gate_up.shape or d_out.shape != out.shape or gate_up.shape != (len(out), 2 * out.shape[1]):
        raise ValueError(f"gate_up, d_out: expected [T, 2 I] and [T, I], got {list(gate_up.shape)} and {list(d_out.shape)}")
    lib.p2l_swiglu_backward(_at(gate_up), _at(d_out), _at(d_gate_up), _at(out), *out.shape, *_how(out))


def rope_kv(
    x: Tensor,
    queries: int,
    keys: int,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    sources: Tensor,
    kv: Tensor,
    prefix: Tensor | None = None,
) -> Tensor:
    """Rotates the queries of x [T, (queries + 2 keys) S] in place; fills kv [R, 2, keys, S] with rotated keys and with values.

    cos and sin [positions, S / 2] float32; positions [T] and sources [R] int32. Row r of kv is token sources[r], or
    row -1 - sources[r] of prefix [P, 2, keys, S] where that is negative.
    """
    half = cos.shape[1]
    _check(x, x=x, prefix=prefix, kv=kv)
    if x.shape[1] != (queries + 2 * keys) * 2 * half or len(positions) != len(x):
        raise ValueError(f"x: expected [{len(positions)}, {(queries + 2 * keys) * 2 * half}], got {list(x.shape)}")
    if cos.shape != sin.shape or (prefix is not None and prefix.shape[1:] != (2, keys, 2 * half)):
        raise ValueError(f"cos, sin, prefix: expected equal tables and a prefix [P, 2, {keys}, {2 * half}]")
    if kv.shape != (len(sources), 2, keys, 2 * half):
        raise ValueError(f"kv: expected [{len(sources)}, 2, {keys}, {2 * half}], got {list(kv.shape)}")
    out_of_range = lib.p2l_rope_kv(
        _at(x), len(x), queries, keys, half, _floats(cos), _floats(sin), len(cos), _integers(positions), _integers(sources),
        len(sources), _at(prefix), 0 if prefix is None else len(prefix), _at(kv), *_how(x),
    )  # fmt: skip
    if out_of_range:
        raise ValueError("sources, positions: expected tokens of x, rows of the prefix and positions of the tables")
    return kv


def attention(
    q: Tensor, kv: Tensor, starts: Tensor, key_starts: Tensor, last: bool, out: Tensor, rounded: bool = False
) -> Tensor:
    """Causal attention within each of N prompts: out [Q, heads S] = softmax(q k' / sqrt(S)) v, with grouped heads.

    q [Q, heads, S], whose rows may be apart; kv [R, 2, kv heads, S]; starts and key_starts [N + 1] int32: the offsets of the
    prompts in q and kv. A prompt has no fewer keys than queries; its last query sees them all, the one before it all but one.
    last: q holds each prompt's last query alone. rounded: on CPUs with dot products of bfloat16, as always there for bfloat16
    tensors, queries, keys, values and weights are rounded to bfloat16 for the products; scores, softmax and sums stay float32.
    A prompt's result depends on nothing but its own rows.
    """
    fits = q.ndim == 3 and kv.ndim == 4 and kv.shape[1] == 2 and q.shape[2] == kv.shape[3] and kv.shape[2] > 0
    if not fits or q.shape[1] % kv.shape[2]:
        raise ValueError(
            f"q, kv: expected [Q, heads, S] and [R, 2, a divisor of the heads, S], got {list(q.shape)} and {list(kv.shape)}"
        )
    (queries, heads, size), (keys, _, kv_heads, _), (apart, *strides) = q.shape, kv.shape, q.stride()
    if q.dtype != kv.dtype or strides != [size, 1] or not q.is_cpu:
        raise ValueError(f"q: expected contiguous rows of {kv.dtype} on the CPU, got {q.dtype}, strides {q.stride()}")
    _check(kv, kv=kv, out=out)
    n = starts.numel() - 1
    if out.shape != (queries, heads * size) or key_starts.numel() != n + 1 or n < 0:
        raise ValueError(
            f"out, starts, key_starts: expected [{queries}, {heads * size}] and [N + 1] twice, got {list(out.shape)}, "
            f"{list(starts.shape)} and {list(key_starts.shape)}"
        )
    count = threads(queries * heads * size * keys // max(n, 1), PRODUCTS_PER_THREAD)
    status = lib.p2l_attention(
        _at(q), apart, queries, _at(kv), keys, _integers(starts), _integers(key_starts), n, heads, kv_heads, size, last,
        q.dtype == torch.bfloat16, rounded, count, _at(out),
    )  # fmt: skip
    if check(status, "attention"):
        raise ValueError("starts, key_starts: expected offsets of all of q and kv, no prompt with fewer keys than queries")
    return out


def rope(x: Tensor, cos: Tensor, sin: Tensor, heads: int, rotated: int, inverse: bool = False) -> None:
    """Rotates, in place, the first ``rotated`` of the ``heads`` heads of x [T, heads S] by cos and sin [T, S / 2] float32.

    inverse: the inverse rotation, which is also the gradient.
    """
    half = cos.shape[1]
    _check(x, x=x)
    if x.shape != (len(cos), heads * 2 * half) or cos.shape != sin.shape or not 0 <= rotated <= heads:
        raise ValueError(f"x: expected [{len(cos)}, {heads * 2 * half}] and at most {heads} heads, got {list(x.shape)}")
    lib.p2l_rope(_at(x), _floats(cos), _floats(sin), len(x), heads, rotated, half, inverse, *_how(x))


def _check(like: Tensor, **tensors: Tensor | None) -> None:
    for name, given in tensors.items():
        if given is None:
            continue
        fits = given.dtype == like.dtype and given.dtype in DTYPES and given.is_contiguous()
        if not fits or not given.is_cpu:
            raise ValueError(
                f"{name}: expected contiguous float32 or bfloat16 on the CPU, all of one type, got {given.dtype} on "
                f"{given.device}, strides {given.stride()}"
            )


def _at(given: Tensor | None) -> object:
    return tensor("void", given)


def _floats(table: Tensor) -> object:
    return tensor("float", _typed(table, torch.float32))


def _integers(index: Tensor) -> object:
    return tensor("int32_t", _typed(index, torch.int32))


def _typed(given: Tensor, dtype: torch.dtype) -> Tensor:
    if given.dtype != dtype or not given.is_contiguous() or not given.is_cpu:
        raise ValueError(
            f"cos, sin, positions, sources, starts, key_starts: expected contiguous {dtype} on the CPU, got {given.dtype}"
        )
    return given


def _how(given: Tensor) -> tuple[bool, int]:
    """Whether it is bfloat16, and the number of threads."""
    return given.dtype == torch.bfloat16, threads(given.numel(), ELEMENTS_PER_THREAD)

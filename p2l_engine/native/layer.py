"""A decoder's layers whose weights are packed (``panels.Panels``), one call each, on CPU tensors.

Reference implementation: the same steps one by one (``p2l_engine.backbone.packed``), which give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from p2l_engine.native.binding import check, ffi, lib, tensor, threads
from p2l_engine.native.decoder import ELEMENTS_PER_THREAD, PRODUCTS_PER_THREAD
from p2l_engine.native.panels import PRODUCTS_PER_THREAD as PANELS_PER_THREAD
from p2l_engine.native.panels import Panels


class LayerWeights:
    """One layer's weights as the native core reads them. norms: [D] each, of the dtype of x; the products of queries, keys and
    values; of the output; of gate and up; of down. Raises ValueError where their shapes do not fit."""

    __slots__ = ("attention_norm", "down", "gate_up", "mlp_norm", "out", "qkv", "struct")

    def __init__(
        self, attention_norm: Tensor, qkv: Panels, out: Panels, mlp_norm: Tensor, gate_up: Panels, down: Panels
    ) -> None:
        self.attention_norm, self.qkv, self.out = attention_norm, qkv, out  # kept alive: the struct holds their addresses
        self.mlp_norm, self.gate_up, self.down = mlp_norm, gate_up, down
        width = len(attention_norm)
        fits = mlp_norm.shape == attention_norm.shape and {qkv.depth, gate_up.depth, out.columns, down.columns} == {width}
        if not fits or gate_up.columns != 2 * down.depth:
            raise ValueError(
                f"weights: expected products to and from {width} columns, of SwiGLU from half of gate_up's columns"
            )
        self.struct: Any = ffi.new("p2l_layer_weights *")
        self.struct.attention_norm, self.struct.mlp_norm = tensor("void", attention_norm), tensor("void", mlp_norm)
        for name in ("qkv", "out", "gate_up", "down"):
            panels: Panels = getattr(self, name)
            data, scale, bias = panels.pointers
            into = getattr(self.struct, name)
            into.data, into.scale, into.bias = data, scale, bias
            into.depth, into.columns, into.level = panels.depth, panels.columns, panels.level


class Pass:
    """A batch on its way through layers of one shape.

    x [T, D]: changed in place. heads, kv_heads: of queries, and of keys. cos, sin [positions, S / 2] float32; positions [T],
    sources [R], starts and key_starts [N + 1] int32: as in ``decoder.rope_kv`` and ``decoder.attention``. buffer: memory of a
    name [rows, columns] of the dtype of x; scratch: of at least so many bytes, or None for 0. Raises ValueError for tensors of
    other dtypes, shapes and strides.
    """

    __slots__ = ("_kept", "_started", "_struct", "delta", "kv")

    def __init__(
        self,
        x: Tensor,
        like: LayerWeights,
        heads: int,
        kv_heads: int,
        eps: float,
        tables: tuple[Tensor, Tensor],
        indices: tuple[Tensor, Tensor, Tensor, Tensor],
        buffer: Callable[[str, int, int], Tensor],
        scratch: Callable[[int], Tensor | None],
    ) -> None:
        (cos, sin), (positions, sources, starts, key_starts) = tables, indices
        (n, width), half, keys, prompts = x.shape, cos.shape[1], len(sources), len(starts) - 1
        inner, projected, attended = like.down.depth, (heads + 2 * kv_heads) * 2 * half, heads * 2 * half
        if (like.qkv.columns, like.out.depth, like.qkv.depth) != (projected, attended, width) or heads % kv_heads:
            raise ValueError(f"x, heads: expected {like.qkv.depth} columns and heads of {2 * half}, got {width} and {heads}")
        if len(positions) != n or len(key_starts) != prompts + 1 or cos.shape != sin.shape:
            raise ValueError(f"positions, key_starts, tables: expected [{n}], [{prompts + 1}] and two of one shape")
        dtypes = (*(torch.float32,) * 2, *(torch.int32,) * 4, like.attention_norm.dtype)
        for given, dtype in zip((*tables, *indices, x), dtypes, strict=True):
            if given.dtype != dtype or not given.is_contiguous() or not given.is_cpu:
                raise ValueError(f"tables, indices, x: expected contiguous {dtype} on the CPU, got {given.dtype}")
        self.kv = buffer("kv", keys, 4 * half * kv_heads).view(keys, 2, kv_heads, 2 * half)
        self.delta = buffer("delta", n, width)
        work = {
            "normed": buffer("norm", n, width), "projected": buffer("qkv", n, projected),
            "attended": buffer("attend", n, attended), "gate_up": buffer("gate_up", n, 2 * inner),
            "gate": buffer("gate", n, inner),
        }  # fmt: skip
        each = (like.qkv, like.out, like.gate_up, like.down)
        memory = scratch(max(panels.scratch(n) for panels in each))
        self._kept = (x, *tables, *indices, memory, work)
        self._struct: Any = ffi.new("p2l_batch *")
        batch = self._struct
        batch.tokens, batch.keys, batch.prompts, batch.heads, batch.kv_heads = n, keys, prompts, heads, kv_heads
        batch.half, batch.n_positions, batch.eps, batch.bf16 = half, len(cos), eps, x.dtype == torch.bfloat16
        batch.rounded = like.qkv.scale is not None  # int8
        batch.cosine, batch.sine = tensor("float", cos), tensor("float", sin)
        batch.positions, batch.sources = tensor("int32_t", positions), tensor("int32_t", sources)
        batch.starts, batch.key_starts = tensor("int32_t", starts), tensor("int32_t", key_starts)
        batch.x, batch.delta, batch.kv = tensor("void", x), tensor("void", self.delta), tensor("void", self.kv)
        for name, given in work.items():
            setattr(batch, name, tensor("void", given))
        batch.scratch = tensor("uint8_t", memory)
        batch.norm_threads = threads(n * width, ELEMENTS_PER_THREAD)
        batch.rope_threads = threads(n * projected, ELEMENTS_PER_THREAD)
        batch.gate_threads = threads(n * 2 * inner, ELEMENTS_PER_THREAD)
        batch.attention_threads = threads(n * attended * keys // max(prompts, 1), PRODUCTS_PER_THREAD)
        batch.qkv_threads, batch.out_threads, batch.gate_up_threads, batch.down_threads = (
            threads(n * panels.depth * panels.columns, PANELS_PER_THREAD) for panels in each
        )
        self._started = False

    def run(self, layer: LayerWeights, prefix: Tensor | None) -> None:
        """One layer: fills ``kv`` with its keys and values [R, 2, kv heads, S], and ``delta`` with what is still to be added to
        x. prefix: the known ones [P, 2, kv heads, S], or None. Raises ValueError for sources, positions and offsets that are
        out of range."""
        rows = 0
        if prefix is not None:
            rows = len(prefix)
            if prefix.shape[1:] != self.kv.shape[1:] or prefix.dtype != self.kv.dtype or not prefix.is_contiguous():
                raise ValueError(
                    f"prefix: expected contiguous {self.kv.dtype} [P, {', '.join(map(str, self.kv.shape[1:]))}], got "
                    f"{prefix.dtype} {list(prefix.shape)}"
                )
        status = lib.p2l_layer(layer.struct, self._struct, not self._started, tensor("void", prefix), rows)
        if check(status, "layer"):
            raise ValueError("sources, positions, starts: expected tokens of x, rows of the prefix, positions of the tables, "
                             "and offsets of all tokens and keys")  # fmt: skip
        self._started = True

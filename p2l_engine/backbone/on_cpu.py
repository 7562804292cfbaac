"""What a packed decoder computes with on a CPU: the native core's one pass for each step between the products.

The steps are those of the Triton kernels of the same names, whose twins are theirs too. float32 and bfloat16.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from p2l_engine._native import ffi, lib
from p2l_engine.backbone import attention
from p2l_engine.backbone.packing import Packed
from p2l_engine.backbone.weights import Linear

DTYPES = (torch.float32, torch.bfloat16)

PACKED_ROWS = 192  # bfloat16: up to here a product is faster with weights laid out for it, 1.4 times at 64 rows
ELEMENTS_PER_THREAD = 4096  # below this a thread costs more than it saves


class CpuOperations:
    """See Operations. One forward pass at a time: each result lies in a buffer that the next one of its name overwrites.

    Fresh memory costs a CPU as much as the products that fill it (page faults), so the buffers stay from pass to pass. packed:
    where the weights of short passes are kept, in oneDNN's layout, for all that share it.
    """

    def __init__(self, dtype: torch.dtype, packed: dict[Linear, Tensor] | None = None) -> None:
        self.dtype = dtype
        self._packed = {} if packed is None else packed
        self._packs = dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        self._buffers: dict[str, Tensor] = {}

    def norm(self, x: Tensor, weight: Tensor, eps: float, delta: Tensor | None = None) -> Tensor:
        """x [T, D] -> its norm, times weight [D]; with delta [T, D], x becomes x + delta first, in place."""
        _check(x, x=x, weight=weight, delta=delta)
        if weight.shape != x.shape[1:] or (delta is not None and delta.shape != x.shape):
            raise ValueError(f"x: expected [T, D], weight [D] and delta [T, D], got {list(x.shape)} and {list(weight.shape)}")
        rows, columns = x.shape
        out = self._buffer("norm", rows, columns)
        lib.p2l_rms_norm(_at(x), _at(delta), _at(weight), _at(out), rows, columns, eps, _bf16(x), _threads(x))
        return out

    def gate(self, gate_up: Tensor) -> Tensor:
        """gate_up [T, 2 I], the gates before the ups -> silu(gate) * up [T, I]."""
        _check(gate_up, gate_up=gate_up)
        if gate_up.ndim != 2 or gate_up.shape[1] % 2:
            raise ValueError(f"gate_up: expected [T, 2 I], got {list(gate_up.shape)}")
        rows, inner = len(gate_up), gate_up.shape[1] // 2
        out = self._buffer("gate", rows, inner)
        lib.p2l_silu_mul(_at(gate_up), _at(out), rows, inner, _bf16(gate_up), _threads(gate_up))
        return out

    def rotary(
        self,
        x: Tensor,
        queries: int,
        keys: int,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        sources: Tensor,
        prefix: Tensor | None = None,
    ) -> Tensor:
        """x [T, (queries + 2 keys) S] -> keys and values [R, 2, keys, S], the queries turned in place.

        As ``kernels.rotary``: cos and sin [positions, S / 2] float32, positions [T] and sources [R] int32, prefix
        [P, 2, keys, S].
        """
        half = cos.shape[1]
        _check(x, x=x, prefix=prefix)
        if x.shape[1] != (queries + 2 * keys) * 2 * half or len(positions) != len(x):
            raise ValueError(f"x: expected [{len(positions)}, {(queries + 2 * keys) * 2 * half}], got {list(x.shape)}")
        if cos.shape != sin.shape or (prefix is not None and prefix.shape[1:] != (2, keys, 2 * half)):
            raise ValueError(f"cos, sin, prefix: expected equal tables and a prefix [P, 2, {keys}, {2 * half}]")
        floats, integers = (_as("float", cos), _as("float", sin)), (_as("int32_t", positions), _as("int32_t", sources))
        kv = self._buffer("kv", len(sources), 4 * half * keys).view(len(sources), 2, keys, 2 * half)
        outside = lib.p2l_rotary(
            _at(x), len(x), queries, keys, half, *floats, len(cos), *integers, len(sources), _at(prefix),
            0 if prefix is None else len(prefix), _at(kv), _bf16(x), _threads(x),
        )  # fmt: skip
        if outside:
            raise ValueError("sources, positions: expected tokens of x, rows of the prefix and positions of the tables")
        return kv

    def linear(self, x: Tensor, layer: Linear, name: str) -> Tensor:
        """x [T, in] -> [T, out]; few rows go through weights packed for them, which are kept beside the plain ones."""
        if self._packs and len(x) <= PACKED_ROWS:
            weight = self._packed.get(layer)
            if weight is None:
                weight = self._packed[layer] = torch.ops.mkldnn._reorder_linear_weight(
                    layer.weight.t().contiguous(), PACKED_ROWS
                )
            return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, weight, layer.bias, "none", [], ""))
        out = self._buffer(name, len(x), layer.weight.shape[1])
        if layer.bias is None:
            return torch.mm(x, layer.weight, out=out)
        return torch.addmm(layer.bias, x, layer.weight, out=out)

    def attend(self, q: Tensor, kv: Tensor, packed: Packed, last: bool = False) -> Tensor:
        """See ``attention``."""
        return attention.over_runs(q, kv, packed, last, self._buffer("attend", len(q), q.shape[1] * q.shape[2]))

    def _buffer(self, name: str, rows: int, columns: int) -> Tensor:
        flat = self._buffers.get(name)
        if flat is None or len(flat) < rows * columns:
            flat = self._buffers[name] = torch.empty(rows * columns, dtype=self.dtype)
        return flat[: rows * columns].view(rows, columns)


def _check(like: Tensor, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        fits = tensor.dtype == like.dtype and tensor.dtype in DTYPES and tensor.is_contiguous()
        if not fits or tensor.device.type != "cpu":
            raise ValueError(
                f"{name}: expected contiguous float32 or bfloat16 on the CPU, all of one type, got {tensor.dtype} on "
                f"{tensor.device}, strides {tensor.stride()}"
            )


def _as(kind: str, tensor: Tensor) -> object:
    expected = {"float": torch.float32, "int32_t": torch.int32}[kind]
    if tensor.dtype != expected or not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError(f"cos, sin, positions, sources: expected contiguous {expected} on the CPU, got {tensor.dtype}")
    return ffi.cast(f"{kind} *", tensor.data_ptr())


def _at(tensor: Tensor | None) -> object:
    return ffi.NULL if tensor is None else ffi.cast("void *", tensor.data_ptr())


def _bf16(tensor: Tensor) -> bool:
    return tensor.dtype == torch.bfloat16


def _threads(tensor: Tensor) -> int:
    return max(1, min(torch.get_num_threads(), tensor.numel() // ELEMENTS_PER_THREAD))

"""The packed decoder's operations on a CPU, in float32 or bfloat16: the native core's products and steps between them, and
torch's products where those are faster.

Reference implementations: those of the Triton kernels of the same steps (``p2l_engine.kernels``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from p2l_engine.backbone.operations import Heads, LayerRun
from p2l_engine.backbone.packing import Packed
from p2l_engine.backbone.weights import Linear
from p2l_engine.native import decoder, embedding, panels
from p2l_engine.native.layer import LayerWeights, Pass
from p2l_engine.native.panels import Panels

PACKED_ROWS = 192  # bfloat16, AMX: up to this many rows a product is faster with weights in oneDNN's layout (1.4 times at 64)


class CpuOperations:
    """See Operations. Used by one forward pass at a time: each result is in a buffer that the next of its name overwrites.

    The buffers are kept from pass to pass, since page faults of fresh memory cost a CPU as much as the products that fill it.
    packed: the weights of short passes in oneDNN's layout, shared by the operations of all threads; two threads may lay out the
    same weight at once, which is only redundant. whole: the layers that are computed in one call each, all but the last; empty
    where torch has the products. rounded: as in ``decoder.attention``.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        packed: dict[Linear, Tensor] | None = None,
        whole: Sequence[LayerWeights] = (),
        rounded: bool = False,
    ) -> None:
        self.dtype, self._whole, self._rounded = dtype, whole, rounded
        self._packed = {} if packed is None else packed
        self._packs = dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        self._buffers: dict[str, Tensor] = {}
        self._last: dict[str, Tensor] = {}  # the last view of each
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def embed(self, tokens: Tensor, table: Tensor) -> Tensor:
        """tokens [T] int32, table [V, D] -> [T, D]; see ``native.embedding.embed``."""
        return embedding.embed(tokens, table, self._buffer("x", len(tokens), table.shape[1]))

    def norm(self, x: Tensor, weight: Tensor, eps: float, delta: Tensor | None = None) -> Tensor:
        """x [T, D] -> its norm, times weight [D]; with delta [T, D], x becomes x + delta first, in place."""
        return decoder.rms_norm(x, weight, eps, self._buffer("norm", *x.shape), delta)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """gate_up [T, 2 I], the gate's columns first -> silu(gate) * up [T, I]."""
        return decoder.swiglu(gate_up, self._buffer("gate", gate_up.shape[0], gate_up.shape[1] // 2))

    def rope(
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
        """x [T, (queries + 2 keys) S] -> rotated keys and values [R, 2, keys, S]; rotates the queries in place.

        As ``kernels.rotary``: cos and sin [positions, S / 2] float32, positions [T] and sources [R] int32, prefix
        [P, 2, keys, S].
        """
        size = 2 * cos.shape[1]
        kv = self._buffer("kv", len(sources), 2 * size * keys).view(len(sources), 2, keys, size)
        return decoder.rope_kv(x, queries, keys, cos, sin, positions, sources, kv, prefix)

    def linear(self, x: Tensor, layer: Linear | Panels, name: str) -> Tensor:
        """x [T, in] -> [T, out]; torch's bfloat16 products of few rows use weights in oneDNN's layout, kept beside the plain
        ones."""
        if isinstance(layer, Panels):
            return panels.multiply(
                x, layer, self._buffer(name, x.shape[0], layer.columns), self._scratch(layer.scratch(x.shape[0]))
            )
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
        """q [T, heads, S], or [N, heads, S] of the last tokens only, and kv as ``rope`` returns it -> [T or N, heads * S]."""
        out = self._buffer("attend", q.shape[0], q.shape[1] * q.shape[2])
        return decoder.attention(q, kv, packed.starts, packed.key_starts, last, out, self._rounded)

    def whole_layers(self, x: Tensor, packed: Packed, heads: Heads, tables: tuple[Tensor, Tensor]) -> LayerRun | None:
        """See Operations."""
        if not self._whole:
            return None
        indices = (packed.positions, packed.sources, packed.starts, packed.key_starts)
        batch = Pass(x, self._whole[0], heads.queries, heads.keys, heads.eps, tables, indices, self._buffer, self._scratch)

        def run(number: int, prefix: Tensor | None) -> tuple[Tensor, Tensor]:
            batch.run(self._whole[number], prefix)
            return batch.kv, batch.delta

        return run

    def _scratch(self, size: int) -> Tensor | None:
        if size > self._bytes.numel():
            self._bytes = torch.empty(size, dtype=torch.uint8)
        return self._bytes if size else None

    def _buffer(self, name: str, rows: int, columns: int) -> Tensor:
        last = self._last.get(name)
        if last is not None and last.shape == (rows, columns):  # as in the layer before
            return last
        flat = self._buffers.get(name)
        if flat is None or flat.numel() < rows * columns:
            flat = self._buffers[name] = torch.empty(rows * columns, dtype=self.dtype)
        self._last[name] = view = flat[: rows * columns].view(rows, columns)
        return view

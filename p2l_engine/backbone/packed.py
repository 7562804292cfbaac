"""The decoders of ``families.FAMILIES`` over packed tokens.

The last layer computes keys and values of all tokens, but queries, output projection and MLP of the CLS tokens only. The
residual sum of each block is added in the norm that follows it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from p2l_engine.backbone.families import DecoderConfig
from p2l_engine.backbone.operations import Heads, Operations
from p2l_engine.backbone.packing import Packed, Tokens
from p2l_engine.backbone.ready import DecoderWeights
from p2l_engine.backbone.weights import Layer, Linear
from p2l_engine.native.decoder import DTYPES
from p2l_engine.native.layer import LayerWeights
from p2l_engine.native.panels import Panels
from p2l_engine.prompts.encode import MAX_TOKENS


def check_operations(device: torch.device, dtype: torch.dtype) -> None:
    """Raises ValueError for a dtype that the operations on this device cannot use."""
    if device.type == "cpu" and dtype not in DTYPES:
        raise ValueError(f"dtype: expected float32, bfloat16 or int8 on a CPU, got {dtype}")


def operations_for(
    device: torch.device, dtype: torch.dtype, layers: Sequence[Layer[Linear | Panels]]
) -> Callable[[], Operations]:
    """A function that makes the operations for one forward pass at a time."""
    if device.type == "cpu":
        from p2l_engine.backbone.on_cpu import CpuOperations

        weights: dict[Linear, Tensor] = {}
        return partial(CpuOperations, dtype, weights, native_layers(layers[:-1]), rounds(layers))
    from p2l_engine.backbone.on_gpu import GpuOperations  # needs Triton

    return GpuOperations


def rounds(layers: Sequence[Layer[Linear | Panels]]) -> bool:
    """Whether attention between these layers may round to bfloat16 (see ``decoder.attention``): int8 has coarser products."""
    first = layers[0].qkv
    return isinstance(first, Panels) and first.scale is not None


def native_layers(layers: Sequence[Layer[Linear | Panels]]) -> list[LayerWeights]:
    """The layers for the native core, if all their products are its own; else none."""
    found = []
    for layer in layers:
        qkv, out, gate_up, down = layer.qkv, layer.out, layer.gate_up, layer.down
        if not (
            isinstance(qkv, Panels) and isinstance(out, Panels) and isinstance(gate_up, Panels) and isinstance(down, Panels)
        ):
            return []
        found.append(LayerWeights(layer.attention_norm, qkv, out, layer.mlp_norm, gate_up, down))
    return found


class PackedDecoder:
    """See Backbone. Safe to call from several threads."""

    positions: int | None = None

    def __init__(
        self,
        config: DecoderConfig,
        weights: DecoderWeights,
        device: torch.device,
        dtype: torch.dtype,
        operations: Callable[[], Operations] | None = None,
    ) -> None:
        self.name = f"packed {config.model_type}"
        self.device, self.dtype = device, dtype
        self.eps = config.rms_norm_eps
        self.heads, self.kv_heads, self.head_size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        frequencies, self._rope_scale = config.rope.frequencies(config.head_dim)
        self._frequencies = frequencies.to(device)
        # On a GPU at full size from the start: CUDA graphs keep the addresses of these tables.
        self._tables = self._angles(MAX_TOKENS if device.type == "cuda" else 512)
        self.embedding, self.layers = weights.embedding, weights.layers
        self.norm: Tensor | None = weights.norm
        queries, whole = self.heads * self.head_size, self.layers[-1].qkv
        self._last_q, self._last_kv = whole.part(0, queries), whole.part(queries, queries + 2 * self.kv_heads * self.head_size)
        self.prefix: Tokens | None = None
        self.prefix_kv: list[Tensor | None] = [None] * len(self.layers)
        self._make = operations or operations_for(device, dtype, self.layers)
        self._idle: deque[Operations] = deque()  # each forward pass takes one and returns it with its buffers

    def share(self, prefix: Tokens | None) -> None:
        """Computes the keys and values of a prefix (None: no prefix); prompts must be packed with it from now on.

        No other thread may use the decoder meanwhile. CUDA graphs that were captured before keep the old prefix.
        """
        self.prefix, self.prefix_kv = None, [None] * len(self.layers)
        if prefix is not None and len(prefix):
            found: list[Tensor | None] = []
            self.behind(Packed.of([prefix]).to(self.device), self.prefix_kv, lambda kv: found.append(kv.clone()))
            self.prefix, self.prefix_kv = prefix, found

    def __call__(self, packed: Packed) -> Tensor:
        """See Backbone."""
        return self.behind(packed, self.prefix_kv)

    @torch.inference_mode()
    def behind(self, packed: Packed, known: Iterable[Tensor | None], keep: Callable[[Tensor], object] | None = None) -> Tensor:
        """The last tokens' hidden states [N, D] before the final norm.

        known: for each layer, the keys and values [P, 2, kv heads, size] that the prompts are packed behind; None for none.
        keep: is given each layer's [R, 2, kv heads, size], which the next layer overwrites.
        """
        try:  # append and pop of a deque are atomic
            operations = self._idle.pop()
        except IndexError:
            operations = self._make()
        try:
            return self._layers(operations, packed, known, keep)
        finally:
            self._idle.append(operations)

    def _layers(
        self, do: Operations, packed: Packed, known: Iterable[Tensor | None], keep: Callable[[Tensor], object] | None
    ) -> Tensor:
        cos, sin = tables = self.rope(packed.longest)
        queries, rows = self.heads * self.head_size, packed.last
        x, delta = do.embed(packed.tokens, self.embedding).to(self.dtype), None
        run = do.whole_layers(x, packed, Heads(self.heads, self.kv_heads, self.eps), tables)
        for i, (layer, prefix) in enumerate(zip(self.layers, known, strict=True)):
            last = layer is self.layers[-1]
            if run is not None and not last:
                kv, delta = run(i, prefix)
                if keep is not None:
                    keep(kv)
                continue
            normed = do.norm(x, layer.attention_norm, self.eps, delta)
            if last:
                projected = do.linear(normed, self._last_kv, "qkv")
                kv = do.rope(projected, 0, self.kv_heads, cos, sin, packed.positions, packed.sources, prefix)
                q = do.linear(normed.index_select(0, rows), self._last_q, "q")
                each = torch.arange(len(rows), dtype=torch.int32, device=self.device)
                do.rope(q, self.heads, 0, cos, sin, packed.positions.index_select(0, rows), each)
                x = x.index_select(0, rows)
            else:
                projected = do.linear(normed, layer.qkv, "qkv")
                kv = do.rope(projected, self.heads, self.kv_heads, cos, sin, packed.positions, packed.sources, prefix)
                q = projected[:, :queries]
            if keep is not None:
                keep(kv)
            attended = do.attend(q.view(len(q), self.heads, self.head_size), kv, packed, last)
            normed = do.norm(x, layer.mlp_norm, self.eps, do.linear(attended, layer.out, "delta"))
            delta = do.linear(do.swiglu(do.linear(normed, layer.gate_up, "gate_up")), layer.down, "delta")
        return x if delta is None else x + delta

    def rope(self, positions: int) -> tuple[Tensor, Tensor]:
        """cos and sin of at least this many positions, [positions, size / 2] float32. Safe from several threads: one assignment
        replaces the tables."""
        tables = self._tables
        if positions > len(tables[0]):
            tables = self._tables = self._angles(max(positions, 2 * len(tables[0])))
        return tables

    def _angles(self, positions: int) -> tuple[Tensor, Tensor]:
        """cos and sin [positions, size / 2], float32."""
        angles = torch.arange(positions, device=self.device).float()[:, None] * self._frequencies
        cos, sin = ((f(angles) * self._rope_scale).contiguous() for f in (torch.cos, torch.sin))
        return cos, sin

"""The packed decoder's operations on a GPU: Triton kernels between the products, one attention call for the batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from p2l_engine.backbone.attention import over_runs
from p2l_engine.backbone.operations import Heads
from p2l_engine.backbone.packing import Packed
from p2l_engine.backbone.weights import Linear
from p2l_engine.kernels.attention import attention
from p2l_engine.kernels.rms_norm import rms_norm
from p2l_engine.kernels.rotary import rotary
from p2l_engine.kernels.swiglu import swiglu


class GpuOperations:
    """See Operations. Nothing here waits for the device."""

    norm = staticmethod(rms_norm)
    swiglu = staticmethod(swiglu)
    rope = staticmethod(rotary)

    def embed(self, tokens: Tensor, table: Tensor) -> Tensor:
        """tokens [T], table [V, D] -> [T, D]."""
        return F.embedding(tokens, table)

    def whole_layers(self, x: Tensor, packed: Packed, heads: Heads, tables: tuple[Tensor, Tensor]) -> None:
        """See Operations: by steps."""

    def linear(self, x: Tensor, layer: Linear, name: str) -> Tensor:
        """x [T, in] -> [T, out]."""
        return x @ layer.weight if layer.bias is None else torch.addmm(layer.bias, x, layer.weight)

    def attend(self, q: Tensor, kv: Tensor, packed: Packed, last: bool = False) -> Tensor:
        """See ``attention``."""
        if q.dtype in (torch.bfloat16, torch.float16):
            return attention(q, kv, packed.starts, packed.key_starts, packed.longest_own, last)
        return over_runs(q, kv, packed, last, q.new_empty(len(q), q.shape[1] * q.shape[2]))

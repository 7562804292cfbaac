"""SwiGLU, the gated activation of the MLP, in one pass: out = silu(gate) * up, silu(x) = x * sigmoid(x), in float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _swiglu_kernel(  # type: ignore[no-untyped-def]
    gate_up_ptr, gate_up_row_stride, out_ptr, out_row_stride,
    N_COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < N_COLUMNS
    gate = tl.load(gate_up_ptr + row * gate_up_row_stride + column, mask=here, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * gate_up_row_stride + N_COLUMNS + column, mask=here, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * out_row_stride + column, gate * tl.sigmoid(gate) * up, mask=here)


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2 I], the gates before the ups, rows contiguous -> [T, I] of the same dtype."""
    if gate_up.ndim != 2 or gate_up.shape[1] < 2 or gate_up.shape[1] % 2 or gate_up.stride(1) != 1:
        raise ValueError(
            f"gate_up: expected [T, 2 I] with contiguous rows, got {list(gate_up.shape)}, strides {gate_up.stride()}"
        )
    rows, inner = len(gate_up), gate_up.shape[1] // 2
    out = torch.empty((rows, inner), dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        grid = (rows, triton.cdiv(inner, BLOCK))
        _swiglu_kernel[grid](gate_up, gate_up.stride(0), out, out.stride(0), N_COLUMNS=inner, BLOCK=BLOCK, num_warps=4)
    return out


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """The reference implementation, in gate_up's dtype."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up

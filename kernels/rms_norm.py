"""RMSNorm, and the residual sum before it, in one pass over the rows.

x[t] <- x[t] + delta[t]                                    (where there is a delta; rounded to x's dtype, as torch would)
out[t] = x[t] / sqrt(mean(x[t]^2) + eps) * weight          (the mean and the product in float32)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_COLUMNS = 16384  # a row stays in one program's registers


@triton.jit
def _rms_norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr, x_row_stride, delta_ptr, delta_row_stride, weight_ptr, out_ptr, out_row_stride, eps,
    N_COLUMNS: tl.constexpr, BLOCK: tl.constexpr, HAS_DELTA: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    here = column < N_COLUMNS
    x = tl.load(x_ptr + row * x_row_stride + column, mask=here, other=0.0)
    if HAS_DELTA:
        delta = tl.load(delta_ptr + row * delta_row_stride + column, mask=here, other=0.0)
        x = (x.to(tl.float32) + delta.to(tl.float32)).to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + row * x_row_stride + column, x, mask=here)
    x = x.to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=here, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / N_COLUMNS + eps)
    tl.store(out_ptr + row * out_row_stride + column, x * scale * weight, mask=here)


def rms_norm(x: Tensor, weight: Tensor, eps: float, delta: Tensor | None = None) -> Tensor:
    """x [T, D] -> its norm, times weight [D]; with delta [T, D], x becomes x + delta first, in place. Rows contiguous."""
    if x.ndim != 2 or x.stride(1) != 1 or not 1 <= x.shape[1] <= MAX_COLUMNS:
        raise ValueError(f"x: expected [T, D <= {MAX_COLUMNS}] with contiguous rows, got {list(x.shape)}, strides {x.stride()}")
    if weight.shape != x.shape[1:] or not weight.is_contiguous():
        raise ValueError(f"weight: expected [{x.shape[1]}], contiguous, got {list(weight.shape)}")
    if delta is not None and (delta.shape != x.shape or delta.stride(1) != 1 or delta.dtype != x.dtype):
        raise ValueError(f"delta: expected {list(x.shape)} of {x.dtype} with contiguous rows, got {list(delta.shape)}")
    out = torch.empty_like(x)
    if len(x):
        block = triton.next_power_of_2(x.shape[1])
        given = x if delta is None else delta
        _rms_norm_kernel[(len(x),)](
            x, x.stride(0), given, given.stride(0), weight, out, out.stride(0), eps,
            N_COLUMNS=x.shape[1], BLOCK=block, HAS_DELTA=delta is not None, num_warps=min(8, max(1, block // 256)),
        )  # fmt: skip
    return out


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, delta: Tensor | None = None) -> Tensor:
    """The reference implementation, in x's dtype; it changes x as the kernel does."""
    if delta is not None:
        x += delta
    return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)

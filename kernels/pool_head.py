"""The head over the prompts' CLS hidden states: the final norm, then the linear head; float32 throughout.

out[n, k] = sum_d h[n, d] w[d] weight[k, d] + bias[k],   h[n] = hidden[n] / sqrt(mean(hidden[n]^2) + eps)

The last row of weight may be the tie parameter's: out is then theta [N, M] and, in column M, eta.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_N, BLOCK_K, BLOCK_D = 16, 64, 32


@triton.jit(do_not_specialize=["n_prompts"])
def _pool_head_kernel(  # type: ignore[no-untyped-def]
    hidden_ptr, hidden_row_stride, norm_ptr, weight_ptr, bias_ptr, out_ptr, n_prompts, n_outputs, eps,
    N_COLUMNS: tl.constexpr, HAS_NORM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    row = n.to(tl.int64)
    out = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    squares = tl.zeros([BLOCK_N], dtype=tl.float32)
    for start in range(0, N_COLUMNS, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        h_here = (n[:, None] < n_prompts) & (d[None, :] < N_COLUMNS)
        h = tl.load(hidden_ptr + row[:, None] * hidden_row_stride + d[None, :], mask=h_here, other=0.0).to(tl.float32)
        if HAS_NORM:
            squares += tl.sum(h * h, axis=1)
            h *= tl.load(norm_ptr + d, mask=d < N_COLUMNS, other=0.0).to(tl.float32)[None, :]
        w_here = (d[:, None] < N_COLUMNS) & (k[None, :] < n_outputs)
        w = tl.load(weight_ptr + k[None, :] * N_COLUMNS + d[:, None], mask=w_here, other=0.0).to(tl.float32)
        out = tl.dot(h, w, acc=out, input_precision="ieee")
    if HAS_NORM:
        out *= (1.0 / tl.sqrt(squares / N_COLUMNS + eps))[:, None]
    out += tl.load(bias_ptr + k, mask=k < n_outputs, other=0.0).to(tl.float32)[None, :]
    here = (n[:, None] < n_prompts) & (k[None, :] < n_outputs)
    tl.store(out_ptr + n.to(tl.int64)[:, None] * n_outputs + k[None, :], out, mask=here)


def pool_head(hidden: Tensor, weight: Tensor, bias: Tensor, norm: Tensor | None = None, eps: float = 0.0) -> Tensor:
    """hidden [N, D], any float; weight [K, D], bias [K] float32; norm [D] or None (no norm) -> [N, K] float32."""
    n, k = check_head(hidden, weight, bias, norm)
    out = torch.empty((n, k), dtype=torch.float32, device=hidden.device)
    if n:
        grid = (triton.cdiv(n, BLOCK_N), triton.cdiv(k, BLOCK_K))
        _pool_head_kernel[grid](
            hidden, hidden.stride(0), weight if norm is None else norm, weight, bias, out,
            n, k, eps, N_COLUMNS=hidden.shape[1], HAS_NORM=norm is not None,
            BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, BLOCK_D=BLOCK_D, num_warps=4,
        )  # fmt: skip
    return out


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor, norm: Tensor | None) -> tuple[int, int]:
    """The number of prompts N and of outputs K; raises ValueError for shapes, strides and dtypes that do not fit."""
    if hidden.ndim != 2 or hidden.stride(1) != 1 or not hidden.is_floating_point():
        raise ValueError(f"hidden: expected [N, D] with contiguous rows, got {list(hidden.shape)} {hidden.dtype}")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1] or not weight.is_contiguous() or weight.dtype != torch.float32:
        raise ValueError(
            f"weight: expected [K, {hidden.shape[1]}] float32, contiguous, got {list(weight.shape)} {weight.dtype}"
        )
    if bias.shape != weight.shape[:1] or bias.dtype != torch.float32 or not bias.is_contiguous():
        raise ValueError(f"bias: expected [{len(weight)}] float32, got {list(bias.shape)} {bias.dtype}")
    if norm is not None and (norm.shape != hidden.shape[1:] or not norm.is_contiguous()):
        raise ValueError(f"norm: expected [{hidden.shape[1]}], contiguous, got {list(norm.shape)}")
    return len(hidden), len(weight)


def pool_head_reference(hidden: Tensor, weight: Tensor, bias: Tensor, norm: Tensor | None = None, eps: float = 0.0) -> Tensor:
    """The reference implementation, in the dtype of the weight (float64 in tests)."""
    h = hidden.to(weight.dtype)
    if norm is not None:
        h = torch.nn.functional.rms_norm(h, norm.shape, norm.to(weight.dtype), eps)
    return torch.nn.functional.linear(h, weight, bias)

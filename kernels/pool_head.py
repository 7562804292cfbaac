"""The head over the prompts' CLS hidden states: the final norm, then the linear head; float32 throughout.

out[n, k] = sum_d h[n, d] w[d] weight[k, d] + bias[k],   h[n] = hidden[n] / sqrt(mean(hidden[n]^2) + eps)

The last row of weight may be the tie parameter's: out is then theta [N, M] and, in column M, eta.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# For few prompts, one program for each prompt and BLOCK_K outputs; from MANY prompts on, tiles of BLOCK_N prompts, on tensor
# cores. The three products of tf32x3 round no worse than float32's. Measured on an H200 with 131 outputs.
FEW, MANY = 64, 768
BLOCK_K_FEW, BLOCK_D_FEW = 4, 512
BLOCK_K, BLOCK_D = 16, 128
BLOCK_N_MANY, BLOCK_K_MANY, BLOCK_D_MANY = 32, 64, 32
VARIANTS = (1, FEW + 1, MANY)  # the fewest prompts of each, for warm-ups and tests


@triton.jit
def _pool_head_kernel(  # type: ignore[no-untyped-def]
    hidden_ptr, hidden_row_stride, norm_ptr, weight_ptr, bias_ptr, out_ptr, n_outputs, eps,
    N_COLUMNS: tl.constexpr, HAS_NORM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    h_ptr = hidden_ptr + n * hidden_row_stride
    products = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
    squares = tl.zeros([BLOCK_D], dtype=tl.float32)
    for start in range(0, N_COLUMNS, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        h = tl.load(h_ptr + d, mask=d < N_COLUMNS, other=0.0).to(tl.float32)
        if HAS_NORM:
            squares += h * h
            h *= tl.load(norm_ptr + d, mask=d < N_COLUMNS, other=0.0).to(tl.float32)
        here = (k[:, None] < n_outputs) & (d[None, :] < N_COLUMNS)
        w = tl.load(weight_ptr + k.to(tl.int64)[:, None] * N_COLUMNS + d[None, :], mask=here, other=0.0)
        products += w * h[None, :]
    out = tl.sum(products, axis=1)
    if HAS_NORM:
        out *= 1.0 / tl.sqrt(tl.sum(squares, axis=0) / N_COLUMNS + eps)
    out += tl.load(bias_ptr + k, mask=k < n_outputs, other=0.0)
    tl.store(out_ptr + n * n_outputs + k, out, mask=k < n_outputs)


@triton.jit(do_not_specialize=["n_prompts"])
def _pool_head_tiles_kernel(  # type: ignore[no-untyped-def]
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
        out = tl.dot(h, w, acc=out, input_precision="tf32x3")
    if HAS_NORM:
        out *= (1.0 / tl.sqrt(squares / N_COLUMNS + eps))[:, None]
    out += tl.load(bias_ptr + k, mask=k < n_outputs, other=0.0).to(tl.float32)[None, :]
    here = (n[:, None] < n_prompts) & (k[None, :] < n_outputs)
    tl.store(out_ptr + row[:, None] * n_outputs + k[None, :], out, mask=here)


def pool_head(hidden: Tensor, weight: Tensor, bias: Tensor, norm: Tensor | None = None, eps: float = 0.0) -> Tensor:
    """hidden [N, D], any float; weight [K, D], bias [K] float32; norm [D] or None (no norm) -> [N, K] float32."""
    n, k = check_head(hidden, weight, bias, norm)
    out = torch.empty((n, k), dtype=torch.float32, device=hidden.device)
    tensors = (hidden, hidden.stride(0), weight if norm is None else norm, weight, bias, out)
    shape = {"N_COLUMNS": hidden.shape[1], "HAS_NORM": norm is not None}
    if n >= MANY:
        _pool_head_tiles_kernel[triton.cdiv(n, BLOCK_N_MANY), triton.cdiv(k, BLOCK_K_MANY)](
            *tensors, n, k, eps, **shape, BLOCK_N=BLOCK_N_MANY, BLOCK_K=BLOCK_K_MANY, BLOCK_D=BLOCK_D_MANY
        )
    elif n:
        block_k, block_d = (BLOCK_K_FEW, BLOCK_D_FEW) if n <= FEW else (BLOCK_K, BLOCK_D)
        _pool_head_kernel[n, triton.cdiv(k, block_k)](*tensors, k, eps, **shape, BLOCK_K=block_k, BLOCK_D=block_d)
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

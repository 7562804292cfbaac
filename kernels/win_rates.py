"""v = W q without ever storing W: each model's win rate against the opponents, per prompt.

v[n, b] = sum_a q[n, a] sigmoid(theta[n, b] - theta[n, a])          (paper, equation (6))
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_B = 64
BLOCK_A = 32


@triton.jit
def win_rate_tile(theta_row_ptr, q_row_ptr, b, n_models, BLOCK_B: tl.constexpr, BLOCK_A: tl.constexpr):  # type: ignore[no-untyped-def]
    """v of the models b [BLOCK_B] of one prompt, summed over all opponents in float32."""
    theta_b = tl.load(theta_row_ptr + b, mask=b < n_models, other=0.0).to(tl.float32)
    v = tl.zeros([BLOCK_B], dtype=tl.float32)
    for start in range(0, n_models, BLOCK_A):
        a = start + tl.arange(0, BLOCK_A)
        theta_a = tl.load(theta_row_ptr + a, mask=a < n_models, other=0.0).to(tl.float32)
        q_a = tl.load(q_row_ptr + a, mask=a < n_models, other=0.0).to(tl.float32)
        win = tl.sigmoid(theta_b[:, None] - theta_a[None, :])
        v += tl.sum(win * q_a[None, :], axis=1)
    return v


@triton.jit
def _win_rates_kernel(  # type: ignore[no-untyped-def]
    theta_ptr, theta_row_stride, q_ptr, q_row_stride, v_ptr, v_row_stride, n_models,
    BLOCK_B: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    v = win_rate_tile(theta_ptr + n * theta_row_stride, q_ptr + n * q_row_stride, b, n_models, BLOCK_B, BLOCK_A)
    tl.store(v_ptr + n * v_row_stride + b, v, mask=b < n_models)


def win_rates(theta: Tensor, q: Tensor) -> Tensor:
    """theta [N, M] (rows contiguous), q [M] or [N, M], on one device -> v [N, M] float32, accumulated in float32."""
    if theta.ndim != 2 or theta.shape[1] == 0 or theta.stride(1) != 1:
        raise ValueError(f"theta: expected [N, M] with contiguous rows, got {list(theta.shape)}, strides {theta.stride()}")
    check_opponents(q, theta)
    n, m = theta.shape
    v = torch.empty((n, m), dtype=torch.float32, device=theta.device)
    if n:
        grid = (n, triton.cdiv(m, BLOCK_B))
        q_stride = q.stride(0) if q.ndim == 2 else 0
        _win_rates_kernel[grid](theta, theta.stride(0), q, q_stride, v, v.stride(0), m, BLOCK_B=BLOCK_B, BLOCK_A=BLOCK_A)
    return v


def check_opponents(q: Tensor, theta: Tensor) -> None:
    """Raises ValueError unless q is [M] or [N, M], rows contiguous, floating point, where theta [N, M] is."""
    if q.shape not in (theta.shape[1:], theta.shape) or q.stride(-1) != 1:
        raise ValueError(f"q: expected [{theta.shape[1]}] or {list(theta.shape)}, got {list(q.shape)}")
    if q.device != theta.device or not theta.is_floating_point() or not q.is_floating_point():
        raise ValueError(f"q: expected floating point on {theta.device}, got {q.dtype} on {q.device}")


def win_rates_reference(theta: Tensor, q: Tensor) -> Tensor:
    """The reference implementation: W in full, in theta's dtype."""
    win = torch.sigmoid(theta[:, :, None] - theta[:, None, :])
    return torch.einsum("nba,na->nb", win, q.expand_as(theta))

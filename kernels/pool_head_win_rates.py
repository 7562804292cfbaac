"""From hidden states to coefficients and win rates in one launch: ``pool_head`` and ``win_rates`` of each prompt together.

theta[n] = weight norm(hidden[n]) + bias,   v[n, b] = sum_a q[n, a] sigmoid(theta[n, b] - theta[n, a])

One program takes one prompt: it writes theta, waits for its own writes, and reads them back for the win rates. The weight is
read once per prompt, from the L2 cache, which is fine for few prompts and wasteful for many: ``Engine.warmup`` measures from
when on two launches are faster.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .pool_head import check_head, pool_head_reference
from .win_rates import BLOCK_A, BLOCK_B, check_opponents, win_rate_tile, win_rates_reference

BLOCK_K, BLOCK_D = 32, 128


@triton.jit
def _pool_head_win_rates_kernel(  # type: ignore[no-untyped-def]
    hidden_ptr, hidden_row_stride, norm_ptr, weight_ptr, bias_ptr, q_ptr, q_row_stride, out_ptr, v_ptr,
    n_outputs, n_models, eps,
    N_COLUMNS: tl.constexpr, HAS_NORM: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    h_ptr = hidden_ptr + n * hidden_row_stride
    scale = 1.0
    if HAS_NORM:
        squares = tl.zeros([BLOCK_D], dtype=tl.float32)
        for start in range(0, N_COLUMNS, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            h = tl.load(h_ptr + d, mask=d < N_COLUMNS, other=0.0).to(tl.float32)
            squares += h * h
        scale = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / N_COLUMNS + eps)
    out_ptr += n * n_outputs
    for first in range(0, n_outputs, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        products = tl.zeros([BLOCK_K, BLOCK_D], dtype=tl.float32)
        for start in range(0, N_COLUMNS, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            h = tl.load(h_ptr + d, mask=d < N_COLUMNS, other=0.0).to(tl.float32)
            if HAS_NORM:
                h *= tl.load(norm_ptr + d, mask=d < N_COLUMNS, other=0.0).to(tl.float32)
            here = (k[:, None] < n_outputs) & (d[None, :] < N_COLUMNS)
            w = tl.load(weight_ptr + k.to(tl.int64)[:, None] * N_COLUMNS + d[None, :], mask=here, other=0.0)
            products += w * h[None, :]
        bias = tl.load(bias_ptr + k, mask=k < n_outputs, other=0.0)
        tl.store(out_ptr + k, tl.sum(products, axis=1) * scale + bias, mask=k < n_outputs)
    tl.debug_barrier()  # every warp of this program sees theta
    for first in range(0, n_models, BLOCK_B):
        b = first + tl.arange(0, BLOCK_B)
        v = win_rate_tile(out_ptr, q_ptr + n * q_row_stride, b, n_models, BLOCK_B, BLOCK_A)
        tl.store(v_ptr + n * n_models + b, v, mask=b < n_models)


def pool_head_win_rates(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    q: Tensor,
    norm: Tensor | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Arguments as of ``pool_head``; q [M] or [N, M], M at most K: the first M outputs are theta.

    Returns out [N, K] and v [N, M], float32.
    """
    n, k = check_head(hidden, weight, bias, norm)
    m = q.shape[-1]
    if not 1 <= m <= k:
        raise ValueError(f"q: expected at most {k} models, the head's outputs, and one at least, got {m}")
    out = torch.empty((n, k), dtype=torch.float32, device=hidden.device)
    v = torch.empty((n, m), dtype=torch.float32, device=hidden.device)
    check_opponents(q, v)
    if n:
        q_stride = q.stride(0) if q.ndim == 2 else 0
        _pool_head_win_rates_kernel[(n,)](
            hidden, hidden.stride(0), weight if norm is None else norm, weight, bias,
            q, q_stride, out, v, k, m, eps,
            N_COLUMNS=hidden.shape[1], HAS_NORM=norm is not None,
            BLOCK_K=BLOCK_K, BLOCK_D=BLOCK_D, BLOCK_B=BLOCK_B, BLOCK_A=BLOCK_A, num_warps=8,
        )  # fmt: skip
    return out, v


def pool_head_win_rates_reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    q: Tensor,
    norm: Tensor | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The reference implementation: those of the two kernels in turn."""
    out = pool_head_reference(hidden, weight, bias, norm, eps)
    return out, win_rates_reference(out[:, : q.shape[-1]], q.to(out.dtype))

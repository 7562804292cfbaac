"""The router's own Bradley-Terry coefficient, the root of sum_a q[a] sigmoid(score - theta[a]) = rate (paper, (9)); float64.

All roots of the single sigmoids lie between min theta + logit(rate) and max theta + logit(rate) over the opponents with
weight, and so does the root of their mean. Newton's method on the logarithm of the smaller side (win rate or loss rate),
which is almost linear in the tails, held within the bracket by bisection. One program takes one prompt.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_MODELS = 4096
MAX_STEPS = 100
TOLERANCE = 1e-14  # of the last step, relative to the score or to 1


@triton.jit
def _bt_score_kernel(  # type: ignore[no-untyped-def]
    theta_ptr, theta_row_stride, q_ptr, q_row_stride, rate_ptr, score_ptr, n_models,
    BLOCK: tl.constexpr, MAX_STEPS: tl.constexpr, TOLERANCE: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    here = k < n_models
    theta = tl.load(theta_ptr + n * theta_row_stride + k, mask=here, other=0.0).to(tl.float64)
    q = tl.load(q_ptr + n * q_row_stride + k, mask=here, other=0.0).to(tl.float64)
    rate = tl.load(rate_ptr + n)
    inside = (rate > 0.0) & (rate < 1.0)
    r = tl.where(inside, rate, 0.5)
    log_win, log_loss = tl.log(r), tl.log(1.0 - r)
    low = tl.min(tl.where(q > 0.0, theta, float("inf")), axis=0) + log_win - log_loss
    high = tl.max(tl.where(q > 0.0, theta, -float("inf")), axis=0) + log_win - log_loss
    x = tl.sum(q * theta, axis=0) + log_win - log_loss
    x = tl.minimum(tl.maximum(x, low), high)
    steps = tl.where(inside & (low < high), MAX_STEPS, 0)
    while steps > 0:
        z = x - theta
        small = tl.exp(-tl.abs(z))
        win = tl.where(z >= 0.0, 1.0, small) / (1.0 + small)
        loss = tl.where(z >= 0.0, small, 1.0) / (1.0 + small)
        wins, losses, slope = tl.sum(q * win, axis=0), tl.sum(q * loss, axis=0), tl.sum(q * win * loss, axis=0)
        excess = tl.where(r < 0.5, tl.log(wins) - log_win, log_loss - tl.log(losses))
        slope = slope / tl.where(r < 0.5, wins, losses)
        high = tl.where(excess > 0.0, x, high)
        low = tl.where(excess > 0.0, low, x)
        newton = x - excess / slope
        # Not-a-number compares false: then, too, the bracket is halved.
        new = tl.where((newton >= low) & (newton <= high), newton, low + 0.5 * (high - low))
        done = tl.abs(new - x) <= TOLERANCE * tl.maximum(tl.abs(x), 1.0)
        x = new
        steps = tl.where(done, 0, steps - 1)
    x = tl.where(rate <= 0.0, -float("inf"), x)
    tl.store(score_ptr + n, tl.where(rate >= 1.0, float("inf"), x))


def bt_score(theta: Tensor, q: Tensor, rate: Tensor) -> Tensor:
    """theta [N, M]; q [M] or [N, M], rows summing to 1; rate [N] float64 in [0, 1]; rows contiguous -> score [N] float64.

    -inf at rate 0, +inf at rate 1. Nothing here waits for the device.
    """
    if theta.ndim != 2 or theta.stride(1) != 1 or not 1 <= theta.shape[1] <= MAX_MODELS or not theta.is_floating_point():
        raise ValueError(f"theta: expected [N, M <= {MAX_MODELS}] with contiguous rows, got {list(theta.shape)} {theta.dtype}")
    if q.shape not in (theta.shape[1:], theta.shape) or q.stride(-1) != 1 or not q.is_floating_point():
        raise ValueError(f"q: expected [{theta.shape[1]}] or {list(theta.shape)}, got {list(q.shape)} {q.dtype}")
    if rate.shape != theta.shape[:1] or not rate.is_contiguous() or rate.dtype != torch.float64:
        raise ValueError(f"rate: expected [{len(theta)}] float64, contiguous, got {list(rate.shape)} {rate.dtype}")
    n, m = theta.shape
    score = torch.empty(n, dtype=torch.float64, device=theta.device)
    if n:
        block = triton.next_power_of_2(m)
        q_stride = q.stride(0) if q.ndim == 2 else 0
        _bt_score_kernel[(n,)](
            theta, theta.stride(0), q, q_stride, rate, score, m,
            BLOCK=block, MAX_STEPS=MAX_STEPS, TOLERANCE=TOLERANCE, num_warps=max(1, min(8, block // 128)),
        )  # fmt: skip
    return score


def bt_score_reference(theta: Tensor, q: Tensor, rate: Tensor) -> Tensor:
    """The reference implementation: bisection in float64."""
    t, w = theta.double(), q.double().expand_as(theta)
    logit = torch.logit(rate)
    low = t.masked_fill(w <= 0, torch.inf).amin(1) + logit
    high = t.masked_fill(w <= 0, -torch.inf).amax(1) + logit
    for _ in range(200):
        middle = low + (high - low) / 2
        above = (w * torch.sigmoid(middle[:, None] - t)).sum(1) > rate
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return torch.where((rate > 0) & (rate < 1), low, logit)

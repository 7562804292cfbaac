"""Outcome probabilities of every pair of models, per prompt or averaged over prompts in one pass (paper, 2.1, 2.2 and (3)).

P[n, 0, b, a] is the probability that b beats a; after it come, where the feedback model knows them, a tie and "both bad".
With x = theta[n, b], y = theta[n, a] and log_lambda[n], everything in float32:

    bt           win = sigmoid(x - y)
    rk           win = sigmoid(x - y - log_lambda)                                tie = 1 - win - lose
    rk-reparam   win = 1 / (1 + exp(log_lambda + y - x) + exp(-x))                tie = 1 - win - lose
    grk          win as rk-reparam,  bad = 1 / (1 + exp(x) + exp(y))              tie = 1 - win - lose - bad
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

OUTCOMES = {"bt": 1, "rk": 2, "rk-reparam": 2, "grk": 3}
BLOCK = 32
PROMPTS_PER_SUM = 256  # of the mean: how many probabilities one float32 sum takes in


@triton.jit
def _pairs(theta_row_ptr, log_lambda_ptr, n, b, a, n_models, RK: tl.constexpr, GROUNDED: tl.constexpr, HAS_BAD: tl.constexpr):  # type: ignore[no-untyped-def]
    """win, tie and bad of the pairs b x a of prompt n."""
    x = tl.load(theta_row_ptr + b, mask=b < n_models, other=0.0).to(tl.float32)[:, None]
    y = tl.load(theta_row_ptr + a, mask=a < n_models, other=0.0).to(tl.float32)[None, :]
    bad = tl.zeros_like(x + y)
    if GROUNDED:
        log_lambda = tl.load(log_lambda_ptr + n).to(tl.float32)
        win = 1.0 / (1.0 + tl.exp(log_lambda + (y - x)) + tl.exp(-x))
        lose = 1.0 / (1.0 + tl.exp(log_lambda + (x - y)) + tl.exp(-y))
        if HAS_BAD:
            bad = 1.0 / (1.0 + tl.exp(x) + tl.exp(y))
    elif RK:
        log_lambda = tl.load(log_lambda_ptr + n).to(tl.float32)
        win = tl.sigmoid(x - y - log_lambda)
        lose = tl.sigmoid(y - x - log_lambda)
    else:
        win = tl.sigmoid(x - y)
        lose = 1.0 - win
    return win, tl.maximum(1.0 - win - lose - bad, 0.0), bad


@triton.jit
def _outcomes_kernel(  # type: ignore[no-untyped-def]
    theta_ptr, theta_row_stride, log_lambda_ptr, out_ptr, n_models,
    RK: tl.constexpr, GROUNDED: tl.constexpr, N_OUTCOMES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    a = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    row = theta_ptr + n * theta_row_stride
    win, tie, bad = _pairs(row, log_lambda_ptr, n, b, a, n_models, RK, GROUNDED, N_OUTCOMES == 3)
    here = (b[:, None] < n_models) & (a[None, :] < n_models)
    at = out_ptr + n * N_OUTCOMES * n_models * n_models + b[:, None] * n_models + a[None, :]
    tl.store(at, win, mask=here)
    if N_OUTCOMES > 1:
        tl.store(at + n_models * n_models, tie, mask=here)
    if N_OUTCOMES > 2:
        tl.store(at + 2 * n_models * n_models, bad, mask=here)


@triton.jit(do_not_specialize=["n_prompts"])
def _mean_outcomes_kernel(  # type: ignore[no-untyped-def]
    theta_ptr, theta_row_stride, log_lambda_ptr, weights_ptr, sums_ptr, n_prompts, n_models,
    RK: tl.constexpr, GROUNDED: tl.constexpr, N_OUTCOMES: tl.constexpr, BLOCK: tl.constexpr, PROMPTS: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    a = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    win_sum = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    tie_sum = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    bad_sum = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
    for n in range(part * PROMPTS, tl.minimum((part + 1) * PROMPTS, n_prompts)):
        weight = tl.load(weights_ptr + n).to(tl.float32)
        row = theta_ptr + n * theta_row_stride
        win, tie, bad = _pairs(row, log_lambda_ptr, n, b, a, n_models, RK, GROUNDED, N_OUTCOMES == 3)
        win_sum += weight * win
        if N_OUTCOMES > 1:
            tie_sum += weight * tie
        if N_OUTCOMES > 2:
            bad_sum += weight * bad
    here = (b[:, None] < n_models) & (a[None, :] < n_models)
    at = sums_ptr + part * N_OUTCOMES * n_models * n_models + b[:, None] * n_models + a[None, :]
    tl.store(at, win_sum, mask=here)
    if N_OUTCOMES > 1:
        tl.store(at + n_models * n_models, tie_sum, mask=here)
    if N_OUTCOMES > 2:
        tl.store(at + 2 * n_models * n_models, bad_sum, mask=here)


def outcomes(theta: Tensor, log_lambda: Tensor | None = None, feedback: str = "bt") -> Tensor:
    """theta [N, M], log_lambda [N] (all but bt) -> P [N, outcomes, M, M] float32: win, then tie, then both bad."""
    _check(theta, log_lambda, feedback)
    n, m = theta.shape
    out = torch.empty((n, OUTCOMES[feedback], m, m), dtype=torch.float32, device=theta.device)
    if n:
        grid = (n, triton.cdiv(m, BLOCK), triton.cdiv(m, BLOCK))
        given = theta if log_lambda is None else log_lambda
        _outcomes_kernel[grid](theta, theta.stride(0), given, out, m, **_constants(feedback))
    return out


def mean_outcomes(
    theta: Tensor, log_lambda: Tensor | None = None, feedback: str = "bt", weights: Tensor | None = None
) -> Tensor:
    """The mean of ``outcomes`` over the prompts, never stored: [outcomes, M, M] float64; weights [N] >= 0, not all 0."""
    _check(theta, log_lambda, feedback)
    n, m = theta.shape
    if n == 0:
        raise ValueError("theta: expected one prompt at least, got none")
    w = torch.ones(n, device=theta.device) if weights is None else weights
    if w.shape != (n,) or not w.is_contiguous():
        raise ValueError(f"weights: expected [{n}], contiguous, got {list(w.shape)}")
    parts = triton.cdiv(n, PROMPTS_PER_SUM)
    sums = torch.empty((parts, OUTCOMES[feedback], m, m), dtype=torch.float32, device=theta.device)
    grid = (parts, triton.cdiv(m, BLOCK), triton.cdiv(m, BLOCK))
    given = theta if log_lambda is None else log_lambda
    _mean_outcomes_kernel[grid](theta, theta.stride(0), given, w, sums, n, m, PROMPTS=PROMPTS_PER_SUM, **_constants(feedback))
    return sums.sum(0, dtype=torch.float64) / w.sum(dtype=torch.float64)


def _constants(feedback: str) -> dict[str, int | bool]:
    grounded = feedback in ("rk-reparam", "grk")
    return {"RK": feedback == "rk", "GROUNDED": grounded, "N_OUTCOMES": OUTCOMES[feedback], "BLOCK": BLOCK}


def _check(theta: Tensor, log_lambda: Tensor | None, feedback: str) -> None:
    if feedback not in OUTCOMES:
        raise ValueError(f"feedback: expected one of {', '.join(OUTCOMES)}, got {feedback!r}")
    if theta.ndim != 2 or theta.shape[1] == 0 or theta.stride(1) != 1 or not theta.is_floating_point():
        raise ValueError(f"theta: expected [N, M] with contiguous rows, got {list(theta.shape)} {theta.dtype}")
    if feedback != "bt" and (log_lambda is None or log_lambda.shape != theta.shape[:1] or not log_lambda.is_contiguous()):
        got = None if log_lambda is None else list(log_lambda.shape)
        raise ValueError(f"log_lambda: {feedback} needs [{len(theta)}], contiguous, got {got}")


def outcomes_reference(theta: Tensor, log_lambda: Tensor | None = None, feedback: str = "bt") -> Tensor:
    """The twin, in theta's dtype."""
    _check(theta, log_lambda, feedback)
    x, y = theta[:, :, None], theta[:, None, :]
    if log_lambda is None:
        return torch.sigmoid(x - y)[:, None]
    t = log_lambda[:, None, None]
    win = torch.sigmoid(x - y - t) if feedback == "rk" else 1 / (1 + torch.exp(t + y - x) + torch.exp(-x))
    rest = 1 - win - win.transpose(1, 2)
    if feedback != "grk":
        return torch.stack([win, rest], 1)
    bad = 1 / (1 + torch.exp(x) + torch.exp(y))
    return torch.stack([win, rest - bad, bad], 1)


def mean_outcomes_reference(
    theta: Tensor, log_lambda: Tensor | None = None, feedback: str = "bt", weights: Tensor | None = None
) -> Tensor:
    """The twin: all of them, then the mean."""
    w = torch.ones(len(theta), dtype=theta.dtype, device=theta.device) if weights is None else weights.to(theta.dtype)
    return torch.einsum("n,noba->oba", w / w.sum(), outcomes_reference(theta, log_lambda, feedback))

"""The one-budget LP of each prompt, exactly (paper, equation (6)): max p v, p c <= budget, p a distribution; float64.

Some optimum mixes a model i within the budget with a model j beyond it, so that no model lies above the line through
(c_i, v_i) and (c_j, v_j). From the best affordable model and the best of all, take the model furthest above the line in
place of i or of j, by which side of the budget it is on, until none is above: each step lowers the dual bound, and a few
steps suffice. One program takes one prompt; the models stay in its registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_MODELS = 4096


@triton.jit
def _highest(of, among, c, k, NONE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The place of the largest entry: of equal ones the cheapest, of equal costs the first; NONE where there is none."""
    infinity = float("inf")
    top = tl.max(tl.where(among, of, -infinity), axis=0)
    best = among & (of == top)
    cheapest = tl.min(tl.where(best, c, infinity), axis=0)
    return tl.min(tl.where(best & (c == cheapest), k, NONE), axis=0), top


@triton.jit
def _budget_lp_kernel(  # type: ignore[no-untyped-def]
    v_ptr, v_row_stride, costs_ptr, costs_row_stride, budget_ptr, indices_ptr, probabilities_ptr, value_ptr, cost_ptr,
    n_models, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    here = k < n_models
    v = tl.load(v_ptr + n * v_row_stride + k, mask=here, other=0.0).to(tl.float64)
    c = tl.load(costs_ptr + n * costs_row_stride + k, mask=here, other=0.0).to(tl.float64)
    limit = tl.load(budget_ptr + n)
    i, _ = _highest(v, here & (c <= limit), c, k, BLOCK)
    j, _ = _highest(v, here, c, k, BLOCK)
    v_i, c_i = tl.sum(tl.where(k == i, v, 0.0), axis=0), tl.sum(tl.where(k == i, c, 0.0), axis=0)
    v_j, c_j = tl.sum(tl.where(k == j, v, 0.0), axis=0), tl.sum(tl.where(k == j, c, 0.0), axis=0)
    # Rounding could let two lines alternate forever: a hull has n_models vertices, so as many steps are enough.
    steps = tl.where((i == BLOCK) | (c_j <= limit), 0, n_models)
    while steps > 0:
        above = (v - v_i) * (c_j - c_i) - (v_j - v_i) * (c - c_i)
        m, top = _highest(above, here & (k != i) & (k != j), c, k, BLOCK)
        v_m, c_m = tl.sum(tl.where(k == m, v, 0.0), axis=0), tl.sum(tl.where(k == m, c, 0.0), axis=0)
        nearer, costlier = (top > 0) & (c_m <= limit), (top > 0) & (c_m > limit)
        i, v_i, c_i = tl.where(nearer, m, i), tl.where(nearer, v_m, v_i), tl.where(nearer, c_m, c_i)
        j, v_j, c_j = tl.where(costlier, m, j), tl.where(costlier, v_m, v_j), tl.where(costlier, c_m, c_j)
        steps = tl.where(top > 0, steps - 1, 0)
    if i == BLOCK:  # the cheapest model is beyond the budget: the cost that is returned exceeds it
        tl.store(indices_ptr + 2 * n, 0)
        tl.store(indices_ptr + 2 * n + 1, 0)
        tl.store(probabilities_ptr + 2 * n, 0.0)
        tl.store(probabilities_ptr + 2 * n + 1, 0.0)
        tl.store(value_ptr + n, 0.0)
        tl.store(cost_ptr + n, tl.min(tl.where(here, c, float("inf")), axis=0))
    else:
        share = tl.where(c_j > limit, (limit - c_i) / tl.where(c_j > c_i, c_j - c_i, 1.0), 0.0)
        # A share of 1 is the budget at j but for rounding; a share of 0 needs no second model.
        i, v_i = tl.where(share >= 1.0, j, i), tl.where(share >= 1.0, v_j, v_i)
        c_i = tl.where(share >= 1.0, limit, c_i)
        share = tl.where(share >= 1.0, 0.0, share)
        tl.store(indices_ptr + 2 * n, i)
        tl.store(indices_ptr + 2 * n + 1, tl.where(share > 0.0, j, i))
        tl.store(probabilities_ptr + 2 * n, 1.0 - share)
        tl.store(probabilities_ptr + 2 * n + 1, share)
        tl.store(value_ptr + n, v_i + share * (v_j - v_i))
        tl.store(cost_ptr + n, tl.where(share > 0.0, limit, c_i))


def budget_lp(v: Tensor, costs: Tensor, budget: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """v [N, M] (float32 or float64), costs [M] or [N, M] float64, budget [N] float64 (inf: none), rows contiguous.

    Returns indices [N, 2] int32, probabilities [N, 2], value [N] and cost [N] float64. A prompt whose budget is below its
    cheapest model's cost has probabilities 0 and that cost, so that cost > budget. Nothing here waits for the device.
    """
    if v.ndim != 2 or v.stride(1) != 1 or not 1 <= v.shape[1] <= MAX_MODELS or not v.is_floating_point():
        raise ValueError(f"v: expected [N, M <= {MAX_MODELS}] with contiguous rows, got {list(v.shape)} {v.dtype}")
    if costs.shape not in (v.shape[1:], v.shape) or costs.stride(-1) != 1 or costs.dtype != torch.float64:
        raise ValueError(f"costs: expected [{v.shape[1]}] or {list(v.shape)} float64, got {list(costs.shape)} {costs.dtype}")
    if budget.shape != v.shape[:1] or not budget.is_contiguous() or budget.dtype != torch.float64:
        raise ValueError(f"budget: expected [{len(v)}] float64, contiguous, got {list(budget.shape)} {budget.dtype}")
    n, m = v.shape
    indices = torch.empty((n, 2), dtype=torch.int32, device=v.device)
    probabilities = torch.empty((n, 2), dtype=torch.float64, device=v.device)
    value, cost = (torch.empty(n, dtype=torch.float64, device=v.device) for _ in range(2))
    if n:
        block = triton.next_power_of_2(m)
        costs_stride = costs.stride(0) if costs.ndim == 2 else 0
        _budget_lp_kernel[(n,)](
            v, v.stride(0), costs, costs_stride, budget, indices, probabilities, value, cost, m,
            BLOCK=block, num_warps=max(1, min(8, block // 128)),
        )  # fmt: skip
    return indices, probabilities, value, cost


def budget_lp_reference(v: Tensor, costs: Tensor, budget: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The reference implementation: tries every affordable model and every pair across the budget, which must be feasible."""
    w, c = v.double(), costs.expand_as(v)
    within = c <= budget[:, None]
    share = ((budget[:, None] - c)[:, :, None] / (c[:, None, :] - c[:, :, None])).where(
        within[:, :, None] & ~within[:, None, :], torch.zeros((), dtype=torch.float64)
    )
    value = w[:, :, None] + share * (w[:, None, :] - w[:, :, None])
    value = value.where(within[:, :, None], torch.full((), -torch.inf, dtype=torch.float64))
    best, place = value.flatten(1).max(1)
    row, i, j = torch.arange(len(v)), place // v.shape[1], place % v.shape[1]
    p = share[row, i, j]
    indices = torch.stack([i, torch.where(p > 0, j, i)], 1).int()
    cost = c[row, i] + p * (c[row, j] - c[row, i])
    return indices, torch.stack([1 - p, p], 1), best, cost

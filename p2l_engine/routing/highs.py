"""Routing LPs by HiGHS: the oracle of the tests, and the solver wherever there are more rows than one budget."""

from __future__ import annotations

import highspy
import numpy as np
import numpy.typing as npt

from p2l_engine.routing.arrays import Float64

SMALLEST_SHARE = 1e-12  # a probability below this is the solver's rounding, not a choice


TOLERANCE = 1e-6  # relative: how far beyond a budget HiGHS's rounding may go before it is an error


class SolverError(RuntimeError):
    """HiGHS stopped without an optimum."""


def _solver() -> highspy.Highs:
    highs = highspy.Highs()
    highs.setOptionValue("output_flag", False)
    highs.setOptionValue("threads", 1)
    return highs


def _optimum(highs: highspy.Highs, what: str) -> Float64:
    highs.run()
    status = highs.getModelStatus()
    if status != highspy.HighsModelStatus.kOptimal:
        # A warm start can lead badly scaled problems astray: once more from nothing before it is an error.
        highs.clearSolver()
        highs.run()
        status = highs.getModelStatus()
    if status != highspy.HighsModelStatus.kOptimal:
        raise SolverError(f"{what}: HiGHS stopped with status {highs.modelStatusToString(status)!r}")
    return np.asarray(highs.getSolution().col_value)


def _linear_program(
    objective: Float64,
    rows: list[tuple[npt.NDArray[np.int32], Float64]],
    lower: Float64,
    upper: Float64,
    allowed: npt.NDArray[np.bool_],
) -> highspy.HighsLp:
    """maximise objective.x over 0 <= x <= 1 (0 where not allowed) with lower <= rows.x <= upper."""
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = len(objective), len(rows)
    lp.col_cost_, lp.sense_ = objective, highspy.ObjSense.kMaximize
    lp.col_lower_, lp.col_upper_ = np.zeros(len(objective)), allowed.astype(np.float64)
    lp.row_lower_, lp.row_upper_ = lower, upper
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_ = np.cumsum([0, *(len(index) for index, _ in rows)], dtype=np.int32)
    lp.a_matrix_.index_ = np.concatenate([index for index, _ in rows])
    lp.a_matrix_.value_ = np.concatenate([value for _, value in rows])
    return lp


def solve_budget(v: Float64, costs: Float64, budget: Float64) -> tuple[npt.NDArray[np.int32], Float64]:
    """One small LP per prompt (paper, equation (6)), each warm-started from the last: indices [N, 2], probabilities [N, 2].

    Budgets must be feasible.
    """
    n, m = v.shape
    indices, probabilities = np.zeros((n, 2), np.int32), np.zeros((n, 2))
    highs, every = _solver(), np.arange(m, dtype=np.int32)
    scale, allowed = _scale(np.broadcast_to(costs, v.shape), budget, 1)
    costs, budget = np.broadcast_to(costs / scale, v.shape), budget / scale
    for i in range(n):
        if i == 0:
            rows = [(every, np.ones(m)), (every, np.where(allowed[0], costs[0], 0.0))]
            bounds = np.array([1.0, -np.inf]), np.array([1.0, budget[0]])
            highs.passModel(_linear_program(v[0], rows, *bounds, allowed[0]))
        else:
            highs.changeColsCost(m, every, v[i])
            highs.changeRowBounds(1, -np.inf, budget[i])
            if costs.strides[0]:
                for j in range(m):
                    highs.changeCoeff(1, j, costs[i, j] if allowed[i, j] else 0.0)
                    highs.changeColBounds(j, 0.0, float(allowed[i, j]))
        x = _optimum(highs, f"prompt {i}")
        top = np.argsort(-x, kind="stable")[:2]
        indices[i], probabilities[i] = (top, x[top]) if m > 1 else ((0, 0), (1.0, 0.0))
    return _tidy(indices, probabilities)


def _scale(costs: Float64, budget: Float64, n: int) -> tuple[float, npt.NDArray[np.bool_]]:
    """What to divide costs and budgets by, and which models to allow at all.

    HiGHS's tolerances are absolute and it drops coefficients under 1e-9: the smallest budget becomes 1. A model of which n
    prompts' largest budget buys less than a share of 1e-9 would let a bound's tolerance buy it instead: it is left out, at a
    loss of win rate of at most 1e-9.
    """
    finite = budget[np.isfinite(budget)]
    if not finite.size:
        return 1.0, np.ones(costs.shape, bool)
    positive = finite[finite > 0]
    scale = float(positive.min()) if positive.size else 1.0
    most = np.inf if len(finite) < len(budget) else 1e9 * n * float(finite.max())
    return scale, costs <= most


def solve_batch_budget(
    v: Float64, costs: Float64, budget: float, max_share: Float64 | None
) -> tuple[npt.NDArray[np.int32], Float64]:
    """One LP over the whole batch: mean cost within the budget, each model's mean share within ``max_share`` [M].

    An optimal vertex mixes at most as many prompts as rows bind, so every policy is narrow: indices and probabilities are
    [N, W] with W the widest policy, at least 2.
    """
    n, m = v.shape
    costs = np.broadcast_to(costs, v.shape)
    column = np.arange(n * m, dtype=np.int32).reshape(n, m)
    rows = [(column[i], np.ones(m)) for i in range(n)]
    lower, upper = [1.0] * n, [1.0] * n
    scale, allowed = _scale(costs, np.array([budget]), n)
    if np.isfinite(budget):
        rows.append((column.ravel(), np.where(allowed, costs / scale, 0.0).ravel()))
        lower.append(-np.inf)
        upper.append(n * budget / scale)
    if max_share is not None:
        for j in np.flatnonzero(max_share < 1):
            rows.append((column[:, j].copy(), np.full(n, 1.0 / n)))
            lower.append(-np.inf)
            upper.append(float(max_share[j]))
    highs = _solver()
    highs.passModel(_linear_program(v.ravel(), rows, np.array(lower), np.array(upper), allowed.ravel()))
    x = _optimum(highs, "batch budget").reshape(n, m)
    width = max(2, int((x > SMALLEST_SHARE).sum(1).max()))
    indices = np.argsort(-x, axis=1, kind="stable")[:, :width].astype(np.int32)
    if m == 1:
        return np.zeros((n, 2), np.int32), np.tile([1.0, 0.0], (n, 1))
    indices, probabilities = _tidy(indices, np.take_along_axis(x, indices, 1))
    spent = float((probabilities * np.take_along_axis(costs, indices, 1)).sum(1).mean())
    if spent > budget * (1 + TOLERANCE):
        raise SolverError(
            f"batch budget: HiGHS's policy costs {spent!r} for a budget of {budget!r}: the costs, {costs.min():g} to "
            f"{costs.max():g}, span more than its tolerances can tell apart; leave out the dearest models"
        )
    return indices, probabilities


def _tidy(indices: npt.NDArray[np.int32], probabilities: Float64) -> tuple[npt.NDArray[np.int32], Float64]:
    """Rounding removed: tiny shares become 0 and repeat the first model, the rest sums to 1."""
    unused = probabilities <= SMALLEST_SHARE
    probabilities = np.where(unused, 0.0, probabilities)
    return np.where(unused, indices[:, :1], indices), probabilities / probabilities.sum(1, keepdims=True)

"""Routing LPs by HiGHS: the oracle of the tests, and the solver wherever there are more rows than one budget."""

from __future__ import annotations

import highspy
import numpy as np
import numpy.typing as npt

from p2l_engine.routing.arrays import Float64

SMALLEST_SHARE = 1e-12  # a probability below this is the solver's rounding, not a choice


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
        raise SolverError(f"{what}: HiGHS stopped with status {highs.modelStatusToString(status)!r}")
    return np.asarray(highs.getSolution().col_value)


def _linear_program(
    objective: Float64, rows: list[tuple[npt.NDArray[np.int32], Float64]], lower: Float64, upper: Float64
) -> highspy.HighsLp:
    """maximise objective.x over 0 <= x <= 1 with lower <= rows.x <= upper."""
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = len(objective), len(rows)
    lp.col_cost_, lp.sense_ = objective, highspy.ObjSense.kMaximize
    lp.col_lower_, lp.col_upper_ = np.zeros(len(objective)), np.ones(len(objective))
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
    costs = np.broadcast_to(costs, v.shape)
    for i in range(n):
        if i == 0:
            rows = [(every, np.ones(m)), (every, np.ascontiguousarray(costs[0]))]
            highs.passModel(_linear_program(v[0], rows, np.array([1.0, -np.inf]), np.array([1.0, budget[0]])))
        else:
            highs.changeColsCost(m, every, v[i])
            highs.changeRowBounds(1, -np.inf, budget[i])
            if costs.strides[0]:
                for j in range(m):
                    highs.changeCoeff(1, j, costs[i, j])
        x = _optimum(highs, f"prompt {i}")
        top = np.argsort(-x, kind="stable")[:2]
        indices[i], probabilities[i] = top if m > 1 else (0, 0), x[top] if m > 1 else (1, 0)
    return _tidy(indices, probabilities)


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
    if np.isfinite(budget):
        # Scaled to the dearest model: HiGHS's tolerances are absolute.
        scale = max(float(costs.max()), np.finfo(float).tiny)
        rows.append((column.ravel(), costs.ravel() / (scale * n)))
        lower.append(-np.inf)
        upper.append(budget / scale)
    if max_share is not None:
        for j in np.flatnonzero(max_share < 1):
            rows.append((column[:, j].copy(), np.full(n, 1.0 / n)))
            lower.append(-np.inf)
            upper.append(float(max_share[j]))
    highs = _solver()
    highs.passModel(_linear_program(v.ravel(), rows, np.array(lower), np.array(upper)))
    x = _optimum(highs, "batch budget").reshape(n, m)
    width = max(2, int((x > SMALLEST_SHARE).sum(1).max()))
    indices = np.argsort(-x, axis=1, kind="stable")[:, :width].astype(np.int32)
    if m == 1:
        indices = np.zeros((n, 2), np.int32)
        return indices, np.tile([1.0, 0.0], (n, 1))
    return _tidy(indices, np.take_along_axis(x, indices, 1))


def _tidy(indices: npt.NDArray[np.int32], probabilities: Float64) -> tuple[npt.NDArray[np.int32], Float64]:
    """Rounding removed: tiny shares become 0 and repeat the first model, the rest sums to 1."""
    unused = probabilities <= SMALLEST_SHARE
    probabilities = np.where(unused, 0.0, probabilities)
    return np.where(unused, indices[:, :1], indices), probabilities / probabilities.sum(1, keepdims=True)

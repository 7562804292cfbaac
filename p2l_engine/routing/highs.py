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
    most: Float64,
) -> highspy.HighsLp:
    """maximise objective.y over 0 <= y <= most with lower <= rows.y <= upper."""
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = len(objective), len(rows)
    lp.col_cost_, lp.sense_ = objective, highspy.ObjSense.kMaximize
    lp.col_lower_, lp.col_upper_ = np.zeros(len(objective)), most
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
    factor = np.maximum(1.0, costs)
    weights, prices, most = 1 / factor, np.where(allowed, costs / factor, 0.0), allowed * factor
    for i in range(n):
        if i == 0:
            bounds = np.array([1.0, -np.inf]), np.array([1.0, budget[0]])
            rows = [(every, weights[0]), (every, prices[0])]
            highs.passModel(_linear_program(v[0] * weights[0], rows, *bounds, most[0]))
        else:
            highs.changeColsCost(m, every, v[i] * weights[i])
            highs.changeRowBounds(1, -np.inf, budget[i])
            if costs.strides[0]:
                for j in range(m):
                    highs.changeCoeff(0, j, weights[i, j])
                    highs.changeCoeff(1, j, prices[i, j])
                    highs.changeColBounds(j, 0.0, most[i, j])
        x = _optimum(highs, f"prompt {i}") * weights[i]
        top = np.argsort(-x, kind="stable")[:2]
        indices[i], probabilities[i] = (top, x[top]) if m > 1 else ((0, 0), (1.0, 0.0))
    return _tidy(indices, probabilities)


def _scale(costs: Float64, budget: Float64, n: int) -> tuple[float, npt.NDArray[np.bool_]]:
    """What to divide costs and budgets by, and which models to allow at all.

    HiGHS's tolerances are absolute and it drops coefficients under 1e-9. So the smallest budget becomes 1, and a model whose
    cost c is then above 1 enters as y = c x: no coefficient exceeds 1, and a bound's tolerance is worth no more than the budget
    row's. A model of which n prompts' largest budget buys less than a share of 1e-9 is left out, at a loss of win rate of at
    most 1e-9.
    """
    finite = budget[np.isfinite(budget)]
    if not finite.size:
        return max(float(costs.max()), float(np.finfo(float).tiny)), np.ones(costs.shape, bool)
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
    scale, allowed = _scale(costs, np.array([budget]), n)
    factor = np.maximum(1.0, costs / scale)
    rows = [(column[i], 1 / factor[i]) for i in range(n)]
    lower, upper = [1.0] * n, [1.0] * n
    if np.isfinite(budget):
        rows.append((column.ravel(), np.where(allowed, costs / scale / factor, 0.0).ravel()))
        lower.append(-np.inf)
        upper.append(n * budget / scale)
    if max_share is not None:
        for j in np.flatnonzero(max_share < 1):
            rows.append((column[:, j].copy(), 1 / (n * factor[:, j])))
            lower.append(-np.inf)
            upper.append(float(max_share[j]))
    highs = _solver()
    most = np.where(allowed, factor, 0.0).ravel()
    program = _linear_program((v / factor).ravel(), rows, np.array(lower), np.array(upper), most)
    highs.passModel(program)
    x = _optimum(highs, "batch budget").reshape(n, m) / factor
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

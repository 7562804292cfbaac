"""A peer: one HiGHS model for all prompts, warm-started; only the objective and the bounds change."""

from __future__ import annotations

from collections.abc import Sequence

import highspy
import numpy as np

from p2l_engine.routing.arrays import Float64


def solve(v: Float64, amounts: Sequence[Float64], bounds: Sequence[Float64]) -> Float64:
    """Each prompt's optimal value [N]: v [N, M]; R rows of amounts [M] and bounds [N]."""
    n, m = v.shape
    every = np.arange(m, dtype=np.int32)
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = m, 1 + len(amounts)
    lp.col_cost_, lp.sense_ = v[0], highspy.ObjSense.kMaximize
    lp.col_lower_, lp.col_upper_ = np.zeros(m), np.ones(m)
    lp.row_lower_ = np.array([1.0, *(-np.inf for _ in amounts)])
    lp.row_upper_ = np.array([1.0, *(bound[0] for bound in bounds)])
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_ = np.arange(0, m * (1 + len(amounts)) + 1, m, dtype=np.int32)
    lp.a_matrix_.index_ = np.tile(every, 1 + len(amounts))
    lp.a_matrix_.value_ = np.concatenate([np.ones(m), *amounts])
    highs = highspy.Highs()
    highs.setOptionValue("output_flag", False)
    highs.setOptionValue("threads", 1)
    highs.passModel(lp)
    values = np.empty(n)
    for i in range(n):
        highs.changeColsCost(m, every, v[i])
        for k, bound in enumerate(bounds, 1):
            highs.changeRowBounds(k, -np.inf, bound[i])
        highs.run()
        assert highs.getModelStatus() == highspy.HighsModelStatus.kOptimal
        values[i] = highs.getInfo().objective_function_value
    return values

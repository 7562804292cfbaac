"""One LP through HiGHS, with rows that hold to rounding.

HiGHS's tolerances are absolute: 1e-9. What they leave of the rows and of the objective is solved once more, magnified
(iterative refinement: Gleixner, Steffy and Wolter, 2016, https://doi.org/10.1287/ijoc.2016.0692).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from p2l_engine.routing.arrays import Float64
from p2l_engine.routing.surplus import NoPolicy

if TYPE_CHECKING:
    import highspy

TOLERANCE = 1e-9  # HiGHS's feasibility tolerances
MAGNIFIED = 2.0**20  # the scale of the second solution: rows hold to TOLERANCE / MAGNIFIED
WIDE = 1e-6  # smaller coefficients slow the simplex method down a hundredfold where rows conflict: interior points come first
MANY_ROWS = 10_000  # from here on interior points take no longer, and a tenth of the time where rows conflict
FEW_ROWS = 500  # up to which interior points take less than a second
SMALLEST = 1e-14  # a smaller variable, or excess of a row, is the solver's rounding; relative to bounds above 1
SMALLEST_PRICE = 1e-12  # the same of a variable's reduced value
SMALLEST_COEFFICIENT = 1e-12  # HiGHS drops smaller ones; its default is 1e-9


class SolverError(RuntimeError):
    """A solver stopped without an optimum. ``gap``: how far its best policy may be from it (absolute), or None."""

    def __init__(self, message: str, gap: float | None = None) -> None:
        self.gap = gap
        super().__init__(message)


class TimeLimit(SolverError):
    """The time limit was reached first."""


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """Maximise objective.y over 0 <= y <= most with rows.y = right, all of order 1.

    The rows are sparse: counts of entries per row, their columns and values. leeway: how far below 0 each variable may go where
    the rows cannot be met otherwise. presolve: whether HiGHS looks for conflicts first.
    """

    objective: Float64
    most: Float64
    counts: npt.NDArray[np.intp]
    columns: npt.NDArray[np.intp]
    values: Float64
    right: Float64
    leeway: Float64
    presolve: bool = False

    def solve(self, what: str, time_limit: float | None = None) -> tuple[Float64, Float64]:
        """y and the rows' dual prices. Raises NoPolicy; SolverError, which says ``what`` was to be solved; TimeLimit."""
        deadline = None if time_limit is None else time.monotonic() + time_limit
        for leeway in (np.zeros(len(self.leeway)), self.leeway):
            highs = solver(None if deadline is None else deadline - time.monotonic(), self.presolve)
            if self.presolve and (len(self.counts) > MANY_ROWS or np.abs(self.values).min(initial=1.0) < WIDE):
                highs.setOptionValue("solver", "ipm")
            try:
                return self._solve(highs, what, -leeway)
            except NoPolicy:
                if leeway is self.leeway:
                    raise
        raise AssertionError

    def _solve(self, highs: highspy.Highs, what: str, least: Float64) -> tuple[Float64, Float64]:
        highs.passModel(self._model(self.objective, least, self.most, self.right))
        solution = optimum(highs, what)
        y = np.clip(np.asarray(solution.col_value), least, self.most)
        prices = np.asarray(solution.row_dual)
        smallest = SMALLEST * float(np.max(self.right, initial=1.0))
        left, reduced = np.asarray(self.right - self._used(y), np.float64), self._reduced(prices)
        gain = np.maximum(np.where(y < self.most, reduced, 0.0), np.where(y > least + smallest, -reduced, 0.0))
        if np.abs(left).max(initial=0.0) > smallest or gain.max(initial=0.0) > SMALLEST_PRICE:
            objective = MAGNIFIED * np.clip(reduced, -1.0, 1.0)
            basis = highs.getBasis()
            highs.passModel(self._model(objective, MAGNIFIED * (least - y), MAGNIFIED * (self.most - y), MAGNIFIED * left))
            highs.setBasis(basis)
            highs.setOptionValue("solver", "choose")
            solution = optimum(highs, what)
            y = y + np.asarray(solution.col_value) / MAGNIFIED
            prices = prices + np.asarray(solution.row_dual) / MAGNIFIED
        y = np.clip(y, 0.0, self.most)
        return np.where(y <= smallest, 0.0, y), prices

    def _reduced(self, prices: Float64) -> Float64:
        """The objective less what each variable uses of the rows, at these prices."""
        spent = np.repeat(prices, self.counts) * self.values
        return np.asarray(self.objective - np.bincount(self.columns, spent, minlength=len(self.objective)))

    def _used(self, y: Float64) -> Any:
        """rows.y, in extended precision where the machine has it."""
        used = np.zeros(len(self.counts), np.longdouble)
        some = self.counts > 0
        if some.any():
            starts = (np.cumsum(self.counts) - self.counts)[some]
            used[some] = np.add.reduceat(self.values.astype(np.longdouble) * y[self.columns], starts)
        return used

    def _model(self, objective: Float64, least: Float64, most: Float64, right: Float64) -> highspy.HighsLp:
        import highspy

        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = len(self.objective), len(self.counts)
        lp.col_cost_, lp.sense_ = objective, highspy.ObjSense.kMaximize
        lp.col_lower_, lp.col_upper_ = least, most
        lp.row_lower_ = lp.row_upper_ = right
        lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        lp.a_matrix_.start_ = np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int32)
        lp.a_matrix_.index_ = self.columns.astype(np.int32)
        lp.a_matrix_.value_ = self.values
        return lp


def solver(time_limit: float | None = None, presolve: bool = False) -> highspy.Highs:
    """A silent HiGHS on one thread; ``time_limit`` in seconds.

    presolve: feasible LPs take a third longer with it; most others are found to be infeasible within milliseconds, where the
    simplex method may take seconds or fail.
    """
    import highspy

    highs = highspy.Highs()
    highs.setOptionValue("output_flag", False)
    highs.setOptionValue("threads", 1)
    highs.setOptionValue("presolve", "on" if presolve else "off")
    highs.setOptionValue("primal_feasibility_tolerance", TOLERANCE)
    highs.setOptionValue("dual_feasibility_tolerance", TOLERANCE)
    highs.setOptionValue("small_matrix_value", SMALLEST_COEFFICIENT)
    if time_limit is not None:
        highs.setOptionValue("time_limit", max(time_limit, 0.0))
    return highs


def optimum(highs: highspy.Highs, what: str) -> Any:
    """HiGHS's solution. Raises NoPolicy if infeasible, SolverError for any other status but optimal."""
    import highspy

    statuses = highspy.HighsModelStatus
    highs.run()
    status = highs.getModelStatus()
    # The simplex method can fail on badly scaled problems, and may call them infeasible: try presolve, then, if that is cheap,
    # interior points. With presolve from the start, a conflict is one.
    _, presolve = highs.getOptionValue("presolve")
    method = str(highs.getOptionValue("solver")[1])
    others = [("presolve", "on", "off"), *([("solver", "ipm", "choose")] if highs.getNumRow() <= FEW_ROWS else [])]
    if presolve == "on":
        others = [("solver", "choose" if method == "ipm" else "ipm", method), ("presolve", "off", "on")]
    for option, other, usual in others:
        if status in (statuses.kOptimal, statuses.kTimeLimit, statuses.kIterationLimit):
            break
        if (option == "solver" or presolve == "on") and status in (statuses.kInfeasible, statuses.kUnboundedOrInfeasible):
            break
        highs.clearSolver()
        highs.setOptionValue(option, other)
        highs.run()
        highs.setOptionValue(option, usual)
        status = highs.getModelStatus()
    if status in (statuses.kInfeasible, statuses.kUnboundedOrInfeasible):
        raise NoPolicy
    info: Any = highs.getInfo()  # its type lacks some fields
    # Unknown: optimal, but for tolerances that no double meets where variables are eleven orders apart. Callers check the rows.
    if status != statuses.kOptimal and not (status == statuses.kUnknown and info.primal_dual_objective_error <= TOLERANCE):
        gap = abs(float(info.primal_dual_objective_error)) if info.primal_solution_status == 2 else None
        reached = "no feasible policy yet" if gap is None else f"relative primal-dual gap {gap:.3g}"
        kind = TimeLimit if status == statuses.kTimeLimit else SolverError
        raise kind(f"{what}: HiGHS stopped with status {highs.modelStatusToString(status)!r}, {reached}", gap)
    return highs.getSolution()

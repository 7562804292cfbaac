"""Routing LPs by HiGHS, in bulk: the reference in the tests, and the solver for prompts with several rows each.

HiGHS's tolerances are absolute, and it drops coefficients under 1e-9. So every row is divided by its bound, and a model that
uses more of a row than the bound, a/b > 1, enters as y = (a/b) p, so that no coefficient exceeds 1. A model of which the bound
pays for less than a share of 1e-9 is left out, at a loss of value of at most 1e-9.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from p2l_engine.native import routing as native
from p2l_engine.routing.arrays import Float64
from p2l_engine.routing.problem import Row

if TYPE_CHECKING:
    import highspy

Int32 = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]

SMALLEST_SHARE = 1e-12  # a smaller probability is the solver's rounding
LEAST_BOUGHT = 1e-9  # a share below this is not worth a column
BLOCK = 64  # prompts per LP where they share no rows
TOLERANCE = 1e-9  # HiGHS's feasibility tolerances, on rows scaled to bounds of 1


class SolverError(RuntimeError):
    """A solver stopped without an optimum. ``gap``: how far its best policy may be from it (absolute), or None."""

    def __init__(self, message: str, gap: float | None = None) -> None:
        self.gap = gap
        super().__init__(message)


class NoPolicy(Exception):
    """No policy satisfies the rows. ``prompts``: a range with a prompt whose own LP is infeasible; None for batch rows."""

    def __init__(self, prompts: range | None = None) -> None:
        self.prompts = prompts
        super().__init__(prompts)


@dataclass(frozen=True, slots=True, eq=False)
class Solved:
    """x [n, M]: probabilities (times weights); prices [K]: dual prices of the batch rows; excess [K]: by how much elastic rows
    are exceeded, in sum."""

    x: Float64
    prices: Float64
    excess: Float64


def solver(time_limit: float | None = None) -> highspy.Highs:
    """A silent HiGHS on one thread; ``time_limit`` in seconds."""
    import highspy

    highs = highspy.Highs()
    highs.setOptionValue("output_flag", False)
    highs.setOptionValue("threads", 1)
    highs.setOptionValue("primal_feasibility_tolerance", TOLERANCE)
    highs.setOptionValue("dual_feasibility_tolerance", TOLERANCE)
    if time_limit is not None:
        highs.setOptionValue("time_limit", max(time_limit, 0.0))
    return highs


def optimum(highs: highspy.Highs, what: str) -> Any:
    """HiGHS's solution. Raises NoPolicy if infeasible, SolverError for any other status but optimal."""
    import highspy

    statuses = highspy.HighsModelStatus
    highs.run()
    status = highs.getModelStatus()
    if status not in (statuses.kOptimal, statuses.kTimeLimit, statuses.kIterationLimit):
        # A warm start or presolve can fail on badly scaled problems: retry from scratch before raising.
        highs.clearSolver()
        highs.setOptionValue("presolve", "off")
        highs.run()
        highs.setOptionValue("presolve", "choose")
        status = highs.getModelStatus()
    if status in (statuses.kInfeasible, statuses.kUnboundedOrInfeasible):
        raise NoPolicy
    if status != statuses.kOptimal:
        info = highs.getInfo()
        gap = abs(float(info.primal_dual_objective_error)) if info.primal_solution_status == 2 else None  # type: ignore[attr-defined]
        reached = "no feasible policy yet" if gap is None else f"relative primal-dual gap {gap:.3g}"
        raise SolverError(f"{what}: HiGHS stopped with status {highs.modelStatusToString(status)!r}, {reached}", gap)
    return highs.getSolution()


def solve_block(
    v: Float64,
    prompt_rows: Sequence[Row] = (),
    batch_rows: Sequence[Row] = (),
    allowed: Mask | None = None,
    totals: Float64 | None = None,
    penalty: Float64 | None = None,
    weights: Float64 | None = None,
    time_limit: float | None = None,
) -> Solved:
    """One LP over all prompts of v [n, M] and their rows.

    totals [K]: bounds of the batch rows in sum over the prompts (None: n times their bounds). penalty [K]: makes the batch rows
    elastic, at this loss of value per unit of sum. weights [n]: how many equal prompts each one stands for; its x sums to that.
    """
    n, m = v.shape
    usable = np.ones((n, m), bool) if allowed is None else allowed.copy()
    totals = np.array([n * float(row.bound) for row in batch_rows]) if totals is None else totals
    factor = np.ones((n, m))
    scaled: list[tuple[Float64, Any]] = []
    for row in prompt_rows:
        bound = np.broadcast_to(np.asarray(row.bound, float), (n,))
        scaled.append((_scaled(row.amounts, bound[:, None], LEAST_BOUGHT, usable, factor), bound))
    unit = []
    for row in batch_rows:
        # Relative to the mean bound: one prompt may use all that the batch may.
        mean = abs(float(row.bound)) if row.bound or np.all(row.amounts >= 0) else float(np.abs(row.amounts).max())
        if row.negated:
            scaled.append((np.broadcast_to(row.amounts, (n, m)), None))
            mean = 1.0
        else:
            scaled.append((_scaled(row.amounts, np.full((n, 1), mean), LEAST_BOUGHT / max(n, 1), usable, factor), None))
            mean = mean or 1.0
        unit.append(mean)
    if not usable.any(axis=1).all():
        raise NoPolicy
    units = np.array(unit)
    who, which = np.nonzero(usable)
    factors = factor[who, which]
    simplex = _csr(who, np.arange(len(who)), 1 / factors, n)
    ones = np.ones(n) if weights is None else weights
    pieces, lower, upper = [simplex], [ones], [ones]
    for amounts, bound in scaled[: len(prompt_rows)]:
        values = amounts[who, which] / factors
        finite = np.isfinite(bound)[who] & (values != 0)
        pieces.append(_csr(who[finite], np.flatnonzero(finite), values[finite], n))
        lower.append(np.full(n, -np.inf))
        upper.append(np.where(np.isfinite(bound), np.where(bound > 0, 1.0, 0.0), np.inf))
    elastic = 0 if penalty is None else len(batch_rows)
    for k, (amounts, _) in enumerate(scaled[len(prompt_rows) :]):
        values = amounts[who, which] / factors
        index = np.flatnonzero(values)
        values = values[index]
        if elastic:
            index, values = np.append(index, len(who) + k), np.append(values, -1.0)
        pieces.append((index.astype(np.int32), values, np.array([len(index)])))
        lower.append(np.array([-np.inf]))
        upper.append(np.array([totals[k] / units[k]]))
    size = float(np.abs(v[who, which]).max(initial=0.0)) or 1.0  # scales values to at most 1, for HiGHS's tolerances
    objective = v[who, which] / size / factors
    most = factors * ones[who]
    if elastic:
        assert penalty is not None
        objective = np.append(objective, -penalty / size * units)
        most = np.append(most, np.full(elastic, np.inf))
    highs = solver(time_limit)
    highs.passModel(_program(objective, most, pieces, np.concatenate(lower), np.concatenate(upper)))
    solution = optimum(highs, f"LP of {n} prompts")
    y = np.asarray(solution.col_value)
    x = np.zeros((n, m))
    x[who, which] = y[: len(who)] / factors
    k = len(batch_rows)
    duals = np.abs(np.asarray(solution.row_dual)[len(solution.row_dual) - k :]) if k else np.zeros(0)
    return Solved(x, size * duals / units, y[len(who) :] * units if elastic else np.zeros(k))


def _scaled(amounts: Any, bound: Any, least: float, usable: Mask, factor: Float64) -> Float64:
    """amounts / bound [n, M]; clears ``usable`` where the bound cannot pay, raises ``factor`` to ratios above 1; both in
    place."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(amounts > 0, amounts / bound, 0.0)
    usable &= ratio <= 1 / least
    ratio = np.where(np.isfinite(ratio), ratio, 0.0)
    np.maximum(factor, np.where(usable, ratio, 1.0), out=factor)
    return ratio


def _csr(rows: Any, columns: Any, values: Float64, n: int) -> tuple[Int32, Float64, Any]:
    """Entries sorted by row as (column indices, values, entries per row)."""
    return columns.astype(np.int32), values, np.bincount(rows, minlength=n)


def _program(objective: Float64, most: Float64, pieces: Sequence[Any], lower: Float64, upper: Float64) -> highspy.HighsLp:
    """Maximise objective.y over 0 <= y <= most with lower <= rows.y <= upper."""
    import highspy

    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = len(objective), len(lower)
    lp.col_cost_, lp.sense_ = objective, highspy.ObjSense.kMaximize
    lp.col_lower_, lp.col_upper_ = np.zeros(len(objective)), most
    lp.row_lower_, lp.row_upper_ = lower, upper
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_ = np.concatenate([[0], np.cumsum(np.concatenate([piece[2] for piece in pieces]))]).astype(np.int32)
    lp.a_matrix_.index_ = np.concatenate([piece[0] for piece in pieces])
    lp.a_matrix_.value_ = np.concatenate([piece[1] for piece in pieces])
    return lp


def solve_prompts(
    v: Float64, rows: Sequence[Row], allowed: Mask | None = None, threads: int | None = None, time_limit: float | None = None
) -> tuple[Int32, Float64]:
    """One small LP per prompt, R rows each: indices and probabilities [n, max(2, R + 1)].

    Dominated models are left out; blocks of prompts make one LP; threads share the blocks. That is faster than one LP per
    prompt warm-started from the previous one (python -m bench.solvers measures both).
    """
    n = len(v)
    width = max(2, len(rows) + 1)
    indices, probabilities = np.zeros((n, width), np.int32), np.zeros((n, width))
    deadline = None if time_limit is None else time.monotonic() + time_limit

    def run(start: int) -> None:
        some = slice(start, min(start + BLOCK, n))
        own = [row.of(some) for row in rows]
        usable = np.ones(v[some].shape, bool) if allowed is None else allowed[some]
        mask = native.undominated(v[some], [row.amounts for row in own], usable)
        left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
        try:
            x = solve_block(v[some], own, (), mask, time_limit=left).x
        except NoPolicy:
            raise NoPolicy(range(some.start, some.stop)) from None
        indices[some], probabilities[some] = _narrow(x, width)

    with ThreadPoolExecutor(threads or native.threads(n)) as pool:
        list(pool.map(run, range(0, n, BLOCK)))
    return indices, probabilities


def _narrow(x: Float64, width: int) -> tuple[Int32, Float64]:
    """x [n, M] as the ``width`` largest probabilities of each prompt and their models, rounding removed."""
    m = x.shape[1]
    top = np.argsort(-x, axis=1, kind="stable")[:, : min(width, m)]
    top = np.pad(top, ((0, 0), (0, width - top.shape[1])), mode="edge")
    probabilities = np.take_along_axis(x, top, 1)
    probabilities[:, m:] = 0.0
    return tidy(top.astype(np.int32), probabilities / np.maximum(x.sum(1, keepdims=True), SMALLEST_SHARE))


def tidy(indices: Int32, probabilities: Float64) -> tuple[Int32, Float64]:
    """Removes rounding: tiny shares become 0 and repeat the first model, the others sum to 1."""
    unused = probabilities <= SMALLEST_SHARE
    probabilities = np.where(unused, 0.0, probabilities)
    return np.where(unused, indices[:, :1], indices), probabilities / probabilities.sum(1, keepdims=True)


def narrow(x: Float64) -> tuple[Int32, Float64]:
    """x [n, M] as policies, as wide as the most mixed prompt needs, at least 2."""
    share = x / np.maximum(x.sum(1, keepdims=True), SMALLEST_SHARE)
    return _narrow(x, max(2, int((share > SMALLEST_SHARE).sum(1).max(initial=0))))

"""The thin face of the native core: checked float64 arrays in, float64 arrays out. Formulas: csrc/p2l_native.h."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from p2l_engine._native import ffi, lib
from p2l_engine.routing.arrays import Float64

PROMPTS_PER_THREAD = 16  # below this a thread costs more than it saves

_isa = {4: "x86-64-v4 (AVX-512)", 3: "x86-64-v3 (AVX2)", 2: "x86-64-v2 (SSE4.2)", 0: "the compiler's baseline"}


def isa() -> str:
    """The instruction set that the native core runs with on this machine."""
    return _isa[lib.p2l_isa_level()]


def threads(n_prompts: int) -> int:
    """Threads for a batch: one per 16 prompts, at most OpenMP's maximum (the CPUs at hand, or OMP_NUM_THREADS)."""
    if n_prompts < 2 * PROMPTS_PER_THREAD:
        return 1
    return int(min(n_prompts // PROMPTS_PER_THREAD, lib.p2l_max_threads()))


def _in(array: Float64) -> object:
    return ffi.from_buffer("double[]", array)


def _out(array: npt.NDArray[np.float64]) -> object:
    return ffi.from_buffer("double[]", array, require_writable=True)


def _check(status: int, what: str) -> int:
    if status < 0:
        raise MemoryError(f"{what}: no working memory could be had")
    return status


def win_rates(theta: Float64, q: Float64) -> Float64:
    """v = W q, [N, M]; q [M] or [N, M]."""
    n, m = theta.shape
    v = np.empty((n, m))
    _check(lib.p2l_win_rates(_in(theta), _in(q), q.ndim == 2, n, m, threads(n), _out(v)), "win_rates")
    return v


def solve_budget(v: Float64, costs: Float64, budget: Float64) -> tuple[npt.NDArray[np.int32], Float64, Float64, Float64, int]:
    """indices [N, 2], probabilities [N, 2], value [N], cost [N] and the number of infeasible prompts (rows of zeros)."""
    n, m = v.shape
    indices = np.zeros((n, 2), np.int32)
    probabilities, value, cost = np.zeros((n, 2)), np.zeros(n), np.zeros(n)
    infeasible = lib.p2l_solve_budget(
        _in(v), _in(costs), costs.ndim == 2, _in(budget), n, m, threads(n),
        ffi.from_buffer("int32_t[]", indices, require_writable=True), _out(probabilities), _out(value), _out(cost),
    )  # fmt: skip
    return indices, probabilities, value, cost, _check(infeasible, "solve_budget")


def bt_score(theta: Float64, q: Float64, rate: Float64) -> Float64:
    """The root of sum_a q_a sigmoid(score - theta_a) = rate, [N]."""
    n, m = theta.shape
    score = np.empty(n)
    diverged = lib.p2l_bt_score(_in(theta), _in(q), q.ndim == 2, _in(rate), n, m, threads(n), _out(score))
    if _check(diverged, "bt_score"):
        row = int(np.argmax(np.isnan(score)))
        raise ArithmeticError(f"bt_score: no root found for prompt {row} at win rate {rate[row]!r}")
    return score

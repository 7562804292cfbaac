"""The thin face of the native core: checked float64 arrays in, float64 arrays out. Formulas: csrc/p2l_native.h."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from p2l_engine._native import ffi, lib
from p2l_engine.routing.arrays import Float64

Mask = npt.NDArray[np.bool_]

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


def _out_int(array: npt.NDArray[np.int32]) -> object:
    return ffi.from_buffer("int32_t[]", array, require_writable=True)


def _mask(allowed: Mask | None) -> object:
    return ffi.NULL if allowed is None else ffi.from_buffer("uint8_t[]", allowed)


def _offsets(array: npt.NDArray[np.int64]) -> object:
    return ffi.from_buffer("int64_t[]", array)


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


def tie_win_rates(theta: Float64, log_lambda: Float64, grounded: bool, q: Float64) -> Float64:
    """Win rates with ties as half a win, [N, M]; log_lambda [N], q [M] or [N, M]."""
    n, m = theta.shape
    v = np.empty((n, m))
    arguments = (_in(theta), _in(log_lambda), grounded, _in(q), q.ndim == 2, n, m, threads(n), _out(v))
    _check(lib.p2l_tie_win_rates(*arguments), "win_rates")
    return v


def solve_budget(
    v: Float64, costs: Float64, budget: Float64, allowed: Mask | None = None
) -> tuple[npt.NDArray[np.int32], Float64, Float64, Float64, int]:
    """indices [N, 2], probabilities [N, 2], value [N], cost [N] and the number of infeasible prompts (rows of zeros)."""
    n, m = v.shape
    indices = np.zeros((n, 2), np.int32)
    probabilities, value, cost = np.zeros((n, 2)), np.zeros(n), np.zeros(n)
    infeasible = lib.p2l_solve_budget(
        _in(v), _in(costs), costs.ndim == 2, _in(budget), _mask(allowed), n, m, threads(n),
        _out_int(indices), _out(probabilities), _out(value), _out(cost),
    )  # fmt: skip
    return indices, probabilities, value, cost, _check(infeasible, "solve_budget")


def hulls(
    v: Float64, costs: Float64, allowed: Mask | None = None
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], Float64, Float64]:
    """The prompts' upper hulls, one behind the other: sizes [N] and, per vertex, model, cost and value."""
    n, m = v.shape
    sizes, models = np.empty(n, np.int32), np.empty(n * m, np.int32)
    cost, value = np.empty(n * m), np.empty(n * m)
    total = lib.p2l_hulls(
        _in(v), _in(costs), costs.ndim == 2, _mask(allowed), n, m, threads(n),
        _out_int(sizes), _out_int(models), _out(cost), _out(value),
    )  # fmt: skip
    _check(total, "hulls")
    return sizes, models[:total].copy(), cost[:total].copy(), value[:total].copy()


def select_steps(offsets: npt.NDArray[np.int64], cost: Float64, value: Float64, room: float) -> tuple[float, float]:
    """The slope at which the room beyond the hulls' first vertices ends (0: never), and what is left for steps of it."""
    price, left = ffi.new("double *"), ffi.new("double *")
    n = len(offsets) - 1
    _check(lib.p2l_select_steps(_offsets(offsets), _in(cost), _in(value), n, room, threads(n), price, left), "select_steps")
    return price[0], left[0]


def take_steps(
    offsets: npt.NDArray[np.int64], models: npt.NDArray[np.int32], cost: Float64, value: Float64, price: float, left: float
) -> tuple[npt.NDArray[np.int32], Float64, Float64, Float64]:
    """The policies at a price: indices [N, 2], probabilities [N, 2], value [N], cost [N]."""
    n = len(offsets) - 1
    indices, probabilities = np.empty((n, 2), np.int32), np.empty((n, 2))
    policy_value, policy_cost = np.empty(n), np.empty(n)
    lib.p2l_take_steps(
        _offsets(offsets), ffi.from_buffer("int32_t[]", models), _in(cost), _in(value), n, price, left,
        _out_int(indices), _out(probabilities), _out(policy_value), _out(policy_cost),
    )  # fmt: skip
    return indices, probabilities, policy_value, policy_cost


def best_models(
    v: Float64, penalty: Float64, allowed: Mask | None = None, first_prompt: int = 0, noise: float = 0.0
) -> tuple[npt.NDArray[np.int32], Float64, Float64, Float64]:
    """Each prompt's best model by v - penalty [M] + noise * ``noise_of``: its index, its reduced value v - penalty, the most
    that any model's is, and its lead over the runner-up with the noise."""
    n, m = v.shape
    best, reduced, most, lead = np.empty(n, np.int32), np.empty(n), np.empty(n), np.empty(n)
    given = (_in(v), _in(penalty), _mask(allowed), first_prompt, noise, n, m, threads(n))
    _check(lib.p2l_best_models(*given, _out_int(best), _out(reduced), _out(most), _out(lead)), "best_models")
    return best, reduced, most, lead


def undominated(v: Float64, amounts: Sequence[Float64], usable: Mask) -> Mask:
    """The usable models that no other one beats with no less value and no more of any row: amounts, each [M] or [n, M]."""
    n, m = v.shape
    shared = all(row.ndim == 1 for row in amounts)
    rows = np.stack([row if shared else np.broadcast_to(row, (n, m)) for row in amounts]) if amounts else np.zeros((0, m))
    kept = usable.copy()
    out = ffi.from_buffer("uint8_t[]", kept, require_writable=True)
    _check(lib.p2l_undominated(_in(v), _in(rows), not shared, len(amounts), n, m, out), "undominated")
    return kept


def noise_of(prompts: npt.NDArray[np.intp], m: int) -> Float64:
    """Fixed numbers in [-1, 0) for prompts and models, [n, M]."""
    noise = np.empty((len(prompts), m))
    lib.p2l_noise(_offsets(np.ascontiguousarray(prompts, np.int64)), len(prompts), m, _out(noise))
    return noise


def bt_score(theta: Float64, q: Float64, rate: Float64) -> Float64:
    """The root of sum_a q_a sigmoid(score - theta_a) = rate, [N]."""
    n, m = theta.shape
    score = np.empty(n)
    diverged = lib.p2l_bt_score(_in(theta), _in(q), q.ndim == 2, _in(rate), n, m, threads(n), _out(score))
    if _check(diverged, "bt_score"):
        row = int(np.argmax(np.isnan(score)))
        raise ArithmeticError(f"bt_score: no root found for prompt {row} at win rate {rate[row]!r}")
    return score

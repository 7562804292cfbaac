"""The native core's routing functions: float64 arrays in and out, already checked. Formulas: csrc/p2l_native.h.

N prompts, M models. All raise MemoryError where the core cannot allocate.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from p2l_engine.native import binding
from p2l_engine.native.binding import array, check, lib

Float64 = npt.NDArray[np.float64]
Int32 = npt.NDArray[np.int32]
Offsets = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

PROMPTS_PER_THREAD = 16  # below this a thread costs more than it saves


def threads(n_prompts: int) -> int:
    """Threads for a batch: one per 16 prompts, at most ``binding.max_threads``."""
    return binding.threads(n_prompts, PROMPTS_PER_THREAD)


def _in(values: Float64) -> object:
    return array("double", values)


def _out(values: Float64) -> object:
    return array("double", values, writable=True)


def _out_int(values: Int32) -> object:
    return array("int32_t", values, writable=True)


def _mask(allowed: Mask | None) -> object:
    return array("uint8_t", allowed)


def win_rates(theta: Float64, q: Float64) -> Float64:
    """v = W q, [N, M]; q [M] or [N, M]."""
    n, m = theta.shape
    v = np.empty((n, m))
    check(lib.p2l_win_rates(_in(theta), _in(q), q.ndim == 2, n, m, threads(n), _out(v)), "win_rates")
    return v


def tie_win_rates(theta: Float64, log_lambda: Float64, grounded: bool, q: Float64) -> Float64:
    """Win rates with ties as half a win, [N, M]; log_lambda [N], q [M] or [N, M]."""
    n, m = theta.shape
    v = np.empty((n, m))
    arguments = (_in(theta), _in(log_lambda), grounded, _in(q), q.ndim == 2, n, m, threads(n), _out(v))
    check(lib.p2l_tie_win_rates(*arguments), "win_rates")
    return v


def contending_win_rates(
    theta: Float64, log_lambda: Float64 | None, grounded: bool, q: Float64, models: Offsets, costs: Float64
) -> Float64:
    """Win rates of K models alone, of rising costs [K]: [N, K], 0 where a cheaper one of them has a clearly higher
    coefficient, so that no policy with one bound on costs, and no price of them, would choose it. q [M]; log_lambda [N], None
    without ties."""
    n, m = theta.shape
    v = np.empty((n, len(models)))
    arguments = (_in(theta), array("double", log_lambda), grounded, _in(q), array("int64_t", models), _in(costs), len(models))
    check(lib.p2l_contending_win_rates(*arguments, n, m, threads(n), _out(v)), "win_rates")
    return v


def outcomes(e: Float64, handicap: Float64 | None, grounded: bool, count: int, most_threads: int) -> Float64:
    """The probabilities of every pair's first ``count`` outcomes, [N, count, M (M - 1) / 2].

    e = exp(theta) [N, M]; handicap = lambda [N] of the models with ties (None: 1); pairs a < b in row-major order.
    """
    n, m = e.shape
    out = np.empty((n, count, m * (m - 1) // 2))
    used = binding.threads(n, 1, most_threads)
    lib.p2l_outcomes(_in(e), array("double", handicap), float(grounded), count, n, m, used, _out(out))
    return out


def solve_budget(
    v: Float64, costs: Float64, budget: Float64, highest: Float64, allowed: Mask | None = None
) -> tuple[Int32, Float64, Float64, Float64, int]:
    """indices [N, 2], probabilities [N, 2], value [N], cost [N] and the number of infeasible prompts (rows of zeros).

    highest [N]: a model of up to this cost, a rounding above the budget [N], counts as within it.
    """
    n, m = v.shape
    indices = np.zeros((n, 2), np.int32)
    probabilities, value, cost = np.zeros((n, 2)), np.zeros(n), np.zeros(n)
    infeasible = lib.p2l_solve_budget(
        _in(v), _in(costs), costs.ndim == 2, _in(budget), _in(highest), _mask(allowed), n, m, threads(n),
        _out_int(indices), _out(probabilities), _out(value), _out(cost),
    )  # fmt: skip
    return indices, probabilities, value, cost, check(infeasible, "solve_budget")


def hulls(v: Float64, costs: Float64, allowed: Mask | None = None) -> tuple[Int32, Int32, Float64, Float64]:
    """The prompts' upper hulls, concatenated: sizes [N] and, per vertex, model, cost and value."""
    n, m = v.shape
    sizes, models = np.empty(n, np.int32), np.empty(n * m, np.int32)
    cost, value = np.empty(n * m), np.empty(n * m)
    total = lib.p2l_hulls(
        _in(v), _in(costs), costs.ndim == 2, _mask(allowed), n, m, threads(n),
        _out_int(sizes), _out_int(models), _out(cost), _out(value),
    )  # fmt: skip
    check(total, "hulls")
    return sizes, models[:total].copy(), cost[:total].copy(), value[:total].copy()


def select_steps(offsets: Offsets, cost: Float64, value: Float64, slack: float) -> tuple[float, float]:
    """The slope of the hull step that uses up the slack beyond the first vertices (0: none does), and what is left for it."""
    price, left = binding.new("double"), binding.new("double")
    n = len(offsets) - 1
    arguments = (array("int64_t", offsets), _in(cost), _in(value), n, slack, threads(n), price, left)
    check(lib.p2l_select_steps(*arguments), "select_steps")
    return price[0], left[0]


def take_steps(
    offsets: Offsets,
    models: Int32,
    cost: Float64,
    value: Float64,
    price: float,
    left: float,
    out: tuple[Int32, Float64, Float64, Float64],
) -> None:
    """The policies at a dual price, into ``out``: indices [N, 2], probabilities [N, 2], value [N], cost [N]."""
    n = len(offsets) - 1
    indices, probabilities, policy_value, policy_cost = out
    lib.p2l_take_steps(
        array("int64_t", offsets), array("int32_t", models), _in(cost), _in(value), n, price, left,
        _out_int(indices), _out(probabilities), _out(policy_value), _out(policy_cost),
    )  # fmt: skip


def best_models(
    v: Float64, penalty: Float64, allowed: Mask | None = None, first_prompt: int = 0, noise: float = 0.0
) -> tuple[Int32, Float64, Float64, Float64]:
    """Each prompt's best model by v - penalty [M] + noise * ``noise_of``.

    Returns its index, its reduced value v - penalty, the highest reduced value of any model, and its lead over the runner-up
    (noise included), all [N].
    """
    n, m = v.shape
    best, reduced, most, lead = np.empty(n, np.int32), np.empty(n), np.empty(n), np.empty(n)
    given = (_in(v), _in(penalty), _mask(allowed), first_prompt, noise, n, m, threads(n))
    check(lib.p2l_best_models(*given, _out_int(best), _out(reduced), _out(most), _out(lead)), "best_models")
    return best, reduced, most, lead


def undominated(v: Float64, amounts: Sequence[Float64], usable: Mask) -> Mask:
    """The usable models that no other usable one dominates, with no less value and no more of any row's amounts.

    amounts: for each row [M] or [N, M].
    """
    n, m = v.shape
    shared = all(row.ndim == 1 for row in amounts)
    rows = np.stack([row if shared else np.broadcast_to(row, (n, m)) for row in amounts]) if amounts else np.zeros((0, m))
    kept = usable.copy()
    out = array("uint8_t", kept, writable=True)
    check(lib.p2l_undominated(_in(v), _in(rows), not shared, len(amounts), n, m, out), "undominated")
    return kept


def noise_of(prompts: npt.NDArray[np.intp], m: int) -> Float64:
    """Fixed numbers in [-1, 0), a hash of prompt and model, [n, M]."""
    noise = np.empty((len(prompts), m))
    lib.p2l_noise(array("int64_t", np.ascontiguousarray(prompts, np.int64)), len(prompts), m, _out(noise))
    return noise


def bt_score(theta: Float64, q: Float64, rate: Float64) -> Float64:
    """The root of sum_a q_a sigmoid(score - theta_a) = rate, [N]."""
    n, m = theta.shape
    score = np.empty(n)
    diverged = lib.p2l_bt_score(_in(theta), _in(q), q.ndim == 2, _in(rate), n, m, threads(n), _out(score))
    if check(diverged, "bt_score"):
        row = int(np.argmax(np.isnan(score)))
        raise ArithmeticError(f"bt_score: no root found for prompt {row} at win rate {rate[row]!r}")
    return score

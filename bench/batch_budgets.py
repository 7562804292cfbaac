"""Rows over a batch, several rows for each prompt, streams, and millions of prompts. Part of python -m bench.solvers.

Problems: theta ~ N(0, 1) plus a strength that rises with the model's cost (so that budgets bind), q uniform, costs log-normal;
the budget lies a fifth of the way from the cheapest policy to the best one. Share caps: the five models (three of nine) that
win most prompts, the cheapest aside, may each take half of what they would.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from bench import warm_highs
from bench.measure import Row, apart, measure, once
from p2l_engine import routing
from p2l_engine.routing import BudgetPacer, LazyWinRates, Problem, Resource, Share, highs
from p2l_engine.routing.hulls import Hulls
from p2l_engine.routing.values import CHUNK

Float64 = npt.NDArray[np.float64]


def coefficients(n: int, m: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """theta [n, m] float32."""
    theta = np.empty((n, m), np.float32)
    for start, chunk in zip(range(0, n, CHUNK), chunks(n, m, seed), strict=True):
        theta[start : start + CHUNK] = chunk
    return theta


def chunks(n: int, m: int, seed: int = 0) -> Iterator[npt.NDArray[np.float32]]:
    """The same coefficients, generated chunk by chunk."""
    strength = (0.4 * np.log(model_costs(m))).astype(np.float32)
    rng = np.random.default_rng(seed)
    for start in range(0, n, CHUNK):
        yield rng.standard_normal((min(CHUNK, n - start), m), np.float32) + strength


def model_costs(m: int) -> Float64:
    return np.asarray(np.exp(np.random.default_rng(m).normal(size=m)))


def rows_of(m: int) -> tuple[Float64, float, list[Share]]:
    """q, the budget and the share caps."""
    q, costs = np.full(m, 1.0 / m), model_costs(m)
    v = routing.win_rates(coefficients(4000, m, 1), q)
    budget = costs.min() + 0.2 * (costs[v.argmax(1)].mean() - costs.min())
    free = routing.solve_batch_budget(v, costs, budget)
    won = np.bincount(free.indices[:, 0], minlength=m) / len(v)
    won[costs.argmin()] = 0.0  # the cheapest stays free: the budget must remain feasible
    top = np.argsort(-won, kind="stable")[: min(5, m // 3)]
    return q, float(budget), [Share(int(j), at_most=float(won[j]) / 2) for j in top]


def bench_batch(m: int, n: int, n_full: int, thread_counts: Sequence[int]) -> list[Row]:
    """Compared with HiGHS: the full LP of n_full prompts, and the LPs of prompts with two rows each, on each number of threads.

    The stream and the frontier have n prompts. thread_counts: 1 first.
    """
    q, budget, shares = rows_of(m)
    costs, rows = model_costs(m), []
    v = routing.win_rates(coefficients(max(n, n_full), m), q)

    problems = {
        "one batch budget": Problem(v[:n_full], costs, budget, "batch"),
        "batch budget and share caps": Problem(v[:n_full], costs, budget, "batch", shares=shares),
    }
    for stage, problem in problems.items():
        ours, solved = measure(partial(routing.solve, problem), n_full, 3)
        rows.append(Row(m, stage, f"ours, {solved.solver}", n_full, ours, 1.0, solved.gap))
        seconds, full = once(partial(routing.solve, problem, "highs"), n_full)
        gap = abs(float(full.value.mean() - solved.value.mean()))
        rows.append(Row(m, stage, "HiGHS, the full LP", n_full, seconds, seconds / ours, gap))

    seconds_of = np.random.default_rng(m).exponential(size=m)
    two = Problem(v[:n_full], costs, budget, resources=[Resource("seconds", seconds_of, float(np.quantile(seconds_of, 0.3)))])
    stage, bounds = "two rows for each prompt", [np.full(n_full, row.bound) for row in two.prompt_rows]
    for threads in thread_counts:
        ours, (indices, p) = measure(partial(highs.solve_prompts, v[:n_full], two.prompt_rows, None, threads), n_full, 1)
        if threads == 1:
            base, value = ours, (p * np.take_along_axis(v[:n_full], indices, 1)).sum(1)
        name = f"ours, {highs.BLOCK} LPs at once, {threads} thread{'s' if threads > 1 else ''}"
        rows.append(Row(m, stage, name, n_full, ours, ours / base, None))
    amounts = [row.amounts for row in two.prompt_rows]
    seconds, peer = once(partial(warm_highs.solve, v[:n_full], amounts, bounds), n_full)
    rows.append(Row(m, stage, "HiGHS, warm-started", n_full, seconds, seconds / base, float(np.abs(peer - value).max())))

    pacer = BudgetPacer.learned(routing.win_rates(coefficients(4000, m, 1), q), costs, budget)
    seconds, chosen = once(lambda: [pacer.choose(row, costs) for row in v[:n]], n)
    lost = float(routing.solve_batch_budget(v[:n], costs, budget).value.mean() - v[np.arange(n), chosen].mean())
    rows.append(Row(m, "stream under a mean budget", "ours, BudgetPacer", n, seconds, 1.0, lost))
    seconds, _ = measure(lambda: routing.frontier(v[:n], costs), n, 3)
    rows.append(Row(m, "frontier, all budgets", "ours", n, seconds, 1.0, None))
    return rows


def bench_millions(m: int, n: int) -> list[Row]:
    """n prompts from theta in memory (float32) to policies, on all threads, each stage in a process of its own; also 10 n
    prompts from an iterator that generates theta."""
    rows = []
    for stage, run in (
        ("win rates, LP per prompt, score", per_prompt),
        ("one batch budget", batch_budget),
        ("batch budget and share caps", share_caps),
        ("one batch budget, theta from an iterator", streamed),
    ):
        if run is streamed:
            n *= 10
        figures = apart(run, n, m)
        gib = figures.pop("gib")
        total = figures.pop("end to end")
        gap = figures.pop("gap", None)
        rows.append(Row(m, stage, "end to end", n, total / n, 1.0, gap, gib))
        rows += [Row(m, stage, f"of it: {part}", n, seconds / n, seconds / total, None) for part, seconds in figures.items()]
    return rows


def per_prompt(n: int, m: int) -> dict[str, float]:
    theta, costs, (q, budget, _) = coefficients(n, m), model_costs(m), rows_of(m)
    clock = Clock()
    for start in range(0, n, CHUNK):
        t = theta[start : start + CHUNK]
        v = clock.of("win rates", partial(routing.win_rates, t, q))
        p = clock.of("budget LP", partial(routing.solve_budget, v, costs, budget))
        clock.of("score", partial(routing.bt_score, t, q, p.value))
    return clock.figures()


def batch_budget(n: int, m: int) -> dict[str, float]:
    theta, costs, (q, budget, _) = coefficients(n, m), model_costs(m), rows_of(m)
    lazy, clock = Timed(theta, q), Clock()
    hulls = clock.of("hulls", lambda: Hulls.of(lazy, costs))
    clock.of("solving", lambda: hulls.within(budget))
    return clock.figures({"win rates": lazy.seconds, "hulls": -lazy.seconds})


def share_caps(n: int, m: int) -> dict[str, float]:
    theta, costs, (q, budget, shares) = coefficients(n, m), model_costs(m), rows_of(m)
    clock = Clock()
    v = clock.of("win rates", lambda: routing.win_rates(theta, q))
    solved = clock.of("solving", lambda: routing.solve(Problem(v, costs, budget, "batch", shares=shares)))
    return clock.figures() | {"gap": solved.gap}


def streamed(n: int, m: int) -> dict[str, float]:
    costs, (q, budget, _) = model_costs(m), rows_of(m)
    lazy, clock = Timed(chunks(n, m), q), Clock()
    clock.of("theta, hulls, solving", lambda: routing.solve_batch_budget(lazy, costs, budget))
    return clock.figures({"win rates": lazy.seconds, "theta, hulls, solving": -lazy.seconds})


class Timed(LazyWinRates):
    """Lazy win rates that measure their own time."""

    seconds = 0.0

    def _win_rates(self, *arguments: Any) -> Float64:
        start = time.perf_counter()
        v = super()._win_rates(*arguments)
        self.seconds += time.perf_counter() - start
        return v


class Clock:
    """Seconds by part."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}

    def of(self, part: str, run: Any) -> Any:
        start = time.perf_counter()
        result = run()
        self.parts[part] = self.parts.get(part, 0.0) + time.perf_counter() - start
        return result

    def figures(self, moved: dict[str, float] | None = None) -> dict[str, float]:
        """``end to end``, their sum, and the parts; ``moved``: seconds to move from one part to another."""
        parts = {part: self.parts.get(part, 0.0) + (moved or {}).get(part, 0.0) for part in {**self.parts, **(moved or {})}}
        return {"end to end": sum(self.parts.values()), **parts}

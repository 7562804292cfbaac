"""Time per prompt of each native routine and of its peers, in one run: python -m bench.solvers.

For M models the same random problems go to every solver: theta ~ N(0, 1), q uniform, costs exponential, each prompt's budget
uniform between the cheapest model's cost and the mean cost. The native routines take all N prompts in one call, on one thread
(--threads N for more); peers whose time is linear in N take the first few, as the table says. Every peer's result is compared
with ours: the table shows the largest difference. Then one prompt through Chooser.decide, which is what Router.route does after
the coefficients (median of 2,000 calls).

Then batches (bench/batch_budgets.py): rows over the batch, and several rows for each prompt, against HiGHS on the full LP;
the stream; and with --millions a million prompts on all threads, each stage in a process of its own with the memory it took.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cvxpy as cp
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.optimize import brentq, elementwise, linprog
from scipy.special import expit
from threadpoolctl import threadpool_limits

from bench import warm_highs
from bench.batch_budgets import bench_batch, bench_millions
from bench.machine import machine
from bench.measure import Row, measure, once
from bench.setting import positive
from p2l_engine import Catalog, Chooser, Coefficients, Constraints, routing
from p2l_engine.catalog import CatalogModel
from p2l_engine.feedback import feedback_model
from p2l_engine.native import binding

Float64 = npt.NDArray[np.float64]


def cvxpy_rebuilt(v: Float64, costs: Float64, budget: Float64) -> Float64:
    """As published routers do: a problem built again for every prompt (HiGHS underneath, which ends on a vertex)."""
    values = []
    for row, limit in zip(v, budget, strict=True):
        p = cp.Variable(len(costs), nonneg=True)
        problem = cp.Problem(cp.Maximize(row @ p), [costs @ p <= limit, cp.sum(p) == 1])
        problem.solve(solver=cp.HIGHS)
        values.append(problem.value)
    return np.array(values)


def scipy_linprog(v: Float64, costs: Float64, budget: Float64) -> Float64:
    ones = np.ones((1, len(costs)))
    solved = (linprog(-row, costs[None], [limit], ones, [1.0]) for row, limit in zip(v, budget, strict=True))
    return np.array([-s.fun for s in solved])


def brentq_each(theta: Float64, q: Float64, rate: Float64) -> Float64:
    roots = [
        brentq(lambda x, row=row, r=r: q @ expit(x - row) - r, row.min() - 50, row.max() + 50, xtol=1e-12)
        for row, r in zip(theta, rate, strict=True)
    ]
    return np.array(roots)


def find_root(theta: Float64, q: Float64, rate: Float64) -> Float64:
    """scipy's vectorised root finder, all prompts at once, from the same bracket as ours."""
    logit = np.log(rate) - np.log1p(-rate)

    def excess(x: Float64, index: npt.NDArray[np.int64]) -> Float64:
        i = index.astype(int)
        return np.asarray(expit(x[..., None] - theta[i]) @ q - rate[i])

    bracket = (theta.min(1) + logit, theta.max(1) + logit)
    result = elementwise.find_root(excess, bracket, args=(np.arange(len(theta)),))
    return np.asarray(result.x)


def numpy_win_rates(theta: Float64, q: Float64) -> Float64:
    return np.asarray(np.stack([expit(row[:, None] - row) @ q for row in theta]))


def bench(m: int, n: int, n_slow: int, decisions: int) -> list[Row]:
    """The rows of M models: n prompts, n_slow for the slow peers, and so many single decisions."""
    rng = np.random.default_rng(m)
    theta, q, costs = rng.normal(size=(n, m)), np.full(m, 1.0 / m), rng.exponential(size=m)
    budget = rng.uniform(costs.min(), costs.mean(), size=n)
    rows: list[Row] = []

    def add(stage: str, solver: str, prompts: int, seconds: float, ours: float, gap: float | None) -> None:
        rows.append(Row(m, stage, solver, prompts, seconds, seconds / ours, gap))

    t_v, v = measure(lambda: routing.win_rates(theta, q), n)
    add("win rates", "ours", n, t_v, t_v, None)
    seconds, peer = once(lambda: numpy_win_rates(theta, q), n)
    add("win rates", "numpy + scipy expit", n, seconds, t_v, float(np.abs(peer - v).max()))

    t_lp, policies = measure(lambda: routing.solve_budget(v, costs, budget), n)
    add("budget LP", "ours, hull", n, t_lp, t_lp, None)
    cvxpy_rebuilt(v[:1], costs, budget[:1])
    peers: list[tuple[str, int, Callable[[int], Float64]]] = [
        (
            "highspy, warm-started",
            n,
            lambda k: warm_highs.solve(v[:k], [costs], [budget[:k]]),
        ),
        ("scipy linprog", n_slow, lambda k: scipy_linprog(v[:k], costs, budget[:k])),
        ("cvxpy, rebuilt each time", n_slow, lambda k: cvxpy_rebuilt(v[:k], costs, budget[:k])),
    ]
    for name, k, run in peers:
        seconds, value = once(partial(run, k), k)
        add("budget LP", name, k, seconds, t_lp, float(np.abs(value - policies.value[:k]).max()))

    rate = policies.value
    t_root, score = measure(lambda: routing.bt_score(theta, q, rate), n)
    add("BT score", "ours, Brent in C", n, t_root, t_root, None)
    seconds, root = measure(lambda: find_root(theta, q, rate), n, 1)
    add("BT score", "scipy find_root", n, seconds, t_root, float(np.abs(root - score).max()))
    seconds, root = once(lambda: brentq_each(theta, q, rate), n)
    add("BT score", "scipy brentq", n, seconds, t_root, float(np.abs(root - score).max()))
    one = Coefficients(theta[:1].astype(np.float32), None, tuple(f"model {i}" for i in range(m)), feedback_model("bt"))
    catalog = Catalog(tuple(CatalogModel(name, cost) for name, cost in zip(one.models, costs.tolist(), strict=True)))
    chooser = Chooser(one.models, one.feedback, catalog)
    limit = Constraints(float(budget[0]))
    times = []
    for _ in range(decisions):
        start = time.perf_counter()
        chooser.decide(one, ["What is the capital of Australia?"], limit)
        times.append(time.perf_counter() - start)
    add("one decision", "Chooser.decide, from theta on", 1, float(np.median(times)), float(np.median(times)), None)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.solvers", description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=positive, nargs="+", default=[9, 34, 130], help="numbers of models M")
    parser.add_argument("--prompts", type=positive, default=10_000, help="prompts N for all but the slow peers")
    parser.add_argument("--slow-prompts", type=positive, default=200, help="prompts for cvxpy and linprog")
    parser.add_argument("--batch-prompts", type=positive, default=2000, help="prompts of batches that HiGHS solves as one LP")
    parser.add_argument("--decisions", type=positive, default=2000, help="single decisions")
    parser.add_argument("--millions", type=float, default=0, help="also route this many million prompts, at the largest M")
    parser.add_argument("--threads", type=positive, default=1, help="threads of the native routines (peers run on one)")
    parser.add_argument("--csv", type=Path, help="also write the rows here, with machine and versions")
    arguments = parser.parse_args()
    console = Console()
    rows = []
    thread_counts = sorted({1, binding.max_threads()})
    with threadpool_limits(arguments.threads, user_api="openmp"):
        for m in track(arguments.models, "measuring", console=console, transient=True):
            rows += bench(m, arguments.prompts, arguments.slow_prompts, arguments.decisions)
            rows += bench_batch(m, arguments.prompts, arguments.batch_prompts, thread_counts)
    if arguments.millions:
        with console.status("a million prompts"):
            rows += bench_millions(max(arguments.models), int(arguments.millions * 1e6))
    table = Table(title=f"Microseconds per prompt, and times ours. {machine()}", title_justify="left", box=None)
    table.add_column("")
    for name, width in (("prompts", 10), ("us", 9), ("times", 8), ("difference", 10), ("GiB", 4)):
        table.add_column(name, justify="right", min_width=width)
    stage = ""
    for r in rows:
        if stage != (stage := f"M = {r.models}: {r.stage}"):
            table.add_row(f"[bold]{stage}[/bold]")
        table.add_row(
            f"  {r.solver}", f"{r.prompts:,}", f"{1e6 * r.seconds:,.2f}", f"{r.times_slower:,.1f}",
            "" if r.gap is None else f"{r.gap:.1e}", "" if r.gib is None else f"{r.gib:.2f}",
        )  # fmt: skip
    console.print(table)
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            file.write(f"# {machine()}; {arguments.threads} thread(s)\n")
            writer = csv.writer(file)
            writer.writerow(
                ["models", "stage", "solver", "prompts", "seconds_per_prompt", "times_ours", "largest_difference", "gib"]
            )
            writer.writerows([r.models, r.stage, r.solver, r.prompts, r.seconds, r.times_slower, r.gap, r.gib] for r in rows)
        console.print(f"wrote {arguments.csv}")


if __name__ == "__main__":
    main()

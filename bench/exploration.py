"""What exploring costs and earns while a new model is learned, in simulation: python -m bench.exploration.

    python -m bench.exploration --csv bench/results/exploration.csv --plot docs/exploration.svg

A world: theta*_m(z) = x(z) . w*_m, where x(z) says which words a prompt has, and 1; w*_m is normal. The answer of model m to z
is good with probability sigmoid(theta*_m(z)), and feedback is that alone: good or not, of the one answer that was given. Five
models are known from --known such answers each; a sixth joins after half of the prompts, with none and the prior N(mean of the
known models, as widely spread). Models cost 1 to 5, the new one 3, and every policy of every prompt keeps the same budget, 3.
After each 100 prompts the posterior of every model is updated (Laplace's approximation; its deviations are those of
``Uncertainty``). The routers:

- thompson: the best policy for a draw of the coefficients;
- greedy: the best policy for their means;
- epsilon: greedy, but for 5% of the prompts the best policy for random win rates;
- share: greedy, but 5% of the prompts go to the new model as far as the budget lets them.

Regret of a prompt: the best policy's expected share of good answers at theta*, less that of the router's policy.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from bench.setting import positive, run, write_rows
from p2l_engine import routing
from p2l_engine.backbone.uncertainty import Uncertainty
from p2l_engine.bootstrap import student
from p2l_engine.plotting import BLUE, GREY, ORANGE, YELLOW, save

Float64 = npt.NDArray[np.float64]

WORDS, OF_A_PROMPT = 12, 2
MODELS = ("a", "b", "c", "d", "e", "new")
COSTS = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 3.0])
BUDGET = 3.0
SPREAD = 0.7  # standard deviation of each weight
EXPLORED = 0.05  # of the prompts, by epsilon and share
BATCH = 100  # prompts between updates
POINTS = 50  # of a curve
LINES = {
    "thompson": (BLUE, "Thompson"),
    "greedy": (ORANGE, "greedy"),
    "epsilon": (YELLOW, "epsilon-greedy, 5%"),
    "share": (GREY, "5% to the new model"),
}


@dataclass(frozen=True)
class Row:
    """Cumulative regret after so many prompts, in good answers: the mean over worlds with Student's 95% interval; more_*: its
    difference to Thompson's in the same worlds; new: the new model's share of the prompts since it joined."""

    router: str
    prompts: int
    worlds: int
    regret: float
    low: float
    high: float
    more: float
    more_low: float
    more_high: float
    new: float


class Beliefs:
    """What the learner believes of each model's weights: N(mean [M, D + 1], precision^-1 [M, D + 1, D + 1])."""

    def __init__(self, mean: Float64) -> None:
        self.mean = mean
        self.precision = np.tile(np.eye(mean.shape[1]) / SPREAD**2, (len(mean), 1, 1))

    def learn(self, x: Float64, model: npt.NDArray[np.intp], good: npt.NDArray[np.bool_]) -> None:
        """Feedback [n] on answers of these models to prompts x [n, D + 1]: the mode by Newton's method, and its curvature."""
        for m in np.unique(model).tolist():
            own, outcome = x[model == m], good[model == m]
            before, prior = self.mean[m], self.precision[m]
            for _ in range(4):
                p = 1 / (1 + np.exp(-own @ self.mean[m]))
                curvature = prior + (own * (p * (1 - p))[:, None]).T @ own
                slope = prior @ (self.mean[m] - before) + own.T @ (p - outcome)
                self.mean[m] = self.mean[m] - np.linalg.solve(curvature, slope)
            self.precision[m] = curvature

    def deviation(self, x: Float64) -> Float64:
        """The standard deviation of theta [n, M], as an engine computes it."""
        factors = torch.from_numpy(np.linalg.cholesky(np.linalg.inv(self.precision))).float()
        posterior = Uncertainty(torch.eye(x.shape[1]), factors, MODELS)
        return posterior.deviation(torch.from_numpy(x[:, :-1])).double().numpy()


def features(n: int, rng: np.random.Generator) -> Float64:
    """x(z) [n, WORDS + 1] of random prompts."""
    chosen = np.argsort(rng.random((n, WORDS)), axis=1)[:, :OF_A_PROMPT]
    x = np.zeros((n, WORDS + 1))
    np.put_along_axis(x, chosen, 1.0, axis=1)
    x[:, -1] = 1.0
    return x


def rates(theta: Float64) -> Float64:
    """The probability of a good answer."""
    return np.asarray(routing.win_rates(theta, np.full(theta.shape[1], 1 / theta.shape[1]), "not-bad"))


def values(router: str, theta: Float64, beliefs: Beliefs, x: Float64, models: int, rng: np.random.Generator) -> Float64:
    """What the router maximises [n, models]."""
    if router == "thompson":
        drawn: Float64 = theta + beliefs.deviation(x)[:, :models] * rng.standard_normal(theta.shape)
        return rates(drawn)
    found, some = rates(theta), rng.random(len(x)) < EXPLORED
    if router == "epsilon":
        found[some] = rng.random((int(some.sum()), models))
    if router == "share" and models == len(MODELS):
        found[some, -1] = 1e6
    return found


def simulate(router: str, prompts: int, known: int, seed: int) -> tuple[Float64, float]:
    """The cumulative regret [POINTS] of one router in one world, and the new model's share."""
    world, rng = np.random.default_rng([seed, 1]), np.random.default_rng([seed, 2])
    truth = world.normal(0, SPREAD, (len(MODELS), WORDS + 1))
    beliefs = Beliefs(np.zeros_like(truth))
    for m in range(len(MODELS) - 1):
        x = features(known, world)
        beliefs.learn(x, np.full(known, m), world.random(known) < 1 / (1 + np.exp(-x @ truth[m])))
    beliefs.mean[-1] = beliefs.mean[:-1].mean(0)
    lost, to_new = [], []
    for start in range(0, prompts, BATCH):
        models = len(MODELS) - (2 * start < prompts)
        x, luck = features(min(BATCH, prompts - start), world), world.random(min(BATCH, prompts - start))
        costs, best = COSTS[:models], rates(x @ truth[:models].T)
        v = values(router, x @ beliefs.mean[:models].T, beliefs, x, models, rng)
        policy, optimum = routing.solve_budget(v, costs, BUDGET), routing.solve_budget(best, costs, BUDGET)
        gained = (policy.probabilities * np.take_along_axis(best, policy.indices, 1)).sum(1)
        lost.append(optimum.value - gained)
        second = rng.random(len(x)) >= policy.probabilities[:, 0]
        chosen = np.where(second, policy.indices[:, 1], policy.indices[:, 0]).astype(np.intp)
        beliefs.learn(x, chosen, luck < best[np.arange(len(x)), chosen])
        if models == len(MODELS):
            to_new.append(chosen == models - 1)
    total = np.concatenate(lost).cumsum()
    return total[np.linspace(0, prompts, POINTS + 1).astype(int)[1:] - 1], float(np.concatenate(to_new).mean())


def summary(regrets: dict[str, Float64], new: dict[str, float], prompts: int) -> list[Row]:
    """One row for each router and point; regrets[router] [worlds, POINTS]."""
    ends = np.linspace(0, prompts, POINTS + 1).astype(int)[1:].tolist()
    found = []
    for router, regret in regrets.items():
        (mean, half), (more, more_half) = _interval(regret), _interval(regret - regrets["thompson"])
        for i, end in enumerate(ends):
            own, difference = (float(mean[i]), float(half[i])), (float(more[i]), float(more_half[i]))
            found.append(
                Row(router, end, len(regret), own[0], own[0] - own[1], own[0] + own[1],
                    difference[0], difference[0] - difference[1], difference[0] + difference[1], new[router])
            )  # fmt: skip
    return found


def _interval(regret: Float64) -> tuple[Float64, Float64]:
    """The mean over worlds [POINTS], and half the width of Student's 95% interval."""
    n = len(regret)
    return regret.mean(0), student(0.95, n - 1) * regret.std(0, ddof=1) / np.sqrt(n)


def draw(rows: list[Row], path: Path) -> None:
    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for router, (colour, label) in LINES.items():
        own = [row for row in rows if row.router == router]
        prompts = [row.prompts for row in own]
        axes.plot(prompts, [row.regret for row in own], color=colour, label=label)
        axes.fill_between(prompts, [row.low for row in own], [row.high for row in own], color=colour, alpha=0.15, linewidth=0)
    axes.axvline(rows[-1].prompts / 2, color=GREY, linewidth=0.8, linestyle=":")
    axes.set_xlabel("prompts; the new model joins at the dotted line")
    axes.set_ylabel("regret so far, in good answers")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_title(f"mean of {rows[0].worlds} worlds, with its 95% interval", loc="left", fontsize="medium")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.exploration", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=positive, default=50_000)
    parser.add_argument("--worlds", type=positive, default=20, help="two at least")
    parser.add_argument("--known", type=positive, default=1_000, help="answers of each known model before the first prompt")
    parser.add_argument("--csv", type=Path, help="also write the rows here")
    parser.add_argument("--plot", type=Path, help="also draw them, to a .png, .svg or .pdf file")
    arguments = parser.parse_args()
    if arguments.prompts < POINTS or arguments.worlds < 2:
        raise ValueError(f"expected {POINTS} prompts and two worlds at least")
    regrets, new = {}, {}
    for router in LINES:
        found = [simulate(router, arguments.prompts, arguments.known, seed) for seed in range(arguments.worlds)]
        regrets[router], new[router] = np.array([regret for regret, _ in found]), float(np.mean([share for _, share in found]))
    rows = summary(regrets, new, arguments.prompts)
    table = Table(title=f"regret after {arguments.prompts:,} prompts (95% interval)", title_justify="left")
    for name in ("router", "regret", "more than Thompson", "share of the new model"):
        table.add_column(name, justify="right")
    for row in rows:
        if row.prompts == arguments.prompts:
            regret = f"{row.regret:,.0f} ({row.low:,.0f} to {row.high:,.0f})"
            table.add_row(
                LINES[row.router][1], regret, f"{row.more:,.0f} ({row.more_low:,.0f} to {row.more_high:,.0f})", f"{row.new:.1%}"
            )
    Console().print(table)
    if arguments.csv:
        write_rows(arguments.csv, rows, torch.device("cpu"))
    if arguments.plot:
        draw(rows, arguments.plot)


if __name__ == "__main__":
    run(main)

"""How often intervals hold the true value, in simulation: python -m bench.coverage.

Prompts are drawn from a population of known truth: coefficients are a common leaderboard and as much again for each prompt;
votes are drawn from grk at them. Of --repeats samples of n prompts each, the share whose 95% interval (200 bootstrap samples)
holds the truth: of leaderboards over prompts (each coefficient counts), with equal and with random weights; of win rates by
category; of the marginal leaderboard of 10 votes a prompt; of their log-loss; and of the calibration error of a predictor that
knows the truth (whose error is 0), and of one whose coefficients are half as large again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bench.setting import positive, run, write_rows
from p2l_engine.coefficients import Coefficients
from p2l_engine.evaluation import strengths
from p2l_engine.evaluation.calibration import BINS, bin_of, hits
from p2l_engine.evaluation.metrics import Prediction, figures
from p2l_engine.feedback import feedback_model
from p2l_engine.leaderboard import Leaderboard
from p2l_engine.reports import Figures
from p2l_engine.votes import Votes
from p2l_engine.votes.marginal import marginal_leaderboard

MODELS = tuple(f"m{i}" for i in range(5))
EACH = 10  # votes a prompt
COMMON = np.random.default_rng(5).normal(size=len(MODELS))
Covered = list[bool]


@dataclass(frozen=True)
class Row:
    """covered: the share of intervals that hold the truth; standard_error: its own, over samples; seconds: of a sample."""

    what: str
    prompts: int
    repeats: int
    covered: float
    standard_error: float
    seconds: float


def population(name: str, n: int, rng: np.random.Generator) -> Coefficients:
    """n prompts under the feedback model called ``name``."""
    feedback = feedback_model(name)
    theta = (COMMON + rng.normal(size=(n, len(MODELS)))).astype(np.float32)
    return Coefficients(theta, rng.normal(size=n).astype(np.float32) if feedback.has_eta else None, MODELS, feedback)


def votes_on(c: Coefficients, rng: np.random.Generator, each: int = EACH) -> Votes:
    """``each`` votes on each prompt, between random models."""
    prompt = np.repeat(np.arange(len(c)), each)
    a = rng.integers(0, len(MODELS), len(prompt))
    b = (a + rng.integers(1, len(MODELS), len(prompt))) % len(MODELS)
    theta = torch.from_numpy(c.theta.astype(np.float64))[prompt]
    rows = np.arange(len(prompt))
    eta = None if c.eta is None else torch.from_numpy(c.eta.astype(np.float64))[prompt]
    p = c.feedback.probabilities(theta[rows, a], theta[rows, b], eta).numpy().cumsum(1)
    outcome = np.minimum((rng.random(len(p))[:, None] > p).sum(1), len(c.feedback.outcomes) - 1)
    return Votes.make([(str(i),) for i in range(len(c))], MODELS, prompt, a, b, outcome)


def sharpened(c: Coefficients, votes: Votes, times: float) -> Prediction:
    """Of coefficients ``times`` as large."""
    return Prediction.of(c.feedback, times * c.theta.astype(np.float64), c.eta, votes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=positive, nargs="+", default=[5, 10, 20, 50, 1000], help="prompts of a sample")
    parser.add_argument("--repeats", type=positive, default=400, help="samples")
    parser.add_argument("--population", type=positive, default=200_000, help="prompts that the truth is computed from")
    parser.add_argument("--what", default="", help="only what has this in its name, such as 'leaderboard, bt'")
    parser.add_argument("--csv", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    console, rows = Console(), []
    shown = Table(title="covered by 95% intervals, by number of prompts", title_justify="left")
    for column in ("what", *(f"{n:,}" for n in arguments.prompts)):
        shown.add_column(column, justify="left" if column == "what" else "right")
    for what, sample in samplers(arguments.population):
        if arguments.what not in what:
            continue
        found = [measure(what, n, max(2, arguments.repeats), sample) for n in arguments.prompts]
        shown.add_row(what, *(f"{row.covered:.3f}" for row in found))
        console.print(f"{what}: {', '.join(f'{row.covered:.3f}' for row in found)}")
        rows += found
    console.print(shown)
    if arguments.csv and rows:
        write_rows(arguments.csv, rows, torch.device("cpu"))


def measure(what: str, n: int, repeats: int, sample: Callable[[int, int], Covered]) -> Row:
    """Of ``repeats`` samples of n prompts."""
    start = time.process_time()
    each = np.array([np.mean(sample(n, seed)) for seed in range(repeats)])
    error = float(each.std(ddof=1) / np.sqrt(repeats))
    return Row(what, n, repeats, float(each.mean()), error, (time.process_time() - start) / repeats)


def samplers(size: int) -> Iterator[tuple[str, Callable[[int, int], Covered]]]:
    """What is measured, by name: from a number of prompts and a seed, whether each interval holds the truth."""
    for name in ("bt", "grk", "ols"):
        board = Leaderboard.over(population(name, size, np.random.default_rng(99)))
        truth = dict(zip(MODELS, board.coefficients(MODELS), strict=True))

        def leaderboard(
            n: int, seed: int, weighted: bool = False, name: str = name, truth: dict[str, float] = truth
        ) -> Covered:
            rng = np.random.default_rng([n, seed])
            c, weights = population(name, n, rng), rng.exponential(size=n) if weighted else None
            return _holds(Leaderboard.over(c, weights, bootstrap=200, seed=seed), truth)

        yield f"leaderboard, {name}", leaderboard
        if name == "bt":
            yield f"leaderboard, {name}, random weights", lambda n, seed: leaderboard(n, seed, weighted=True)
    many = population("grk", size, np.random.default_rng(98))
    cast = votes_on(many, np.random.default_rng(97))
    rate = {model: figure.value for model, figure in _win_rates(many, 2, 0).items()}
    counted = marginal_leaderboard(many.feedback, cast)
    truth = dict(zip(MODELS, counted.coefficients(MODELS), strict=True))
    loss = float(sharpened(many, cast, 1.0).loss.mean())

    def win_rates(n: int, seed: int) -> Covered:
        found = _win_rates(population("grk", n, np.random.default_rng([n, seed])), 200, seed)
        return [found[model].low <= rate[model] <= found[model].high for model in MODELS[1:]]

    def marginal(n: int, seed: int) -> Covered:
        rng = np.random.default_rng([n, seed])
        return _holds(marginal_leaderboard(many.feedback, votes_on(population("grk", n, rng), rng), 200, seed), truth)

    def figure(name: str, times: float, true: float) -> Callable[[int, int], Covered]:
        def sample(n: int, seed: int) -> Covered:
            rng = np.random.default_rng([n, seed])
            c = population("grk", n, rng)
            votes = votes_on(c, rng)
            found = figures(sharpened(c, votes, times), votes, 200, seed)[name]
            return [found.low <= true <= found.high]

        return sample

    yield "win rates by category, grk", win_rates
    yield "marginal leaderboard, grk", marginal
    yield "log-loss, grk", figure("log_loss", 1.0, loss)
    yield "calibration error, true coefficients", figure("ece", 1.0, 0.0)
    yield "calibration error, 1.5 times them", figure("ece", 1.5, _calibration_error(many, cast, 1.5))


def _win_rates(c: Coefficients, bootstrap: int, seed: int) -> Figures:
    return strengths.by_category(c, ["all"] * len(c), MODELS[0], bootstrap, seed).categories["all"].win_rate


def _holds(board: Leaderboard, truth: dict[str, float]) -> Covered:
    return [(of.low is None or of.low <= truth[of.model]) and (of.high is None or truth[of.model] <= of.high) for of in board]


def _calibration_error(c: Coefficients, votes: Votes, times: float) -> float:
    """Of so many votes that no correction matters."""
    p = sharpened(c, votes, times).probabilities
    top = p.max(1)
    gaps = np.bincount(bin_of(top, BINS), top - hits(p, votes.outcome.astype(np.int64)), BINS)
    return float(np.abs(gaps).sum() / len(votes))


if __name__ == "__main__":
    run(main)

"""How often replay's intervals hold the true value, in simulation: python -m bench.replay_coverage.

Prompts have coefficients of known truth; a checkpoint knows them with an error. A model's answer is good with a probability
that is no function of the checkpoint's win rates. Of --repeats logs of n decisions each, made by one policy, the share whose
95% interval for another policy's value holds the truth, which is computed from a large population: by inverse propensity
(ips), self-normalised (snips) and doubly robust (dr). refused: the share of logs that replay refuses to judge; covered is of
the others. half_width: the mean half of the intervals' widths.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from bench.setting import positive, run, write_rows
from p2l_engine.catalog import Catalog, CatalogModel
from p2l_engine.chooser import Chooser
from p2l_engine.coefficients import Coefficients
from p2l_engine.constraints import Constraints
from p2l_engine.feedback import feedback_model
from p2l_engine.replay.compare import replay
from p2l_engine.replay.logged import LoggedDecisions, Turns
from p2l_engine.replay.mixture import Float64, Mixture
from p2l_engine.replay.policies import PolicySpec
from p2l_engine.replay.report import ESTIMATORS

MODELS = tuple(f"m{i}" for i in range(5))
CATALOG = Catalog(tuple(CatalogModel(name, cost) for name, cost in zip(MODELS, (1.0, 2.0, 4.0, 8.0, 16.0), strict=True)))
COMMON = np.array([-1.0, -0.4, 0.1, 0.5, 0.9])
ERROR = 0.5  # standard deviation of the checkpoint's error in a coefficient
SESSION = 4  # decisions of a session, where there are sessions
SIZES = "sessions of many sizes"  # the largest has a fifth of 500 decisions, and a sixth of 2,000

ALL = tuple(range(len(MODELS)))
PAIRS = {
    "uniform -> budget of 4 for each prompt": ("uniform", PolicySpec("t", budget=4.0)),
    "greedy with 30% uniform -> greedy": ("exploring", PolicySpec("t")),
    "softmax -> one model": ("softmax", PolicySpec("t", always="m3")),
    "budget of 3 with 20% uniform -> budget of 6": ("cheap", PolicySpec("t", budget=6.0)),
    "softmax, in sessions -> budget of 4, without m4": (
        "softmax, sessions", PolicySpec("t", budget=4.0, models=MODELS[:4]),
    ),
    "uniform, in sessions of many sizes -> budget of 4": (f"uniform, {SIZES}", PolicySpec("t", budget=4.0)),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """See the module. standard_error: of ``covered``."""

    pair: str
    estimator: str
    decisions: int
    repeats: int
    covered: float
    standard_error: float
    half_width: float
    refused: float
    seconds: float


@dataclass(frozen=True)
class World:
    """n prompts: what the checkpoint says of them, [n, M] how good each model's answer is, and each prompt's session."""

    coefficients: Coefficients
    good: Float64
    session: np.ndarray

    @classmethod
    def drawn(cls, n: int, rng: np.random.Generator, policy: str = "") -> World:
        """policy: the logging policy's name, which says what sessions there are."""
        session = np.arange(n) // (SESSION if "sessions" in policy else 1)
        if SIZES in policy:
            p = 1 / np.arange(1, n // 8 + 1)
            session = np.unique(rng.choice(len(p), n, p=p / p.sum()), return_inverse=True)[1]
        theta = COMMON + rng.normal(size=(n, len(MODELS)))
        if "sessions" in policy:  # what a session's prompts share
            theta += rng.normal(size=(n, len(MODELS)))[session]
        known = (theta + ERROR * rng.normal(size=theta.shape)).astype(np.float32)
        good = 1 / (1 + np.exp(-theta - 0.5 * np.sin(3 * theta)))
        return cls(Coefficients(known, None, MODELS, feedback_model("bt")), good, session)

    def policy(self, spec: PolicySpec) -> Mixture:
        if spec.always is not None:
            return Mixture.single(np.full(len(self.good), MODELS.index(spec.always)))
        chooser = Chooser(MODELS, self.coefficients.feedback, CATALOG)
        own = np.array([spec.models is None or name in spec.models for name in MODELS])
        allowed = None if own.all() else np.tile(own, (len(self.good), 1))
        found = chooser.solve(chooser.win_rates(self.coefficients), Constraints(spec.budget, allowed=allowed))
        return Mixture(found.indices, found.probabilities)

    def value(self, policy: Mixture) -> float:
        """The true value of a policy on these prompts."""
        return float(policy.mean(self.good[np.arange(len(self.good))[:, None], policy.indices]).mean())

    def logging(self, name: str) -> Float64:
        """The probabilities [n, M] of the logging policy."""
        n, m = self.good.shape
        if name.startswith("uniform"):
            return np.full((n, m), 1 / m)
        if name.startswith("softmax"):
            e = np.exp(self.coefficients.theta.astype(np.float64))
            return np.asarray(e / e.sum(1, keepdims=True))
        spec, share = (PolicySpec("l"), 0.3) if name == "exploring" else (PolicySpec("l", budget=3.0), 0.2)
        policy = self.policy(spec)
        return np.asarray((1 - share) * policy.of(np.tile(np.arange(m), (n, 1))) + share / m)

    def log(self, name: str, rng: np.random.Generator) -> LoggedDecisions:
        """Decisions of the logging policy, one for each prompt."""
        n = len(self.good)
        p = self.logging(name)
        chosen = np.minimum((rng.random(n)[:, None] > p.cumsum(1)).sum(1), len(MODELS) - 1).astype(np.int32)
        rows = np.arange(n)
        reward = (rng.random(n) < self.good[rows, chosen]).astype(np.float64)
        indices = np.tile(np.array(ALL, np.int32), (n, 1))
        texts: list[Turns | None] = [(str(i),) for i in range(n)]
        return LoggedDecisions(
            MODELS, chosen, p[rows, chosen], np.zeros(n), Mixture(indices, p), np.ones(n, bool), None, reward,
            np.full(n, np.nan), np.zeros(n, bool), rows, [str(i) for i in range(n)], texts, self.session,
        )  # fmt: skip


@dataclass(frozen=True)
class KnownCheckpoint:
    """The coefficients of one world's prompts, as ``replay`` takes them."""

    known: Coefficients

    def coefficients(self, checkpoint: str | None, prompts: Sequence[Turns]) -> Coefficients:
        return self.known

    def catalog(self, checkpoint: str | None) -> Catalog:
        return CATALOG


def truth(pair: str, population: int) -> float:
    """The target policy's value, of so many prompts."""
    name, spec = PAIRS[pair]
    world = World.drawn(population, np.random.default_rng(99), "sessions" if "sessions" in name else "")  # of any size
    return world.value(world.policy(spec))


def measure(pair: str, n: int, repeats: int, true: float) -> list[Row]:
    """Of ``repeats`` logs of n decisions; a row for each estimator."""
    name, spec = PAIRS[pair]
    start, held, widths, refused = time.process_time(), [], [], 0
    for seed in range(repeats):
        rng = np.random.default_rng([n, seed])
        world = World.drawn(n, rng, name)
        log = world.log(name, rng)
        # Models alone are no policy of the router: its checkpoint is the reward model of both.
        reward_model = PolicySpec("reward model")
        *_, found = replay(log, [reward_model, spec] if spec.always else [spec], KnownCheckpoint(world.coefficients)).policies
        if found.verdict == "refused":
            refused += 1
            continue
        held.append([found.value[of].low <= true <= found.value[of].high for of in ESTIMATORS])
        widths.append([(found.value[of].high - found.value[of].low) / 2 for of in ESTIMATORS])
    seconds = (time.process_time() - start) / repeats
    covered = np.mean(held, axis=0) if held else np.full(len(ESTIMATORS), np.nan)
    error = np.sqrt(covered * (1 - covered) / max(len(held), 1))
    width = np.mean(widths, axis=0) if held else covered
    return [
        Row(pair, of, n, repeats, float(covered[i]), float(error[i]), float(width[i]), refused / repeats, seconds)
        for i, of in enumerate(ESTIMATORS)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decisions", type=positive, nargs="+", default=[500, 2000], help="decisions of a log")
    parser.add_argument("--repeats", type=positive, default=2000, help="logs")
    parser.add_argument("--population", type=positive, default=1_000_000, help="prompts that the truth is computed from")
    parser.add_argument("--pair", default="", help="only pairs that have this in their names")
    parser.add_argument("--csv", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    console, rows = Console(), list[Row]()
    for pair in PAIRS:
        if arguments.pair not in pair:
            continue
        true = truth(pair, arguments.population)
        for n in arguments.decisions:
            found = measure(pair, n, arguments.repeats, true)
            shown = ", ".join(f"{row.estimator} {row.covered:.3f} (half width {row.half_width:.3f})" for row in found)
            console.print(f"{pair}, {n:,} decisions: {shown}; refused {found[0].refused:.3f}", highlight=False)
            rows += found
    if arguments.csv and rows:
        write_rows(arguments.csv, rows, torch.device("cpu"))


if __name__ == "__main__":
    run(main)

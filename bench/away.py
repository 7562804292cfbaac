"""Prompts of kinds that a checkpoint was not trained on: what shrinking coefficients towards one leaderboard gains there.

    python -m p2l_engine.train.sources train/pools/default.yaml --data ../shared/data -o pool.parquet
    python -m bench.away pool.parquet --scores ../shared/data/routing_scores.parquet --csv bench/results/away.csv

theta' = m + s (theta - m), and eta alike: m is the leaderboard of all training prompts, d one of the distances of
``bench.distances``, s = 1 / (1 + exp((d - middle) / width)). Middle (a quantile of training prompts' distances) and width have
the least log-loss

- "tasks": on tasks that were left out, of the distance and of a head that is learned without them (the backbone has seen
  them), and on a fifth of the other prompts, which the head has not seen; half of the weight each. No other source is used.
- "sources": by the checkpoint's own head, on the other sources that it was not trained on and on the other half of its
  held-out prompts; each counts alike.

Compared on held-out prompts and on each other source: the true score of the best model by theta', among those that have one
and that the checkpoint knows, and the mean log-loss of a prompt's votes; beside no shrinkage, one constant s, the leaderboard
alone (s = 0), the best single model by the training prompts' scores, and the one that is best on the source itself.
Differences are to no shrinkage, with standard errors over prompts. "all others": the mean over prompts of the other sources;
"tasks left out": each by middle and width of the other tasks.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table
from scipy.special import expit

from bench.away_votes import Kind, losses, outputs, read, refit, scored
from bench.distances import DISTANCES, Distance, Fit
from bench.setting import positive, run, write_rows
from p2l_engine import Engine, checkpoint
from p2l_engine.backbone.head import Head
from p2l_engine.checkpoint.files import read_json
from p2l_engine.feedback import FeedbackModel
from p2l_engine.learning import shrinkage
from p2l_engine.learning.shrinkage import marginal_outputs, upper_half

Float64 = npt.NDArray[np.float64]

FOLDS = 5
CONSTANTS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
ALL, LEFT_OUT = "all others", "tasks left out"


@dataclass(frozen=True)
class Row:
    """One way on one kind of prompts. known: models of the checkpoint that have scores there, at most. kept: mean s. score:
    mean true score; points: 100 times its difference to no shrinkage; single: the score of the best single model by the
    training prompts, over_single: 100 times the difference to it. own_single: the score of the model that is best on these
    prompts. loss: mean log-loss; gain: how much lower it is than without shrinkage. *_error: standard errors. quantile, width:
    that were chosen, of a constant the constant and 0; NaN where several were."""

    way: str
    chosen_on: str
    prompts_of: str
    prompts: int
    known: int
    kept: float
    score: float
    points: float
    points_error: float
    single: float
    over_single: float
    over_single_error: float
    own_single: float
    loss: float
    gain: float
    gain_error: float
    quantile: float
    width: float


Way = tuple[float, float]  # quantile and width; width 0: the constant share ``quantile``
GRID: list[Way] = [(1.0, 0.0), *shrinkage.GRID]
PENALTIES = (3e-4, 1e-3, 3e-3)
NONE, MARGINAL = (1.0, 0.0), (0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Measured:
    """Prompts of one kind, what a head says of them, and how far they are. away [T]: the distances of training prompts."""

    kind: Kind
    out: Float64
    marginal: Float64
    away: Float64
    distances: Float64
    feedback: FeedbackModel

    def kept(self, way: Way) -> Float64:
        """s [N]."""
        quantile, width = way
        if width == 0:
            return np.full(len(self.distances), quantile)
        return np.asarray(expit((np.quantile(self.away, quantile) - self.distances) / (width * upper_half(self.away))))

    def shrunk(self, way: Way) -> Float64:
        """Outputs [N, K]."""
        found: Float64 = self.marginal + self.kept(way)[:, None] * (self.out - self.marginal)
        return found

    def losses(self, way: Way) -> Float64:
        """[N]."""
        return losses(self.kind, self.shrunk(way), self.feedback)

    def scores(self, way: Way) -> Float64:
        """[N]: of what is chosen."""
        return scored(self.kind, self.shrunk(way)[:, : self.kind.scores.shape[1]])

    def of(self, rows: npt.NDArray[np.bool_]) -> Measured:
        """Only these prompts."""
        return Measured(self.kind.of(rows), self.out[rows], self.marginal, self.away, self.distances[rows], self.feedback)


def crossed(fit: Fit, training: Kind, head: Head) -> Float64:
    """Each training prompt's distance from the others, by five parts."""
    part, found = np.random.default_rng(0).permutation(len(training.states)) % FOLDS, np.empty(len(training.states))
    for k in range(FOLDS):
        rest = training.of(part != k)
        found[part == k] = fit(rest.states, rest.task, head)(training.states[part == k])
    return found


def mean_losses(of: Measured, grid: Sequence[Way]) -> Float64:
    """[ways]."""
    return np.array([of.losses(way).mean() for way in grid])


def without_tasks(training: Kind, marginal: Float64, feedback: FeedbackModel) -> dict[str, tuple[Kind, Head, Kind, Kind]]:
    """For each task: the other tasks' prompts but for a fifth, a head that is learned on them, the fifth, and the task's."""
    part = np.random.default_rng(1).permutation(len(training.states)) % FOLDS
    chosen = min(PENALTIES, key=lambda penalty: _held_out(training, part, marginal, feedback, penalty))
    found = {}
    for task in sorted(set(training.task.tolist())):
        own = training.task == task
        rest = training.of(~own & (part > 0))
        found[task] = rest, refit(rest, marginal, feedback, chosen), training.of(~own & (part == 0)), training.of(own)
    return found


def _held_out(kind: Kind, part: npt.NDArray[np.int64], start: Float64, feedback: FeedbackModel, penalty: float) -> float:
    head = refit(kind.of(part > 0), start, feedback, penalty)
    fifth = kind.of(part == 0)
    return float(losses(fifth, outputs(head, fifth.states), feedback).mean())


def row(way: str, chosen_on: str, name: str, parts: Sequence[tuple[Measured, Way]], known: Float64) -> Row:
    """Of all parts together. known [M]: the models' mean scores on training prompts."""
    score, loss, kept = (
        np.concatenate(each) for each in zip(*((m.scores(w), m.losses(w), m.kept(w)) for m, w in parts), strict=True)
    )
    score_0, loss_0 = (np.concatenate(each) for each in zip(*((m.scores(NONE), m.losses(NONE)) for m, _ in parts), strict=True))
    scores = np.concatenate([m.kind.scores for m, _ in parts])
    single = np.concatenate([scored(m.kind, known) for m, _ in parts])
    own = np.concatenate([_own_best(m.kind) for m, _ in parts])
    chosen = {w for _, w in parts}
    quantile, width = chosen.pop() if len(chosen) == 1 else (np.nan, np.nan)
    return Row(
        way, chosen_on, name, len(score), int(np.isfinite(scores).sum(1).max()), float(kept.mean()), float(score.mean()),
        *_points(score - score_0), float(single.mean()), *_points(score - single), float(own.mean()), float(loss.mean()),
        float((loss_0 - loss).mean()), _points(loss_0 - loss)[1] / 100, float(quantile), float(width),
    )  # fmt: skip


def _own_best(kind: Kind) -> Float64:
    """[N]: the scores of the model that is best among prompts that have scores of the same models."""
    there = np.isfinite(kind.scores)
    found = np.empty(len(there))
    for models in np.unique(there, axis=0):
        rows = (there == models).all(1)
        some = kind.of(rows)
        found[rows] = scored(some, np.where(models, np.nan_to_num(some.scores).mean(0), -np.inf))
    return found


def _points(gain: Float64) -> tuple[float, float]:
    return 100 * float(gain.mean()), 100 * float(gain.std(ddof=1) / np.sqrt(len(gain)))


def compare(kinds: Sequence[Kind], known: Float64, marginal: Float64, engine: Engine, console: Console) -> list[Row]:
    """All rows. kinds: of training, held out, then the others."""
    training, held, *others = kinds
    head, feedback = Head(engine.head.weight, engine.head.bias, engine.head.n_models), engine.feedback
    first = np.random.default_rng(2).permutation(len(held.states)) % 2 == 0
    console.print(f"learning heads without each of {len(set(training.task.tolist()))} tasks")
    tasks = without_tasks(training, marginal, feedback)
    means, rows = known.mean(0), []

    def measured(kind: Kind, by: Head, away: Float64, distance: Distance) -> Measured:
        return Measured(kind, outputs(by, kind.states), marginal, away, distance(kind.states), feedback)

    for name, fit in DISTANCES.items():
        console.print(f"distance: {name}")
        away, distance = crossed(fit, training, head), fit(training.states, training.task, head)
        tests = {kind.name: measured(kind, head, away, distance) for kind in (held, *others)}
        halves = [tests[held.name].of(rows_) for rows_ in (first, ~first)]
        pairs = {}
        for task, (rest, by, fifth, left) in tasks.items():
            far = fit(rest.states, rest.task, by)
            unseen = far(fifth.states)
            pairs[task] = measured(fifth, by, unseen, far), measured(left, by, unseen, far)
        ways: list[tuple[str, Sequence[Way]]] = [(name, GRID)]
        if name == next(iter(DISTANCES)):
            ways = [("none", [NONE]), ("leaderboard", [MARGINAL]), ("constant", [(s, 0.0) for s in CONSTANTS]), *ways]
        for label, grid in ways:
            near, own = (np.stack([mean_losses(pair[k], grid) for pair in pairs.values()]) for k in (0, 1))  # [tasks, ways]
            size = np.array([len(pair[1].distances) for pair in pairs.values()])

            def of_tasks(used: npt.NDArray[np.bool_], near: Float64 = near, own: Float64 = own, size: Any = size) -> int:
                return int((near[used].mean(0) + size[used] @ own[used] / size[used].sum()).argmin())

            every = np.ones(len(size), bool)
            chosen = grid[of_tasks(every)]
            on_tasks = [(pair[1], grid[of_tasks(np.arange(len(size)) != k)]) for k, pair in enumerate(pairs.values())]
            rows.append(row(label, "tasks", LEFT_OUT, on_tasks, means))
            rows += [row(label, "tasks", kind.name, [(tests[kind.name], chosen)], means) for kind in (held, *others)]
            rows.append(row(label, "tasks", ALL, [(tests[kind.name], chosen) for kind in others], means))
            if len(grid) == 1:
                continue  # nothing is chosen
            of = {kind.name: mean_losses(tests[kind.name], grid) for kind in (held, *others)}
            away_from_home = sum(of[kind.name] for kind in others)
            on = [(halves[k], grid[int((mean_losses(halves[1 - k], grid) + away_from_home).argmin())]) for k in (0, 1)]
            rows.append(row(label, "sources", held.name, on, means))
            by_source = [
                (tests[kind.name], grid[int((of[held.name] + away_from_home - of[kind.name]).argmin())]) for kind in others
            ]
            rows += [row(label, "sources", kind.name, [pair], means) for kind, pair in zip(others, by_source, strict=True)]
            rows.append(row(label, "sources", ALL, by_source, means))
    return rows


def show(rows: Sequence[Row], console: Console) -> None:
    """Points of true score over no shrinkage, and the fall of log-loss, by kind of prompts."""
    names = dict.fromkeys(f"{row.prompts_of} ({row.prompts:,})" for row in rows)
    table = Table("way", "chosen on", *names, title="Points of true score and fall of log-loss against no shrinkage (s.e.)")
    for way, chosen_on in dict.fromkeys((row.way, row.chosen_on) for row in rows):
        cells = {}
        for one in rows:
            if (one.way, one.chosen_on) == (way, chosen_on):
                points, fall = f"{one.points:+.2f} ({one.points_error:.2f})", f"{one.gain:+.4f} ({one.gain_error:.4f})"
                cells[f"{one.prompts_of} ({one.prompts:,})"] = f"{points} {fall}"
        table.add_row(way, chosen_on, *(cells.get(name, "") for name in names))
    console.print(table)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pool", type=Path, help="a table of p2l_engine.train.sources")
    parser.add_argument("--scores", type=Path, required=True, help="the scores that the checkpoint was trained on")
    parser.add_argument("--checkpoint", default="builtin/llmrouter-9", help="folder or name (%(default)s)")
    parser.add_argument("--training-prompts", type=positive, default=2000, help="of which hidden states are computed, at most")
    parser.add_argument("--prompts", type=positive, default=400, help="of each other source, at most")
    parser.add_argument("--of", nargs="+", default=[], metavar="SOURCE=N", help="of these sources, at most so many instead")
    parser.add_argument("--csv", type=Path, help="also write the rows here")
    given = parser.parse_args()
    loaded = replace(checkpoint.load(given.checkpoint), shrinkage=None)
    engine, console = Engine(loaded, "cpu"), Console(stderr=True)
    training = read_json(loaded.folder / "training_config.json", dict)
    fewer = {name: positive(count) for name, _, count in (text.partition("=") for text in given.of)}

    def most(source: str) -> int:
        return int(fewer.get(source, given.prompts))

    votes, known, kinds = read(
        given.pool, given.scores, engine, most, given.training_prompts, training["held_out"], training["split_seed"]
    )
    rows = compare(kinds, known, marginal_outputs(engine.feedback, votes), engine, console)
    show(rows, Console())
    if given.csv is not None:
        write_rows(given.csv, rows, engine.device)


if __name__ == "__main__":
    run(main)

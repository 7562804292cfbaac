"""Routers on prompts that they never saw, by the true scores of what they choose.

    python -m p2l_engine.train.sources train/pools/default.yaml --data ../shared/data -o pool.parquet
    python -m bench.routers pool.parquet --checkpoint builtin/pool-85 --csv bench/results/routers.csv --plot docs/routers.svg

The pool is split by hash as in training: 10% of the prompts are held out, 10% of the rest are for choosing settings. Each
router predicts every model's score, and chooses among those that have a score on the prompt. Compared: the best single model of
the prompt's source and the best model of its task; ridge regression, nearest neighbours, a perceptron and matrix factorisation
on the hidden states that the config's head reads (``bench.simple_routers``); the checkpoint; and the oracle. Gains are over the
best single model, with their standard errors; "all" is the mean over prompts.

With --folds all prompts that are not held out, each predicted by what was learned from the other folds: the simple routers, the
head that training makes with this config, the predicted task's mean scores, and the sum of all of these (``bench.in_folds``);
with --shares from these shares of the other folds' prompts alone.

With --leave-out the simple routers and the head on sources, or tasks, that they never saw (``bench.left_out``): on all prompts
that are not held out, or on the held-out ones. Both read the untrained backbone: an adapter may have been trained on any of
them.

With a catalog (--catalog) also the cost-quality curves: the choice maximises predicted score less price times cost, at every
price. Models that the catalog does not have are left out of them, and prompts on which no other model has a score.
The score at a fifth is that at a fifth of the best single model's cost; "single's score at" is the share of that cost at which
a router reaches that model's score. AIQ is the area under the upper hull of (cost, score), divided by the highest cost of any
router and model (RouterBench, https://arxiv.org/abs/2403.12031); "mixture" is the hull of each source's best model at each
price. RouterArena's score (https://arxiv.org/abs/2510.00202) is 1.1 A C / (0.1 A + C), with A the mean score where money has no
price, and C the cost of 1,000 prompts in USD on a logarithmic scale: 0 at 200, 1 at 0.0044.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench.in_folds import in_folds
from bench.left_out import among, left_out
from bench.pooled import Pooled, read_pool
from bench.router_rows import CurveRow, LossRow, RouterRow, compare, curves
from bench.setting import positive, share
from bench.setting import run as run_main
from bench.simple_routers import Float64, Scored, predictions
from bench.trained_heads import PoolVotes
from p2l_engine import Catalog, Engine, plotting
from p2l_engine.catalog import DEFAULT_UNIT
from p2l_engine.evaluation import features
from p2l_engine.learning import hidden
from p2l_engine.train import frozen
from p2l_engine.train.config import TrainConfig

CONFIG = Path(__file__).parent.parent / "train" / "configs" / "pool.yaml"


def costs_of(catalog: Catalog, models: tuple[str, ...]) -> Float64:
    """[M]: the catalog's cost of each model in USD a prompt, NaN where it has none. Raises ValueError where it knows none of
    the models, and for costs in another unit."""
    if catalog.unit != DEFAULT_UNIT:
        raise ValueError(f"catalog: unit: expected {DEFAULT_UNIT!r}, got {catalog.unit!r}")
    cost = {model.name: model.cost for model in catalog.models}
    if not set(models) & set(cost):
        raise ValueError("catalog: expected costs of models of the pool, found none")
    return np.array([cost.get(model, np.nan) for model in models])


def with_costs(predicted: Mapping[str, Float64], test: Scored, costs: Float64) -> tuple[dict[str, Float64], Scored]:
    """What is predicted of models with a cost, on the prompts on which one of these has a score. costs [M], NaN where there is
    none."""
    known = np.flatnonzero(np.isfinite(costs))
    scored = among(test, known)
    rows = np.flatnonzero(np.isfinite(scored.scores).any(1))
    return {name: values[rows][:, known] for name, values in predicted.items()}, scored.of(rows)


def theta_of(name: str, models: tuple[str, ...], prompts: list[tuple[str, ...]], console: Console) -> Float64:
    """A checkpoint's coefficients [N, M]; -inf for models that it does not know."""
    engine = Engine.from_pretrained(name)
    with progress(console, name, len(prompts)) as advance:
        _, coefficients = features.hidden_states(engine, prompts, advance)
    found = np.full((len(prompts), len(models)), -np.inf)
    for m, model in enumerate(models):
        if model in engine.models:
            found[:, m] = coefficients.theta[:, engine.models.index(model)]
    return found


def backbone_states(config: TrainConfig, prompts: list[tuple[str, ...]], console: Console) -> tuple[Float64, Float64]:
    """The hidden states [N, D] that a head trained with this config reads, kept in the user's cache, and the words [N, E]."""
    engine = Engine(frozen.base(config), dtype=config.dtype, max_tokens=config.max_length)
    with progress(console, config.pretrain_model_name, len(prompts)) as advance:
        states = hidden.hidden_states(engine, prompts, hidden.cache_folder(), advance)
    return states.astype(np.float64), engine.words(prompts).astype(np.float64)


@contextmanager
def progress(console: Console, name: str, total: int) -> Iterator[Callable[[int], object]]:
    """A bar for the prompts that a backbone reads."""
    with Progress(console=console) as bar:
        task = bar.add_task(f"{name}: prompts", total=total)
        yield lambda count: bar.advance(task, count)


def show(found: Sequence[RouterRow], console: Console) -> None:
    """The mean scores and gains by source or task."""
    table = Table(
        "prompts of",
        *dict.fromkeys(row.router for row in found),
        title="Mean true score, and points over the best single model (s.e.)",
    )
    for name, count in dict.fromkeys((row.source, row.prompts) for row in found):
        of = [row for row in found if row.source == name]
        table.add_row(f"{name} ({count:,})", *(f"{row.score:.4f} {row.points:+.1f} ({row.error:.1f})" for row in of))
    console.print(table)


def draw(hulls: Mapping[str, Float64], path: Path) -> None:
    """The routers' hulls: mean true score by mean cost, on a logarithmic axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    colours = [plotting.BLUE, plotting.ORANGE, plotting.YELLOW, plotting.GREY, "black"]
    for i, (name, points) in enumerate(hulls.items()):
        axes.plot(*points.T, color=colours[i % 5], linestyle=("-", "--", ":")[i // 5 % 3], label=name)
    axes.set(xscale="log", xlabel="mean cost of a prompt, USD", ylabel="mean true score")
    axes.legend(frameon=False)
    plotting.save(figure, path)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pool", type=Path, help="a table of p2l_engine.train.sources")
    parser.add_argument("--checkpoint", nargs="*", help="folders or names; left out: the default one; none: none")
    parser.add_argument("--leave-out", choices=("source", "task"), help="sources or tasks that no router has seen")
    parser.add_argument(
        "--min-prompts",
        type=positive,
        default=500,
        help="with --leave-out: that a known model shares with another (%(default)s)",
    )
    parser.add_argument("--folds", type=positive, metavar="K", help="all prompts that are not held out, in K folds")
    parser.add_argument("--shares", type=share, nargs="+", default=[1.0], help="with --folds: of the prompts to learn from")
    parser.add_argument("--words", action="store_true", help="the simple routers read the prompts' words beside hidden states")
    parser.add_argument(
        "--config", type=Path, default=CONFIG, help="of training: the hidden states that the simple routers read"
    )
    parser.add_argument("--part", choices=("validation", "held-out"), default="validation", help="held-out: once, at the end")
    parser.add_argument("--catalog", type=Path, help="costs in USD a prompt, for the curves")
    parser.add_argument("--csv", type=Path, help="also write the rows here")
    parser.add_argument("--plot", type=Path, help="also draw the curves here")
    args = parser.parse_args()
    if args.plot and not args.catalog:
        raise ValueError("--plot: the curves need costs: give --catalog")
    if (args.leave_out or args.folds) and (args.checkpoint or args.catalog):
        raise ValueError("--leave-out, --folds: expected no --checkpoint, which has seen all prompts, and no --catalog")
    if args.shares != [1.0] and not args.folds:
        raise ValueError("--shares: expected --folds")
    if args.leave_out and args.folds:
        raise ValueError("--leave-out, --folds: expected one of them")
    console, pool = Console(), read_pool(args.pool)
    config = TrainConfig.load(args.config).model_copy(update={"train_data_path": str(args.pool)})
    if (args.folds or args.leave_out) and config.head_optimum is not None and config.head_optimum.adapter is not None:
        console.print(
            f"over the untrained backbone: the adapter {config.head_optimum.adapter} may have been trained on any prompt"
        )
        config = config.model_copy(update={"head_optimum": config.head_optimum.model_copy(update={"adapter": None})})
    states, words = backbone_states(config, pool.prompts, console)
    every = pool.scored(np.hstack([states, words]) if args.words else states)
    if args.folds or args.leave_out:
        if config.head_optimum is None:
            raise ValueError(f"--leave-out, --folds: expected head_optimum in {args.config}, found none")
        heads = PoolVotes.read(config, config.head_optimum, pool, states, words)
        never_seen(args, heads, pool, every, console)
        return
    part = pool.part(1 if args.part == "validation" else 2)
    training, validation, test = (every.of(of) for of in (pool.part(0), pool.part(1), part))
    predicted = predictions(training, validation, test)
    names = ["default"] if args.checkpoint is None else args.checkpoint
    for name in names:
        predicted[name] = theta_of(name, pool.models, [pool.prompts[i] for i in part], console)
    found = compare(predicted, test, ahead=names[-1] if names else None)
    show(found, console)
    written: list[RouterRow | CurveRow | LossRow] = [*found]
    if args.catalog:
        costs = costs_of(Catalog.from_yaml(args.catalog), pool.models)
        affordable, scored = with_costs(predicted, test, costs)
        costs = costs[np.isfinite(costs)]
        rows, hulls = curves(affordable, scored, np.tile(costs, (len(scored.scores), 1)))
        console.print(
            f"curves: {len(costs)} of {len(pool.models)} models have a cost; one of them has a score on "
            f"{len(scored.scores):,} of {len(test.scores):,} prompts"
        )
        table = Table("router", "AIQ", "score", "USD a prompt", "score at a fifth", "single's score at", "RouterArena")
        for row in rows:
            quality = (f"{row.aiq:.4f}", f"{row.score:.4f}", f"{row.cost:.3g}", f"{row.at_a_fifth:.4f}")
            table.add_row(row.router, *quality, f"{row.reaches:.3f}", f"{row.arena:.4f}")
        console.print(table)
        if args.plot:
            draw(hulls, args.plot)
        written += rows
    if args.csv:
        write(args.csv, written)


def never_seen(args: argparse.Namespace, heads: PoolVotes, pool: Pooled, every: Scored, console: Console) -> None:
    """Shows, and writes, what routers choose on the folds or on the sources or tasks that they did not learn from."""
    training, validation, held_out = (pool.part(k) for k in range(3))
    seen = np.concatenate([training, validation])
    found: list[RouterRow] = []
    losses: list[LossRow] = []
    if args.leave_out:
        parts, texts = (training, validation, held_out if args.part == "held-out" else seen), [p[0] for p in pool.prompts]
        found, losses = left_out(heads, every, parts, texts, args.leave_out, console.print, args.min_prompts)
        show(found, console)
    for part in sorted(args.shares) if args.folds else []:
        rows, of_votes = in_folds(heads, every, seen, args.folds, part, console.print)
        console.print(f"{part:g} of the other folds' prompts:")
        show(rows, console)
        found, losses = [*found, *rows], [*losses, *of_votes]
    table = Table("prompts of", "learned from", "router", "prompts", "kept", "log-loss of a vote")
    for row in losses:
        table.add_row(row.source, f"{row.share:g}", row.router, f"{row.prompts:,}", f"{row.kept:.1%}", f"{row.log_loss:.4f}")
    console.print(table)
    if args.csv:
        write(args.csv, [*found, *losses])


def write(path: Path, rows: Sequence[RouterRow | CurveRow | LossRow]) -> None:
    """The rows of all kinds as CSV, with the columns that a kind lacks left empty."""
    names = list(dict.fromkeys(name for row in rows for name in asdict(row)))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in asdict(row).items()})


if __name__ == "__main__":
    run_main(main)

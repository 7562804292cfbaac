"""A new model joins a checkpoint with few votes: models of a score table are left out in turn and added again.

    python -m bench.adapting --backbone frozen --csv bench/results/adapting.csv --plot docs/adapting.svg

frozen: the backbone of builtin/llmrouter-9 before its training. default: this checkpoint's, which never saw votes on other
tables than its own. A head is fitted to the votes on the other models of the table, so that nothing has seen the model that is
left out. Over the default backbone the table that it was trained on is an exception: the head is the checkpoint's,
without that model's row, and the figures are too good.

Of a table are taken: models with scores on 95% of its prompts, at most twelve; prompts of at most 600 characters on which all
of these have scores; and models to leave out whose names the checkpoint does not have, unless it has them all. Each
choice is at random, with a fixed seed.

Votes to learn from are on two thirds of the prompts: the new model against a random other one on a random prompt. On the other
prompts are measured the log-loss of its votes against every other model, and the mean true score of the model that has the
highest coefficient. Compared: one number for the model, added to the mean of the other models' coefficients (offset); ridge
regression on hidden states from scratch; the votes on the nearest prompts (knn); the whole head fitted again to all votes,
those on the other models included (retrained); adapt, where the votes on a prompt weigh one together, as the command has it for
scores; adapt with a Gaussian process on the votes' prompts added to it (residual: of the first draw).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bench.adapting_rows import SIZES, Row, draw, panels, read, show, write
from bench.ways_to_join import compared, task_of
from p2l_engine import Engine
from p2l_engine.evaluation.features import frozen
from p2l_engine.feedback import feedback_model
from p2l_engine.learning.hidden import cache_folder, hidden_states
from p2l_engine.votes import score_matrix

Float64 = npt.NDArray[np.float64]

CHECKPOINT = "builtin/llmrouter-9"
COVERED = 0.95  # of the prompts, by a model's scores
MOST_MODELS = 12


@dataclass(frozen=True, slots=True)
class Plan:
    """sizes: numbers of votes. seeds: draws of them. prompts, left_out: at most. retrain_at, residual_at: the sizes at which
    the slower ways are measured too. ridge: of heads that are fitted, None: the best one for the votes on the other models."""

    sizes: Sequence[int] = SIZES
    seeds: int = 5
    prompts: int = 1000
    left_out: int = 9
    retrain_at: Sequence[int] = (300,)
    residual_at: Sequence[int] = ()
    ridge: float | None = None


PLAN = Plan()


def measured(path: Path, backbone: str, plan: Plan) -> Iterator[Row]:
    """The rows of a table's left-out models."""
    engine = Engine.from_pretrained(CHECKPOINT)
    training = json.loads((engine.folder / "training_config.json").read_text(encoding="utf-8"))
    every, names, table = score_matrix(path, complete=False)
    kept, columns, scores = part_of(every, table, plan.prompts)
    names = tuple(names[i] for i in columns)
    trained_on = set(names) == set(engine.models)
    known = () if trained_on else engine.models
    candidates = np.array([k for k, name in enumerate(names) if name not in known])
    left_out = np.sort(np.random.default_rng(2).permutation(candidates)[: plan.left_out])
    if backbone == "frozen":
        engine = Engine(frozen(training["pretrain_model_name"], training))
    states = hidden_states(engine, [list(every[i]) for i in kept], cache_folder()).astype(np.float64)
    feedback = feedback_model(training["loss_type"])
    for k in left_out.tolist():
        task = task_of(
            feedback, names, states, scores, k, engine.head if trained_on and backbone == "default" else None, plan.ridge
        )
        for seed, n in product(range(plan.seeds), plan.sizes):
            if seed and not 0 < n < len(task.new):
                continue  # one draw has them all
            found = compared(task, n, seed, n in plan.retrain_at, n in plan.residual_at and not seed)
            for method, figures in found.items():
                yield Row(path.stem, backbone, names[k], seed, min(n, len(task.new)), method, *figures)


def part_of(
    every: Sequence[tuple[str, ...]], table: Float64, prompts: int
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], Float64]:
    """Of a table [P, M] the rows of some short prompts, the columns of some models, and all their scores."""
    short = np.flatnonzero([sum(map(len, turns)) <= 600 for turns in every])
    kept = np.sort(np.random.default_rng(0).permutation(short)[:prompts])
    columns = np.flatnonzero(np.isfinite(table).mean(0) >= COVERED)
    columns = np.sort(np.random.default_rng(1).permutation(columns)[:MOST_MODELS])
    scores = table[kept][:, columns]
    whole = np.isfinite(scores).all(1)
    return kept[whole], columns, scores[whole]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.adapting", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--table",
        type=Path,
        nargs="+",
        default=[Path("../shared/data/routing_scores.parquet")],
        help="scores of models on prompts, a file for each source",
    )
    parser.add_argument("--backbone", choices=("frozen", "default"), default="frozen")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="VOTES")
    parser.add_argument("--seeds", type=int, default=PLAN.seeds, help="draws of the votes, for each model and size")
    parser.add_argument("--prompts", type=int, default=PLAN.prompts)
    parser.add_argument("--left-out", type=int, default=PLAN.left_out, help="models to leave out, of each source")
    parser.add_argument(
        "--retrain-at", type=int, nargs="*", default=PLAN.retrain_at, metavar="VOTES", help="fit the head again at these"
    )
    parser.add_argument(
        "--residual-at", type=int, nargs="*", default=PLAN.residual_at, metavar="VOTES", help="measure a residual at these"
    )
    parser.add_argument(
        "--ridge", type=float, help="of the heads that are fitted. Default: chosen on a quarter of their prompts"
    )
    parser.add_argument("--csv", type=Path, help="write the rows here as they come; those of other runs are kept")
    parser.add_argument("--plot", type=Path, help="also draw them, to a .png, .svg or .pdf file")
    parser.add_argument("--only-show", action="store_true", help="measure nothing: show the rows of --csv")
    given = parser.parse_args()
    measuring = () if given.only_show else tuple((path, given.backbone) for path in given.table)
    again = {(path.stem, backbone) for path, backbone in measuring}
    rows = [row for row in read(given.csv) if (row.source, row.backbone) not in again] if given.csv else []
    plan = Plan(given.sizes, given.seeds, given.prompts, given.left_out, given.retrain_at, given.residual_at, given.ridge)
    for path, backbone in measuring:
        for row in measured(path, backbone, plan):
            rows.append(row)
            if given.csv:
                write(rows, given.csv)
    for title, of in panels(rows).items():
        show(title, of)
    if given.plot:
        draw(rows, given.plot)


if __name__ == "__main__":
    main()

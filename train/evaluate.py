"""Held-out figures of a checkpoint beside its baselines: python -m p2l_engine.train.evaluate CHECKPOINT --config FILE.

Log-loss (mean negative log-likelihood a vote) and four-way accuracy against the constant predictor (every outcome equally
likely) and the marginal one (one leaderboard for all prompts, fitted to the training votes). Where the data has scores, the
mean score of the model that the router chooses without a budget, against the best single model and each task's best (both
chosen on the training prompts), the oracle, and, with --probes, ridge regression and kNN on the frozen backbone's features.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.linear_model import RidgeCV
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from p2l_engine import checkpoint
from p2l_engine.engine import Engine
from p2l_engine.head import Head
from p2l_engine.regression import FeedbackModel, feedback_model
from p2l_engine.train import votes as vote_files
from p2l_engine.train.config import TrainConfig
from p2l_engine.train.run import split
from p2l_engine.train.votes import Votes

Floats = npt.NDArray[np.float64]
NEIGHBOURS = 80


def vote_figures(log_p: Tensor, likelihood: Tensor, outcome: Tensor) -> dict[str, float]:
    """log_loss and accuracy (the likeliest of the four outcomes is the one that came)."""
    return {
        "log_loss": -likelihood.mean().item(),
        "accuracy": (log_p.argmax(-1) == outcome).double().mean().item(),
    }


def marginal(model: FeedbackModel, votes: Votes) -> tuple[Tensor, Tensor | None]:
    """theta [M] and eta [1] or None of the one leaderboard that fits the votes best (maximum likelihood, L-BFGS, float64)."""
    keys, counts = np.unique(np.stack([votes.a, votes.b, votes.outcome], 1), axis=0, return_counts=True)
    a, b, outcome = torch.from_numpy(keys).unbind(1)
    weight = torch.from_numpy(counts / counts.sum())
    theta = torch.zeros(len(votes.models), dtype=torch.float64, requires_grad=True)
    eta = torch.zeros(1, dtype=torch.float64, requires_grad=True) if model.has_eta else None
    free = [theta] if eta is None else [theta, eta]
    optimiser = torch.optim.LBFGS(free, max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        # A ridge of 1e-6 pins the shift that bt leaves free.
        loss = -(weight * model.log_likelihood(theta[a], theta[b], eta, outcome)).sum() + 1e-6 * theta.square().sum()
        loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call, unused-ignore]
    return theta.detach(), None if eta is None else eta.detach()


def figures(model: FeedbackModel, theta: Tensor, eta: Tensor | None, votes: Votes) -> dict[str, float]:
    """vote_figures of coefficients [P, M] (or [1, M] for all prompts) on votes."""
    row = torch.from_numpy(votes.prompt) if len(theta) > 1 else torch.zeros(len(votes), dtype=torch.long)
    a, b, outcome = (torch.from_numpy(x) for x in (votes.a, votes.b, votes.outcome))
    chosen = (theta[row, a], theta[row, b], None if eta is None else eta[row])
    return vote_figures(model.log_probabilities(*chosen), model.log_likelihood(*chosen, outcome), outcome)


def probes(base: str, config: TrainConfig, training: Votes, held_out: Votes, scores: Floats, advance: Any) -> dict[str, Any]:
    """The predicted scores [P, M] of ridge and kNN on the frozen backbone's CLS states, trained on ``scores`` [T, M]."""
    folder = checkpoint.find(base)
    loaded = _frozen(folder, config, len(training.models))
    engine = Engine(loaded)
    engine.encoder.max_tokens = config.max_length
    features = [engine.coefficients(v.prompts, advance).theta.astype(np.float64) for v in (training, held_out)]
    scaler = StandardScaler().fit(features[0])
    train, test = (scaler.transform(f) for f in features)
    ridge = RidgeCV(np.logspace(1, 5, 9)).fit(train, scores)
    train, test = (f / np.linalg.norm(f, axis=1, keepdims=True) for f in (train, test))
    near = NearestNeighbors(n_neighbors=NEIGHBOURS).fit(train).kneighbors(test, return_distance=False)
    return {"ridge": ridge.predict(scaler.transform(features[1])), "knn": scores[near].mean(1)}


def _frozen(folder: Path, config: TrainConfig, n_models: int) -> checkpoint.Checkpoint:
    """The bare backbone as a checkpoint whose "coefficients" are its hidden states."""
    decoder, weights = checkpoint.read_config(folder), checkpoint.decoder_weights(folder)
    tokenizer = checkpoint.read_tokenizer(folder, config.model_dump())
    # New tokens start as the end-of-sequence token, as in training.
    table = weights["embed_tokens.weight"]
    grown = max(len(tokenizer) - len(table), 0)
    weights["embed_tokens.weight"] = torch.cat([table, table[int(tokenizer.eos_token_id)].expand(grown, -1)])
    decoder.vocab_size = len(table) + grown
    size = int(decoder.hidden_size)
    return checkpoint.Checkpoint(
        folder, decoder, tokenizer, tuple(f"h{i}" for i in range(size)), feedback_model("bt"), weights,
        Head(torch.eye(size), torch.zeros(size), size),
    )  # fmt: skip


def evaluate(
    path: str, config: TrainConfig, with_probes: bool, advance: Callable[[int], object] | None = None
) -> dict[str, Any]:
    """Every figure, as a nested mapping."""
    training, held_out = split(config)
    if held_out is None:
        raise ValueError("config: expected held_out > 0 or val_data_path, got neither: nothing to evaluate on")
    engine = Engine.from_pretrained(path)
    if engine.models != training.models:
        raise ValueError(f"checkpoint: expected the models {list(training.models)}, got {list(engine.models)}")
    c = engine.coefficients(held_out.prompts, advance)
    model = engine.feedback
    theta, eta = torch.from_numpy(c.theta).double(), None if c.eta is None else torch.from_numpy(c.eta).double()
    one, tie = marginal(model, training)
    known = len(model.outcomes)
    report: dict[str, Any] = {
        "training": {"prompts": len(training.prompts), "votes": len(training)},
        "held_out": {"prompts": len(held_out.prompts), "votes": len(held_out)},
        "dtype": str(engine.dtype).removeprefix("torch."),
        "votes": {
            "p2l": figures(model, theta, eta, held_out),
            "marginal": figures(model, one[None], tie, held_out),
            "constant": {"log_loss": float(np.log(known)), "accuracy": 1.0 / known},
        },
    }
    columns = set(pq.read_schema(config.train_data_path).names) if config.train_data_path.endswith(".parquet") else set()
    if "score" in columns and not config.val_data_path:
        report["routing"] = _routing(config, training, held_out, c.theta, with_probes, advance)
    return report


def _routing(
    config: TrainConfig, training: Votes, held_out: Votes, theta: Any, with_probes: bool, advance: Any
) -> dict[str, Any]:
    prompts, models, matrix = vote_files.score_matrix(config.train_data_path)
    row = {prompt: i for i, prompt in enumerate(prompts)}
    known, scores = (matrix[[row[p] for p in v.prompts]] for v in (training, held_out))
    every = np.arange(len(scores))
    best = int(known.mean(0).argmax())
    report: dict[str, Any] = {
        "best_single": {"model": models[best], "mean_score": float(scores[:, best].mean())},
        "routed": {"mean_score": float(scores[every, theta.argmax(1)].mean())},
        "oracle": {"mean_score": float(scores.max(1).mean())},
    }
    tasks = _tasks(config.train_data_path)
    if tasks:
        of_training, of_held_out = (np.array([tasks[p] for p in v.prompts]) for v in (training, held_out))
        choice = {task: int(known[of_training == task].mean(0).argmax()) for task in set(of_training)}
        report["task_best"] = {"mean_score": float(scores[every, [choice.get(t, best) for t in of_held_out]].mean())}
    if with_probes:
        for name, predicted in probes(config.pretrain_model_name, config, training, held_out, known, advance).items():
            report[name] = {"mean_score": float(scores[every, predicted.argmax(1)].mean())}
    for entry in report.values():
        entry["points_over_best_single"] = 100 * (entry["mean_score"] - report["best_single"]["mean_score"])
    gain = scores[every, theta.argmax(1)] - scores[:, best]
    report["routed"]["standard_error_points"] = float(100 * gain.std(ddof=1) / np.sqrt(len(gain)))
    return report


def _tasks(path: str) -> dict[tuple[str, ...], str]:
    table = pq.read_table(path)
    if "task" not in table.column_names:
        return {}
    turns = (vote_files.turns(p, path, i) for i, p in enumerate(table.column("prompt").to_pylist()))
    return dict(zip(turns, table.column("task").to_pylist(), strict=True))


def show(report: dict[str, Any], console: Console) -> None:
    """The report as two tables."""
    sizes = f"{report['held_out']['prompts']:,} prompts, {report['held_out']['votes']:,} votes held out ({report['dtype']})"
    table = Table(title=sizes, title_justify="left")
    for name in ("predictor", "log-loss", "accuracy"):
        table.add_column(name, justify="left" if name == "predictor" else "right")
    for name, entry in report["votes"].items():
        table.add_row(name, f"{entry['log_loss']:.4f}", f"{entry['accuracy']:.4f}")
    console.print(table)
    if "routing" in report:
        table = Table(title="mean true score of the chosen model", title_justify="left")
        for name in ("choice", "mean score", "points over the best single model"):
            table.add_column(name, justify="left" if name == "choice" else "right")
        for name, entry in sorted(report["routing"].items(), key=lambda item: item[1]["mean_score"]):
            table.add_row(name, f"{entry['mean_score']:.4f}", f"{entry['points_over_best_single']:+.2f}")
        console.print(table)


def main() -> int:
    """Exit status 0, or 2 with one line on what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m p2l_engine.train.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="checkpoint folder or hub name")
    parser.add_argument("--config", required=True, help="the YAML file that it was trained with: data and split")
    parser.add_argument("--probes", action="store_true", help="also ridge and kNN on the frozen backbone (minutes)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    console = Console()
    try:
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task("prompts", total=None)
            report = evaluate(
                arguments.checkpoint,
                TrainConfig.load(arguments.config),
                arguments.probes,
                lambda n: bar.advance(task, n),
            )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(report, console)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A checkpoint's model card, made of its training config and its evaluation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from p2l_engine.checkpoint.saving import write_json
from p2l_engine.jsonable import to_json
from p2l_engine.reports import DtypeFigures, Evaluation, Figure, RoutingFigures, ValueFigures, VoteFigures
from p2l_engine.reports.dtypes import too_much
from p2l_engine.tables.atomic import write_file

FIGURES = {
    "log_loss": "log-loss",
    "accuracy_2": "accuracy, decided votes",
    "accuracy_3": "accuracy, three-way",
    "accuracy_4": "accuracy, four-way",
    "ece": "calibration error",
}
PREDICTORS = {
    "constant": "constant (every outcome equally likely)",
    "marginal": "marginal (one leaderboard for all prompts)",
    "category": "one leaderboard for each category (category known)",
    "p2l": "**this checkpoint**",
}
VALUE_PREDICTORS = {"p2l": "**this checkpoint**", "marginal": "one regression for all prompts", "constant": "constant"}
CHOICES = {
    "best_single": "best single model ({})",
    "task_best": "the best model of the prompt's task (task known)",
    "ridge": "ridge regression on the untrained backbone's features",
    "knn": "k nearest neighbours on the same",
    "mlp": "a multilayer perceptron on the same",
    "routed": "**routed by this checkpoint**, no budget",
    "oracle": "oracle: the best model of each prompt",
}


def text(models: Sequence[str], training: Mapping[str, Any], evaluation: Evaluation | None) -> str:
    """The card in Markdown. training: the keys of the training config; evaluation: None where there is none."""
    base = training.get("pretrain_model_name")
    lines = ["---", "library_name: p2l-engine", "tags: [prompt-to-leaderboard]"]
    lines += [f"base_model: {base}"] if base else []
    lines += [f"license: {training['license']}"] if training.get("license") else []
    lines += ["---", f"# {training.get('proj_name') or 'A P2L model'}", ""]
    lines += [
        "A Prompt-to-Leaderboard model ([paper](https://arxiv.org/abs/2502.14855)): for every prompt a coefficient for each of "
        f"{len(models)} chat models, under the feedback model {training['loss_type']}.",
        "",
        *([training["description"].strip(), ""] if training.get("description") else []),
        f"- **Models**: {', '.join(models)}",
    ]
    lines += [f"- **Backbone**: {base}"] if base else []
    lines += _training_lines(training)
    if evaluation is None:
        return "\n".join([*lines, "", "Not evaluated; `p2l-engine eval` does that.", ""])
    return "\n".join([*lines, "", *_evaluation_lines(evaluation)]) + "\n"


def write(folder: Path, evaluation: Evaluation) -> None:
    """Writes README.md and evaluation.json into a checkpoint folder."""
    models, training = (
        json.loads((folder / name).read_text(encoding="utf-8")) for name in ("model_list.json", "training_config.json")
    )
    write_json(folder / "evaluation.json", to_json(evaluation))
    write_file(folder / "README.md", text(models, training, evaluation))


def _training_lines(training: Mapping[str, Any]) -> list[str]:
    lora = training.get("lora")
    how = f"LoRA of rank {lora['r']}, from layer {lora['first_layer']} up" if lora else "full"
    if training.get("train_head_only"):
        how = "the head alone"
    named = {
        "train_data_path": "votes", "num_train_epochs": "epochs", "batch_size": "prompts a batch",
        "learning_rate": "learning rate", "max_length": "tokens at most",
    }  # fmt: skip
    if found := training.get("optimum"):
        how += f", at its greatest posterior probability for a prior of deviation {found['deviation']:g}"
        named = {key: named[key] for key in ("train_data_path", "max_length")}
    given = [f"{name} {_joined(training[key])}" for key, name in named.items() if training.get(key) is not None]
    return [f"- **Training**: {how}; {', '.join(given)}"]


def _evaluation_lines(report: Evaluation) -> list[str]:
    held_out, training = report.held_out, report.training
    lines = [f"## Held-out figures ({held_out.votes:,} votes on {held_out.prompts:,} prompts)", ""]
    if training is not None:
        lines += [f"Trained on {training.votes:,} votes on {training.prompts:,} other prompts.", ""]
    intervals = ["", f"In brackets: 95% intervals, {report.bootstrap} bootstrap samples of the prompts.", ""]
    if report.votes is not None:
        lines += [*_vote_lines(report.votes), *intervals]
    if report.routing is not None:
        lines += [*_routing_lines(report.routing), ""]
    if report.value_figures is not None:
        lines += [*_value_lines(report.value_figures), *intervals]
    if report.dtypes:
        lines += [*_dtype_lines(report.dtypes), ""]
    return lines[:-1]


def _vote_lines(votes: VoteFigures) -> list[str]:
    overall = votes.overall
    shown = [figure for figure in FIGURES if figure in overall["p2l"]]
    lines = [f"| predictor of votes | {' | '.join(FIGURES[figure] for figure in shown)} |", "|---" * (1 + len(shown)) + "|"]
    for name, label in PREDICTORS.items():
        if name in overall:
            lines.append(f"| {label} | {' | '.join(_cell(overall[name].get(figure)) for figure in shown)} |")
    return lines


def _value_lines(values: ValueFigures) -> list[str]:
    overall = values.overall
    labels = {name: label for name, label in VALUE_PREDICTORS.items() if name in overall}
    lines = [f"| figure | {' | '.join(labels.values())} |", "|---" * (1 + len(labels)) + "|"]
    for figure in overall["p2l"]:
        cells = (_cell(overall[name].get(figure)) for name in labels)
        lines.append(f"| {figure.replace('_', ' ')} | {' | '.join(cells)} |")
    return lines


def _routing_lines(routing: RoutingFigures) -> list[str]:
    lines = ["| choice of the model | mean true score | points over the best single model (s.e.) |", "|---|---|---|"]
    for name, label in CHOICES.items():
        if name in routing.choices:
            of = routing.choices[name]
            gain = f"{of.points_over_best_single:+.2f} ({of.standard_error_points:.1f})"
            lines.append(f"| {label.format(routing.best_single_model)} | {of.mean_score:.4f} | {gain} |")
    return lines


def _dtype_lines(of: Sequence[DtypeFigures]) -> list[str]:
    """float32 is the first."""
    lines = [
        f"What a dtype costs, on the same {of[0].prompts:,} prompts:",
        "",
        "| dtype | theta off by: root mean square (largest) | log-loss | mean true score | another model chosen | "
        "win rate lost by that, points: mean (most) | acceptable |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in of:
        off, choice, lost, verdict = "", "", "", ""
        if each is not of[0]:
            off = f"{each.deviation:.4f} ({each.largest:.3f})"
            choice = "" if each.other_choice is None else f"{each.other_choice:.1%}"
            lost = "" if each.win_rate_lost is None else f"{each.win_rate_lost:.3f} ({each.most_lost:.2f})"
            verdict = "; ".join(too_much(each, of[0])) or "yes"
        score = "" if each.mean_score is None else f"{each.mean_score:.4f}"
        loss = "" if each.log_loss is None else f"{each.log_loss:.4f}"
        lines.append(f"| {each.dtype} | {off} | {loss} | {score} | {choice} | {lost} | {verdict} |")
    return lines


def _joined(value: Any) -> str:
    return " and ".join(value) if isinstance(value, list) else str(value)


def _cell(figure: Figure | None) -> str:
    return "" if figure is None else f"{figure.value:.3f} ({figure.low:.3f} to {figure.high:.3f})"

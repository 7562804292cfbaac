"""The model card of a checkpoint, filled in from its training config and its evaluation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from p2l_engine.checkpoint.saving import write_json

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
CHOICES = {
    "best_single": "best single model ({})",
    "task_best": "the best model of the prompt's task (task known)",
    "ridge": "ridge regression on the untrained backbone's features",
    "knn": "k nearest neighbours on the same",
    "mlp": "a multilayer perceptron on the same",
    "routed": "**routed by this checkpoint**, no budget",
    "oracle": "oracle: the best model of each prompt",
}


def text(models: Sequence[str], training: dict[str, Any], evaluation: dict[str, Any] | None) -> str:
    """The card in Markdown. evaluation: what ``p2l-engine eval --json`` wrote, or None."""
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
        return "\n".join([*lines, "", "It was not evaluated: `p2l-engine eval` does that.", ""])
    return "\n".join([*lines, "", *_evaluation_lines(evaluation)]) + "\n"


def write(folder: Path, evaluation: dict[str, Any]) -> None:
    """README.md and evaluation.json of a checkpoint folder, from its own models and training config."""
    models, training = (
        json.loads((folder / name).read_text(encoding="utf-8")) for name in ("model_list.json", "training_config.json")
    )
    write_json(folder / "evaluation.json", evaluation)
    (folder / "README.md").write_text(text(models, training, evaluation), encoding="utf-8")


def _training_lines(training: dict[str, Any]) -> list[str]:
    lora = training.get("lora")
    how = f"LoRA of rank {lora['r']}, from layer {lora['first_layer']} up" if lora else "full"
    if training.get("train_head_only"):
        how = "the head alone"
    named = {
        "train_data_path": "votes", "num_train_epochs": "epochs", "batch_size": "prompts a batch",
        "learning_rate": "learning rate", "max_length": "tokens at most",
    }  # fmt: skip
    given = [f"{name} {_plain(training[key])}" for key, name in named.items() if training.get(key) is not None]
    return [f"- **Training**: {how}; {', '.join(given)}"]


def _evaluation_lines(report: dict[str, Any]) -> list[str]:
    held = report["held_out"]
    lines = [f"## Held-out figures ({held['votes']:,} votes on {held['prompts']:,} prompts)", ""]
    if "training" in report:
        lines += [f"Trained on {report['training']['votes']:,} votes on {report['training']['prompts']:,} other prompts.", ""]
    if "votes" in report:
        overall = report["votes"]["overall"]
        shown = [figure for figure in FIGURES if figure in overall["p2l"]]
        lines += [
            f"| predictor of votes | {' | '.join(FIGURES[figure] for figure in shown)} |",
            "|---" * (1 + len(shown)) + "|",
        ]
        for name, label in PREDICTORS.items():
            if name in overall:
                lines.append(f"| {label} | {' | '.join(_cell(overall[name].get(figure)) for figure in shown)} |")
        lines += ["", f"In brackets: 95% intervals, {report['bootstrap']} bootstrap samples of the prompts.", ""]
    if "routing" in report:
        routing = report["routing"]
        lines += ["| choice of the model | mean true score | points over the best single model (s.e.) |", "|---|---|---|"]
        for name, label in CHOICES.items():
            if name in routing["choices"]:
                of = routing["choices"][name]
                label = label.format(routing["best_single_model"])
                gain = f"{of['points_over_best_single']:+.2f} ({of['standard_error_points']:.1f})"
                lines.append(f"| {label} | {of['mean_score']:.4f} | {gain} |")
        lines.append("")
    if "value_figures" in report:
        of = report["value_figures"]["overall"]
        lines += ["| figure | value |", "|---|---|"]
        lines += [f"| {name.replace('_', ' ')} | {_cell(figure)} |" for name, figure in of.items()]
        lines += ["", f"In brackets: 95% intervals, {report['bootstrap']} bootstrap samples of the prompts.", ""]
    return lines[:-1]


def _plain(value: Any) -> str:
    return " and ".join(value) if isinstance(value, list) else str(value)


def _cell(figure: dict[str, float] | None) -> str:
    return "" if figure is None else f"{figure['value']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})"

"""The default checkpoint: its size, its card's figures on held-out prompts, and the same theta as transformers and peft."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from p2l_engine import Catalog, Engine, Router, checkpoint
from p2l_engine.backbone.packing import Packed
from p2l_engine.checkpoint.adapter import NEW_ROWS
from p2l_engine.evaluation import routed
from p2l_engine.evaluation.report import ReportOptions, evaluate
from p2l_engine.evaluation.sources import scores_of
from p2l_engine.jsonable import from_json
from p2l_engine.reports import Evaluation
from p2l_engine.tables.whole import read_table
from p2l_engine.train.config import TrainConfig
from p2l_engine.train.data import load
from p2l_engine.train.model import build
from p2l_engine.votes import prompts_hash
from p2l_engine.votes.scores import SCORES

CONFIG = Path(__file__).resolve().parent.parent / "train" / "configs" / "default.yaml"
PROMPTS = ["What is the capital of France?", "Prove that there are infinitely many primes.", "Write a haiku.", ""]


def test_it_ships_in_at_most_12_megabytes():
    assert sum(file.stat().st_size for file in checkpoint.DEFAULT.iterdir()) <= 12_000_000


@pytest.mark.slow
def test_it_routes_over_its_own_catalog(default_engine):
    catalog = Catalog.from_yaml(checkpoint.DEFAULT / "catalog.yaml")
    router = Router(default_engine, catalog)
    for budget in (None, 0.1, 0.3):
        for decision in router.route_batch(PROMPTS, budget):
            assert decision.model in catalog.names
            assert budget is None or decision.expected_cost <= budget


@pytest.mark.slow
def test_theta_is_that_of_transformers_and_peft(default_engine):
    """The adapter applied by peft to transformers' own decoder, in float32, against the merged packed engine."""
    from safetensors.torch import load_file

    config = TrainConfig.load(CONFIG).model_copy(update={"dtype": "float32"})
    model, _ = build(config, len(default_engine.models))
    saved = load_file(checkpoint.DEFAULT / "adapter_model.safetensors")
    own = {name.replace(".weight", ".default.weight") if ".lora_" in name else name: w for name, w in saved.items()}
    state = {
        n.replace("base_model.model.model.", "model.base_model.model.").replace("base_model.model.head.", "head."): w
        for n, w in own.items()
    }
    rows = state.pop(f"base_model.model.{NEW_ROWS}".replace("base_model.model.model.", "model.base_model.model."))
    with torch.no_grad():
        model.model.get_input_embeddings().weight[-len(rows) :] = rows
    unexpected = model.load_state_dict(state, strict=False).unexpected_keys
    assert not unexpected
    model = model.eval()
    exact = Engine.from_pretrained(device="cpu", dtype=torch.float32)
    for prompt, theta in zip(PROMPTS, exact.coefficients(PROMPTS).theta, strict=True):
        with torch.no_grad():
            expected = model(Packed.of(exact.encoder.encode([prompt])))["theta"][0]
        np.testing.assert_allclose(theta, expected, atol=1e-4)


@pytest.mark.slow
def test_it_knows_its_held_out_prompts(data):
    kept = json.loads((checkpoint.DEFAULT / "training_config.json").read_text())
    config = TrainConfig.load(CONFIG).model_copy(update={"train_data_path": str(data / "routing_scores.parquet")})
    assert kept["held_out_hashes"] == {"held-out": prompts_hash(load(config).held_out)}


LONG = ("mmlu", "gpqa", "math", "agentverse-logicgrid")  # these tasks have most of the held-out prompts' text


@pytest.mark.slow
def test_its_card_states_what_held_out_prompts_give(data, default_engine, monkeypatch):
    """The figures of each task with short prompts; those of all prompts are the tasks' means."""
    stated = from_json(Evaluation, json.loads((checkpoint.DEFAULT / "evaluation.json").read_text()))
    config = TrainConfig.load(CONFIG).model_copy(update={"train_data_path": str(data / "routing_scores.parquet")})
    training, _, held_out = load(config)
    table = read_table(config.train_data_path, SCORES)
    # What needs no forward pass is computed on all prompts.
    scores = scores_of(default_engine, (table, held_out), (table, training), None)
    chosen = routed.choices(np.zeros_like(scores.held_out), scores.training, training.category, held_out.category)
    now, then = routed.table(chosen, scores.held_out, default_engine.models, held_out.category), stated.routing
    for name in ("best_single", "task_best", "oracle"):
        assert now.choices[name].mean_score == pytest.approx(then.choices[name].mean_score, abs=1e-9)
    rows = [i for i, task in enumerate(held_out.category) if task not in LONG]
    short, scores = held_out.of(rows), replace(scores, held_out=scores.held_out[rows])
    # The card does not state how its figures grow, which takes most of the report's time.
    monkeypatch.setattr("p2l_engine.evaluation.report.growth", lambda *given, **options: None)
    # As many samples as the card's: they debias the calibration error.
    measured = evaluate(default_engine, short, training, scores, ReportOptions())
    tasks = stated.votes.categories
    assert set(measured.votes.categories) == set(tasks) - set(LONG)
    for name in ("p2l", "category", "marginal", "constant"):
        for figure in ("log_loss", "accuracy_4", "ece"):
            for task, found in measured.votes.categories.items():
                now, then = (of.predictors[name][figure].value for of in (found, tasks[task]))
                assert now == pytest.approx(then, abs=0.005 if figure != "ece" else 0.01)
        for figure in ("log_loss", "accuracy_4"):
            mean = np.average(
                [of.predictors[name][figure].value for of in tasks.values()], weights=[of.votes for of in tasks.values()]
            )
            assert stated.votes.overall[name][figure].value == pytest.approx(mean, abs=1e-9)
    then = stated.routing.choices
    mean = np.average(
        [of.choices["routed"] for of in stated.routing.tasks.values()],
        weights=[of.prompts for of in stated.routing.tasks.values()],
    )
    assert then["routed"].mean_score == pytest.approx(mean, abs=1e-9)
    # In another dtype near-ties between models may fall the other way.
    known = [stated.routing.tasks[task] for task in measured.votes.categories]
    mean = np.average([of.choices["routed"] for of in known], weights=[of.prompts for of in known])
    assert measured.routing.choices["routed"].mean_score == pytest.approx(mean, abs=0.01)
    card = (checkpoint.DEFAULT / "README.md").read_text()
    for name in ("p2l", "category", "marginal", "constant"):
        assert f"{stated.votes.overall[name]['log_loss'].value:.3f}" in card
    for name in ("routed", "best_single", "task_best", "oracle", "ridge", "knn", "mlp"):
        assert f"{then[name].mean_score:.4f}" in card

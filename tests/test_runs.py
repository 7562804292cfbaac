"""Training runs that are killed, use several processes or fail; and their checkpoints as other readers see them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from p2l_engine import Engine
from p2l_engine.checkpoint.export import export
from p2l_engine.errors import CheckpointError
from p2l_engine.train.config import TrainConfig
from p2l_engine.train.progress import ProgressBar, TrainedCounts
from p2l_engine.train.run import train
from tests.support import plain_reader, tiny
from tests.support.command import p2l_engine
from tests.support.training import interrupt, largest_file, settings, skill_votes, start, weights


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.fixture
def config(tmp_path):
    values = {"dtype": "float32", "batch_size": 4, "save_steps": 5, "learning_rate": 1e-3}
    return settings(tmp_path, **values)


@pytest.fixture
def whole(config, tmp_path):
    """The weights of an uninterrupted run of 20 steps."""
    return weights(config.model_copy(update={"output_dir": str(tmp_path / "whole")}))


@pytest.mark.slow
def test_a_run_killed_in_step_13_and_resumed_gives_equal_weights(config, tmp_path):
    """All weights are trained, or an adapter."""
    jobs = {}
    for name, how in (("all", {}), ("lora", {"lora": {"r": 4, "dropout": 0.1}})):
        jobs[name] = TrainConfig.model_validate(config.model_dump() | how | {"output_dir": str(tmp_path / name)})
    start(tmp_path, jobs, kill_at=13)
    for name, job in jobs.items():
        states = sorted(path.name for path in (tmp_path / name / "trial.run").glob("checkpoint-*"))
        assert states == ["checkpoint-10", "checkpoint-5"]
        whole = weights(job.model_copy(update={"output_dir": str(tmp_path / f"whole {name}")}))
        assert largest_difference(whole, weights(job, if_present="resume")) == 0


@pytest.mark.slow
def test_an_incomplete_state_is_skipped(config, whole, tmp_path):
    interrupt(config, at=13)
    file = tmp_path / "out" / "trial.run" / "checkpoint-10" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert largest_difference(whole, weights(config, if_present="resume")) == 0
    assert not file.parent.exists()


SHARDED = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one(config, tmp_path):
    """Also where 36 prompts do not fill batches of 16: the last batch is padded, and no prompt counts twice.

    In the same processes, sharding without GPUs is refused."""
    even = config.model_copy(update={"num_train_epochs": 3})
    uneven = config.model_copy(update={"batch_size": 16, "num_train_epochs": 2})
    halves = {
        "even": even.model_copy(update={"batch_size": 2}),
        "uneven": uneven.model_copy(update={"batch_size": 8}),
        "sharded": config.model_copy(update=SHARDED),
    }
    halves = {name: half.model_copy(update={"output_dir": str(tmp_path / name)}) for name, half in halves.items()}
    two = start(tmp_path, halves, steps=6, processes=2)
    assert largest_difference(weights(even, 6), two["even"]) < 1e-5
    uneven = uneven.model_copy(update={"output_dir": str(tmp_path / "one")})
    assert largest_difference(weights(uneven, 6), two["uneven"]) < 1e-5
    assert two["sharded"].startswith("fsdp: expected several processes on GPUs")
    assert not list((tmp_path / "sharded").glob("*.run"))


def test_sharding_in_one_process_is_refused(config):
    with pytest.raises(ValueError, match="fsdp only works in distributed training"):
        train(config.model_copy(update=SHARDED), 2)


@pytest.mark.slow
def test_a_run_killed_after_its_last_step_only_writes_the_checkpoint(config, tmp_path, monkeypatch):
    from p2l_engine.train import run as runs

    whole = train(config.model_copy(update={"output_dir": str(tmp_path / "whole")}), 20)

    def full(*_):
        raise OSError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(runs, "write", full)
        with pytest.raises(OSError, match="no room"):
            train(config, 20)
    resumed = train(config, 20, "resume")
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert train(config, 20, "resume") == resumed  # complete already
    with pytest.raises(ValueError, match="exists already; --restart"):
        train(config, 20)


def test_restart_replaces_only_checkpoints(config, tmp_path):
    (tmp_path / "out" / "trial").mkdir(parents=True)
    (tmp_path / "out" / "trial" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="and never another folder"):
        train(config, 2, "restart")
    assert (tmp_path / "out" / "trial" / "notes.txt").read_text() == "mine"
    for name in ("", "a/b", ".hidden"):
        with pytest.raises(ValueError, match="proj_name"):
            TrainConfig.model_validate(config.model_dump() | {"proj_name": name})


@pytest.mark.slow
def test_evaluation_refuses_data_that_changed(config, tmp_path):
    from p2l_engine.evaluation.sources import of_config

    engine = Engine.from_pretrained(train(config, 2), device="cpu")
    assert len(of_config(engine, "held-out", None).held_out.prompts) == 12
    skill_votes(tmp_path / "votes.parquet", n=60)
    with pytest.raises(ValueError, match="changed since .* was trained"):
        of_config(engine, "held-out", None)


def test_validation_prompts_must_not_be_training_prompts(config, tmp_path):
    same = config.model_copy(update={"held_out": 0.0, "val_data_path": config.train_data_path})
    with pytest.raises(ValueError, match="48 of its prompts are training prompts too"):
        train(same, 2)


@pytest.mark.slow
def test_accumulated_passes_give_the_weights_of_one(config, whole):
    half = config.model_copy(update={"batch_size": 2, "gradient_accumulation_steps": 2})
    assert largest_difference(whole, weights(half)) < 1e-5


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing(config, tmp_path):
    plain = weights(config.model_copy(update={"output_dir": str(tmp_path / "plain")}), 5)
    assert largest_difference(plain, weights(config.model_copy(update={"gradient_checkpointing": True}), 5)) < 1e-6


@pytest.mark.slow
def test_an_interrupted_run_is_resumed_or_restarted_only_on_request(config, tmp_path):
    interrupt(config, at=7)
    with pytest.raises(ValueError, match="--resume continues it, --restart deletes it"):
        train(config, 20)
    with pytest.raises(ValueError, match=r"cannot be resumed, since this changed: learning_rate: was 0.001, is 0.5"):
        train(config.model_copy(update={"learning_rate": 0.5}), 20, "resume")
    skill_votes(tmp_path / "votes.parquet", n=50)
    with pytest.raises(ValueError, match=r"cannot be resumed, since this changed: votes: "):
        train(config, 20, "resume")
    assert train(config, 2, "restart").is_dir()
    assert not (tmp_path / "out" / "trial.run").exists()


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_batch(config, tmp_path):
    table = pq.read_table(tmp_path / "votes.parquet")
    pq.write_table(table.append_column("weight", pa.array(np.full(len(table), 1e308))), tmp_path / "votes.parquet")
    file = tmp_path / "bad.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(exclude_none=True)))
    ended = p2l_engine("train", "--config", str(file))
    assert ended.status == 2
    assert "the loss is nan at step" in ended.message
    assert "'poem " in ended.message or "'sum " in ended.message
    assert not (tmp_path / "out" / "trial").exists()


@pytest.mark.slow
def test_a_full_disk_leaves_no_incomplete_checkpoint(config, tmp_path, monkeypatch):
    from p2l_engine.train import run as runs

    write = runs.write

    def full(*arguments):
        with largest_file(100_000):
            write(*arguments)

    monkeypatch.setattr(runs, "write", full)
    with pytest.raises(OSError, match="cannot be written, nothing was kept"):
        train(config, 2)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["trial.run"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"lora": {"r": 4}},
        {"loss_type": "bt-tie", "head_type": "bt"},
        {"linear_head_downsize_factor": 1.5, "head_config": {"eta_downsize": True}},
    ],
)
def test_transformers_reads_exported_checkpoints(how, tmp_path):
    folder = train(settings(tmp_path, num_train_epochs=1, **how), max_steps=3)
    target = tmp_path / "exported"
    export(folder, target)
    export(folder, tmp_path / "again")
    names = sorted(path.name for path in target.iterdir())
    assert all((target / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)
    prompts = ["sum 1", "a poem about rain", "", "<|cls|> and " + "x" * 300]
    theta, eta = plain_reader.coefficients(target, prompts)
    for checkpoint in (folder, target):
        c = Engine.from_pretrained(checkpoint, device="cpu", dtype=torch.float32).coefficients(prompts)
        # An adapter is merged in float32; an exported checkpoint is rounded to bfloat16.
        exact = checkpoint == target or "lora" not in how
        np.testing.assert_allclose(c.theta, theta, atol=1e-4 if exact else 0.05)
        if c.eta is not None:
            np.testing.assert_allclose(c.eta, eta, atol=1e-4 if exact else 0.05)


def test_export_does_not_overwrite_anything(tmp_path):
    source = tiny.write(tmp_path / "source")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="expected a folder that does not exist yet"):
        export(source, tmp_path / "full")
    (tmp_path / "no.json").write_text("[]")
    with pytest.raises(CheckpointError, match="p2l-engine eval --json"):
        export(source, tmp_path / "new", tmp_path / "no.json")
    export(source, tmp_path / "new")
    assert "Not evaluated" in (tmp_path / "new" / "README.md").read_text()
    assert json.loads((tmp_path / "new" / "config.json").read_text())["dtype"] == "bfloat16"


def test_progress_shows_the_speed_of_all_processes(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("p2l_engine.train.progress.time.monotonic", lambda: now[0])
    counts = TrainedCounts()
    bar, process = ProgressBar(counts), SimpleNamespace(world_size=4)
    state = SimpleNamespace(max_steps=10, global_step=0, is_world_process_zero=True)
    bar.on_train_begin(process, state, None)
    counts.tokens, counts.votes, now[0] = 500, 50, 2.0
    bar.on_step_end(process, state, None)
    assert bar.bar.tasks[0].description == "1,000 tokens/s 100 votes/s"

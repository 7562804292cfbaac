"""Training runs that are killed, spread over processes, or fail; and their checkpoints as others read them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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
from p2l_engine.train.progress import Seen, Show
from p2l_engine.train.run import train
from tests.support import plain_reader, tiny
from tests.support.training import ROOT, run, settings, skill_votes


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.fixture
def config(tmp_path):
    values = {"dtype": "float32", "batch_size": 4, "save_steps": 5, "learning_rate": 1e-3}
    return settings(tmp_path, **values)


@pytest.mark.parametrize("how", [{}, {"lora": {"r": 4, "dropout": 0.1}}])
def test_killed_at_step_13_and_resumed_is_as_never_killed(how, config, tmp_path):
    config = config.model_copy(update={"lora": TrainConfig.model_validate(config.model_dump() | how).lora})
    whole = run(tmp_path, config, "whole")
    run(tmp_path, config, "cut", kill_at=13, output="again")
    states = sorted(path.name for path in (tmp_path / "again" / "trial.run").glob("checkpoint-*"))
    assert states == ["checkpoint-10", "checkpoint-5"]
    resumed = run(tmp_path, config, "resumed", if_present="resume", output="again")
    assert largest_difference(whole, resumed) == 0


def test_a_state_that_was_cut_short_is_passed_over(config, tmp_path):
    whole = run(tmp_path, config, "whole")
    run(tmp_path, config, "cut", kill_at=13, output="again")
    weights = tmp_path / "again" / "trial.run" / "checkpoint-10" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert largest_difference(whole, run(tmp_path, config, "resumed", if_present="resume", output="again")) == 0


def test_two_processes_give_the_weights_of_one(config, tmp_path):
    one = run(tmp_path, config.model_copy(update={"num_train_epochs": 3}), "one")
    half = config.model_copy(update={"batch_size": 2, "num_train_epochs": 3})
    assert largest_difference(one, run(tmp_path, half, "two", processes=2)) < 1e-5


def test_sharding_that_cannot_be_had_is_refused(config, tmp_path):
    sharded = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
    with pytest.raises(ValueError, match="fsdp only works in distributed training"):
        train(config.model_copy(update=sharded), 2)
    with pytest.raises(AssertionError, match="fsdp: expected several processes on GPUs"):
        run(tmp_path, config.model_copy(update=sharded), "sharded", processes=2)


def test_prompts_that_do_not_divide_are_counted_once(config, tmp_path):
    """36 prompts in batches of 16, two processes of 8: the last batch is filled up with nothing."""
    whole = config.model_copy(update={"batch_size": 16, "num_train_epochs": 2})
    one = run(tmp_path, whole, "one", steps=6)
    half = whole.model_copy(update={"batch_size": 8})
    assert largest_difference(one, run(tmp_path, half, "two", steps=6, processes=2)) < 1e-5


def test_killed_after_its_last_step_it_is_trained_no_further(config, tmp_path, monkeypatch):
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
    assert train(config, 20, "resume") == resumed  # it is there, whole
    with pytest.raises(ValueError, match="expected no such folder yet; --restart"):
        train(config, 20)


def test_nothing_but_a_checkpoint_is_ever_replaced(config, tmp_path):
    (tmp_path / "out" / "trial").mkdir(parents=True)
    (tmp_path / "out" / "trial" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="anything else is left alone"):
        train(config, 2, "restart")
    assert (tmp_path / "out" / "trial" / "notes.txt").read_text() == "mine"
    for name in ("", "a/b", ".hidden"):
        with pytest.raises(ValueError, match="proj_name"):
            TrainConfig.model_validate(config.model_dump() | {"proj_name": name})


def test_an_evaluation_notices_that_the_data_changed(config, tmp_path):
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


def test_accumulated_passes_give_the_weights_of_one(config, tmp_path):
    one = run(tmp_path, config, "one")
    half = config.model_copy(update={"batch_size": 2, "gradient_accumulation_steps": 2})
    assert largest_difference(one, run(tmp_path, half, "parts")) < 1e-5


def test_gradient_checkpointing_changes_nothing(config, tmp_path):
    one = run(tmp_path, config, "one", steps=5)
    assert (
        largest_difference(one, run(tmp_path, config.model_copy(update={"gradient_checkpointing": True}), "again", steps=5))
        < 1e-6
    )


def test_a_run_that_is_there_is_not_touched_unless_asked(config, tmp_path):
    run(tmp_path, config, "cut", kill_at=7, output="out")
    same = config.model_copy(update={"output_dir": str(tmp_path / "out")})
    with pytest.raises(ValueError, match="--resume goes on with it, --restart throws it away"):
        train(same, 20)
    with pytest.raises(ValueError, match=r"cannot be resumed, since this changed: learning_rate: was 0.001, is 0.5"):
        train(same.model_copy(update={"learning_rate": 0.5}), 20, "resume")
    skill_votes(tmp_path / "votes.parquet", n=50)
    with pytest.raises(ValueError, match=r"cannot be resumed, since this changed: votes: "):
        train(same, 20, "resume")
    assert train(same, 2, "restart").is_dir()
    assert not (tmp_path / "out" / "trial.run").exists()


def test_a_loss_that_is_not_finite_stops_with_its_batch_named(config, tmp_path, monkeypatch, capsys):
    from p2l_engine.train.__main__ import main

    table = pq.read_table(tmp_path / "votes.parquet")
    pq.write_table(table.append_column("weight", pa.array(np.full(len(table), 1e308))), tmp_path / "votes.parquet")
    file = tmp_path / "bad.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(exclude_none=True)))
    monkeypatch.setattr("sys.argv", ["train", "--config", str(file)])
    assert main() == 2
    error = capsys.readouterr().err
    assert "the loss is nan at step" in error
    assert "'poem " in error or "'sum " in error
    assert not (tmp_path / "out" / "trial").exists()


def test_a_full_disk_leaves_no_checkpoint_that_looks_whole(config, tmp_path):
    # Files beyond 100 kB cannot be written: what a full disk does, without one.
    script = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from p2l_engine.train.config import TrainConfig\n"
        "from p2l_engine.train import run\n"
        "from p2l_engine.train.saving import write\n"
        "def full(*arguments):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "    write(*arguments)\n"
        "run.write = full\n"
        "try:\n"
        "    run.train(TrainConfig.load(sys.argv[1]), 2)\n"
        "except OSError as error:\n"
        "    sys.exit(f'said: {error}')\n"
    )
    file = tmp_path / "full.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(exclude_none=True)))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script, str(file)], env=environment, capture_output=True, text=True, check=False
    )
    assert "said: " in done.stderr, done.stderr
    assert "could not be written, and nothing of it was kept" in done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["trial.run"]


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"lora": {"r": 4}},
        {"loss_type": "bt-tie", "head_type": "bt"},
        {"linear_head_downsize_factor": 1.5, "head_config": {"eta_downsize": True}},
    ],
)
def test_a_plain_script_reads_what_was_trained_and_exported(how, tmp_path):
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
        # The adapter is merged in float32, what is exported is rounded to bfloat16.
        exact = checkpoint == target or "lora" not in how
        np.testing.assert_allclose(c.theta, theta, atol=1e-4 if exact else 0.05)
        if c.eta is not None:
            np.testing.assert_allclose(c.eta, eta, atol=1e-4 if exact else 0.05)


def test_export_does_not_write_over_anything(tmp_path):
    source = tiny.write(tmp_path / "source")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="expected a folder that does not exist yet"):
        export(source, tmp_path / "full")
    (tmp_path / "no.json").write_text("[]")
    with pytest.raises(CheckpointError, match="p2l-engine eval --json"):
        export(source, tmp_path / "new", tmp_path / "no.json")
    export(source, tmp_path / "new")
    assert "It was not evaluated" in (tmp_path / "new" / "README.md").read_text()
    assert json.loads((tmp_path / "new" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_speed_that_is_shown_is_that_of_all_processes(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("p2l_engine.train.progress.time.monotonic", lambda: now[0])
    seen = Seen()
    show, process = Show(seen), SimpleNamespace(world_size=4)
    state = SimpleNamespace(max_steps=10, global_step=0, is_world_process_zero=True)
    show.on_train_begin(process, state, None)
    seen.tokens, seen.votes, now[0] = 500, 50, 2.0
    show.on_step_end(process, state, None)
    assert show.bar.tasks[0].description == "1,000 tokens/s 100 votes/s"

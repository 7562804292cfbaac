"""Small training runs: votes that are easy to learn from, and a run in a process of its own that can be killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from safetensors.torch import load_file

from p2l_engine.train.config import TrainConfig
from tests.support import tiny

ROOT = Path(__file__).resolve().parents[2]

# A run whose weights are kept in float32, as they are before they are rounded for the checkpoint.
SCRIPT = """
import os, signal, sys
import torch
from safetensors.torch import save_file
from p2l_engine.train import run
from p2l_engine.train.config import TrainConfig
from p2l_engine.train.progress import Show

config, out, steps, if_present, kill_at = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], int(sys.argv[5])
torch.set_num_threads(1)
shown = Show.on_step_end
def on_step_end(self, args, state, control, **rest):
    shown(self, args, state, control, **rest)
    if state.global_step == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
Show.on_step_end = on_step_end
def write(folder, model, state, *rest):
    save_file({name: tensor.float().clone() for name, tensor in state.items()}, out)
run.write = write
run.train(TrainConfig.load(config), steps, if_present)
"""


def write_votes(path, rows):
    names = ("prompt", "model_a", "model_b", "winner")
    pq.write_table(pa.table({key: [row[i] for row in rows] for i, key in enumerate(names)}), path)
    return str(path)


def skill_votes(path, n=48, start=0):
    """Prompts that start with "sum" are x's, the others y's; both always right on their own, z never."""
    rows = []
    for i in range(start, start + n):
        prompt = f"{'sum' if i % 2 else 'poem'} {i}"
        good, bad = ("x", "y") if i % 2 else ("y", "x")
        rows += [(prompt, good, bad, "model_a"), (prompt, bad, "z", "tie (bothbad)"), (prompt, "z", good, "model_b")]
    return write_votes(path, rows)


def settings(tmp_path, **changes):
    tiny.write(tmp_path / "base", loss_type="grk", dtype=torch.bfloat16)
    values = {
        "proj_name": "trial",
        "pretrain_model_name": str(tmp_path / "base"),
        "train_data_path": skill_votes(tmp_path / "votes.parquet"),
        "output_dir": str(tmp_path / "out"),
        "held_out": 0.25,
        "head_type": "rk",
        "loss_type": "grk",
        "learning_rate": 3e-3,
        "batch_size": 8,
        "num_train_epochs": 6,
        "max_length": 64,
    } | changes
    return TrainConfig.model_validate(values)


def run(tmp_path, config, name, steps=20, if_present="refuse", kill_at=0, processes=1, **more):
    file = tmp_path / f"{name}.yaml"
    values = config.model_dump(exclude_none=True) | {"output_dir": str(tmp_path / more.pop("output", name))}
    file.write_text(yaml.safe_dump(values))
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, str(script), str(file), str(tmp_path / f"{name}.safetensors"), str(steps), if_present]
    # The same threads in each process: sums have the same order.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(kill_at)], env=environment, capture_output=True, text=True, check=False)
    if kill_at:
        assert done.returncode == -9, done.stderr
        return None
    assert done.returncode == 0, done.stderr
    return load_file(tmp_path / f"{name}.safetensors")

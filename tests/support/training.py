"""Small training runs: votes that are easy to learn, runs in this process, and runs in processes that can be killed."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file

from p2l_engine.train import run as runs
from p2l_engine.train.config import TrainConfig
from p2l_engine.train.progress import ProgressBar
from tests.support import tiny
from tests.support.threads import threads

ROOT = Path(__file__).resolve().parents[2]

# Training runs, one after the other, whose weights are saved in float32 (a checkpoint has them in bfloat16). Arguments: jobs as
# JSON, [config, weights file, steps]; the step at which each job's process, a fork, kills itself, or 0: no forks; the number of
# processes that train together: forks with the environment of torchrun, whose launcher and processes would each import
# everything again. A job that is refused leaves its message in a file.
SCRIPT = """
import json, os, signal, socket, sys
import torch
from safetensors.torch import save_file
from p2l_engine.train import run
from p2l_engine.train.config import TrainConfig
from p2l_engine.train.progress import ProgressBar

jobs, kill_at, processes = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
if processes > 1:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
    os.environ["LOCAL_WORLD_SIZE"] = str(processes)
    children = set()
    for rank in range(processes):
        os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
        child = os.fork()
        if not child:
            break
        children.add(child)
    else:
        while children:
            ended, status = os.wait()
            children.remove(ended)
            if status:  # the others would wait for it
                for child in children:
                    os.kill(child, signal.SIGKILL)
                sys.exit(1)
        sys.exit()
on_step_end = ProgressBar.on_step_end
def killing(self, args, state, control, **rest):
    on_step_end(self, args, state, control, **rest)
    if state.global_step == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
ProgressBar.on_step_end = killing
for config, out, steps in jobs:
    if kill_at and os.fork():
        assert os.waitstatus_to_exitcode(os.wait()[1]) == -signal.SIGKILL
        continue
    def write(folder, model, state, *rest):
        save_file({name: tensor.float().clone() for name, tensor in state.items()}, out)
    run.write = write
    try:
        run.train(TrainConfig.load(config), steps)
    except ValueError as error:
        if os.environ.get("RANK", "0") == "0":
            open(out + ".error", "w").write(str(error))
"""


class Killed(BaseException):
    """Ends a run where a kill would: nothing catches it."""


def write_votes(path: Path, rows) -> str:
    names = ("prompt", "model_a", "model_b", "winner")
    pq.write_table(pa.table({key: [row[i] for row in rows] for i, key in enumerate(names)}), path)
    return str(path)


def skill_votes(path: Path, n: int = 48, start: int = 0) -> str:
    """Model x always answers prompts that start with "sum" best, y all others, z none."""
    rows = []
    for i in range(start, start + n):
        prompt = f"{'sum' if i % 2 else 'poem'} {i}"
        good, bad = ("x", "y") if i % 2 else ("y", "x")
        rows += [(prompt, good, bad, "model_a"), (prompt, bad, "z", "tie (bothbad)"), (prompt, "z", good, "model_b")]
    return write_votes(path, rows)


def settings(tmp_path: Path, **changes) -> TrainConfig:
    """The config of a run on a tiny backbone and 48 prompts, both of which it writes."""
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


def weights(config: TrainConfig, steps: int = 20, if_present="refuse") -> dict[str, torch.Tensor]:
    """Trains in this process, with one thread so that sums have the same order everywhere.

    Returns the trained weights in float32 instead of writing a checkpoint.
    """
    kept: dict[str, torch.Tensor] = {}

    def keep(folder, model, state, *rest) -> None:
        kept.update({name: tensor.float().clone() for name, tensor in state.items()})

    with threads(1), pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "write", keep)
        runs.train(config, steps, if_present)
    return kept


def interrupt(config: TrainConfig, at: int, steps: int = 20) -> None:
    """Trains in this process and ends the run in step ``at``, which leaves the files that a kill there leaves."""
    on_step_end = ProgressBar.on_step_end

    def ending(self, args, state, control, **rest) -> None:
        on_step_end(self, args, state, control, **rest)
        if state.global_step == at:
            raise Killed

    with threads(1), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProgressBar, "on_step_end", ending)
        with pytest.raises(Killed):
            runs.train(config, steps)


def start(tmp_path: Path, jobs: dict[str, TrainConfig], steps: int = 20, kill_at: int = 0, processes: int = 1) -> dict:
    """Trains each job in new processes; the trained weights by name, or the message of the ValueError that refused it."""
    rows = []
    for name, config in jobs.items():
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(config.model_dump(exclude_none=True)))
        rows.append([str(file), str(tmp_path / f"{name}.safetensors"), steps])
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), json.dumps(rows), str(kill_at), str(processes)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = {}
    for name, (_, out, _) in zip(jobs, rows, strict=True):
        error = Path(f"{out}.error")
        found[name] = error.read_text() if error.exists() else load_file(out) if Path(out).exists() else None
    return found


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing more than ``size`` bytes to a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

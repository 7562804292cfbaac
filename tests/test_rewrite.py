"""checkpoint/rewrite.py: a checkpoint with another head is the same checkpoint but for its head."""

from __future__ import annotations

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from p2l_engine import Engine, checkpoint
from p2l_engine.backbone.head import Head
from p2l_engine.checkpoint import rewrite as rewriting
from p2l_engine.checkpoint import saving
from p2l_engine.checkpoint.export import export
from p2l_engine.checkpoint.rewrite import rewrite
from tests.support import tiny

PROMPTS = ["hello", "what is 2 + 2?", "a longer prompt, of several words"]


def theta(folder):
    return Engine.from_pretrained(folder, device="cpu", dtype=torch.float32).coefficients(PROMPTS)


def source(kind, tmp_path):
    if kind == "adapter":
        return tiny.adapter_of(tmp_path / "deep" / "source", tiny.write(tmp_path / "base"), "../../base")
    if kind == "adapter without prefix":
        return tiny.adapter_of(tmp_path / "deep" / "source", tiny.write(tmp_path / "base"), str(tmp_path / "base"), "")
    options = {
        "shards": {"shards": 3},
        "two layers": {"factor": 2.0},
        "two layers, shared": {"factor": 2.0, "eta_downsize": True},
        "bt": {"loss_type": "bt", "head_type": "bt"},
        "bt with an unused tie parameter": {"loss_type": "bt"},
        "bfloat16": {"dtype": torch.bfloat16},
        "one file": {},
    }
    return tiny.write(tmp_path / "source", **options[kind])


KINDS = [
    "one file", "shards", "two layers", "two layers, shared", "bt", "bt with an unused tie parameter", "bfloat16", "adapter",
    "adapter without prefix",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_rewritten_checkpoint_has_the_new_head_and_the_old_backbone(kind, tmp_path):
    folder = source(kind, tmp_path)
    loaded = checkpoint.load(folder)
    old, torch_seed = loaded.head, torch.Generator().manual_seed(3)
    m, d = old.n_models, old.weight.shape[1]
    row, bias = torch.randn(1, d, generator=torch_seed), torch.randn(1, generator=torch_seed)
    # The second model is retired, a new one comes last; 1 + 1e-7 has no bfloat16.
    keep = [0, *range(2, m)]
    eta = [old.weight[m:], old.bias[m:]]
    new = Head(torch.cat([old.weight[keep], row, eta[0]]), torch.cat([old.bias[keep] * (1 + 1e-7), bias, eta[1]]), m)
    names = [*[loaded.models[i] for i in keep], "zeta"]
    target = tmp_path / "elsewhere" / "target"
    rewrite(loaded, target, new, names, {"retired": ["beta"]}, {"extra.json": b"{}\n"})
    again = checkpoint.load(target)
    assert torch.equal(again.head.weight, new.weight)
    assert torch.equal(again.head.bias, new.bias)
    assert (again.models, again.feedback) == (tuple(names), loaded.feedback)
    ours, theirs = loaded.weights.read(), again.weights.read()
    assert {name: tensor.dtype for name, tensor in theirs.items()} == {name: tensor.dtype for name, tensor in ours.items()}
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())
    before, after = theta(folder), theta(target)
    np.testing.assert_allclose(after.theta[:, : m - 1], before.theta[:, keep], rtol=1e-5, atol=1e-6)
    assert (before.eta is None) == (after.eta is None)
    assert before.eta is None or np.array_equal(before.eta, after.eta)
    assert json.loads((target / "training_config.json").read_text())["retired"] == ["beta"]
    assert (target / "extra.json").read_bytes() == b"{}\n"
    assert (target / "adapter_config.json").is_file() == kind.startswith("adapter")


@pytest.mark.parametrize("kind", ["shards", "two layers", "adapter"])
def test_a_rewritten_checkpoint_is_exported_and_rewritten_again(kind, tmp_path):
    loaded = checkpoint.load(source(kind, tmp_path))
    rewrite(loaded, tmp_path / "a", loaded.head)
    rewrite(checkpoint.load(tmp_path / "a"), tmp_path / "b" / "c", loaded.head)
    export(tmp_path / "b" / "c", tmp_path / "exported")
    one, two = theta(tmp_path / "a"), theta(tmp_path / "b" / "c")
    assert np.array_equal(one.theta, two.theta)
    np.testing.assert_allclose(theta(tmp_path / "exported").theta, one.theta, atol=0.3)  # bfloat16
    index = tmp_path / "a" / "model.safetensors.index.json"
    if index.is_file():
        places = json.loads(index.read_text())["weight_map"]
        found = {name: path.name for path in (tmp_path / "a").glob("*.safetensors") for name in load_file(path)}
        assert found == places


def test_what_describes_the_old_head_is_left_out(tmp_path):
    folder = tiny.write(tmp_path / "source")
    for name in ("README.md", "evaluation.json", "catalog.yaml", "notes.txt"):
        (folder / name).write_text(name)
    loaded = checkpoint.load(folder)
    rewrite(loaded, tmp_path / "target", loaded.head, files={"notes.txt": None, "README.md": b"new"})
    found = {path.name for path in (tmp_path / "target").iterdir()}
    assert found & {"catalog.yaml", "evaluation.json", "notes.txt"} == {"catalog.yaml"}
    assert (tmp_path / "target" / "README.md").read_bytes() == b"new"


def test_the_same_head_gives_the_same_bytes(tmp_path):
    loaded = checkpoint.load(tiny.write(tmp_path / "source"))
    for name in ("a", "b"):
        rewrite(loaded, tmp_path / name, loaded.head)
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("a", "b")]
    assert files[0] == files[1]


def test_targets_that_hold_something_are_refused_and_unchanged(tmp_path):
    loaded = checkpoint.load(tiny.write(tmp_path / "source"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for target in (tmp_path / "full", tmp_path / "source", tmp_path / "full" / "mine.txt"):
        with pytest.raises(ValueError, match="does not exist yet, or an empty one"):
            rewrite(loaded, target, loaded.head)
    with pytest.raises(ValueError, match="outside the checkpoint's own"):
        rewrite(loaded, tmp_path / "source" / "inside", loaded.head)
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"
    assert not (tmp_path / "source" / "inside").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    loaded = checkpoint.load(tiny.write(tmp_path / "source"))
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="file/target: cannot be written, nothing was kept"):
        rewrite(loaded, tmp_path / "file" / "target", loaded.head)


def test_a_read_only_source_is_no_hindrance(tmp_path):
    folder = tiny.write(tmp_path / "source")
    for file in folder.iterdir():
        file.chmod(0o444)
    loaded = checkpoint.load(folder)
    rewrite(loaded, tmp_path / "target", loaded.head)
    shutil.rmtree(tmp_path / "target")


def test_heads_that_do_not_fit_are_refused(tmp_path):
    loaded = checkpoint.load(tiny.write(tmp_path / "source"))
    head = loaded.head
    with pytest.raises(ValueError, match="5 different names"):
        rewrite(loaded, tmp_path / "t", head, ["a", "b"])
    with pytest.raises(ValueError, match="5 different names"):
        rewrite(loaded, tmp_path / "t", head, ["a", "b", "c", "d", "a"])
    with pytest.raises(ValueError, match="with a tie parameter"):
        rewrite(loaded, tmp_path / "t", Head(head.weight[:-1], head.bias[:-1], 5))
    with pytest.raises(ValueError, match="files: expected none that the checkpoint consists of"):
        rewrite(loaded, tmp_path / "t", head, files={"model.safetensors": b""})
    with pytest.raises(FloatingPointError, match="not finite"):
        rewrite(loaded, tmp_path / "t", Head(head.weight * float("nan"), head.bias, 5))
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("there", [True, False])
def test_what_another_process_has_written_meanwhile_is_kept(there, tmp_path):
    loaded = checkpoint.load(tiny.write(tmp_path / "source"))
    target = tmp_path / "target"
    if there:
        target.mkdir()

    def second(_):
        rewrite(loaded, target, loaded.head, files={"who": b"second"})

    with pytest.raises(ValueError, match="another process has written it meanwhile"):
        rewrite(loaded, target, loaded.head, files={"who": second})
    assert (target / "who").read_bytes() == b"second"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


@pytest.mark.parametrize("last", ["model.safetensors", "model_list.json", None])
def test_a_kill_while_it_is_written_leaves_no_checkpoint_and_the_next_one_is_whole(last, tmp_path, monkeypatch):
    loaded = checkpoint.load(tiny.write(tmp_path / "source"))
    target = tmp_path / "target"
    written = saving.write_json if last == "model_list.json" else saving.write_tensors

    def die(path, *given, **named):
        written(path, *given, **named)
        if path.name == last:
            os.kill(os.getpid(), signal.SIGKILL)

    if (child := os.fork()) == 0:
        monkeypatch.setattr(rewriting, written.__name__, die)
        try:
            rewrite(loaded, target, loaded.head, files={"more": lambda _: os.kill(os.getpid(), signal.SIGKILL)})
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not target.exists()
    rewrite(loaded, target, loaded.head)
    assert torch.equal(checkpoint.load(target).head.weight, loaded.head.weight)

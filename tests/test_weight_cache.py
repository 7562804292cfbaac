"""Packed weights in files that processes share: the same theta, never of other weights, and sound or made anew."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import pwd
import resource
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from p2l_engine import Engine, checkpoint
from p2l_engine.checkpoint import mapped, weight_cache
from p2l_engine.checkpoint.export import export
from p2l_engine.checkpoint.fingerprint import of_weights
from p2l_engine.checkpoint.mapped import PAGE, DamagedFile
from p2l_engine.native import panels
from p2l_engine.native.panels import Panels
from tests.support import tiny
from tests.support.cases import slow_but
from tests.support.other_user import open_folder, problem_of_other_user

PROMPTS = ["hello", "", "Schreibe ein Gedicht.", ["two", "turns"], "x" * 300]
DTYPES = ("float32", "bfloat16", "int8")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The cache's folder, which is not there yet."""
    monkeypatch.setenv("P2L_ENGINE_WEIGHT_CACHE", str(tmp_path / "weights"))
    return tmp_path / "weights"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("base") / "base")


def theta(source, dtype="float32"):
    return Engine.from_pretrained(source, "cpu", dtype).coefficients(PROMPTS).theta


def without(monkeypatch, call, *arguments):
    """What the call returns without a cache."""
    with monkeypatch.context() as patch:
        patch.setenv("P2L_ENGINE_WEIGHT_CACHE", "off")
        return call(*arguments)


def files(folder):
    """Inode and time of each file: another one was written anew."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def only(folder):
    (path,) = folder.iterdir()
    return path


def is_mapped(tensor, path):
    """Whether the tensor's memory is that file's, and not this process's own."""
    inode, at = path.stat().st_ino, tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(text, 16) for text in line.split()[0].split("-"))
        if begin <= at < end:
            return int(line.split()[4]) == inode
    return False


# An engine


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", slow_but(["llama"], ["llama", "qwen2"]))
def test_theta_is_the_same_to_the_last_bit(family, dtype, tmp_path, folder, monkeypatch):
    source = tiny.write(tmp_path / "c", tiny.config(family, hidden_size=96, intermediate_size=112))
    expected = without(monkeypatch, theta, source, dtype)
    assert not folder.exists()
    first = theta(source, dtype)
    before = files(folder)
    again = theta(source, dtype)
    assert np.array_equal(first, expected)
    assert np.array_equal(again, expected)
    assert files(folder) == before
    assert len(before) == 1


def test_weights_without_packed_products_are_kept_too(base, folder, monkeypatch):
    # As on a CPU on which torch's products are the fastest: beside AMX, or without AVX2.
    monkeypatch.setattr(panels, "level", lambda dtype: -1)
    expected = without(monkeypatch, theta, base)
    assert np.array_equal(theta(base), expected)
    engine = Engine.from_pretrained(base, "cpu", "float32")
    assert not isinstance(engine.backbone.layers[0].qkv, Panels)
    assert np.array_equal(engine.coefficients(PROMPTS).theta, expected)
    assert is_mapped(engine.backbone.layers[0].qkv.weight, only(folder))


def test_the_maker_of_a_file_shares_it_too(base, folder):
    for _ in range(2):
        decoder = Engine.from_pretrained(base, "cpu", "float32").backbone
        for tensor in (decoder.embedding, decoder.norm, *(layer.down.data for layer in decoder.layers)):
            assert is_mapped(tensor, only(folder))
            assert tensor.data_ptr() % 64 == 0


def test_an_adapter_is_not_merged_again(base, tmp_path, folder, monkeypatch):
    adapter = tiny.adapter_of(tmp_path / "adapter", base, str(base))
    expected = without(monkeypatch, theta, adapter)
    assert np.array_equal(theta(adapter), expected)
    assert not np.array_equal(expected, theta(base))

    def fail(*arguments):
        raise AssertionError("the weights are read")

    monkeypatch.setattr(checkpoint.stored.Adapter, "merged", fail)
    assert np.array_equal(theta(adapter), expected)


def test_what_needs_the_weights_themselves_has_them(base, tmp_path, folder, monkeypatch):
    adapter = tiny.adapter_of(tmp_path / "adapter", base, str(base))
    engines = [Engine.from_pretrained(adapter, "cpu", "float32") for _ in range(2)]
    count = sum(weight.numel() for weight in checkpoint.load(adapter).weights.read().values())
    assert [engine.n_parameters for engine in engines] == [count, count]
    export(adapter, tmp_path / "cached")
    without(monkeypatch, export, adapter, tmp_path / "plain")
    names = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "cached").iterdir())
    assert all((tmp_path / "plain" / name).read_bytes() == (tmp_path / "cached" / name).read_bytes() for name in names)


def test_one_file_for_each_dtype_and_instruction_set(base, folder, monkeypatch):
    found = {dtype: theta(base, dtype) for dtype in DTYPES}
    assert len(list(folder.iterdir())) == 3
    if panels.level(torch.int8) > 1:
        monkeypatch.setattr(panels, "level", lambda dtype: 1)  # AVX2
        again, levels = (
            theta(base, "int8"),
            {layer.qkv.level for layer in Engine.from_pretrained(base, "cpu", "int8").backbone.layers},
        )
        assert len(list(folder.iterdir())) == 4
        assert levels == {1}
        assert np.array_equal(again, found["int8"])
        assert np.array_equal(again, without(monkeypatch, theta, base, "int8"))


@pytest.mark.slow
def test_backbones_of_transformers_have_no_file(tmp_path, folder):
    Engine.from_pretrained(tiny.write(tmp_path / "c", tiny.config("gemma")), "cpu", "float32")
    assert not folder.exists()


def test_the_folder_is_named_or_off(base, tmp_path, monkeypatch):
    monkeypatch.setenv("P2L_ENGINE_WEIGHT_CACHE", "weights")
    with pytest.raises(
        ValueError, match="P2L_ENGINE_WEIGHT_CACHE: expected off, or the absolute path of a folder, got 'weights'"
    ):
        Engine.from_pretrained(base, "cpu")
    monkeypatch.delenv("P2L_ENGINE_WEIGHT_CACHE")
    monkeypatch.setenv("P2L_ENGINE_CACHE", str(tmp_path / "cache"))
    theta(base)
    assert [path.suffix for path in (tmp_path / "cache" / "weights").iterdir()] == [weight_cache.SUFFIX]


def test_a_user_without_a_home_has_no_file_and_that_is_said_once(base, monkeypatch, caplog):
    """As in a container whose user is a number alone."""
    expected = without(monkeypatch, theta, base)
    for name in ("HOME", "P2L_ENGINE_WEIGHT_CACHE", "P2L_ENGINE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for _ in range(2):
        assert np.array_equal(theta(base), expected)
    assert len(said(caplog)) == 1
    assert "this user has no home directory; P2L_ENGINE_CACHE names a folder" in said(caplog)[0]


# Weights that changed


def in_place(path, change):
    """Changes a safetensors file in place, and sets its times back."""
    before = path.stat()
    tensors = load_file(path)
    change(tensors)
    data = save_at(path.with_name("new"), tensors)
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_ino, path.stat().st_size, path.stat().st_mtime_ns) == (
        before.st_ino,
        before.st_size,
        before.st_mtime_ns,
    )


def renamed(path, change):
    """Replaces a safetensors file by a changed one with its times."""
    before = path.stat()
    tensors = load_file(path)
    change(tensors)
    path.with_name("new").write_bytes(save_at(path.with_name("new"), tensors))
    os.utime(path.with_name("new"), ns=(before.st_atime_ns, before.st_mtime_ns))
    path.with_name("new").rename(path)


def save_at(path, tensors):
    save_file(tensors, path)
    data = path.read_bytes()
    path.unlink()
    return data


def scale(name):
    def change(tensors):
        (key,) = [key for key in tensors if key.endswith(name)]
        tensors[key] *= 1.5

    return change


@pytest.mark.parametrize("how", [in_place, renamed])
@pytest.mark.parametrize("which", ["adapter", "base", "embedding"])
def test_changed_weights_are_never_served_from_a_file(which, how, base, tmp_path, folder, monkeypatch):
    copy = shutil.copytree(base, tmp_path / "base")
    adapter = tiny.adapter_of(tmp_path / "adapter", copy, str(copy))
    old = theta(adapter)
    if which == "adapter":
        how(adapter / "adapter_model.safetensors", scale("q_proj.lora_B.weight"))
    else:
        how(copy / "model.safetensors", scale("embed_tokens.weight" if which == "embedding" else "layers.2.mlp.up_proj.weight"))
    found = theta(adapter)
    assert np.array_equal(found, without(monkeypatch, theta, adapter))
    assert not np.allclose(found, old, atol=1e-4)


def test_a_single_bit_of_a_large_file_is_another_fingerprint(tmp_path):
    # Which none of the samples of its content holds.
    (tmp_path / "model.safetensors").write_bytes(bytes(5 << 20))
    before, about = of_weights(tmp_path, tmp_path), (tmp_path / "model.safetensors").stat()
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(70_000)
        file.write(b"\1")
    os.utime(tmp_path / "model.safetensors", ns=(about.st_atime_ns, about.st_mtime_ns))
    assert of_weights(tmp_path, tmp_path) != before


def test_changed_settings_of_an_adapter_are_other_weights(base, tmp_path, folder, monkeypatch):
    adapter = tiny.adapter_of(tmp_path / "adapter", base, str(base))
    old, file = theta(adapter), adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 40}))
    found = theta(adapter)
    assert not np.allclose(found, old, atol=1e-4)
    assert np.array_equal(found, without(monkeypatch, theta, adapter))


def test_a_checkpoint_that_changes_while_it_is_loaded_is_kept_under_its_old_fingerprint(base, tmp_path, folder, monkeypatch):
    source = shutil.copytree(base, tmp_path / "base")
    loaded = checkpoint.load(source)
    renamed(source / "model.safetensors", scale("layers.2.mlp.up_proj.weight"))
    Engine(loaded, "cpu", "float32")  # of the old weights, which it has mapped
    assert np.array_equal(theta(source), without(monkeypatch, theta, source))


# Files that are damaged, foreign or half-written


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "bit":
        data[len(data) // 2] ^= 4
    elif how == "header":
        data[80] ^= 4
    elif how == "half":
        del data[len(data) // 2 // PAGE * PAGE :]
    elif how == "torn":
        del data[len(data) // 2 + 1 :]
    elif how == "empty":
        data.clear()
    elif how == "foreign":
        data = bytearray(b"something else" * PAGE)
    elif how == "lost":
        data[-8 * PAGE :] = bytes(8 * PAGE)
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["bit", "header", "half", "torn", "empty", "foreign", "lost"])
def test_a_damaged_file_is_made_anew_and_that_is_said_once(how, base, folder, monkeypatch, caplog):
    expected = theta(base)
    path, sound = only(folder), only(folder).read_bytes()
    damage(path, how)
    assert path.read_bytes() != sound
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(theta(base), expected)
    (said,) = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert str(path) in said
    assert "made anew" in said
    assert path.read_bytes() == sound
    caplog.clear()
    assert np.array_equal(theta(base), expected)
    assert not caplog.records


def test_a_file_of_other_weights_under_this_name_is_made_anew(base, tmp_path, folder, caplog):
    expected, first = theta(base), only(folder)
    theta(tiny.write(tmp_path / "other", seed=1))
    (second,) = [path for path in folder.iterdir() if path != first]
    shutil.copyfile(second, first)
    assert np.array_equal(theta(base), expected)
    assert "expected the key" in caplog.text


SHAPES = st.lists(st.integers(0, 70), max_size=3)
KINDS = st.sampled_from([torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.float64])


@pytest.mark.slow
@settings(max_examples=60)
@given(kinds=st.lists(st.tuples(KINDS, SHAPES), min_size=1, max_size=6), seed=st.integers(0, 2**32 - 1))
def test_tensors_come_back_as_they_were(kinds, seed, tmp_path_factory):
    rng = torch.Generator().manual_seed(seed)
    tensors = {
        f"{i}.é": torch.randint(-1 if dtype != torch.uint8 else 0, 255, shape, generator=rng).to(dtype)
        for i, (dtype, shape) in enumerate(kinds)
    }
    path = tmp_path_factory.mktemp("file") / "file"
    mapped.write(path, "key", tensors)
    found = mapped.read(path, "key")
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor)
        assert found[name].data_ptr() % 64 == 0 or not tensor.numel()
    data = path.read_bytes()
    for tensor in found.values():
        tensor.zero_()
    assert path.read_bytes() == data
    assert all(torch.equal(again, tensors[name]) for name, again in mapped.read(path, "key").items())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A file of a few pages, and how many bytes of its first page mean something."""
    path = tmp_path_factory.mktemp("written") / "file"
    mapped.write(path, "key", {"a": torch.randn(30, 70), "b": torch.arange(3), "c": torch.randn(4000)})
    return path, int.from_bytes(path.read_bytes()[24:32], "little") + 64


@pytest.mark.slow
@settings(max_examples=200)
@given(data=st.data(), flip=st.integers(1, 255))
def test_any_byte_that_changes_shows(data, flip, written, tmp_path_factory):
    path, used = written
    content = bytearray(path.read_bytes())
    at = data.draw(st.one_of(st.integers(0, used - 1), st.integers(PAGE, len(content) - 1)))
    content[at] ^= flip
    other = tmp_path_factory.mktemp("flipped") / "file"
    other.write_bytes(content)
    with pytest.raises(DamagedFile):
        mapped.read(other, "key")


@pytest.mark.slow
@settings(max_examples=60)
@given(data=st.data())
def test_any_part_of_a_file_is_refused(data, written, tmp_path_factory):
    path, _ = written
    content = path.read_bytes()
    other = tmp_path_factory.mktemp("cut") / "file"
    end = data.draw(
        st.one_of(st.integers(0, len(content) - 1), st.integers(0, len(content) // PAGE - 1).map(lambda n: n * PAGE))
    )
    other.write_bytes(content[:end])
    with pytest.raises(DamagedFile):
        mapped.read(other, "key")
    other.write_bytes(content + bytes(PAGE))
    with pytest.raises(DamagedFile):
        mapped.read(other, "key")


def test_exchanged_pages_show(written, tmp_path):
    content = written[0].read_bytes()
    pages = [content[at : at + PAGE] for at in range(0, len(content), PAGE)]
    pages[1], pages[2] = pages[2], pages[1]
    (tmp_path / "file").write_bytes(b"".join(pages))
    with pytest.raises(DamagedFile, match="not what was written"):
        mapped.read(tmp_path / "file", "key")


# Where no file can be kept


def said(caplog):
    return [record.message for record in caplog.records if "no packed weights can be kept here" in record.message]


def test_a_folder_that_cannot_be_made_is_said_once(base, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("P2L_ENGINE_WEIGHT_CACHE", str(tmp_path / "file" / "weights"))
    expected = without(monkeypatch, theta, base)
    for _ in range(2):
        assert np.array_equal(theta(base), expected)
    assert len(said(caplog)) == 1


def test_a_read_only_folder_is_said_and_a_file_in_it_is_used(base, monkeypatch):
    with open_folder() as folder:
        made = []

        def make():
            made.append(1)
            return {"a": torch.arange(3)}

        def kept():
            if not torch.equal(weight_cache.kept(folder, "f", "how", make)["a"], torch.arange(3)):
                raise ValueError("other tensors")
            raise OSError(f"made {len(made)} times: {sorted(said_to)}")

        said_to = []
        monkeypatch.setattr(weight_cache, "_say", said_to.append)
        found = problem_of_other_user(kept)
        assert "made 1 times" in found
        assert "no packed weights can be kept here: [Errno 13] Permission denied" in found
        weight_cache.kept(folder, "f", "how", make)
        made.clear()
        assert problem_of_other_user(kept) == "OSError: made 0 times: []"


def test_a_disk_without_room_is_said_once(base, folder, monkeypatch, caplog):
    expected = without(monkeypatch, theta, base)
    monkeypatch.setattr(weight_cache.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1))
    for _ in range(2):
        assert np.array_equal(theta(base), expected)
    assert len(said(caplog)) == 1
    assert "of free space, found 0 MB" in said(caplog)[0]
    assert list(folder.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile_leaves_nothing(base, folder, monkeypatch, caplog):
    expected = without(monkeypatch, theta, base)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * PAGE, before[1]))  # a write beyond fails, as on a full disk
    try:
        assert np.array_equal(theta(base), expected)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(said(caplog)) == 1
    assert list(folder.iterdir()) == []


def test_errors_of_the_checkpoint_are_its_own(folder, caplog):
    def make():
        raise OSError("the checkpoint's disk")

    with pytest.raises(OSError, match="the checkpoint's disk"):
        weight_cache.kept(folder, "f", "how", make)
    assert not said(caplog)
    assert torch.equal(weight_cache.kept(folder, "f", "how", lambda: {"a": torch.arange(3)})["a"], torch.arange(3))


# Several processes, and what is kept


def make_one(folder, barrier, results):
    made = []

    def make():
        made.append(1)
        time.sleep(0.2)  # the others come meanwhile
        return {"a": torch.arange(100_000)}

    barrier.wait()
    found = weight_cache.kept(folder, "f", "how", make)
    results.put((len(made), bool(torch.equal(found["a"], torch.arange(100_000))), is_mapped(found["a"], only(folder))))


@pytest.mark.slow
def test_processes_that_start_together_make_one_file_and_share_it(tmp_path):
    context, count = multiprocessing.get_context("fork"), 4
    barrier, results = context.Barrier(count), context.Queue()
    processes = [context.Process(target=make_one, args=(tmp_path / "weights", barrier, results)) for _ in range(count)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(made for made, *_ in found) == [0, 0, 0, 1]
    assert all(equal and shared for _, equal, shared in found)


def test_a_file_that_is_loaded_counts_as_used(folder, monkeypatch):
    weight_cache.kept(folder, "f", "how", lambda: {"a": torch.arange(3)})
    path, now = only(folder), time.time()
    os.utime(path, (now - 3600, now - 7200))
    monkeypatch.setattr(mapped, "read", lambda path, key: {})  # as on a disk that notes no reading
    weight_cache.kept(folder, "f", "how", lambda: pytest.fail("made anew"))
    assert path.stat().st_atime > now - 10
    assert path.stat().st_mtime == pytest.approx(now - 7200, abs=1)


def test_files_used_longest_ago_are_removed(folder, monkeypatch):
    monkeypatch.setattr(weight_cache, "MOST_BYTES", 7 * PAGE)
    folder.mkdir()
    other, left = folder / "notes.weights", folder / f".x{weight_cache.SUFFIX}.0123.tmp"
    other.write_text("of another program")
    left.write_text("of a process that was killed")

    def keep(name, pages):
        made = []
        weight_cache.kept(folder, name, "how", lambda: made.append(1) or {"a": torch.zeros(pages * PAGE, dtype=torch.uint8)})
        return bool(made)

    def used(path, when):
        os.utime(path, (when, when))

    assert keep("one", 2)
    assert not left.exists()
    one = next(folder.glob(f"*{weight_cache.SUFFIX}"))
    assert keep("two", 2)
    (two,) = set(folder.glob(f"*{weight_cache.SUFFIX}")) - {one}
    used(one, 2_000_000_000)
    used(two, 1_000_000_000)
    assert keep("three", 2)  # each is a page more, its header
    assert not two.exists()
    assert one.exists()
    assert keep("large", 50)  # the newest is always kept
    assert [path.stat().st_size for path in folder.glob(f"*{weight_cache.SUFFIX}")] == [51 * PAGE]
    assert other.read_text() == "of another program"
    assert not keep("large", 50)

"""The engine's peers compute what the engine computes, and its benchmarks run them to the end; each test at tiny sizes."""

from __future__ import annotations

import csv
import importlib.util
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import latency, peers, setting, throughput
from bench.latency_by_length import prompts_of
from bench.machine import extensions, instructions
from bench.peers import expected
from bench.peers.batches import in_batches, padded
from bench.peers.decoder import Decoder, nibbles, rounded
from bench.peers.expected import TOLERANCE, Expected
from bench.peers.transformers import Transformers
from p2l_engine import Engine, checkpoint
from p2l_engine.backbone.topics import Topics
from tests.support import tiny

pytestmark = pytest.mark.slow  # other runtimes are imported and compile their graphs

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
CPU = torch.device("cpu")


def needs(name):
    package = peers.PACKAGES[name]
    return pytest.param(
        name, marks=pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")
    )


NAMES = [needs(name) for name in peers.PACKAGES]


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def loaded(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return checkpoint.load(tiny.write(folder / "checkpoint", tiny.config(request.param, **SIZES)))


@pytest.mark.parametrize("throughput", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_peer_computes_the_engines_theta(name, throughput, loaded, tmp_path):
    engine = Engine(loaded, "cpu", "float32")
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, 256, n).astype(np.int32) for n in (1, 2, 33, 7, 300, 8)]
    theirs = engine.forward(tokens)
    found = list(peers.start([name], Decoder.of(loaded), 2, throughput, tmp_path))
    assert found[0].precision == "float32"
    for peer in found:
        for out in (np.concatenate(peer.run([[ids] for ids in tokens])), in_batches(peer.run, tokens, 64)):
            assert out.dtype == np.float32
            off = np.sqrt(np.mean((out - theirs) ** 2)) / theirs.std()
            assert off < {"float32": 1e-3, "int4 blocks": 0.4}.get(peer.precision, 0.05), peer.precision
        assert Expected.of(engine).off(peer) < TOLERANCE[peer.precision]


def test_transformers_computes_the_engines_theta(loaded):
    engine, peer = Engine(loaded, "cpu", "float32"), Transformers(loaded, CPU, torch.float32)
    assert Expected.of(engine).off(peer) < 1e-5
    prompts = ["a", "much longer than the others", "b c"]
    np.testing.assert_allclose(peer.one_by_one(prompts), peer.batched(prompts, 30), atol=1e-4)


def test_a_head_that_reads_more_than_hidden_states_is_refused(loaded):
    topics = Topics(torch.zeros(2, SIZES["hidden_size"]), torch.zeros(2), ("a", "b"))
    for start in (Decoder.of, lambda of: Transformers(of, CPU, torch.float32)):
        with pytest.raises(ValueError, match="--checkpoint: expected a head that reads hidden states alone.* has topics"):
            start(replace(loaded, topics=topics))


def test_a_peer_with_another_models_weights_is_refused(loaded, tmp_path):
    engine = Engine(loaded, "cpu", "float32")
    other = checkpoint.load(tiny.write(tmp_path / "other", tiny.config(loaded.config.model_type, **SIZES), seed=1))
    for precision in ("float32", "int4 blocks"):
        peer = Transformers(other, CPU, torch.float32)
        peer.precision = precision
        with pytest.raises(ValueError, match=f"transformers {precision}: expected theta within .* it does not compute"):
            Expected.of(engine).off(peer)
        peer.run = lambda batches: [np.full((len(batch), 6), np.nan, np.float32) for batch in batches]
        with pytest.raises(ValueError, match="got nan"):
            Expected.of(engine).off(peer)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 100))
def test_batches_keep_the_order_and_the_budget(lengths, budget):
    tokens = [np.full(n, i, np.int32) for i, n in enumerate(lengths)]

    def run(batches):
        for batch in batches:
            ids, last = padded(batch)
            assert ids.size <= budget or len(batch) == 1
            assert [ids[row, end] for row, end in enumerate(last)] == [part[0] for part in batch]
            assert not any(ids[row, end + 1 :].any() for row, end in enumerate(last))
        return [np.array([[ids[0], len(ids)] for ids in batch], np.float32) for batch in batches]

    np.testing.assert_array_equal(in_batches(run, tokens, budget), [[i, n] for i, n in enumerate(lengths)])


@given(st.integers(0, 2**32 - 1), st.sampled_from([4, 7, 8]), st.sampled_from([1e-30, 1.0, 1e30]))
def test_weights_in_whole_numbers_are_off_by_half_a_step(seed, bits, size):
    weight = (size * np.random.default_rng(seed).normal(size=(3, 64))).astype(np.float32)
    weight[1, :32] = 0
    values, scales = rounded(weight, 32, bits)
    assert values.min() >= -(2 ** (bits - 1))
    assert values.max() < 2 ** (bits - 1)
    back, step = values * scales.astype(float), np.abs(scales)
    over = np.where(values == 7, 1, 0.5) if bits == 4 else 0.5  # 8, which four bits do not have, becomes 7
    assert (np.abs(back - weight.reshape(back.shape)) <= over * step * (1 + 1e-5)).all()


@given(st.lists(st.integers(-8, 7), min_size=8, max_size=8))
def test_nibbles_are_two_to_a_byte(values):
    packed = nibbles(np.array([values], np.int8))[0]
    signed = [part - 16 if part > 7 else part for byte in packed.tolist() for part in (byte & 15, byte >> 4)]
    assert signed == values


def test_single_prompts_have_their_length_and_no_prefix(loaded):
    encoder = Engine(loaded, "cpu").encoder
    prefix = encoder.prefix()
    for tokens in (1, 8, 700):
        found = prompts_of(encoder, tokens, 3)
        assert [len(ids) for ids in found] == [tokens] * 3
        assert {int(ids[-1]) for ids in found} == {int(encoder.encode(["a"])[0][-1])}
        assert not any(len(prefix) and np.array_equal(ids[: len(prefix)], prefix) for ids in found)


def run(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench", *map(str, arguments)])
    module.main()


@pytest.mark.parametrize("name", NAMES)
def test_latency_by_length_runs_to_the_end(name, tmp_path, monkeypatch):
    folder, table = tiny.write(tmp_path / "checkpoint", tiny.config(**SIZES)), tmp_path / "rows.csv"
    threads = torch.get_num_threads()
    few = (
        "--device", "cpu", "--dtype", "fp32", "--lengths", 8, 16, "--threads", 1, "--busy", 0, 1, "--calls", 2, "--rest", 0.01,
    )  # fmt: skip
    run(monkeypatch, latency, "--checkpoint", folder, *few, "--peers", name, "--csv", table)
    assert torch.get_num_threads() == threads
    rows = list(csv.DictReader(table.open()))
    assert [row["busy"] for row in rows] == ["0"] * (len(rows) // 2) + ["1"] * (len(rows) // 2)
    rows = rows[: len(rows) // 2]
    paths = [(row["path"], row["precision"]) for row in rows if row["tokens"] == "8"]
    assert paths[:3] == [("engine", "float32"), ("transformers", "float32"), (name, "float32")]
    assert len(set(paths)) == len(paths) == len(rows) / 2
    for row in rows:
        assert 0 < float(row["least"]) <= float(row["p50"])
        assert float(row["cpu_p50"]) >= 0
        assert float(row["off"]) < TOLERANCE[row["precision"]]
        mine = next(r for r in rows if r["path"] == "engine" and r["tokens"] == row["tokens"])
        assert float(row["times_float32"]) == pytest.approx(float(row["p50"]) / float(mine["p50"]), rel=1e-4)
        assert row["times_float32"] == row["times_fastest"]  # the engine runs in no other dtype here
        assert instructions() in row["setting"]
        assert peers.PACKAGES[name] in row["setting"]


@pytest.mark.parametrize("name", NAMES)
def test_throughput_of_a_peer_runs_to_the_end(name, tmp_path, monkeypatch):
    folder, table = tiny.write(tmp_path / "checkpoint", tiny.config(**SIZES)), tmp_path / "rows.csv"
    few = ("--device", "cpu", "--dtype", "float32", "--count", 6, "--peer-count", 4, "--reference-count", 2, "--rounds", 1)
    run(monkeypatch, throughput, "--checkpoint", folder, *few, "--peers", name, "--csv", table)
    rows = list(csv.DictReader(table.open()))
    assert [row["path"] for row in rows[:4]] == ["engine", "hf-batched", "reference", name]
    assert [row["prompts"] for row in rows[:4]] == ["6", "4", "2", "4"]
    for row in rows[3:]:
        assert float(row["off"]) < TOLERANCE[row["precision"]]
        assert float(row["times_engine"]) == pytest.approx(
            float(row["prompts_per_s"]) / float(rows[0]["prompts_per_s"]), rel=1e-4
        )


def test_mistakes_are_errors_of_one_line(monkeypatch, capsys, tmp_path):
    folder = tiny.write(tmp_path / "checkpoint")
    few = ("--checkpoint", folder, "--device", "cpu")
    for wrong, told in (
        (("--threads", 1), "expected --lengths"),
        (("--busy", 1), "expected --lengths"),
        (("--lengths", "--busy", -1), "--busy: expected numbers of processes from 0 on, got -1"),
        (("--rest", 1), "expected --lengths"),
        (("--lengths", "--rest", "nan"), "--rest: expected a number of seconds >= 0, got nan"),
        (("--peers", "openvino"), "expected --lengths"),
        (("--lengths", "--tokens", 64), "expected no --lengths"),
        (("--lengths", "--peers", "vllm"), "invalid choice: 'vllm'"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run(monkeypatch, latency, *few, *wrong)
        assert told in capsys.readouterr().err
    for wrong, told in ((("--threads", 4096), "expected at most"), (("--dtype", "int3"), "expected one of float32")):
        with pytest.raises(SystemExit, match="2"):
            setting.run(lambda wrong=wrong: run(monkeypatch, latency, *few, "--lengths", 8, *wrong))
        assert told in capsys.readouterr().err
    monkeypatch.setitem(peers.PACKAGES, "openvino", "not_there")
    with pytest.raises(ValueError, match=r"--peers: not_there is not installed; install it with: pip install"):
        peers.check(["openvino"], CPU)
    with pytest.raises(ValueError, match="--peers: expected --device cpu"):
        peers.check(["openvino"], torch.device("cuda"))


def test_the_machines_instructions_are_named():
    assert all(name in instructions() for name in extensions())
    assert set(peers.PACKAGES) == set(peers.MODULES) == set(setting.PEERS)
    assert expected.TOLERANCE.keys() >= {"float32", "bfloat16", "int8"}

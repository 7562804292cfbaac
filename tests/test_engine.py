"""The engine against transformers' own forward, in any batch composition."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from p2l_engine import Engine, checkpoint
from p2l_engine.backbone.families import FAMILIES
from p2l_engine.backbone.packing import Packed, batches
from p2l_engine.engine import as_device, as_dtype, cpu
from p2l_engine.engine.compile_watch import CompileWatch
from p2l_engine.errors import PromptError
from p2l_engine.native import cpus, panels
from tests.support import families, tiny
from tests.support.cases import slow_but

PROMPTS = [
    "a",
    "hello",
    "world",
    "Schreibe ein Gedicht über den Mond.",
    "x" * 700,
    "def f(x):\n    return x + 1",
    "b",
    "",
]

DECODERS = {name: tiny.config(name) for name in FAMILIES} | {
    "llama mha": tiny.config("llama", num_key_value_heads=6),
    "llama mqa": tiny.config("llama", num_key_value_heads=1),
    "llama biases": tiny.config("llama", attention_bias=True, mlp_bias=True),
    "llama wide heads": tiny.config("llama", head_dim=20),
    "llama tied": tiny.config("llama", tie_word_embeddings=True),
    "llama one layer": tiny.config("llama", num_hidden_layers=1),
    "llama3 rope": tiny.config(
        "llama",
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        },
    ),
    "qwen2 tied mha": tiny.config("qwen2", tie_word_embeddings=True, num_key_value_heads=6),
}  # fmt: skip


@pytest.mark.parametrize("name", slow_but(("llama mqa", "llama3 rope", "llama wide heads", *FAMILIES), DECODERS))
def test_equals_transformers_in_float32(name, tmp_path):
    folder = tiny.write(tmp_path, DECODERS[name])
    engine = Engine.from_pretrained(folder, device="cpu", dtype=torch.float32)
    assert engine.backbone.name.startswith("packed")
    theta, eta = tiny.reference_theta(folder, PROMPTS)
    c = engine.coefficients(PROMPTS)
    assert c.theta.dtype == np.float32
    np.testing.assert_allclose(c.theta, theta, atol=1e-4)
    np.testing.assert_allclose(c.eta, eta, atol=1e-4)


@pytest.mark.slow
def test_equals_transformers_from_1_to_8192_tokens(tmp_path):
    # Few heads, which share keys all the same.
    few = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    folder = tiny.write(tmp_path, tiny.config(**few))
    engine = Engine.from_pretrained(folder, device="cpu", dtype=torch.float32)
    prompts = ["", "ab", "c" * 4000, "d" * 8170, "e" * 9000]
    assert [len(ids) for ids in engine.encoder.encode(prompts)][-1] == 8192
    # Not eager: scores of 8192 x 8192 tokens, for each head and layer, would be written to memory.
    theta, _ = tiny.reference_theta(folder, prompts, attention="sdpa")
    np.testing.assert_allclose(engine.coefficients(prompts).theta, theta, atol=1e-4)
    # The template alone is longer than one token: that case goes straight to the backbone.
    with torch.inference_mode():
        hidden = engine.backbone(Packed.of([np.array([7], np.int32)] * 2))
    np.testing.assert_allclose(hidden[0], hidden[1], atol=1e-6)


@pytest.mark.slow
def test_neighbours_do_not_matter(tmp_path, rng):
    engine = Engine.from_pretrained(tiny.write(tmp_path), device="cpu", dtype=torch.float32)
    alone = np.concatenate([engine.coefficients([prompt]).theta for prompt in PROMPTS])
    for _ in range(5):
        order = rng.permutation(len(PROMPTS) * 3) % len(PROMPTS)
        together = engine.coefficients([PROMPTS[i] for i in order]).theta
        np.testing.assert_allclose(together, alone[order], atol=1e-5)


@pytest.mark.slow
def test_other_architectures_go_through_transformers(tmp_path, caplog):
    decoder = GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=300, n_positions=1024)
    folder = tiny.write(tmp_path, decoder)
    with caplog.at_level(logging.WARNING):
        engine = Engine.from_pretrained(folder, device="cpu", dtype=torch.float32)
    assert "through transformers" in caplog.text
    theta, _ = tiny.reference_theta(folder, PROMPTS)
    np.testing.assert_allclose(engine.coefficients(PROMPTS).theta, theta, atol=1e-4)


@pytest.mark.slow
def test_a_rope_that_changes_with_length_sees_one_prompt(tmp_path):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    decoder = LlamaConfig(**{**tiny.SIZES, "max_position_embeddings": 40}, rope_parameters=rope)
    folder = tiny.write(tmp_path, decoder)
    engine = Engine.from_pretrained(folder, device="cpu", dtype=torch.float32)
    assert engine.backbone.name == "transformers llama"
    alone = np.concatenate([tiny.reference_theta(folder, [prompt])[0] for prompt in PROMPTS])  # each in a new model
    np.testing.assert_allclose(engine.coefficients(PROMPTS).theta, alone, atol=1e-4)
    for prompt, theta in zip(PROMPTS, alone, strict=True):
        np.testing.assert_allclose(engine.coefficients([prompt]).theta[0], theta, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    slow_but(
        ("gpt2", "mamba"),
        ["gemma2", "gpt2", "gpt_oss", "lfm2", "mamba", "mistral", "modernbert", "phi3 longrope", "qwen3", "rwkv"],
    ),
)
def test_other_architectures_equal_transformers(name, tmp_path):
    folder = tiny.write(tmp_path, families.config(name))
    engine = Engine.from_pretrained(folder, device="cpu", dtype=torch.float32)
    alone = np.concatenate([tiny.reference_theta(folder, [prompt], engine.encoder.max_tokens)[0] for prompt in PROMPTS])
    np.testing.assert_allclose(engine.coefficients(PROMPTS).theta, alone, atol=1e-4)


@pytest.mark.slow
def test_a_backbone_that_sees_both_sides_is_not_packed(tmp_path):
    folder = tiny.write(tmp_path, tiny.config("llama", is_causal=False))
    engine = Engine.from_pretrained(folder, device="cpu", dtype=torch.float32)
    assert engine.backbone.name == "transformers llama"
    theta, _ = tiny.reference_theta(folder, PROMPTS)
    np.testing.assert_allclose(engine.coefficients(PROMPTS).theta, theta, atol=1e-4)


def test_prompts_beyond_the_positions_are_truncated(tmp_path, caplog):
    decoder = GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=300, n_positions=30)
    folder = tiny.write(tmp_path, decoder)
    with caplog.at_level(logging.WARNING):
        engine = Engine.from_pretrained(folder, device="cpu", dtype=torch.float32)
    assert "30 positions: longer prompts are truncated from the left to 30 tokens" in caplog.text
    assert engine.warmup() > 0
    assert {len(ids) for ids in engine.encoder.encode(PROMPTS)} == {9, 10, 14, 30}
    theta, _ = tiny.reference_theta(folder, PROMPTS, most=30)
    np.testing.assert_allclose(engine.coefficients(PROMPTS).theta, theta, atol=1e-4)
    with pytest.raises(ValueError, match=r"tokens\[1\]: expected at most 30 tokens, the backbone's positions, got 31"):
        engine.forward([np.ones(30, np.int32), np.ones(31, np.int32)])
    shorter = Engine(checkpoint.load(folder), "cpu", "float32", max_tokens=10)
    assert shorter.encoder.max_tokens == 10


def test_bfloat16_stays_near_float32(tmp_path):
    folder = tiny.write(tmp_path)
    exact = Engine.from_pretrained(folder, device="cpu", dtype=torch.float32).coefficients(PROMPTS).theta
    rounded = Engine.from_pretrained(folder, device="cpu", dtype=torch.bfloat16).coefficients(PROMPTS).theta
    # bfloat16 keeps 8 bits: 0.4% a rounding, over three layers of a 48-wide random network.
    assert np.abs(rounded - exact).max() < 0.03 * np.abs(exact).max()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("template", [tiny.TEMPLATE, "{{ 'You are a helpful assistant. ' * 3 }}" + tiny.TEMPLATE])
def test_int8_stays_near_float32(tmp_path, family, template):
    folder = tiny.write(tmp_path, tiny.config(family), template=template)
    exact = Engine.from_pretrained(folder, device="cpu", dtype="float32").coefficients(PROMPTS).theta
    engine = Engine.from_pretrained(folder, device="cpu", dtype="int8")
    assert engine.dtype == torch.int8
    rounded = engine.coefficients(PROMPTS).theta
    assert 0 < np.abs(rounded - exact).max() < 0.04 * np.abs(exact).max()
    alone = np.concatenate([engine.coefficients([prompt]).theta for prompt in PROMPTS])
    np.testing.assert_allclose(alone, rounded, atol=1e-3 * np.abs(exact).max())


def test_int8_is_refused_where_it_is_not_computed(tmp_path):
    with pytest.raises(ValueError, match="int8 is computed on CPUs alone, got the device 'cuda': use bfloat16"):
        as_dtype("int8", torch.device("cuda"))
    with pytest.raises(ValueError, match="dtype: int8 is for decoders that are computed here .*got 'gpt2'.*: use bfloat16"):
        Engine.from_pretrained(tiny.write(tmp_path, tiny.config("gpt2")), device="cpu", dtype="int8")


def test_empty_batch_and_progress(tmp_path):
    engine = Engine.from_pretrained(tiny.write(tmp_path), device="cpu")
    empty = engine.coefficients([])
    assert empty.theta.shape == (0, 5)
    assert empty.eta.shape == (0,)
    done = []
    engine.coefficients(PROMPTS, progress=done.append)
    assert sum(done) == len(PROMPTS)


def test_heads_without_ties_give_no_eta(tmp_path):
    engine = Engine.from_pretrained(tiny.write(tmp_path, loss_type="bt", head_type="bt"), device="cpu")
    assert engine.coefficients(["hi"]).eta is None


def test_coefficients_that_are_not_finite_name_the_prompt(tmp_path):
    engine = Engine.from_pretrained(tiny.write(tmp_path), device="cpu", dtype=torch.float32)
    engine.head.bias[2] = float("nan")
    with pytest.raises(FloatingPointError, match=r"prompts\[0\].*not finite \(2 such"):
        engine.coefficients(["a", "b"])


def test_a_single_string_is_no_batch(tmp_path):
    engine = Engine.from_pretrained(tiny.write(tmp_path), device="cpu")
    with pytest.raises(TypeError, match="wrap it in a list"):
        engine.coefficients("hello")


def test_batches_keep_every_prompt_within_the_budget(rng):
    lengths = rng.integers(1, 300, size=200).tolist()
    found = batches(lengths, 256)
    assert sorted(i for batch in found for i in batch) == list(range(200))
    assert all(sum(lengths[i] for i in batch) <= 256 or len(batch) == 1 for batch in found)


def test_chunks_are_prefetched_and_every_prompt_comes_once(tmp_path, monkeypatch):
    engine = Engine.from_pretrained(tiny.write(tmp_path), device="cpu", dtype=torch.float32)
    prompts = [f"{i} " * (1 + i % 7) for i in range(50)]
    whole = engine.coefficients(prompts).theta
    monkeypatch.setattr("p2l_engine.engine.engine.PROMPTS_PER_CHUNK", 8)
    monkeypatch.setattr(engine, "tokens_per_batch", 64)
    np.testing.assert_allclose(engine.coefficients(prompts).theta, whole, atol=1e-5)
    batches_seen = list(engine.stream(prompts, lambda hidden, rows: (torch.from_numpy(rows),)))
    assert sorted(i for rows, _ in batches_seen for i in rows) == list(range(50))
    assert all((rows == given).all() for rows, (given,) in batches_seen)
    with pytest.raises(PromptError, match=r"prompts\[41\]"):
        engine.coefficients([*prompts[:41], []])
    monkeypatch.setattr(engine.encoder, "_tokens", lambda texts: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.coefficients(prompts)


def test_a_stream_of_chunks_is_computed_chunk_by_chunk(tmp_path, monkeypatch):
    engine = Engine.from_pretrained(tiny.write(tmp_path), device="cpu", dtype=torch.float32)
    monkeypatch.setattr(engine, "tokens_per_batch", 64)
    prompts = [f"{i} " * (1 + i % 7) for i in range(50)]
    cuts = [0, 1, 20, 23, 50]
    drawn = []

    def chunks():
        for number, (start, end) in enumerate(pairwise(cuts)):
            drawn.append(number)
            yield prompts[start:end]

    found = []
    for outputs in engine.outputs_of(chunks()):
        assert len(drawn) <= len(found) + 4  # at most two chunks are prefetched
        found.append(outputs)
    assert [len(part.outputs) for part in found] == np.diff(cuts).tolist()
    whole = engine.coefficients(prompts)
    together = np.concatenate([part.outputs for part in found])
    np.testing.assert_allclose(together[:, :-1], whole.theta, atol=1e-5)
    np.testing.assert_allclose(together[:, -1], whole.eta, atol=1e-5)
    shared = len(engine.encoder.prefix()) if engine.backbone.prefix is not None else 0
    assert sum(part.tokens for part in found) == sum(len(ids) - shared for ids in engine.encoder.encode(prompts))
    # A chunk's outputs do not depend on its neighbours, to the last bit.
    (alone,) = engine.outputs_of([prompts[20:23]])
    np.testing.assert_array_equal(alone.outputs, found[2].outputs)
    with pytest.raises(PromptError, match=r"prompts\[1\]"):
        list(engine.outputs_of([["fine"], ["fine", []]]))
    with pytest.raises(ZeroDivisionError):
        list(engine.outputs_of(1 / 0 if i else ["fine"] for i in range(2)))


def test_a_warm_up_changes_nothing(tmp_path):
    engine = Engine.from_pretrained(tiny.write(tmp_path), device="cpu", dtype=torch.float32)
    before = engine.coefficients(PROMPTS).theta
    assert engine.warmup() > 0
    np.testing.assert_array_equal(engine.coefficients(PROMPTS).theta, before)
    assert engine.forward(engine.encoder.encode(PROMPTS[:3])).shape == (3, 6)


def test_late_compilation_is_logged(caplog, monkeypatch):
    from triton import knobs

    calls = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **details: calls.append(details))
    monkeypatch.setattr(CompileWatch, "_watching", False)
    CompileWatch.start()
    CompileWatch.start()
    with caplog.at_level(logging.WARNING):
        knobs.runtime.jit_post_compile_hook(fn=SimpleNamespace(name="kernel_x"), key="k")
    assert caplog.text.count("Triton compiled kernel_x after the warm-up") == 1
    assert calls == [{"fn": SimpleNamespace(name="kernel_x"), "key": "k"}]


@pytest.mark.parametrize(
    ("groups", "quotas", "expected"),
    [
        ("0::/system.slice/p2l.service", {"system.slice/p2l.service/cpu.max": "250000 100000"}, 3),
        ("0::/pod/box", {"pod/box/cpu.max": "max 100000", "pod/cpu.max": "100000 50000"}, 2),
        ("0::/pod/box", {"pod/box/cpu.max": "800000 100000", "cpu.max": "400000 100000"}, 4),
        ("0::/pod/box", {"other/cpu.max": "100000 100000"}, 64),
        ("0::/../box", {"box/cpu.max": "100000 100000"}, 64),
        ("0::/", {"cpu.max": "100000 100000"}, 1),
        (
            "4:memory:/mem\n3:cpu,cpuacct:/box\n0::/",
            {"cpu/box/cpu.cfs_quota_us": "200000", "cpu/box/cpu.cfs_period_us": "100000", "cpu/mem/cpu.max": "1 1"},
            2,
        ),
    ],
)
def test_quotas_of_the_own_group_and_of_those_around_it(groups, quotas, expected, tmp_path, monkeypatch):
    """A service of systemd, or a process in a container's inner group, has no quota at the root."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(64), raising=False)
    for name, text in quotas.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    (tmp_path / "own").write_text(f"{groups}\n")
    assert cpus.available(tmp_path, tmp_path / "own") == expected


def test_threads_are_those_of_the_container(tmp_path, monkeypatch):
    everything = cpus.available(tmp_path)  # no cgroup files: the affinity
    assert everything >= 1
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cpus.available(tmp_path) == everything
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert cpus.available(tmp_path) == cpus.available(tmp_path, tmp_path / "none") == 1
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert cpus.available(tmp_path) == everything
    before, threads = torch.get_num_threads(), 2
    monkeypatch.setattr(cpus, "available", lambda: 1)
    try:
        torch.set_num_threads(threads)
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        cpu.limit_threads()
        assert torch.get_num_threads() == threads
        monkeypatch.delenv("OMP_NUM_THREADS")
        cpu.limit_threads()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_wrong_types_of_tokens_and_prompts_are_refused(tmp_path):
    engine = Engine.from_pretrained(tiny.write(tmp_path), device="cpu", dtype=torch.float32)
    assert engine.forward([]).shape == (0, 6)
    with pytest.raises(ValueError, match=r"tokens\[1\]: expected one token at least"):
        engine.forward([np.array([1], np.int32), np.zeros(0, np.int32)])
    with pytest.raises(TypeError, match="expected a list of prompts, got generator"):
        engine.coefficients(p for p in PROMPTS)
    engine.encoder.max_tokens = 0
    with pytest.raises(ValueError, match="max_tokens: expected one at least, got 0"):
        engine.coefficients(["a"])


def test_torchs_bfloat16_products_with_and_without_onednns_layout(tmp_path, monkeypatch):
    folder = tiny.write(tmp_path)
    monkeypatch.setattr(panels, "level", lambda dtype: -1)
    with_onednn = Engine.from_pretrained(folder, device="cpu", dtype=torch.bfloat16).coefficients(["hello"]).theta
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", lambda *_: pytest.fail("not supported"))
    plain = Engine.from_pretrained(folder, device="cpu", dtype=torch.bfloat16).coefficients(["hello"]).theta
    np.testing.assert_allclose(plain, with_onednn, atol=0.03 * np.abs(plain).max())


@pytest.mark.slow
def test_threads_share_an_engine(tmp_path):
    """Concurrent forward passes never share buffers."""
    engine = Engine.from_pretrained(tiny.write(tmp_path), device="cpu", dtype="float32")
    prompts = [f"{i} " * (1 + i % 40) for i in range(24)]
    alone = [engine.coefficients([prompt]).theta[0] for prompt in prompts]
    start = threading.Barrier(8)

    def work(thread):
        start.wait()
        return [(i, engine.coefficients([prompts[i]]).theta[0]) for i in range(thread, len(prompts), 4)]

    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(work, [0, 1, 2, 3] * 2):
            for i, theta in found:
                np.testing.assert_array_equal(theta, alone[i])
    assert 1 <= len(engine.backbone._idle) <= 8


def test_pauses_of_the_watch_are_counted_across_threads():
    start = threading.Barrier(8)

    def pause(_):
        start.wait()
        for _ in range(2000):
            with CompileWatch.paused():
                pass

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(pause, range(8)))
    assert CompileWatch._warming == 0


@pytest.mark.parametrize("name", ["float32", "fp32", "torch.float32", "FP32", torch.float32])
def test_dtypes_have_the_names_that_pytorch_users_write(name):
    assert as_dtype(name, torch.device("cpu")) == torch.float32
    assert as_dtype("bf16", torch.device("cpu")) == as_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16
    assert as_dtype("half", torch.device("cuda")) == torch.float16
    assert as_dtype(None, torch.device("cuda")) == torch.bfloat16


@pytest.mark.parametrize("wrong", ["int4", "float31", torch.int16, 32, ""])
def test_other_dtypes_are_refused_before_the_checkpoint_is_read(wrong):
    with pytest.raises(ValueError, match="dtype: expected one of float32, fp32, .*, got "):
        Engine.from_pretrained("no-such-folder", device="cpu", dtype=wrong)


@pytest.mark.parametrize("wrong", ["tpu", "mps", "cuda:99", "cpu:x", "", " ", 99])
def test_other_devices_are_refused(wrong):
    with pytest.raises(ValueError, match="device: "):
        as_device(wrong)


def test_devices_in_any_case():
    assert as_device("CPU") == as_device(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.slow
def test_a_packed_checkpoint_is_read_without_transformers(tmp_path):
    folder = tiny.write(tmp_path)
    code = (
        "import sys; from p2l_engine import Engine\n"
        f"Engine.from_pretrained({str(folder)!r}, device='cpu').coefficients(['hello', 'you'])\n"
        "print(sorted({'transformers', 'huggingface_hub', 'triton', 'pyarrow', 'sklearn', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", done.stdout

"""Layers that the native core computes in one call: the same bits as its steps one by one, on any number of threads."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from p2l_engine import Engine
from p2l_engine.backbone.on_cpu import CpuOperations
from p2l_engine.backbone.packed import rounds
from p2l_engine.backbone.packing import Packed
from p2l_engine.native import panels
from p2l_engine.native.layer import LayerWeights, Pass
from p2l_engine.native.panels import Panels
from tests.support import tiny
from tests.support.threads import threads

DECODERS = {
    "llama": tiny.config("llama"),
    "qwen2": tiny.config("qwen2"),
    "one key head": tiny.config("llama", num_key_value_heads=1),
    "biases": tiny.config("llama", attention_bias=True, mlp_bias=True),
    "wide heads": tiny.config("llama", head_dim=20),
    "one layer": tiny.config("llama", num_hidden_layers=1),
}
lengths = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@pytest.fixture(scope="module", params=["float32", "bfloat16", "int8"])
def decoders(request, tmp_path_factory):
    """Each decoder twice: with layers in one call, and by steps."""
    if panels.level(getattr(torch, request.param)) < 0:
        pytest.skip(f"{request.param}: torch's products are used on this CPU")
    found = {}
    for name, config in DECODERS.items():
        folder = tiny.write(tmp_path_factory.mktemp(name), config)
        whole, steps = (Engine.from_pretrained(folder, "cpu", request.param).backbone for _ in range(2))
        steps._make = partial(CpuOperations, steps.dtype, rounded=rounds(steps.layers))
        steps._idle.clear()
        found[name] = whole, steps
    return found


@pytest.mark.parametrize("name", DECODERS)
@given(lengths=lengths, seed=st.integers(0, 2**32 - 1), shared=st.integers(0, 30))
@settings(deadline=None, max_examples=15)
def test_the_same_bits_as_by_steps(decoders, name, lengths, seed, shared):
    whole, steps = decoders[name]
    rng = np.random.default_rng(seed)
    prefix = rng.integers(0, 200, shared).astype(np.int32)
    prompts = [rng.integers(0, 200, n).astype(np.int32) for n in lengths]
    prompts = [np.concatenate([prefix, ids]) if rng.random() < 0.7 else ids for ids in prompts]
    found = []
    for decoder, count in ((steps, 1), (whole, 1), (whole, 3)):
        with threads(count):
            decoder.share(prefix)
            kept = []
            packed = Packed.of(prompts, decoder.prefix)
            hidden = decoder.behind(packed, decoder.prefix_kv, lambda kv, kept=kept: kept.append(kv.clone()))
        found.append([hidden, *kept])
    for other in found[1:]:
        assert len(other) == len(found[0]) == len(whole.layers) + 1
        for first, again in zip(found[0], other, strict=True):
            assert torch.equal(first, again)


def layer(width=8, heads=2, kv_heads=1, size=4, inner=6):
    shapes = ((heads + 2 * kv_heads) * size, width), (width, heads * size), (2 * inner, width), (width, inner)
    qkv, out, gate_up, down = (Panels.of(torch.randn(shape), None, torch.float32) for shape in shapes)
    return LayerWeights(torch.ones(width), qkv, out, torch.ones(width), gate_up, down)


def batch(weights, n=3, **changes):
    """A Pass of one prompt of n tokens; changes to what is right."""
    given = {
        "x": torch.randn(n, 8), "heads": 2, "kv_heads": 1, "cos": torch.ones(5, 2), "sin": torch.zeros(5, 2),
        "positions": torch.arange(n).int(), "sources": torch.arange(n).int(), "starts": torch.tensor([0, n]).int(),
        "key_starts": torch.tensor([0, n]).int(),
    } | changes  # fmt: skip
    return Pass(
        given["x"], weights, given["heads"], given["kv_heads"], 1e-5, (given["cos"], given["sin"]),
        tuple(given[name] for name in ("positions", "sources", "starts", "key_starts")),
        lambda name, rows, columns: torch.empty(rows, columns), lambda size: None,
    )  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"x": torch.randn(3, 9)},
        {"x": torch.randn(3, 8).double()},
        {"x": torch.randn(3, 16)[:, ::2]},
        {"heads": 3},
        {"kv_heads": 2},
        {"cos": torch.ones(5, 3), "sin": torch.ones(5, 3)},
        {"sin": torch.ones(4, 2)},
        {"cos": torch.ones(5, 2).double()},
        {"positions": torch.arange(2).int()},
        {"positions": torch.arange(3)},
        {"key_starts": torch.tensor([0, 1, 3]).int()},
        {"sources": torch.arange(3).float()},
    ],
)
def test_a_batch_that_does_not_fit_is_refused(changes):
    with pytest.raises(ValueError, match="expected"):
        batch(layer(), **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"positions": torch.tensor([0, 1, 5]).int()},
        {"positions": torch.tensor([0, -1, 2]).int()},
        {"sources": torch.tensor([0, 1, 3]).int()},
        {"sources": torch.tensor([0, 1, -1]).int()},
        {"starts": torch.tensor([0, 2]).int()},
        {"key_starts": torch.tensor([0, 4]).int()},
    ],
)
def test_indices_out_of_range_are_refused(changes):
    weights = layer()
    with pytest.raises(ValueError, match="sources, positions, starts: expected"):
        batch(weights, **changes).run(weights, None)


@pytest.mark.parametrize(
    "prefix", [torch.zeros(1, 2, 1, 5), torch.zeros(1, 2, 1, 4).double(), torch.zeros(1, 2, 1, 8)[..., ::2]]
)
def test_a_prefix_that_does_not_fit_is_refused(prefix):
    weights = layer()
    with pytest.raises(ValueError, match="prefix: expected contiguous"):
        batch(weights).run(weights, prefix)


def test_weights_that_do_not_fit_are_refused():
    right = layer()
    for name, shape in (("qkv", (16, 9)), ("out", (9, 8)), ("gate_up", (13, 8)), ("down", (8, 7))):
        given = {each: getattr(right, each) for each in ("qkv", "out", "gate_up", "down")}
        given[name] = Panels.of(torch.randn(shape), None, torch.float32)
        with pytest.raises(ValueError, match="weights: expected products"):
            LayerWeights(right.attention_norm, given["qkv"], given["out"], right.mlp_norm, given["gate_up"], given["down"])

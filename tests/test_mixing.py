"""Decoders of transformers against each prompt alone, in a new model and in eager attention."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import T5Config

from p2l_engine import backbone
from p2l_engine.backbone import mixing
from p2l_engine.backbone.packing import Packed
from p2l_engine.backbone.unpacked import unchanged
from p2l_engine.errors import CheckpointError
from tests.support import families
from tests.support.cases import slow_but

OF_EACH_KIND = (
    "bert", "falcon_h1", "gemma2", "gpt2", "gpt_oss", "lfm2", "llama dynamic", "llama longrope", "llama4_text", "mamba",
    "mistral", "mixtral", "modernbert", "rwkv",
)  # fmt: skip
LENGTHS = [40, 3, 21, 9, 9, 14, 1, 7, 2]  # of which some are beyond the windows, and the context, of the tiny decoders


def built(name, seed):
    torch.manual_seed(seed)
    config = families.config(name)
    weights = families.weights(config)
    return config, weights, backbone.build(config, lambda: weights, torch.device("cpu"), torch.float32)


@pytest.mark.slow
def test_every_listed_model_type_is_tested():
    tested = {families.config(name).model_type for name in families.FAMILIES}
    assert mixing.PADDED - tested == set()


@pytest.mark.parametrize("name", slow_but(OF_EACH_KIND, families.FAMILIES))
def test_neighbours_and_history_do_not_matter(name, seed, rng):
    config, weights, decoder = built(name, seed)
    prompts = families.drawn(rng, LENGTHS)
    expected = families.alone(config, weights, prompts)
    close = {"rtol": 0, "atol": 1e-4 * float(expected.abs().max())}
    torch.testing.assert_close(decoder(Packed.of(prompts)), expected, **close)
    for i, ids in enumerate(prompts):  # alone, after longer and shorter ones
        torch.testing.assert_close(decoder(Packed.of([ids])), expected[i : i + 1], **close)
    order = rng.permutation(len(prompts))
    torch.testing.assert_close(decoder(Packed.of([prompts[i] for i in order])), expected[order], **close)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    slow_but(("llama longrope", "lfm2"), ["llama dynamic", "llama longrope", "phi3 longrope", "gemma2", "gpt_oss", "lfm2"]),
)
@given(data=st.data())
@settings(max_examples=6)
def test_any_neighbours_and_any_history(name, data):
    config, weights, decoder = built(name, data.draw(st.integers(0, 5)))
    lengths = st.lists(st.integers(1, 40), min_size=1, max_size=5)
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    for _ in range(data.draw(st.integers(1, 3))):
        prompts = families.drawn(rng, data.draw(lengths))
        expected = families.alone(config, weights, prompts)
        torch.testing.assert_close(decoder(Packed.of(prompts)), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("gpt2", {"n_positions": 16}, 16),
        ("opt", {"max_position_embeddings": 16}, 16),
        ("bert", {"max_position_embeddings": 16}, 16),
        ("roberta", {"max_position_embeddings": 16, "pad_token_id": 1}, 14),  # its first two rows are for padding
        ("roberta", {"max_position_embeddings": 16, "pad_token_id": 7}, 8),
        ("codegen", {"n_positions": 16, "n_ctx": 16}, 16),
        ("gptj", {"n_positions": 16}, 16),
        ("mpt", {"max_seq_len": 16}, 16),
        ("qwen3", {"max_position_embeddings": 16}, None),
        ("falcon alibi", {}, None),
        ("mamba", {}, None),
        ("rwkv", {}, None),
    ],
)
def test_the_longest_prompt_is_found(name, changes, expected, rng):
    config = families.config(name, **changes)
    decoder = backbone.build(config, lambda: families.weights(config), torch.device("cpu"), torch.float32)
    assert decoder.positions == expected
    longest = expected or 40
    (ids,) = families.drawn(rng, [longest])
    assert torch.isfinite(decoder(Packed.of([ids]))).all()
    if expected is not None:
        with pytest.raises((IndexError, RuntimeError)):
            decoder(Packed.of([np.append(ids, ids[:1])]))


def test_a_decoder_that_needs_more_than_tokens_is_refused():
    config = T5Config(vocab_size=300, d_model=48, d_kv=12, d_ff=80, num_layers=1, num_heads=4)
    with pytest.raises(CheckpointError, match="expected a decoder that token ids alone run in float32, got model_type 't5'"):
        backbone.build(config, lambda: families.weights(config), torch.device("cpu"), torch.float32)


def test_a_rope_of_one_kind_of_layer_counts():
    ropes = {"sliding_attention": families.rope("default"), "full_attention": families.rope("dynamic", factor=2.0)}
    config = families.config("gemma3_text", rope_parameters=ropes, max_position_embeddings=16)
    assert mixing.rope_of_length(config)
    assert not mixing.packs(config)
    assert not mixing.pads(config)
    older = families.config("llama", rope_scaling={"type": "dynamic", "factor": 2.0})
    assert mixing.rope_of_length(older)


@pytest.mark.slow
def test_threads_share_a_decoder_with_state(seed, rng):
    config, weights, decoder = built("llama dynamic", seed)
    prompts = families.drawn(rng, [40, 3, 30, 17, 5, 25] * 4)
    expected = families.alone(config, weights, prompts)
    with ThreadPoolExecutor(4) as pool:
        found = torch.cat(list(pool.map(lambda ids: decoder(Packed.of([ids])), prompts)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_a_decoder_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.register_buffer("empty", None)
    before, linear, mean = dict(model.state_dict()), model[0], model[1].running_mean
    with unchanged(model):
        mean.add_(1)
        model.register_buffer("empty", torch.ones(1))
        model[1].running_var, model[1].more, model[0] = torch.zeros(2), 1, nn.Identity()
    assert model[0] is linear
    assert model[1].running_mean is mean
    assert model.empty is None
    assert not hasattr(model[1], "more")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(mean, torch.zeros(2))

"""Decoder configs and RoPE frequencies, against transformers' own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from p2l_engine.backbone.families import FAMILIES, DecoderConfig
from p2l_engine.backbone.rope import UnsupportedConfig
from tests.support import tiny

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
# As in the config.json of published models, in the spelling of transformers 4 or 5.
PUBLISHED = {
    "SmolLM2-135M": {
        "model_type": "llama", "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3,
        "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152, "rms_norm_eps": 1e-5, "rope_theta": 100000,
        "rope_scaling": None, "max_position_embeddings": 8192, "tie_word_embeddings": True, "hidden_act": "silu",
    },
    "Llama-3.1-8B": {
        "model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072, "rope_theta": 500000.0, "rope_scaling": LLAMA3, "attention_bias": False,
    },
    "Llama-3.2-1B": {
        "model_type": "llama", "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
        "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072, "rope_theta": 500000.0, "rope_scaling": LLAMA3 | {"factor": 32.0},
    },
    "Qwen2.5-7B": {
        "model_type": "qwen2", "hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4,
        "intermediate_size": 18944, "num_hidden_layers": 28, "vocab_size": 152064, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768, "rope_theta": 1000000.0, "sliding_window": 131072, "use_sliding_window": False,
    },
    "Qwen2.5-7B, 128k": {
        "model_type": "qwen2", "hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4,
        "intermediate_size": 18944, "num_hidden_layers": 28, "vocab_size": 152064, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072, "rope_theta": 1000000.0,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    },
    "vicuna-16k": {
        "model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 11008,
        "num_hidden_layers": 32, "vocab_size": 32000, "rms_norm_eps": 1e-6, "max_position_embeddings": 4096,
        "rope_scaling": {"factor": 4.0, "type": "linear"},
    },
    "transformers 5": {
        "model_type": "llama", "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3,
        "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"}, "attention_bias": True, "mlp_bias": True,
    },
    "nothing but a name": {"model_type": "llama"},
    "nothing but another name": {"model_type": "qwen2"},
}  # fmt: skip


def theirs(config: dict) -> PretrainedConfig:
    return AutoConfig.for_model(**{key: dict(v) if isinstance(v, dict) else v for key, v in config.items()})


def same_frequencies(config: dict) -> None:
    ours, expected = DecoderConfig.read(config), LlamaRotaryEmbedding(config=theirs(config))
    frequencies, scale = ours.rope.frequencies(ours.head_dim)
    torch.testing.assert_close(frequencies, expected.inv_freq, rtol=1e-7, atol=0)
    assert scale == pytest.approx(expected.attention_scaling, rel=1e-12)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read_as_transformers_reads_them(name):
    config = PUBLISHED[name]
    ours, expected = DecoderConfig.read(config), theirs(config)
    names = (
        "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "rms_norm_eps",
    )  # fmt: skip
    for key in names:
        assert getattr(ours, key) == getattr(expected, key), key
    size = getattr(expected, "head_dim", None) or expected.hidden_size // expected.num_attention_heads
    assert ours.head_dim == size
    assert ours.query_bias == (config["model_type"] == "qwen2" or expected.attention_bias)
    assert ours.output_bias == (config["model_type"] == "llama" and expected.attention_bias)
    assert ours.mlp_bias == bool(getattr(expected, "mlp_bias", False))
    assert DecoderConfig.read(expected.to_dict()) == ours
    same_frequencies(config)


SCALINGS = st.one_of(
    st.just({"rope_type": "default"}),
    st.fixed_dictionaries({"rope_type": st.just("linear"), "factor": st.floats(1, 64)}),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("llama3"),
            "factor": st.floats(1, 64),
            "low_freq_factor": st.floats(0.5, 2),
            "high_freq_factor": st.floats(2.5, 8),
            "original_max_position_embeddings": st.integers(64, 4096),
        }
    ),
    st.fixed_dictionaries(
        {
            "rope_type": st.just("yarn"),
            "factor": st.floats(1, 64),
            "original_max_position_embeddings": st.integers(64, 4096),
        },
        optional={
            "attention_factor": st.floats(0.5, 2),
            "beta_fast": st.floats(16, 64),
            "beta_slow": st.floats(0.5, 4),
            "truncate": st.booleans(),
            "mscale": st.floats(0.1, 2),
            "mscale_all_dim": st.floats(0.1, 2),
        },
    ),
)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(SCALINGS, st.integers(1, 128), st.floats(500, 1e7), st.booleans())
def test_frequencies_are_those_of_transformers(scaling, half, theta, old_spelling):
    sizes = {"model_type": "llama", "head_dim": 2 * half, "max_position_embeddings": 8192}
    spelt = (
        {"rope_theta": theta, "rope_scaling": scaling} if old_spelling else {"rope_parameters": scaling | {"rope_theta": theta}}
    )
    same_frequencies(sizes | spelt)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "architecture 'gpt2' is not one of llama, qwen2"),
        ({"model_type": None}, "architecture None"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic' is not one of"),
        ({"rope_scaling": {"type": "linear"}}, "factor of the RoPE 'linear' is None"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor of the RoPE 'linear' is '2'"),
        ({"rope_theta": None}, "rope_theta of the RoPE 'default' is None"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "from layer to layer"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
        ({"rope_scaling": [1]}, "rope_parameters are a list"),
        ({"hidden_act": "gelu"}, "activation 'gelu' is not silu"),
        ({"vocab_size": "300"}, "vocab_size is '300'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"hidden_size": 100, "num_attention_heads": 3}, "no multiple of its num_attention_heads"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"rms_norm_eps": 1}, "rms_norm_eps is 1"),
        ({"attention_bias": 1}, "biases are"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "sliding-window"),
    ],
)
def test_configs_that_need_transformers_say_why(change, message):
    with pytest.raises(UnsupportedConfig, match=message):
        DecoderConfig.read({"model_type": "llama"} | change)


def test_defaults_are_those_of_transformers():
    for name in FAMILIES:
        assert DecoderConfig.read({"model_type": name}) == DecoderConfig.read(AutoConfig.for_model(name).to_dict())
    assert DecoderConfig.read(tiny.config().to_dict()).num_key_value_heads == 2

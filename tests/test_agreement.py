"""Training computes what inference computes, with every backbone: together as each prompt alone, in eager attention."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel

from p2l_engine import Engine
from p2l_engine.backbone.packing import Packed
from p2l_engine.train import agreement, attention, fused
from p2l_engine.train.config import TrainConfig
from p2l_engine.train.model import build
from p2l_engine.train.saving import write
from tests.support import families, tiny
from tests.support.cases import slow_but

LENGTHS = [1, 2, 3, 7, 9, 9, 14, 21, 40]  # sorted, as batches are; some beyond the windows of the tiny decoders
WAYS = {
    "falcon_h1": "padded",
    "gemma2": "padded",
    "gemma3_text": "packed",
    "gpt2": "packed",
    "gpt_oss": "padded",
    "lfm2": "padded",
    "llama": "fused",
    "llama both sides": "by length",
    "llama dynamic": "by length",
    "llama longrope": "by length",
    "mamba": "padded",
    "mistral": "packed",
    "modernbert": "padded",
    "qwen3": "packed",
}


def backbone(folder, name, seed):
    """A folder with a random decoder and a tokenizer; the decoder's config and weights."""
    torch.manual_seed(seed)
    config = families.config(name)
    weights = families.weights(config)
    model = AutoModel.from_config(config, dtype=torch.float32)
    model.load_state_dict(weights)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return config, weights


def settings(folder, **changes):
    values = {
        "proj_name": "trial", "pretrain_model_name": str(folder), "train_data_path": "votes.parquet", "learning_rate": 1e-3,
        "head_type": "rk", "loss_type": "grk", "dtype": "float32",
    }  # fmt: skip
    return TrainConfig.model_validate(values | changes)


@pytest.mark.parametrize("name", slow_but(WAYS, families.FAMILIES))
def test_training_computes_each_prompt_as_it_is_alone(name, tmp_path, seed, rng):
    config, weights = backbone(tmp_path, name, seed)
    model, _ = build(settings(tmp_path), 3)
    assert model.hidden.way == WAYS.get(name, model.hidden.way)
    prompts = families.drawn(rng, LENGTHS)
    expected = families.alone(config, weights, prompts)
    for some in (prompts, prompts[2:5], prompts[:1]):  # a batch beyond a window, one within it
        with torch.no_grad():
            found = model.hidden(model.model, Packed.of(some))
        first = next(i for i, ids in enumerate(prompts) if ids is some[0])
        want = expected[first : first + len(some)]
        torch.testing.assert_close(found, want, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(
    "name", slow_but(("gemma2", "llama longrope"), ["gemma2", "llama dynamic", "llama longrope", "mistral", "qwen3"])
)
def test_gradients_are_those_of_each_prompt_alone(name, tmp_path, seed, rng):
    _, weights = backbone(tmp_path, name, seed)
    model, _ = build(settings(tmp_path), 3)
    prompts, towards = families.drawn(rng, LENGTHS[2:]), torch.randn(len(LENGTHS) - 2, 48)
    (model.hidden(model.model, Packed.of(prompts)) * towards).sum().backward()
    alone = AutoModel.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    for ids, direction in zip(prompts, towards, strict=True):
        fresh = AutoModel.from_config(alone.config, dtype=torch.float32, attn_implementation="eager").eval()
        fresh.load_state_dict(weights)
        (
            fresh(input_ids=torch.from_numpy(ids).long()[None], use_cache=False).last_hidden_state[0, -1] * direction
        ).sum().backward()
        for mine, its in zip(alone.parameters(), fresh.parameters(), strict=True):
            if its.grad is not None:
                mine.grad = its.grad if mine.grad is None else mine.grad + its.grad
    for (what, mine), one in zip(alone.named_parameters(), model.model.parameters(), strict=True):
        if mine.grad is not None and one.grad is not None:
            torch.testing.assert_close(one.grad, mine.grad, rtol=1e-3, atol=1e-4 * float(mine.grad.abs().max()), msg=what)


@pytest.mark.parametrize(
    "name",
    slow_but(
        ("gemma2", "gpt2", "modernbert", "llama dynamic"),
        ["falcon_h1", "gemma2", "gpt2", "gpt_oss", "lfm2", "llama dynamic", "mistral", "modernbert", "rwkv"],
    ),
)
def test_the_engine_gives_the_coefficients_of_the_model_in_training(name, tmp_path, seed):
    backbone(tmp_path / "base", name, seed)
    config = settings(tmp_path / "base")
    model, tokenizer = build(config, 3)
    with torch.no_grad():
        for what, parameter in model.named_parameters():
            if what.startswith("head."):
                parameter.normal_(std=0.3)
            parameter.copy_(parameter.bfloat16().float())  # what the file keeps
    write(tmp_path / "made", model, model.state_dict(), tokenizer, ("x", "y", "z"), config)
    engine = Engine.from_pretrained(tmp_path / "made", device="cpu", dtype=torch.float32)
    prompts = ["a", "b", "hello", "how are you?", "x" * 60, ["two", "turns"]]
    tokens = sorted(engine.encoder.encode(prompts), key=len)
    with torch.no_grad():
        together = model(Packed.of(tokens))["theta"]
    alone = torch.cat([torch.from_numpy(engine.forward([ids])[:, :3].copy()) for ids in tokens])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4 * float(alone.abs().max()))


@pytest.mark.slow
def test_gradient_checkpointing_changes_no_gradient(tmp_path, seed, rng):
    backbone(tmp_path, "llama longrope", seed)
    packed, found = Packed.of(families.drawn(rng, LENGTHS)), []
    for checkpointing in (False, True):
        model, _ = build(settings(tmp_path, gradient_checkpointing=checkpointing), 3)
        model.train()
        model.hidden(model.model, packed).square().sum().backward()
        found.append([parameter.grad for parameter in model.model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("how", [{"lora": {"r": 4}}, {"train_head_only": True}, {"gradient_checkpointing": True}])
def test_every_kind_of_training_is_checked(how, tmp_path, seed):
    backbone(tmp_path, "mistral", seed)
    model, _ = build(settings(tmp_path, **how), 3)
    assert model.hidden.way == "packed"


def test_a_way_that_differs_is_left_out_by_name(tmp_path, seed, monkeypatch, caplog):
    backbone(tmp_path, "gemma2", seed)
    monkeypatch.setattr("p2l_engine.backbone.mixing.packs", lambda config: True)
    model, _ = build(settings(tmp_path), 3)
    assert model.hidden.way == "padded"
    assert (
        "gemma2 is computed padded in training: packed: packed attention: expected plain causal attention, got softcap"
        in caplog.text
    )
    backbone(tmp_path, "mamba", seed)
    model, _ = build(settings(tmp_path), 3)
    assert model.hidden.way == "padded"
    assert "mamba is computed padded in training: packed: hidden states differ by" in caplog.text


def test_a_fused_layer_that_differs_is_left_out(tmp_path, seed, monkeypatch, caplog):
    backbone(tmp_path, "llama", seed)
    monkeypatch.setattr(fused, "_probabilities", lambda q, k, part, layout: (q @ k.transpose(-1, -2)).softmax(-1))
    model, _ = build(settings(tmp_path), 3)
    assert model.hidden.way == "packed"
    assert "llama is computed packed in training: fused: hidden states differ by" in caplog.text


def test_a_backbone_of_which_no_way_agrees_is_refused(tmp_path, seed, monkeypatch):
    backbone(tmp_path, "llama", seed)
    monkeypatch.setattr(agreement, "last_hidden", lambda model, packed, padded: torch.ones(len(packed), 48))
    with pytest.raises(ValueError, match="pretrain_model_name: llama computes prompts together differently .*: fused: hidden"):
        build(settings(tmp_path), 3)


def test_sharded_weights_need_one_pass_a_batch(tmp_path, seed):
    backbone(tmp_path, "llama dynamic", seed)
    with pytest.raises(ValueError, match="fsdp, deepspeed: llama is trained with prompts of one length at a time"):
        build(settings(tmp_path, fsdp=True), 3)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.zeros(2)}, "s_aux"),
        ({"attention_mask": torch.zeros(1, 1, 5, 5)}, "attention_mask"),
        ({"is_causal": False}, "attention to both sides"),
        ({"sliding_window": 4}, "a sliding window of 4 tokens for a prompt of 5"),
    ],
)
def test_packed_attention_refuses_what_it_does_not_compute(others, message, rng):
    packed = Packed.of(families.drawn(rng, [5]))
    q = torch.randn(1, 2, 5, 8)
    mask = others.pop("attention_mask", None)
    module = torch.nn.Identity()
    plain = {
        "position_ids": packed.positions,
        "is_causal": True,
        "softcap": None,
        "output_attentions": False,
        "sliding_window": 5,
    }
    assert attention.packed_attention(module, q, q, q, None, packed=packed, **plain)[0].shape == (1, 5, 2, 8)
    with pytest.raises(ValueError, match=f"expected plain causal attention, got {message}"):
        attention.packed_attention(module, q, q, q, mask, packed=packed, **{**plain, **others})

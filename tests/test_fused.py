"""The fused CPU layers against transformers' and peft's own: outputs and every gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel

from p2l_engine.backbone.packing import Packed
from p2l_engine.train import fused
from p2l_engine.train.attention import register
from tests.support import tiny
from tests.support.cases import slow_but

LENGTHS = [1, 3, 3, 7, 20, 20, 20]


def models(config, lora):
    """The same random decoder twice: with transformers' layers, and to be fused."""
    pair = []
    for _ in range(2):
        torch.manual_seed(1)
        model = AutoModel.from_config(config, attn_implementation=register()).float()
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, 0.0 if "bias" in name else 1.0, 0.3)
        if lora:
            names = r"layers\.(1|2)\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
            model = get_peft_model(model, LoraConfig(r=4, lora_alpha=12, target_modules=names))
            torch.manual_seed(2)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.1)
        pair.append(model)
    return pair


def batch(vocabulary):
    rng = np.random.default_rng(0)
    return Packed.of([rng.integers(0, vocabulary, n).astype(np.int32) for n in LENGTHS])


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("checkpointing", slow_but([False], [False, True]))
def test_outputs_and_gradients_are_transformers(family, lora, checkpointing):
    config = tiny.config(family=family, num_hidden_layers=3)
    plain, quick = models(config, lora)
    bare = quick.base_model.model if lora else quick
    fused.fuse(bare, torch.float32)
    if checkpointing:
        bare.gradient_checkpointing_enable({"use_reentrant": False})
        bare.train()
    packed = batch(config.vocab_size)
    weight = torch.randn(len(LENGTHS), config.hidden_size)
    inputs = {"input_ids": packed.tokens.long()[None], "position_ids": packed.positions.long()[None], "use_cache": False}
    outputs = []
    for model, more in (
        (plain, {"packed": packed}),
        (quick, {"layout": fused.layout_of(bare, packed.positions, packed.runs())}),
    ):
        out = model(**inputs, **more).last_hidden_state[0, packed.last.long()]
        (out * weight).sum().backward()
        outputs.append(out)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-5)
    for (name, a), (_, b) in zip(plain.named_parameters(), quick.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5 * float(a.grad.abs().max()), msg=name)


def test_packed_attention_is_that_of_each_prompt_alone():
    config = tiny.config()
    model = AutoModel.from_config(config, attn_implementation=register()).float().eval()
    packed = batch(config.vocab_size)
    inputs = {"input_ids": packed.tokens.long()[None], "position_ids": packed.positions.long()[None], "use_cache": False}
    with torch.no_grad():
        together = model(**inputs, packed=packed).last_hidden_state[0]
        model.set_attn_implementation("eager")
        for start, n in zip(packed.starts.tolist(), packed.lengths, strict=False):
            alone = model(input_ids=packed.tokens.long()[None, start : start + n], use_cache=False).last_hidden_state[0]
            torch.testing.assert_close(together[start : start + n], alone, rtol=0, atol=1e-5)


def test_long_prompts_are_attended_in_parts(monkeypatch):
    config = tiny.config()
    whole, parts = models(config, lora=False)
    packed = batch(config.vocab_size)
    found = []
    for model in (whole, parts):
        fused.fuse(model, torch.float32)
        layout = fused.layout_of(model, packed.positions, packed.runs())
        out = model(input_ids=packed.tokens.long()[None], use_cache=False, layout=layout).last_hidden_state
        out.square().sum().backward()
        found.append((out, model.embed_tokens.weight.grad))
        monkeypatch.setattr(fused, "PROBABILITIES", 1)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_bfloat16_is_near_float32():
    config = tiny.config()
    wide, narrow = models(config, lora=False)
    packed, outputs = batch(config.vocab_size), []
    for model, dtype in ((wide, torch.float32), (narrow, torch.bfloat16)):
        fused.fuse(model, dtype)
        layout = fused.layout_of(model, packed.positions, packed.runs())
        out = model(input_ids=packed.tokens.long()[None], use_cache=False, layout=layout).last_hidden_state.float()
        out.square().mean().backward()
        outputs.append((out.detach(), model.layers[0].mlp.up_proj.weight.grad))
    for a, b in zip(*outputs, strict=True):
        assert float((a - b).norm() / a.norm()) < 0.03


def test_adapters_on_some_layers_of_a_product_are_refused():
    linear, adapted = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    adapted.lora_A = None
    with pytest.raises(ValueError, match="an adapter on every linear layer of a block or on none"):
        fused.Product.of((linear, adapted), torch.float32)

"""What is exported or trained is read by lmarena/p2l's code, which runs on transformers 4."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import processors
from transformers import AutoModel, AutoTokenizer, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from p2l_engine import Engine
from p2l_engine.checkpoint import huggingface
from p2l_engine.checkpoint.export import export
from p2l_engine.train.run import train
from tests.support import tiny, transformers4
from tests.support.training import settings

pytestmark = pytest.mark.slow

PROMPTS = ["sum 1", "a poem about rain", "", "<|cls|> and " + "x" * 300, ["first", "second\n"], "naïve 漢字 <|im_end|>"]
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 256}
ROPES = {
    "default": {"rope_theta": 500_000.0},
    "linear": {"rope_theta": 20_000.0, "factor": 2.5},
    "llama3": {"rope_theta": 50_000.0, **LLAMA3},
    "yarn": {"rope_theta": 30_000.0, "factor": 4.0, "original_max_position_embeddings": 2048},
}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The published code's answers to jobs, from one process."""
    with transformers4.reader(transformers4.environment(), tmp_path_factory.mktemp("transformers4")) as run:
        yield run


def in_double_precision(engine):
    """Theta and eta by transformers 5 in float64, each prompt alone: what rounding leaves out of the comparison."""
    model = AutoModel.from_pretrained(engine.folder, dtype=torch.float64)
    with torch.no_grad():
        states = [model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in engine.encoder.encode(PROMPTS)]
    return engine.head.split(F.linear(torch.stack(states), engine.head.weight.double(), engine.head.bias.double()))


def assert_equal_to_ours(published, folders):
    jobs = [{"folder": str(folder), "prompts": PROMPTS} for folder in folders]
    for folder, theirs in zip(folders, published(jobs), strict=True):
        engine = Engine.from_pretrained(folder, device="cpu", dtype=torch.float32)
        ours = engine.coefficients(PROMPTS)
        # In float32, the engine's products and torch's sum in other orders: theta of 17 differs by seven roundings.
        for dtype, (theta, eta), atol, rtol in (
            ("torch.float32", (ours.theta, ours.eta), 2e-5, 2e-6),
            ("torch.float64", in_double_precision(engine), 1e-6, 0),
        ):
            found = theirs[dtype]
            np.testing.assert_allclose(found["theta"], theta, rtol, atol, err_msg=f"{folder}, {dtype}")
            assert (found["eta"] is None) == (eta is None)
            if eta is not None:
                np.testing.assert_allclose(found["eta"], eta, rtol, atol, err_msg=f"{folder}, {dtype}")
        assert theirs["dtype"] == "torch.bfloat16"


def test_an_exported_checkpoint_of_the_package(published, default_engine, tmp_path):
    """Not the default one, which reads topics: export refuses it."""
    export("builtin/llmrouter-9", tmp_path / "nine")
    assert_equal_to_ours(published, [tmp_path / "nine"])
    with pytest.raises(ValueError, match="topics"):
        export(None, tmp_path / "default")


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_exported_checkpoints_of_every_rope_and_head(published, family, tmp_path):
    heads = [{}, {"loss_type": "bt", "head_type": "bt"}, {"factor": 2, "eta_downsize": True}, {"factor": 2, "head_type": "bt"}]
    folders = []
    for (kind, rope), head in zip(ROPES.items(), heads, strict=True):
        config = tiny.config(family, rope_parameters={"rope_type": kind, **rope})
        loss = {"loss_type": "bt-tie"} if head.get("head_type") == "bt" else {}
        source = tiny.write(tmp_path / "source" / kind, config, **(loss | head))
        export(source, tmp_path / kind)
        folders.append(tmp_path / kind)
    assert_equal_to_ours(published, folders)


def test_a_tokenizer_that_adds_tokens_by_itself_and_has_more_special_ones(published, tmp_path):
    """Readers that let it add them would see its first token twice."""
    source = tiny.write(tmp_path / "source", template="{{ bos_token }}" + tiny.TEMPLATE)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|one|>", "<|two|>"]})
    bos = ("<|im_start|>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[bos])
    tokenizer.save_pretrained(source)
    assert tokenizer("x").input_ids[0] == tokenizer.bos_token_id
    before = Engine.from_pretrained(source, device="cpu", dtype=torch.float32).coefficients(PROMPTS).theta
    export(source, tmp_path / "exported")
    after = Engine.from_pretrained(tmp_path / "exported", device="cpu", dtype=torch.float32).coefficients(PROMPTS).theta
    assert np.abs(after - before).max() < 0.1  # rounded to bfloat16
    assert_equal_to_ours(published, [tmp_path / "exported"])


def test_trained_checkpoints(published, tmp_path):
    """A whole one as it is; an adapter after its export."""
    folders = []
    for name, how in {"whole": {}, "adapter": {"lora": {"r": 4}}}.items():
        folder = train(settings(tmp_path / name, num_train_epochs=1, **how), max_steps=2)
        if how:
            export(folder, tmp_path / "exported")
        folders.append(tmp_path / "exported" if how else folder)
    assert_equal_to_ours(published, folders)


def test_any_rope_is_read_alike(published, rng, tmp_path):
    """Cosines by transformers 4, from its own keys, against those of transformers 5, at positions before and after a change."""
    jobs, expected = [], []
    for i in range(60):
        kind = ["default", "linear", "llama3", "yarn", "dynamic", "longrope"][i % 6]
        original, factor = int(rng.choice([64, 256, 1000])), float(rng.choice([1.5, 4.0, 8.0]))
        rope = {"rope_type": kind, "rope_theta": float(rng.choice([500.0, 10_000.0, 123_456.7, 5e6]))}
        rope |= {} if kind == "default" else {"factor": factor}
        rope |= LLAMA3 | {"factor": factor} if kind == "llama3" else {}
        rope |= {"original_max_position_embeddings": original} if kind in ("llama3", "yarn", "longrope") else {}
        if kind == "longrope":
            rope |= {f"{name}_factor": rng.uniform(1, 4, 4).tolist() for name in ("short", "long")}
        if kind == "yarn" and rng.random() < 0.5:
            rope |= {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.25}
        config = LlamaConfig(
            hidden_size=16, num_attention_heads=2, max_position_embeddings=int(original * factor), rope_parameters=rope
        )
        folder = tmp_path / f"{i}"
        folder.mkdir()
        huggingface.write_config(folder, config)
        positions = int(rng.choice([3, original, original * 9]))
        jobs.append({"folder": str(folder), "positions": positions})
        table = LlamaRotaryEmbedding(huggingface.read_config(folder))
        expected.append(table(torch.ones(1), torch.arange(positions)[None])[0][0, -1].tolist())
        assert json.loads((folder / "config.json").read_text())["rope_theta"] == rope["rope_theta"]
    found = published(jobs)
    for job, theirs, ours in zip(jobs, found, expected, strict=True):
        np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-6, err_msg=str(job))

"""Training: checks of the votes, one forward pass for all votes of a prompt, checkpoints that the engine loads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from p2l_engine import Engine
from p2l_engine.evaluation.metrics import Prediction
from p2l_engine.evaluation.sources import of_config
from p2l_engine.feedback import feedback_model
from p2l_engine.train import data
from p2l_engine.train.batches import PromptVotes, collate
from p2l_engine.train.config import TrainConfig
from p2l_engine.train.model import build
from p2l_engine.train.run import train
from p2l_engine.train.saving import write
from p2l_engine.votes import read, split
from p2l_engine.votes.marginal import marginal_fit
from tests.support import tiny
from tests.support.command import p2l_engine
from tests.support.training import settings, write_votes


@pytest.mark.slow
@pytest.mark.parametrize("how", [{}, {"lora": {"r": 4, "alpha": 8, "first_layer": 1}}, {"train_head_only": True}])
def test_training_learns_and_the_engine_loads_it(how, tmp_path):
    config = settings(tmp_path, **how)
    folder = train(config)
    engine = Engine.from_pretrained(folder, device="cpu", dtype=torch.float32)
    training, _, held_out = data.load(config)
    prompts = held_out.prompts
    assert len(prompts) == 12
    if not config.train_head_only:
        c, marginal = engine.coefficients(prompts), marginal_fit(engine.feedback, training)
        baseline = Prediction.of(c.feedback, marginal.theta[None], np.array([marginal.eta]), held_out)
        assert Prediction.of(c.feedback, c.theta, c.eta, held_out).loss.mean() < 0.6 * baseline.loss.mean()
        chosen = [engine.models[m] for m in c.theta.argmax(1)]
        good = ["x" if prompt[0].startswith("sum") else "y" for prompt in prompts]
        assert np.mean([a == b for a, b in zip(good, chosen, strict=True)]) > 0.8
    published = json.loads((folder / "training_config.json").read_text())
    assert published["loss_type"] == "grk"
    assert published["model_type"] == "llama"


@pytest.mark.parametrize(
    ("rows", "change", "message"),
    [
        ([("p", "x", "y", "tie"), ("q", "y", "x", "tie (bothbad)")], {}, "all 2 are ties"),
        ([("p", "x", "y", "tie")], {"loss_type": "bt", "head_type": "bt"}, "at least one vote with a weight above 0"),
        ([("p", "x", "y", "model_a"), ("q", "v", "w", "model_b")], {}, "no chain of votes connects these models .*: x, y"),
        ([("p", "x", "x", "model_a")], {}, "a model against itself"),
        ([("", "x", "y", "model_a")], {}, "prompt: empty"),
    ],
)
def test_votes_without_information_are_refused(rows, change, message, tmp_path):
    config = settings(tmp_path, **change)
    write_votes(tmp_path / "votes.parquet", rows)
    with pytest.raises(ValueError, match=message):
        train(config)


def test_votes_on_one_model_are_refused(tmp_path):
    config = settings(tmp_path, loss_type="ols", head_type="bt")
    pq.write_table(pa.table({"prompt": ["p"], "model": ["x"], "value": [1.0]}), tmp_path / "votes.parquet")
    with pytest.raises(ValueError, match="votes on at least two models, got one: 'x'"):
        train(config)
    pq.write_table(pa.table({"prompt": ["p", "p"], "model": ["x", "y"], "value": [1.0, 0.5]}), tmp_path / "votes.parquet")
    with pytest.raises(ValueError, match="value: expected counts"):
        train(config.model_copy(update={"loss_type": "poisson"}))


@pytest.mark.slow
def test_disconnected_models_can_be_trained(tmp_path, caplog):
    config = settings(tmp_path, disconnected_models="train", held_out=0)
    write_votes(tmp_path / "votes.parquet", [("p", "x", "y", "model_a"), ("q", "v", "w", "model_b")])
    with caplog.at_level("INFO"):
        assert train(config, max_steps=1).is_dir()
    assert "no chain of votes connects" in caplog.text


@pytest.mark.slow
def test_disconnected_models_can_be_left_out(tmp_path, caplog):
    rows = [(f"{i} of {i % 7}", *pair, "model_a") for i in range(40) for pair in (("x", "y"), ("y", "z"), ("v", "w"))]
    config = settings(tmp_path, disconnected_models="leave_out")
    write_votes(tmp_path / "votes.parquet", rows)
    engine = Engine.from_pretrained(train(config, max_steps=1), device="cpu")
    assert engine.models == ("x", "y", "z")
    assert "disconnected_models: left out 2 models and their 30 training votes" in caplog.text
    found = of_config(engine, "held-out", None)  # the same votes, read again from the config
    assert (found.held_out.models, len(found.held_out)) == (engine.models, 20)
    one = [("p", "x", "y", "model_a")] * 3 + [(f"{i}", "v", "w", "model_b") for i in range(9)] + [("0", "w", "u", "tie")]
    write_votes(tmp_path / "votes.parquet", one)
    votes, _ = read(config.train_data_path)
    seed = next(seed for seed in range(1000) if split(votes, 0.1, seed=seed).held_out.prompts == (("p",),))
    with pytest.raises(ValueError, match="leaves no votes in the held-out part"):
        data.load(config.model_copy(update={"held_out": 0.1, "split_seed": seed}))


@pytest.mark.slow
def test_bt_leaves_out_ties_and_truncated_prompts_are_counted(tmp_path, caplog):
    config = settings(tmp_path, loss_type="bt", head_type="bt", max_length=12)
    with caplog.at_level("INFO"):
        train(config, max_steps=1)
    assert "left out 48 ties" in caplog.text
    assert "reach max_length = 12 tokens" in caplog.text


@pytest.mark.slow
def test_dropout_is_repeatable(tmp_path):
    votes, _ = read(settings(tmp_path).train_data_path)
    encoder = Engine.from_pretrained(tmp_path / "base", device="cpu").encoder
    whole, some = PromptVotes(votes, encoder), PromptVotes(votes, encoder, token_dropout=0.3, seed=1)
    first = [some[i]["ids"] for i in range(10)]
    assert all(len(a) <= len(whole[i]["ids"]) and a[-1] == whole[i]["ids"][-1] for i, a in enumerate(first))
    assert [len(some[i]["ids"]) for i in range(10)] == [len(a) for a in first]
    some.epoch = 1
    assert any(not np.array_equal(some[i]["ids"], a) for i, a in enumerate(first))
    config = settings(tmp_path, token_dropout=0.2, head_dropout=0.2, num_train_epochs=1)
    assert train(config, max_steps=2).is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["bt-tie", "rk", "rk-reparam", "bag"])
def test_every_feedback_model_trains(loss_type, tmp_path):
    head = "bt" if loss_type.startswith("bt") else "rk"
    folder = train(settings(tmp_path, loss_type=loss_type, head_type=head, num_train_epochs=1), max_steps=2)
    assert np.isfinite(Engine.from_pretrained(folder, device="cpu").coefficients(["hello"]).theta).all()


@pytest.mark.slow
def test_a_downsized_head_trains_and_loads(tmp_path):
    config = settings(tmp_path, linear_head_downsize_factor=1.5, head_config={"eta_downsize": True}, num_train_epochs=1)
    head = Engine.from_pretrained(train(config, max_steps=2), device="cpu").head
    assert list(head.weight.shape) == [4, 48]
    assert torch.linalg.matrix_rank(head.weight[:3]) == 2  # its inner width


def test_trained_model_and_engine_agree(tmp_path):
    config = settings(tmp_path, lora={"r": 4}, num_train_epochs=1, dtype="float32")
    votes, _ = read(config.train_data_path)
    torch.manual_seed(0)
    model, tokenizer = build(config, 3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or name.startswith("head."):
            torch.nn.init.normal_(parameter, std=0.1)
            parameter.data = parameter.data.bfloat16().float()  # what the file keeps
        if "lora_A" in name:
            parameter.data = parameter.data.bfloat16().float()
    write(tmp_path / "made", model, model.state_dict(), tokenizer, votes.models, config)
    engine = Engine.from_pretrained(tmp_path / "made", device="cpu", dtype=torch.float32)
    items = PromptVotes(votes, engine.encoder)
    batch = collate([items[i] for i in range(5)])
    with torch.no_grad():
        outputs = model(**batch)
    c = engine.coefficients([votes.prompts[i] for i in batch["prompts"]])
    np.testing.assert_allclose(c.theta, outputs["theta"], atol=1e-4)
    likelihood = [
        feedback_model("grk").log_likelihood(
            torch.tensor(c.theta[row, a]), torch.tensor(c.theta[row, b]), torch.tensor(c.eta[row]), torch.tensor(y)
        )
        for (row, a, b), y in zip(batch["pairs"].tolist(), batch["outcome"].tolist(), strict=True)
    ]
    assert float(outputs["loss"]) == pytest.approx(-float(torch.stack(likelihood).sum()), abs=1e-3)


@pytest.mark.slow
def test_an_adapter_carries_the_embedding_of_a_new_cls_token(tmp_path):
    config = settings(tmp_path, lora={"r": 4}, num_train_epochs=1)
    # A backbone whose vocabulary is full and has no CLS token.
    tiny.write(tmp_path / "base", tiny.config(vocab_size=259), dtype=torch.bfloat16)
    tiny.tokenizer(cls_token=None).save_pretrained(tmp_path / "base")
    folder = train(config, max_steps=2)
    engine = Engine.from_pretrained(folder, device="cpu", dtype=torch.float32)
    assert engine.encoder.tokenizer.id_of(engine.encoder.cls_token) == 259
    eos = engine.encoder.tokenizer.id_of(engine.encoder.tokenizer.special_tokens["eos_token"])
    torch.testing.assert_close(engine.backbone.embedding[259], engine.backbone.embedding[eos])
    assert np.isfinite(engine.coefficients(["hello"]).theta).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rat": 1}, "learning_rat: Extra inputs are not permitted"),
        ({"learning_rate": -1}, "learning_rate: .*greater than 0"),
        ({"head_type": "bt"}, "head_type: expected 'rk' for loss_type 'grk'"),
        ({"lora": {"rank": 3}}, "lora.rank: Extra inputs"),
        ({"held_out": 1.5}, "held_out"),
        ({"disconnected": "train"}, "disconnected: Extra inputs are not permitted"),
        pytest.param({"cls_token_if_none": "<|new|>", "lora": {"r": 4}}, None, marks=pytest.mark.slow),
    ],
)
def test_bad_configs_are_one_line_on_the_command_line(change, message, tmp_path):
    values = settings(tmp_path).model_dump(exclude_none=True) | change
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    ended = p2l_engine("train", "--config", str(file), "--max-steps", "1")
    if message is None:  # the tiny tokenizer has a CLS token already, so no embedding is added
        assert ended.status == 0
        return
    assert ended.status == 2
    assert message.split(":")[0] in ended.message
    with pytest.raises(ValueError, match=message):
        TrainConfig.load(file)


def test_the_committed_configs_are_valid():
    files = sorted((Path(__file__).parent.parent / "train" / "configs").glob("*.yaml"))
    assert files
    for file in files:
        TrainConfig.load(file)

"""Training: votes read and checked, one forward for all votes of a prompt, checkpoints that the engine loads."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from p2l_engine import Engine
from p2l_engine.regression import Outcome, feedback_model
from p2l_engine.train import votes as vote_files
from p2l_engine.train.__main__ import main
from p2l_engine.train.batches import Collator, LengthGroupedBatches, PromptVotes
from p2l_engine.train.config import TrainConfig
from p2l_engine.train.evaluate import evaluate, figures, marginal
from p2l_engine.train.model import build
from p2l_engine.train.run import split, train
from p2l_engine.train.votes import Votes
from tests import tiny


def vote_table(rows):
    return pa.table({key: [row[i] for row in rows] for i, key in enumerate(("prompt", "model_a", "model_b", "winner"))})


def write_votes(path, rows):
    pq.write_table(vote_table(rows), path)
    return str(path)


ROWS = [
    ("p1", "x", "y", "model_a"),
    ('["p2", "and more"]', "y", "z", "tie"),
    ("p1", "z", "x", "tie (bothbad)"),
    ('["p1"]', "y", "z", "model_b"),
]


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "folder"])
def test_votes_are_grouped_by_prompt(kind, tmp_path):
    path = tmp_path / f"votes.{kind}"
    if kind == "parquet":
        write_votes(path, ROWS)
    elif kind == "folder":
        path.mkdir()
        write_votes(path / "train-00000.parquet", ROWS)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in vote_table(ROWS).to_pylist()))
    votes = vote_files.read(str(path))
    assert votes.prompts == (("p1",), ("p2", "and more"))
    assert votes.models == ("x", "y", "z")
    assert votes.prompt.tolist() == [0, 0, 0, 1]
    assert votes.outcome.tolist() == [Outcome.A, Outcome.BOTH_BAD, Outcome.B, Outcome.TIE]
    only = votes.of([1])
    assert only.prompts == (("p2", "and more"),)
    assert only.prompt.tolist() == [0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("p", "x", "y", "left"), "row 1: winner: expected one of model_a, .*got 'left'"),
        (("p", "x", None, "tie"), "row 1: model_b: expected one of"),
        (("p", "x", "x", "tie"), "row 1: 'x' against itself"),
        (("[]", "x", "y", "tie"), "row 1: prompt: expected at least one user turn"),
    ],
)
def test_bad_votes_are_named_by_their_row(row, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        vote_files.read(write_votes(tmp_path / "v.parquet", [ROWS[0], row]))


def test_files_that_are_not_there_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"votes.parquet: expected .*; found no such file"):
        vote_files.read(str(tmp_path / "votes.parquet"))
    (tmp_path / "votes.txt").write_text("x")
    with pytest.raises(ValueError, match="found another kind of file"):
        vote_files.read(str(tmp_path / "votes.txt"))


def test_scores_become_every_pair():
    scores = np.array([[1.0, 0.0, 1.0], [0.2, 0.2, 0.6]])
    votes = vote_files.from_scores((("a",), ("b",)), ("x", "y", "z"), scores)
    assert list(zip(votes.a, votes.b, strict=True)) == [(0, 1), (0, 2), (1, 2)] * 2
    assert votes.outcome.tolist() == [
        Outcome.A, Outcome.TIE, Outcome.B, Outcome.BOTH_BAD, Outcome.B, Outcome.B,
    ]  # fmt: skip


def test_the_split_is_by_prompt_and_repeatable():
    kept, held = vote_files.split_by_prompt(101, 0.1, seed=3)
    assert len(held) == 10
    assert sorted(kept + held) == list(range(101))
    assert (kept, held) == vote_files.split_by_prompt(101, 0.1, seed=3)
    assert held != vote_files.split_by_prompt(101, 0.1, seed=4)[1]


def skill_votes(path, n=48):
    """Prompts that start with "sum" are x's, the others y's; both always right on their own, z never."""
    rows = []
    for i in range(n):
        prompt = f"{'sum' if i % 2 else 'poem'} {i}"
        good, bad = ("x", "y") if i % 2 else ("y", "x")
        rows += [(prompt, good, bad, "model_a"), (prompt, bad, "z", "tie (bothbad)"), (prompt, "z", good, "model_b")]
    return write_votes(path, rows)


def settings(tmp_path, **changes):
    tiny.write(tmp_path / "base", loss_type="grk", dtype=torch.bfloat16)
    values = {
        "proj_name": "trial",
        "pretrain_model_name": str(tmp_path / "base"),
        "train_data_path": skill_votes(tmp_path / "votes.parquet"),
        "output_dir": str(tmp_path / "out"),
        "held_out": 0.25,
        "head_type": "rk",
        "loss_type": "grk",
        "learning_rate": 1e-2,
        "batch_size": 8,
        "num_train_epochs": 6,
        "max_length": 64,
    } | changes
    return TrainConfig.model_validate(values)


@pytest.mark.parametrize("how", [{}, {"lora": {"r": 4, "alpha": 8, "first_layer": 1}}, {"train_head_only": True}])
def test_training_learns_and_the_engine_loads_it(how, tmp_path):
    config = settings(tmp_path, **how)
    folder = train(config)
    report = evaluate(str(folder), config, with_probes=False)
    assert report["held_out"]["prompts"] == 12
    if not config.train_head_only:
        assert report["votes"]["p2l"]["log_loss"] < 0.6 * report["votes"]["marginal"]["log_loss"]
        engine = Engine.from_pretrained(folder, device="cpu", dtype=torch.float32)
        prompts = split(config)[1].prompts
        chosen = [engine.models[m] for m in engine.coefficients(prompts).theta.argmax(1)]
        good = ["x" if prompt[0].startswith("sum") else "y" for prompt in prompts]
        assert np.mean([a == b for a, b in zip(good, chosen, strict=True)]) > 0.8
    published = json.loads((folder / "training_config.json").read_text())
    assert published["loss_type"] == "grk"
    assert published["model_type"] == "llama"


@pytest.mark.parametrize("loss_type", ["bt-tie", "rk", "rk-reparam", "bag"])
def test_every_feedback_model_trains(loss_type, tmp_path):
    head = "bt" if loss_type.startswith("bt") else "rk"
    folder = train(settings(tmp_path, loss_type=loss_type, head_type=head, num_train_epochs=1), max_steps=2)
    assert np.isfinite(Engine.from_pretrained(folder, device="cpu").coefficients(["hello"]).theta).all()


def test_a_downsized_head_trains_and_loads(tmp_path):
    config = settings(tmp_path, linear_head_downsize_factor=1.5, head_config={"eta_downsize": True}, num_train_epochs=1)
    head = Engine.from_pretrained(train(config, max_steps=2), device="cpu").head
    assert list(head.weight.shape) == [4, 48]
    assert torch.linalg.matrix_rank(head.weight[:3]) == 2  # the inner width


def test_trained_model_and_engine_agree(tmp_path):
    config = settings(tmp_path, lora={"r": 4}, num_train_epochs=1)
    votes = vote_files.read(config.train_data_path)
    torch.manual_seed(0)
    model, tokenizer = build(config, 3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or name.startswith("head."):
            torch.nn.init.normal_(parameter, std=0.1)
            parameter.data = parameter.data.bfloat16().float()  # what the file keeps
        if "lora_A" in name:
            parameter.data = parameter.data.bfloat16().float()
    from p2l_engine.train.run import write

    write(tmp_path / "made", model, tokenizer, votes.models, config)
    engine = Engine.from_pretrained(tmp_path / "made", device="cpu", dtype=torch.float32)
    items = PromptVotes(votes, engine.encoder)
    batch = Collator(int(tokenizer.pad_token_id))([items[i] for i in range(5)])
    with torch.no_grad():
        outputs = model.float()(**batch)
    c = engine.coefficients(votes.prompts[:5])
    np.testing.assert_allclose(c.theta, outputs["theta"], atol=1e-4)
    likelihood = [
        feedback_model("grk").log_likelihood(
            torch.tensor(c.theta[row, a]), torch.tensor(c.theta[row, b]), torch.tensor(c.eta[row]), torch.tensor(y)
        )
        for row, a, b, y in batch["votes"].tolist()
    ]
    assert float(outputs["loss"]) == pytest.approx(-float(torch.stack(likelihood).mean()), abs=1e-4)


def test_an_adapter_carries_the_embedding_of_a_new_cls_token(tmp_path):
    config = settings(tmp_path, lora={"r": 4}, num_train_epochs=1)
    # A backbone whose vocabulary is full and has no CLS token.
    tiny.write(tmp_path / "base", tiny.config(vocab_size=259), dtype=torch.bfloat16)
    tiny.tokenizer(cls_token=None).save_pretrained(tmp_path / "base")
    folder = train(config, max_steps=2)
    engine = Engine.from_pretrained(folder, device="cpu", dtype=torch.float32)
    assert engine.encoder.tokenizer.cls_token_id == 259
    eos = engine.encoder.tokenizer.eos_token_id
    torch.testing.assert_close(engine.backbone.embedding[259], engine.backbone.embedding[eos])
    assert np.isfinite(engine.coefficients(["hello"]).theta).all()


def test_batches_have_like_lengths_in_random_order():
    lengths = np.random.default_rng(0).integers(1, 400, 1007)
    sampler = LengthGroupedBatches(lengths.tolist(), 16, seed=3, pool=10)
    first, again = list(sampler), list(sampler)
    assert first == again
    assert sorted(first) == list(range(1007)) and len(sampler) == 1007  # noqa: PT018
    sampler.set_epoch(1)
    assert list(sampler) != first
    batches = lengths[np.array(first)[: 1007 // 16 * 16].reshape(-1, 16)]
    # alike within a batch, and no trend from batch to batch
    assert np.median(np.ptp(batches, axis=1)) < 80
    assert abs(np.corrcoef(batches.mean(1)[1:], batches.mean(1)[:-1])[0, 1]) < 0.35


def test_marginal_recovers_a_known_leaderboard():
    rng, model = np.random.default_rng(0), feedback_model("grk")
    theta, eta = torch.tensor([1.0, -0.5, 0.2, 2.0], dtype=torch.float64), torch.tensor([0.3], dtype=torch.float64)
    pairs = np.array([(i, j) for i in range(4) for j in range(i)] * 4000)
    p = model.probabilities(theta[pairs[:, 0]], theta[pairs[:, 1]], eta).numpy()
    outcome = (rng.random(len(p))[:, None] > p.cumsum(1)).sum(1).clip(max=3)
    votes = Votes((("p",),), ("a", "b", "c", "d"), np.zeros(len(p), int), pairs[:, 0], pairs[:, 1], outcome)
    fitted, tie = marginal(model, votes)
    np.testing.assert_allclose(fitted, theta, atol=0.1)
    np.testing.assert_allclose(tie, eta, atol=0.1)
    best = figures(model, fitted[None], tie, votes)["log_loss"]
    assert best <= figures(model, theta[None], eta, votes)["log_loss"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rat": 1}, "learning_rat: Extra inputs are not permitted"),
        ({"learning_rate": -1}, "learning_rate: .*greater than 0"),
        ({"head_type": "bt"}, "head_type: expected 'rk' for loss_type 'grk'"),
        ({"lora": {"rank": 3}}, "lora.rank: Extra inputs"),
        ({"held_out": 1.5}, "held_out"),
        ({"cls_token_if_none": "<|new|>", "lora": {"r": 4}}, None),
    ],
)
def test_bad_configs_are_one_line_on_the_command_line(change, message, tmp_path, capsys, monkeypatch):
    values = settings(tmp_path).model_dump(exclude_none=True) | change
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    monkeypatch.setattr("sys.argv", ["train", "--config", str(file), "--max-steps", "1"])
    if message is None:  # the tiny tokenizer names its own CLS token: nothing is grown
        assert main() == 0
        return
    assert main() == 2
    assert message.split(":")[0] in capsys.readouterr().err
    with pytest.raises(ValueError, match=message):
        TrainConfig.load(file)


def test_real_votes_are_read(data):
    votes = vote_files.read(str(data / "votes_llm_judge.parquet"))
    assert len(votes) == 55_183
    human = vote_files.read(str(data / "votes_human.parquet"))
    assert len(human) == 13_365


def test_the_committed_configs_are_valid():
    from pathlib import Path

    files = sorted(Path("train/configs").glob("*.yaml"))
    assert files
    for file in files:
        TrainConfig.load(file)

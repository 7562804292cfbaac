"""Topics that a head reads beside hidden states: the file, every path of the engine, what builds on it, and their training."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression

from p2l_engine import Engine, checkpoint
from p2l_engine.backbone.lengths import FILE as LENGTHS_FILE
from p2l_engine.backbone.shrinkage import FILE as SHRINKAGE_FILE
from p2l_engine.backbone.topics import FILE, Topics
from p2l_engine.backbone.uncertainty import FILE as UNCERTAINTY_FILE
from p2l_engine.backbone.uncertainty import Uncertainty
from p2l_engine.checkpoint.export import export
from p2l_engine.engine.batcher import Batcher
from p2l_engine.errors import CheckpointError
from p2l_engine.evaluation import features
from p2l_engine.feedback import feedback_model
from p2l_engine.learning import hidden
from p2l_engine.train import optimum, topics
from p2l_engine.train.config import TrainConfig
from p2l_engine.train.optimum import HeadObjective, TopicsPrior
from p2l_engine.train.run import train
from p2l_engine.votes import Votes
from tests.support import tiny
from tests.support.command import p2l_engine
from tests.support.training import settings as run_settings

PROMPTS = ["one", "two words", "", "three more words " * 20]
D, NAMES = 48, ("maths", "poems", "code")  # D of the tiny checkpoint


def some_topics(width=D, names=NAMES, seed=0):
    rng = np.random.default_rng(seed)
    weight, bias = rng.normal(size=(len(names), width)), rng.normal(size=len(names))
    return Topics(torch.from_numpy(weight).float(), torch.from_numpy(bias).float(), names)


def read_by_definition(of, states):
    """[h; p] in float64."""
    logits = states.astype(np.float64) @ of.weight.double().numpy().T + of.bias.double().numpy()
    p = np.exp(logits - logits.max(1, keepdims=True))
    return np.concatenate([states, p / p.sum(1, keepdims=True)], 1)


# ---- The file ----


@given(st.integers(1, 9), st.integers(1, 8), st.integers(0, 6), st.sampled_from([0.0, 1.0, 1e4]), st.integers(0, 2**32 - 1))
def test_what_the_head_reads_is_the_definition(width, count, n, size, seed):
    of = some_topics(width, tuple(map(str, range(count))), seed)
    states = (np.random.default_rng(seed + 1).normal(size=(n, width)) * size).astype(np.float32)
    found = of(torch.from_numpy(states))
    assert found.dtype == torch.float32
    assert torch.equal(found[:, :width], torch.from_numpy(states))
    np.testing.assert_allclose(found, read_by_definition(of, states), rtol=1e-4, atol=2e-6 * max(1.0, size))
    np.testing.assert_allclose(found[:, width:].sum(1), 1, rtol=1e-5)


def test_a_file_reads_back_and_is_the_same_each_time(tmp_path):
    before = some_topics(names=("a b", "漢字", ""))
    before.write(tmp_path / FILE)
    again = Topics.read(tmp_path / FILE, D)
    assert (torch.equal(again.weight, before.weight), torch.equal(again.bias, before.bias)) == (True, True)
    assert again.names == before.names
    again.write(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / FILE).read_bytes()


@pytest.mark.parametrize(
    ("change", "names", "message"),
    [
        (lambda t: {"weight": t["weight"]}, None, "expected the tensors bias, weight, found weight"),
        (lambda t: t | {"more": t["bias"] * 2}, None, "expected the tensors bias, weight, found bias, more, weight"),
        (lambda t: t | {"weight": t["weight"][:, :-1]}, None, r"weight: expected \[3, 48\], .* found \[3, 47\]"),
        (lambda t: t | {"weight": t["weight"][:-1]}, None, r"weight: expected \[3, D\], found \[2, 48\]"),
        (lambda t: t | {"bias": t["bias"][:-1]}, None, r"bias: expected \[3\], found \[2\]"),
        (lambda t: t | {"bias": t["bias"] * torch.nan}, None, "bias: expected finite numbers in float32"),
        (lambda t: t | {"weight": t["weight"].half()}, None, "weight: expected finite numbers in float32, found torch.float16"),
        (lambda t: t, '["a", "b", "a"]', "names: expected different names"),
        (lambda t: t, '["a", "b"]', r"weight: expected \[2, D\], found \[3, 48\]"),
        (lambda t: t, "[]", "names: expected different names, at least one"),
        (lambda t: t, '["a", "b", 3]', "names: expected a list of names as JSON"),
        (lambda t: t, "a, b, c", "names: expected a list of names as JSON"),
        (lambda t: t, "", "names: expected a list of names as JSON"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, change, names, message):
    some_topics().write(tmp_path / FILE)
    metadata = {"names": json.dumps(NAMES) if names is None else names}
    tensors = {name: tensor.contiguous() for name, tensor in change(load_file(tmp_path / FILE)).items()}
    save_file(tensors, tmp_path / FILE, metadata=metadata)
    with pytest.raises(CheckpointError, match=message):
        Topics.read(tmp_path / FILE, D)


def test_a_damaged_file_and_one_without_names_are_refused(tmp_path):
    (tmp_path / FILE).write_bytes(b"x" * 30)
    with pytest.raises(CheckpointError, match="damaged, truncated or no safetensors file"):
        Topics.read(tmp_path / FILE, D)
    save_file({"weight": torch.ones(1, D), "bias": torch.ones(1)}, tmp_path / FILE)
    with pytest.raises(CheckpointError, match="names: expected a list of names as JSON in the metadata, found 'null'"):
        Topics.read(tmp_path / FILE, D)


# ---- The engine ----


def with_topics(folder, of, **how):
    """A tiny checkpoint whose head reads these topics."""
    tiny.write(folder, **how)
    weights, count = load_file(folder / "model.safetensors"), len(of.names)
    for name in [name for name in weights if name.startswith("head.") and name.endswith(".weight")]:
        torch.manual_seed(len(name))
        weights[name] = torch.cat([weights[name], 3 * torch.randn(len(weights[name]), count)], 1).contiguous()
    save_file(weights, folder / "model.safetensors")
    of.write(folder / FILE)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return with_topics(tmp_path_factory.mktemp("topics") / "checkpoint", some_topics())


@pytest.fixture(scope="module")
def engine(folder):
    return Engine.from_pretrained(folder, "cpu", "float32")


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """Hidden states of the same backbone."""
    plain = tiny.write(tmp_path_factory.mktemp("plain") / "checkpoint")
    return features.hidden_states(Engine.from_pretrained(plain, "cpu", "float32"), PROMPTS)[0]


def test_every_path_of_the_engine_reads_topics(engine, folder, states):
    head, read = checkpoint.load(folder).head, read_by_definition(some_topics(), states)
    expected = read @ head.weight.double().numpy().T + head.bias.double().numpy()
    assert np.abs(read[:, D:] @ head.weight[:5, D:].double().numpy().T).max(1).min() > 0.1  # they matter
    together, (again, evaluated) = engine.coefficients(PROMPTS), features.hidden_states(engine, PROMPTS)
    batcher = Batcher(engine)
    alone = [batcher.submit(prompt, lambda found: found).result() for prompt in PROMPTS]
    batcher.close()
    for found in (together, evaluated):
        np.testing.assert_allclose(found.theta, expected[:, :5], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found.eta, expected[:, 5], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.concatenate([one.theta for one in alone]), expected[:, :5], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(again, read, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(hidden.hidden_states(engine, PROMPTS), read, rtol=1e-4, atol=1e-5)
    assert (engine.hidden_size, engine.topics.names) == (D, NAMES)
    assert engine.warmup() > 0


def test_the_cache_of_hidden_states_does_not_depend_on_topics(engine, states, tmp_path, monkeypatch):
    first = hidden.hidden_states(engine, PROMPTS, tmp_path)
    (path,) = tmp_path.rglob("*.safetensors")
    assert load_file(path)["states"].shape == (len(PROMPTS), D)
    monkeypatch.setattr(Engine, "stream", None)
    np.testing.assert_array_equal(hidden.hidden_states(engine, PROMPTS, tmp_path), first)


def test_uncertainty_is_of_what_the_head_reads(engine, folder, tmp_path):
    rng = np.random.default_rng(0)
    basis, factors = rng.normal(size=(D + len(NAMES) + 1, 2)), np.tril(rng.normal(size=(5, 2, 2)))
    own = Uncertainty(*(torch.from_numpy(part).float() for part in (basis, factors)), tuple(tiny.MODELS))
    shutil.copytree(folder, tmp_path / "sure")
    own.write(tmp_path / "sure" / UNCERTAINTY_FILE)
    found = Engine.from_pretrained(tmp_path / "sure", "cpu", "float32").coefficients(PROMPTS)
    read = torch.from_numpy(hidden.hidden_states(engine, PROMPTS))
    np.testing.assert_allclose(found.deviation, own.deviation(read), rtol=1e-4)
    Uncertainty(own.basis[1:], own.factors, own.models).write(tmp_path / "sure" / UNCERTAINTY_FILE)
    with pytest.raises(CheckpointError, match="basis: expected 52 rows"):
        checkpoint.load(tmp_path / "sure")


def test_a_head_of_another_width_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "other")
    (tmp_path / "other" / FILE).unlink()
    with pytest.raises(CheckpointError, match=r"head\.weight: expected .*48.*, found .*51"):
        checkpoint.load(tmp_path / "other")


def test_exports_are_refused(folder, tmp_path):
    with pytest.raises(CheckpointError, match="topics.safetensors: the head reads topics beside hidden states"):
        export(folder, tmp_path / "exported")


# ---- What builds on it ----


def write_votes(path, about, rows=240):
    names = tiny.MODELS
    with path.open("w") as file:
        for i in range(rows):
            winner = ("model_a", "model_b", "tie", "both_bad")[i % 4]
            vote = {"prompt": f"{about} {i}", "model_a": names[i % 5], "model_b": names[(i + 1) % 5], "winner": winner}
            file.write(json.dumps(vote) + "\n")
    return path


@pytest.mark.slow
def test_commands_that_change_the_head_keep_topics(folder, tmp_path):
    votes, trained_on = (write_votes(tmp_path / f"{about}.jsonl", about) for about in ("question", "poem"))
    before = Engine.from_pretrained(folder, "cpu", "float32").coefficients(PROMPTS)
    shared = (str(folder), "--votes", str(votes), "--device", "cpu")
    calls = (
        ("adapt", *shared, "-o", str(tmp_path / "adapted")),
        ("calibrate", *shared, "-o", str(tmp_path / "calibrated")),
        ("shrink", *shared, "--trained-on", str(trained_on), "-o", str(tmp_path / "shrunk")),
    )
    for call in calls:
        ended, target = p2l_engine(*call), tmp_path / call[-1]
        assert ended.status in (0, 1), ended.err  # 1: no shrinkage is better than none
        if ended.status == 0:
            assert (target / FILE).read_bytes() == (folder / FILE).read_bytes()
            after = Engine.from_pretrained(target, "cpu", "float32")
            assert after.topics.names == NAMES
            assert np.isfinite(after.coefficients(PROMPTS).theta).all()
    assert (tmp_path / "adapted" / FILE).exists()
    moved = Engine.from_pretrained(tmp_path / "adapted", "cpu", "float32").coefficients(PROMPTS)
    assert not np.array_equal(moved.theta, before.theta)


# ---- Training ----


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(st.integers(2, 4), st.integers(1, 5), st.integers(6, 60), st.floats(0.2, 8), st.integers(0, 2**32 - 1))
def test_the_fit_is_that_of_scikit_learn(count, width, n, deviation, seed):
    rng = np.random.default_rng(seed)
    label = np.concatenate([np.arange(count), rng.integers(count, size=n - count)])
    states = (3 + 2 * rng.normal(size=(n, width)) + np.eye(count, width)[label]).astype(np.float32)
    found = topics.fit(states, [f"topic {i}" for i in label], deviation)
    assert found.names == tuple(f"topic {i}" for i in range(count))
    wide = states.astype(np.float64)
    z = (wide - wide.mean(0)) / wide.std(0)
    of_two = 2 if count == 2 else 1  # of two classes it has one row of weights, the difference of ours
    theirs = LogisticRegression(C=of_two * deviation**2 / width, tol=1e-9, max_iter=10_000).fit(z, label)
    np.testing.assert_allclose(found.probabilities(torch.from_numpy(states)), theirs.predict_proba(z), atol=0.01)


def test_one_category_and_a_search_that_does_not_end_are_errors(monkeypatch):
    states = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    with pytest.raises(ValueError, match="topics: expected prompts of two categories at least, got 'none' alone"):
        topics.fit(states, ["none"] * 30, 1.0)
    monkeypatch.setattr(topics, "MOST_STEPS", 1)
    with pytest.raises(ArithmeticError, match="the topics' optimum was not reached in 1 steps"):
        topics.fit(states, [str(i % 3) for i in range(30)], 100.0)


@given(st.integers(1, 4), st.integers(1, 4), st.floats(0.1, 5), st.floats(0.1, 5), st.integers(0, 2**32 - 1))
def test_the_priors_of_states_and_topics_are_their_own(d, count, deviation, leaderboards, seed):
    rng, feedback = np.random.default_rng(seed), feedback_model("grk")
    a = rng.integers(3, size=20)
    votes = Votes.make([(str(i),) for i in range(6)], "abc", rng.integers(6, size=20), a, (a + 1) % 3, rng.integers(4, size=20))
    z = rng.normal(size=(6, d + count))
    objective = HeadObjective(feedback, votes, z, deviation, TopicsPrior(count, leaderboards))
    # A topic's column that is wider has a narrower prior: the same as plain columns that are scaled so.
    wide = z.copy()
    wide[:, d:] *= leaderboards / (deviation / np.sqrt(d + count))
    wide[:, :d] *= np.sqrt(d + count) / np.sqrt(d)
    plain = HeadObjective(feedback, votes, wide, deviation)
    x = rng.normal(size=objective.rows * (d + count + 1))
    for one, other in zip(objective(x), plain(x), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)


def of_topics(tmp_path, **changes):
    """Votes on two topics: in one the first model is the best, in the other the last."""
    names = ["x", "y", "z"]
    rng, path = np.random.default_rng(0), tmp_path / "votes.jsonl"
    with path.open("w") as file:
        for i in range(300):
            about, (a, b) = ("rain", "sums")[i % 2], rng.permutation(3)[:2]
            best = min(a, b) if about == "rain" else max(a, b)
            row = {"prompt": f"{about} {i}", "category": about, "model_a": names[a], "model_b": names[b]}
            file.write(json.dumps(row | {"winner": "model_a" if best == a else "model_b"}) + "\n")
    optimum_of = {"deviations": [0.01], "topics": {"deviation": 5.0, "leaderboards": 2.0}} | changes
    tiny.write(tmp_path / "base")
    values = {"pretrain_model_name": str(tmp_path / "base"), "train_data_path": str(path), "head_type": "bt", "loss_type": "bt"}
    steps = {"learning_rate": None, "batch_size": 16, "num_train_epochs": 1}  # as if they were not given
    return run_settings(tmp_path, **steps, **values, train_head_only=True, head_optimum=optimum_of, dtype="float32")


@pytest.mark.slow
def test_a_run_learns_a_leaderboard_of_each_topic(tmp_path, monkeypatch):
    monkeypatch.setenv("P2L_ENGINE_CACHE", str(tmp_path / "cache"))
    folder = train(of_topics(tmp_path))
    engine = Engine.from_pretrained(folder, device="cpu", dtype=torch.float32)
    assert engine.topics.names == ("rain", "sums")
    theta = engine.coefficients(["rain 5000", "sums 5000", "rain 77", "sums 78"]).theta
    assert [engine.models[k] for k in theta.argmax(1)] == ["x", "z", "x", "z"]
    files = [FILE, "adapter_model.safetensors"]
    before = [(folder / name).read_bytes() for name in files]
    train(of_topics(tmp_path), if_present="restart")
    assert [(folder / name).read_bytes() for name in files] == before
    assert not (folder / LENGTHS_FILE).exists()
    assert not (folder / SHRINKAGE_FILE).exists()


def test_topics_need_categories(tmp_path, monkeypatch):
    monkeypatch.setenv("P2L_ENGINE_CACHE", str(tmp_path / "cache"))
    config = of_topics(tmp_path)
    path = tmp_path / "votes.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "category"}) + "\n" for row in rows))
    with pytest.raises(ValueError, match="topics: expected votes with a category"):
        train(config)


@pytest.mark.parametrize("bad", [{"deviation": 0.0}, {"leaderboards": -1.0}, {"deviation": 1e7}, {"more": 1}])
def test_settings_that_mean_nothing_are_refused(bad, tmp_path):
    values = of_topics(tmp_path).model_dump()
    values["head_optimum"]["topics"] |= bad
    with pytest.raises(ValueError, match="topics"):
        TrainConfig.model_validate(values)


def test_the_head_is_for_states_as_they_are():
    rng, feedback = np.random.default_rng(1), feedback_model("bt")
    states = (5 + 3 * rng.normal(size=(200, 6))).astype(np.float32)
    decided = (states[:, 0] < 5).astype(np.int64)
    zeros = np.zeros(200, np.int64)
    votes = Votes.make([(str(i),) for i in range(200)], ("x", "y"), np.arange(200), zeros, zeros + 1, decided)
    of = topics.fit(states, [("low", "high")[int(flag)] for flag in decided], 5.0)
    found = optimum.best(feedback, votes, states, (votes, states), [1.0, 0.01], of, 2.0)
    assert found.topics is of
    theta = found.head(of(torch.from_numpy(states)), None, 0.0).numpy()
    assert ((theta[:, 0] > theta[:, 1]) == (decided == 0)).mean() > 0.95
    assert found.head.weight.shape == (2, 8)

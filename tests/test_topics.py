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
from transformers import GPT2Config

from p2l_engine import Engine, checkpoint
from p2l_engine.backbone.lengths import FILE as LENGTHS_FILE
from p2l_engine.backbone.shrinkage import FILE as SHRINKAGE_FILE
from p2l_engine.backbone.topics import FILE, Topics
from p2l_engine.backbone.uncertainty import FILE as UNCERTAINTY_FILE
from p2l_engine.backbone.uncertainty import Uncertainty
from p2l_engine.backbone.words import words
from p2l_engine.checkpoint.export import export
from p2l_engine.engine.batcher import Batcher
from p2l_engine.errors import CheckpointError
from p2l_engine.evaluation import features
from p2l_engine.feedback import feedback_model
from p2l_engine.learning import hidden
from p2l_engine.train import optimum, topics
from p2l_engine.train.config import TrainConfig
from p2l_engine.train.optimum import HeadObjective, Inputs, TopicsPrior
from p2l_engine.train.run import train
from p2l_engine.votes import Votes
from tests.support import tiny
from tests.support.command import p2l_engine
from tests.support.training import settings as run_settings

PROMPTS = ["one", "two words", "", "three more words " * 20]
D, NAMES = 48, ("maths", "poems", "code")  # D of the tiny checkpoint


def some_topics(width=D, names=NAMES, seed=0, words=0):
    """Topics of hidden states [width], and of as many numbers for a prompt's words."""
    rng = np.random.default_rng(seed)
    shapes = (len(names), width), (len(names),), (len(names), words)
    weight, bias, of_words = (torch.from_numpy(rng.normal(size=shape)).float() for shape in shapes)
    return Topics(weight, bias, names, 20 * of_words if words else None)


def read_by_definition(of, states, words=None):
    """[h; p] in float64."""
    logits = states.astype(np.float64) @ of.weight.double().numpy().T + of.bias.double().numpy()
    if words is not None:
        logits += words.astype(np.float64) @ of.of_words.double().numpy().T
    p = np.exp(logits - logits.max(1, keepdims=True))
    return np.concatenate([states, p / p.sum(1, keepdims=True)], 1)


# ---- The file ----


@given(
    st.integers(1, 9), st.integers(1, 8), st.integers(0, 6), st.sampled_from([0.0, 1.0, 1e4]), st.integers(0, 5),
    st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_what_the_head_reads_is_the_definition(width, count, n, size, of_words, seed):
    of = some_topics(width, tuple(map(str, range(count))), seed, of_words)
    rng = np.random.default_rng(seed + 1)
    states, words = ((rng.normal(size=(n, d)) * size).astype(np.float32) for d in (width, of_words))
    known = (torch.from_numpy(words), words) if of_words else (None, None)
    found = of(torch.from_numpy(states), known[0])
    assert found.dtype == torch.float32
    assert torch.equal(found[:, :width], torch.from_numpy(states))
    np.testing.assert_allclose(found, read_by_definition(of, states, known[1]), rtol=1e-4, atol=4e-5 * max(1.0, size))
    np.testing.assert_allclose(found[:, width:].sum(1), 1, rtol=1e-5)


@pytest.mark.parametrize("words", [0, 5])
def test_words_come_exactly_where_topics_read_them(words):
    with pytest.raises(ValueError, match="words: expected some: the topics read them" if words else "words: expected none"):
        some_topics(words=words)(torch.ones(2, D), None if words else torch.ones(2, 5))


@pytest.mark.parametrize("words", [0, 7])
def test_a_file_reads_back_and_is_the_same_each_time(tmp_path, words):
    before = some_topics(names=("a b", "漢字", ""), words=words)
    before.write(tmp_path / FILE)
    again = Topics.read(tmp_path / FILE, D)
    assert (torch.equal(again.weight, before.weight), torch.equal(again.bias, before.bias)) == (True, True)
    assert (again.of_words is None) == (words == 0)
    assert not words or torch.equal(again.of_words, before.of_words)
    assert again.names == before.names
    again.write(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / FILE).read_bytes()


@pytest.mark.parametrize(
    ("change", "names", "message"),
    [
        (lambda t: {"weight": t["weight"]}, None, "expected the tensors bias, weight, with or without of_words, found weight"),
        (lambda t: t | {"more": t["bias"] * 2}, None, "expected the tensors bias, weight, .* found bias, more, weight"),
        (lambda t: t | {"of_words": t["weight"][:-1] * 2}, None, r"of_words: expected \[3, E\], found \[2, 48\]"),
        (lambda t: t | {"of_words": t["weight"][:, :0] * 2}, None, r"of_words: expected \[3, E\], found \[3, 0\]"),
        (lambda t: t | {"of_words": t["weight"] * torch.inf}, None, "of_words: expected finite numbers in float32"),
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


@pytest.fixture(scope="module", params=[0, D], ids=["states", "states and words"])
def folder(tmp_path_factory, request):
    return with_topics(tmp_path_factory.mktemp("topics") / "checkpoint", some_topics(words=request.param))


def bags(engine, prompts=PROMPTS):
    """The mean embedding of each prompt's different tokens, in float64."""
    table = engine.backbone.embedding.double().numpy()
    return np.stack([np.mean([table[i] for i in set(map(int, ids))], 0) for ids in engine.encoder.encode(prompts)])


@pytest.fixture(scope="module")
def engine(folder):
    return Engine.from_pretrained(folder, "cpu", "float32")


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """Hidden states of the same backbone."""
    plain = tiny.write(tmp_path_factory.mktemp("plain") / "checkpoint")
    return features.hidden_states(Engine.from_pretrained(plain, "cpu", "float32"), PROMPTS)[0]


def test_every_path_of_the_engine_reads_topics(engine, folder, states):
    loaded = checkpoint.load(folder)
    head, of = loaded.head, loaded.topics
    read = read_by_definition(of, states, None if of.of_words is None else bags(engine))
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
    assert engine.state_size == (D if of.of_words is None else 2 * D)
    assert engine.warmup() > 0


def test_info_names_topics(engine, folder):
    shown = p2l_engine("info", "--checkpoint", str(folder), "--device", "cpu").out
    assert f"3 topics of hidden states{' and words' if engine.state_size > D else ''}" in shown


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


@given(st.integers(0, 5), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.integers(0, 2**32 - 1))
def test_words_are_the_mean_of_different_tokens(count, dtype, seed):
    rng, table = np.random.default_rng(seed), torch.randn(300, 7, generator=torch.Generator().manual_seed(seed)).to(dtype)
    tokens = [rng.integers(300, size=rng.integers(1, 60)) for _ in range(count)]
    found = words(tokens, table)
    assert (found.shape, found.dtype) == ((len(tokens), 7), torch.float32)
    for row, ids in zip(found, tokens, strict=True):
        np.testing.assert_allclose(row, np.mean([table[i].double().numpy() for i in set(ids)], 0), atol=1e-6)
        assert torch.equal(words([ids], table)[0], row)  # whatever else is in the batch


def test_words_of_another_backbone_are_refused(tmp_path):
    with_topics(tmp_path / "other", some_topics(words=D + 1))
    with pytest.raises(
        CheckpointError, match=r"of_words: expected \[3, 48\], as the backbone's embeddings have it, found \[3, 49\]"
    ):
        Engine.from_pretrained(tmp_path / "other", "cpu", "float32")


def test_words_of_a_backbone_that_transformers_computes(tmp_path):
    gpt2 = GPT2Config(n_embd=D, n_layer=2, n_head=4, vocab_size=300, n_positions=512)
    engine = Engine.from_pretrained(with_topics(tmp_path / "gpt2", some_topics(words=D), decoder=gpt2), "cpu", "float32")
    assert (engine.hidden_size, engine.state_size) == (D, 2 * D)
    np.testing.assert_allclose(engine.words(PROMPTS), bags(engine), atol=1e-6)
    read = hidden.hidden_states(engine, PROMPTS)
    np.testing.assert_allclose(read, read_by_definition(engine.topics, read[:, :D], bags(engine)), rtol=1e-4, atol=1e-5)
    expected = read @ engine.head.weight.numpy().T + engine.head.bias.numpy()
    np.testing.assert_allclose(engine.coefficients(PROMPTS).theta, expected[:, :5], rtol=1e-4, atol=1e-4)


def test_words_of_chats_behind_a_prefix_cache(tmp_path):
    with_topics(tmp_path / "checkpoint", some_topics(words=D))
    plain, cached = (
        Engine.from_pretrained(tmp_path / "checkpoint", "cpu", "float32", prefix_cache_bytes=size) for size in (0, 2**20)
    )
    chats = [["first " * n, *["and more " * 9] * turns] for n in (8, 9) for turns in range(4)]
    for chat in chats:
        np.testing.assert_allclose(cached.coefficients([chat]).theta, plain.coefficients([chat]).theta, rtol=1e-4, atol=1e-4)
    assert cached.prefix_cache.hits > 0
    np.testing.assert_allclose(cached.words(chats), bags(cached, chats), atol=1e-6)
    assert cached.words([]).shape == (0, D)


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
@pytest.mark.parametrize("folder", [D], indirect=True, ids=["states and words"])
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


def test_the_fit_reads_words_like_states():
    rng = np.random.default_rng(0)
    label = [str(i % 3) for i in range(90)]
    states, words = rng.normal(size=(90, 5)).astype(np.float32), rng.normal(size=(90, 4)).astype(np.float32)
    words[np.arange(90), np.arange(90) % 3] += 2
    found, joined = topics.fit(states, label, 2.0, words), topics.fit(np.concatenate([states, words], 1), label, 2.0)
    assert torch.equal(torch.cat([found.weight, found.of_words], 1), joined.weight)
    right = found.probabilities(torch.from_numpy(states), torch.from_numpy(words)).argmax(1) == torch.arange(90) % 3
    assert right.float().mean() > 0.8


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
@pytest.mark.parametrize("reads_words", [True, False])
def test_a_run_learns_a_leaderboard_of_each_topic(tmp_path, monkeypatch, reads_words):
    monkeypatch.setenv("P2L_ENGINE_CACHE", str(tmp_path / "cache"))
    of = {"deviation": 5.0, "leaderboards": 2.0, "words": reads_words}
    folder = train(of_topics(tmp_path, topics=of))
    engine = Engine.from_pretrained(folder, device="cpu", dtype=torch.float32)
    assert engine.topics.names == ("rain", "sums")
    assert (engine.topics.of_words is not None) == reads_words
    theta = engine.coefficients(["rain 5000", "sums 5000", "rain 77", "sums 78"]).theta
    assert [engine.models[k] for k in theta.argmax(1)] == ["x", "z", "x", "z"]
    files = [FILE, "adapter_model.safetensors"]
    before = [(folder / name).read_bytes() for name in files]
    train(of_topics(tmp_path, topics=of), if_present="restart")
    assert [(folder / name).read_bytes() for name in files] == before
    assert not (folder / LENGTHS_FILE).exists()
    assert not (folder / SHRINKAGE_FILE).exists()


@pytest.mark.slow
@pytest.mark.parametrize("has_topics", [True, False])
def test_a_run_falls_back_on_prompts_of_new_kinds(tmp_path, monkeypatch, has_topics):
    monkeypatch.setenv("P2L_ENGINE_CACHE", str(tmp_path / "cache"))
    how = {"shrinkage": {"quantile": 0.9, "width": 0.3}, "topics": {} if has_topics else None}
    folder = train(of_topics(tmp_path, **how))
    engine = Engine.from_pretrained(folder, device="cpu", dtype=torch.float32)
    assert len(engine.shrinkage.centres) == 2
    known = engine.coefficients([f"{about} {i}" for i in range(400, 440) for about in ("rain", "sums")])
    assert (known.kept > 0.5).mean() > 0.75
    new = engine.coefficients(["Ω" * 30, "Я" * 40])
    assert (new.kept < 0.1).all()
    marginal = engine.head(engine.shrinkage.anchor[None], None, 0.0)[0].numpy()
    np.testing.assert_allclose(new.theta, np.tile(marginal, (2, 1)), atol=0.1 * np.ptp(known.theta))
    before = (folder / SHRINKAGE_FILE).read_bytes()
    train(of_topics(tmp_path, **how), if_present="restart")
    assert (folder / SHRINKAGE_FILE).read_bytes() == before


@pytest.mark.parametrize("bad", [{"quantile": 1.0}, {"quantile": 0.0}, {"width": 0.0}, {"more": 1}])
def test_a_shrinkage_that_means_nothing_is_refused(bad, tmp_path):
    values = of_topics(tmp_path).model_dump()
    values["head_optimum"]["shrinkage"] = {"quantile": 0.9, "width": 0.3} | bad
    with pytest.raises(ValueError, match="shrinkage"):
        TrainConfig.model_validate(values)


def test_a_shrinkage_needs_prompts(tmp_path, monkeypatch):
    monkeypatch.setenv("P2L_ENGINE_CACHE", str(tmp_path / "cache"))
    config = of_topics(tmp_path, shrinkage={"quantile": 0.9, "width": 0.3})
    path = tmp_path / "votes.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:60]))
    with pytest.raises(ValueError, match="training: expected at least 100 prompts for a shrinkage, got "):
        train(config)
    assert not (tmp_path / "cache" / "hidden").exists()  # found before hidden states are computed


def test_topics_need_categories(tmp_path, monkeypatch):
    monkeypatch.setenv("P2L_ENGINE_CACHE", str(tmp_path / "cache"))
    config = of_topics(tmp_path)
    path = tmp_path / "votes.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "category"}) + "\n" for row in rows))
    with pytest.raises(ValueError, match="topics: expected votes with a category"):
        train(config)
    assert not (tmp_path / "cache" / "hidden").exists()  # found before hidden states are computed


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
    read = Inputs(states, of.probabilities(torch.from_numpy(states)).numpy())
    found = optimum.best(feedback, votes, read, (votes, read), [1.0, 0.01], 2.0)
    theta = found.head(of(torch.from_numpy(states)), None, 0.0).numpy()
    assert ((theta[:, 0] > theta[:, 1]) == (decided == 0)).mean() > 0.95
    assert found.head.weight.shape == (2, 8)

"""p2l-engine adapt, the cache of hidden states, and score tables with gaps."""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file, save_file

from p2l_engine import Engine, checkpoint, learning
from p2l_engine.checkpoint.export import export
from p2l_engine.checkpoint.rewrite import rewrite
from p2l_engine.cli.adapted import catalog_with
from p2l_engine.feedback import feedback_model
from p2l_engine.learning.hidden import fingerprint, hidden_states
from p2l_engine.votes import read
from tests.support import tiny
from tests.support.cases import slow_but
from tests.support.command import p2l_engine

PROMPTS = ["hello", "what is 2 + 2?", "a longer prompt", "hello"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("P2L_ENGINE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tiny.write(tmp_path_factory.mktemp("adapt") / "source")
    prices = "".join(f"  {name}: {{cost: 1}}\n" for name in tiny.MODELS)
    (folder / "catalog.yaml").write_text(f"models:\n{prices}")
    return folder


def table(path, rows, header=("prompt", "model_a", "model_b", "winner")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


def votes(path, new="zeta", n=12, winner="model_b"):
    return table(path, [(f"prompt {i}", tiny.MODELS[i % 2], new, winner) for i in range(n)])


def test_models_that_a_catalog_leaves_out_stay_so_unless_they_are_dropped_or_get_a_cost(tmp_path):
    file = tmp_path / "catalog.yaml"
    file.write_text("left_out: [b, c, d]\nmodels: {a: {cost: 1}}\n")
    assert catalog_with(file, {}, "abcd", [], []) is None
    found = yaml.safe_load(catalog_with(file, {"b": 2.0}, "abcd", [], ["c"]))
    assert found == {"left_out": ["d"], "models": {"a": {"cost": 1}, "b": {"cost": 2.0}}}


@pytest.mark.slow
def test_a_new_model_joins_is_described_and_another_is_retired(source, tmp_path):
    (tmp_path / "models.yaml").write_text("models:\n  zeta: {like: alpha, cost: 0.5}\n  quiet:\n")
    new = tmp_path / "new"
    given = ("--models", str(tmp_path / "models.yaml"), "--drop", "delta")
    ended = p2l_engine("adapt", str(source), "--votes", votes(tmp_path / "v.csv"), "-o", str(new), *given)
    assert ended.status == 0, ended.err
    assert "zeta new 12" in " ".join(ended.out.split())
    assert "quiet has no votes: its row is what the prior says" in ended.message
    assert "catalog.yaml has no cost of quiet" in ended.message
    assert "bytes for each" in ended.message
    loaded = checkpoint.load(new)
    assert loaded.models == ("alpha", "beta", "gamma", "epsilon", "zeta", "quiet")
    assert set(loaded.uncertainty.models) == {"alpha", "beta", "zeta", "quiet"}
    training = json.loads((new / "training_config.json").read_text())
    assert training["retired"] == ["delta"]
    assert training["adapted"][0]["new"] == ["zeta", "quiet"]
    old = checkpoint.load(source)
    assert torch.equal(loaded.head.weight[[2, 3, -1]], old.head.weight[[2, 4, -1]])  # no votes on gamma, epsilon; eta
    assert "zeta" in (new / "catalog.yaml").read_text()
    assert "delta" not in (new / "catalog.yaml").read_text()
    # A second time: the retired name is refused, the new model is known by now.
    again = p2l_engine("adapt", str(new), "--votes", votes(tmp_path / "w.csv", "delta"), "-o", str(tmp_path / "again"))
    assert "'delta' is the name of a retired model" in again.message
    again = p2l_engine("adapt", str(new), "--votes", votes(tmp_path / "v.csv"), "-o", str(tmp_path / "again"))
    assert again.status == 0, again.err
    assert "zeta updated 12" in " ".join(again.out.split())
    assert "learned from before" in again.message


@pytest.mark.slow
def test_a_model_is_retired_without_any_votes(source, tmp_path):
    ended = p2l_engine("adapt", str(source), "--drop", "delta", "-o", str(tmp_path / "new"))
    assert ended.status == 0, ended.err
    old, new = checkpoint.load(source), checkpoint.load(tmp_path / "new")
    assert new.models == ("alpha", "beta", "gamma", "epsilon")
    assert new.uncertainty is None
    assert torch.equal(new.head.weight, old.head.weight[[0, 1, 2, 4, 5]])
    again = p2l_engine("adapt", str(tmp_path / "new"), "--votes", votes(tmp_path / "v.csv", "Delta"), "-o", str(tmp_path / "a"))
    assert "'Delta' is like 'delta', the name of a retired model" in again.message
    every = [part for name in tiny.MODELS for part in ("--drop", name)]
    ended = p2l_engine("adapt", str(source), *every, "-o", str(tmp_path / "none"))
    assert "expected at least one model to stay" in ended.message


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ([("p", "x", "y", "model_a")], (), "no chain of votes connects x, y to a model of the checkpoint"),
        ([("p", "alpha", "Beta", "tie")], (), "'Beta' and 'beta' differ in case or white space only"),
        ([("p", "alpha", "x", "tie")], ("--drop", "x"), "expected some of alpha"),
        ([("p", "alpha", "alpha", "tie")], (), "expected at least one vote that can be used"),
    ],
)
def test_votes_that_cannot_be_used_are_refused_by_name(source, rows, more, message, tmp_path):
    ended = p2l_engine("adapt", str(source), "--votes", table(tmp_path / "v.csv", rows), "-o", str(tmp_path / "new"), *more)
    assert ended.status == 2
    assert message in ended.message
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_it_needs_something_to_learn_and_a_free_folder(source, tmp_path):
    ended = p2l_engine("adapt", str(source), "-o", str(tmp_path / "new"))
    assert "expected votes, what a service learned, descriptions" in ended.message
    assert "expected a folder to write" in p2l_engine("adapt", str(source), "--drop", "beta").message
    assert "an empty one" in p2l_engine("adapt", str(source), "--drop", "beta", "-o", str(source)).message


@pytest.mark.parametrize("catalog", ["", "[]", "models: 3", "models: {alpha: {cost: x}}"])
def test_a_catalog_that_cannot_be_read_is_named_before_the_work(source, catalog, tmp_path, monkeypatch):
    folder = tmp_path / "source"
    shutil.copytree(source, folder)
    (folder / "catalog.yaml").write_text(catalog)
    monkeypatch.setattr(learning.hidden, "hidden_states", None)  # nothing is computed
    ended = p2l_engine("adapt", str(folder), "--votes", votes(tmp_path / "v.csv"), "-o", str(tmp_path / "new"))
    assert ended.status == 2
    assert "catalog.yaml: " in ended.message


def test_a_catalog_keeps_a_model(source, tmp_path):
    folder = tmp_path / "source"
    shutil.copytree(source, folder)
    (folder / "catalog.yaml").write_text("models: {delta: {cost: 1}}")
    ended = p2l_engine("adapt", str(folder), "--drop", "delta", "-o", str(tmp_path / "new"))
    assert "without delta it has no model" in ended.message


def test_folders_that_cannot_be_written_are_named_before_the_work(source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(learning.hidden, "hidden_states", None)
    given = ("adapt", str(source), "--votes", votes(tmp_path / "v.csv"), "-o")
    assert "a folder outside the checkpoint's own" in p2l_engine(*given, str(source / "new")).message
    assert "file is no folder" in p2l_engine(*given, str(tmp_path / "file" / "new")).message
    log = table(tmp_path / "log.csv", [("a", "alpha", 5)], ("prompt", "model", "completion_tokens"))
    given = ("lengths", str(source), "--log", log, "-o")
    assert "a folder outside the checkpoint's own" in p2l_engine(*given, str(source / "new")).message
    assert "file is no folder" in p2l_engine(*given, str(tmp_path / "file" / "new")).message


def test_a_mount_point_is_named_before_the_work(source, tmp_path, monkeypatch):
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr(type(tmp_path), "is_mount", lambda path: path.name == "volume")
    monkeypatch.setattr(learning.hidden, "hidden_states", None)
    given = ("adapt", str(source), "--votes", votes(tmp_path / "v.csv"), "-o")
    ended = p2l_engine(*given, str(tmp_path / "volume"))
    assert ended.status == 2
    assert "volume: cannot be written, nothing was kept: it is a mount point: name a folder within it" in ended.message


def test_a_cache_that_cannot_be_written_is_named_before_the_work(source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    engine = Engine.from_pretrained(source, device="cpu")
    hidden_states(engine, PROMPTS, tmp_path / "cache")
    monkeypatch.setattr(Engine, "stream", None)
    with pytest.raises(OSError, match=r"file/.*: hidden states cannot be kept here: .*; P2L_ENGINE_CACHE .* --no-cache"):
        hidden_states(engine, PROMPTS, tmp_path / "file" / "cache")
    hidden_states(engine, PROMPTS, tmp_path / "cache")  # all are there: nothing is written


@pytest.mark.parametrize("kind", slow_but(("bt",), ["bt", "ols"]))
def test_other_feedback_models_are_adapted_too(kind, tmp_path):
    folder = tiny.write(tmp_path / "source", loss_type=kind, head_type="bt")
    header = ("prompt", "model", "value") if kind == "ols" else ("prompt", "model_a", "model_b", "winner")
    rows = [("p", "zeta", "3.5")] if kind == "ols" else [("p", "alpha", "zeta", "model_b"), ("q", "zeta", "beta", "tie")]
    ended = p2l_engine("adapt", str(folder), "--votes", table(tmp_path / "v.csv", rows, header), "-o", str(tmp_path / "new"))
    assert ended.status == 0, ended.err
    assert checkpoint.load(tmp_path / "new").models[-1] == "zeta"


@pytest.mark.slow
def test_eval_shows_learning_curves(source, tmp_path):
    rows = [(f"prompt {i}", tiny.MODELS[i % 5], tiny.MODELS[(i + 1 + i % 3) % 5], "model_a") for i in range(15)]
    ended = p2l_engine(
        "eval", "--votes", table(tmp_path / "v.csv", rows), "--checkpoint", str(source), "--adapt", "--bootstrap", "5"
    )
    assert ended.status == 0, ended.err
    assert "left out and learned again" in ended.out


def test_scores_of_different_models_on_different_prompts_are_votes(tmp_path):
    rows = [("p", "a", 1), ("p", "b", 0), ("q", "b", 0.2), ("q", "c", 0.2), ("r", "c", 1)]
    path = table(tmp_path / "s.csv", rows, ("prompt", "model", "score"))
    with pytest.raises(ValueError, match="has no score of"):
        read(path)
    found, _ = read(path, feedback=feedback_model("grk"), complete=False)
    assert found.models == ("a", "b", "c")
    assert [found.prompts[p][0] for p in found.prompt] == ["p", "q"]
    assert found.outcome.tolist() == [0, 3]
    assert found.weight.tolist() == [1, 1]
    rows = [("p", name, score) for name, score in zip("abcd", (0, 1, 0.5, 1), strict=True)] + rows[2:]
    weighed, _ = read(table(tmp_path / "w.csv", rows, ("prompt", "model", "score")), complete=False, answers_once=True)
    assert np.bincount(weighed.prompt, weighed.weight) == pytest.approx([2, 1])  # answers / 2
    for model in range(4):
        of = (weighed.prompt == 0) & ((weighed.a == model) | (weighed.b == model))
        assert weighed.weight[of].sum() == pytest.approx(1)
    with pytest.raises(ValueError, match="expected at least one prompt with scores of two models"):
        read(table(tmp_path / "t.csv", [("p", "a", 1), ("q", "b", 0)], ("prompt", "model", "score")), complete=False)


def test_hidden_states_are_computed_once(source, tmp_path, monkeypatch):
    engine = Engine.from_pretrained(source, device="cpu", dtype=torch.float32)
    done = []
    first = hidden_states(engine, PROMPTS, tmp_path / "store", done.append)
    assert sum(done) == len(PROMPTS)
    outputs = first @ engine.head.weight.numpy().T + engine.head.bias.numpy()
    np.testing.assert_allclose(outputs[:, :5], engine.coefficients(PROMPTS).theta, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(engine, "stream", None)  # nothing is computed
    assert np.array_equal(hidden_states(engine, PROMPTS[::-1], tmp_path / "store"), first[::-1])
    file = next((tmp_path / "store").rglob("*.safetensors"))
    stored = load_file(file)
    save_file(stored | {"states": stored["states"] * np.float32(np.nan)}, file)
    with pytest.raises(ValueError, match="cannot be read: expected finite numbers; remove this file"):
        hidden_states(engine, PROMPTS, tmp_path / "store")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read: .*; remove this file"):
        hidden_states(engine, PROMPTS, tmp_path / "store")


def test_the_head_is_no_part_of_the_fingerprint(source, tmp_path):
    loaded = checkpoint.load(source)
    rewrite(loaded, tmp_path / "other", loaded.head, [name.upper() for name in loaded.models])
    tiny.write(tmp_path / "seed", seed=1)
    of = [Engine.from_pretrained(folder, device="cpu") for folder in (source, tmp_path / "other", tmp_path / "seed")]
    one, same, different = map(fingerprint, of)
    assert one == same != different


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"factor": 2.0, "eta_downsize": True}, {"loss_type": "bt"}, {"shards": 3}], ids=str)
def test_an_export_of_what_was_learned_has_its_coefficients(options, tmp_path):
    folder = tiny.write(tmp_path / "source", dtype=torch.bfloat16, **options)
    given = ("--votes", votes(tmp_path / "v.csv"), "-o", str(tmp_path / "new"), "--dtype", "float32")
    ended = p2l_engine("adapt", str(folder), *given)
    assert ended.status == 0, ended.err
    export(tmp_path / "new", tmp_path / "exported")
    engines = (Engine.from_pretrained(tmp_path / name, device="cpu", dtype=torch.float32) for name in ("new", "exported"))
    learned, exported = (each.coefficients(PROMPTS) for each in engines)
    assert learned.models == exported.models == (*tiny.MODELS, "zeta")
    np.testing.assert_array_equal(learned.theta, exported.theta)
    np.testing.assert_array_equal(learned.deviation, exported.deviation)


@pytest.mark.slow
def test_an_adapter_learns_as_its_merged_checkpoint_does_and_stays_an_adapter(tmp_path):
    base = tiny.write(tmp_path / "base")
    adapter = tiny.adapter_of(tmp_path / "deep" / "source", base, "../../base")
    new = tmp_path / "new"
    ended = p2l_engine("adapt", str(adapter), "--votes", votes(tmp_path / "v.csv"), "-o", str(new), "--dtype", "float32")
    assert ended.status == 0, ended.err
    assert json.loads((new / "adapter_config.json").read_text())["base_model_name_or_path"] == "../base"
    before, after = (Engine.from_pretrained(folder, device="cpu", dtype=torch.float32) for folder in (adapter, new))
    np.testing.assert_array_equal(hidden_states(before, PROMPTS), hidden_states(after, PROMPTS))
    np.testing.assert_array_equal(before.coefficients(PROMPTS).theta[:, 2:5], after.coefficients(PROMPTS).theta[:, 2:5])
    export(adapter, tmp_path / "old exported")
    export(new, tmp_path / "exported")
    merged, exported = (checkpoint.load(tmp_path / name) for name in ("old exported", "exported"))
    assert all(torch.equal(weight, exported.weights.read()[name]) for name, weight in merged.weights.read().items())
    assert exported.models == (*tiny.MODELS, "zeta")
    assert torch.equal(exported.head.weight, after.head.weight.cpu())
    assert exported.uncertainty.models == checkpoint.load(new).uncertainty.models

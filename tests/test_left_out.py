"""bench/left_out.py, bench/trained_heads.py: routers on sources and tasks that they never saw; bench/routers.py: models without
a cost; bench/prompts_needed.py: how many prompts a model needs."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from bench import left_out, pooled, prompts_needed, routers, simple_routers, trained_heads
from p2l_engine import Catalog
from p2l_engine.catalog import CatalogModel
from p2l_engine.train import data, frozen
from p2l_engine.train.config import TrainConfig
from tests.support.scored import scored_world


def test_models_without_a_cost_are_left_out_of_curves():
    scores = np.array([[1.0, 0.0, np.nan], [np.nan, np.nan, 0.5], [0.0, 1.0, 1.0]])
    test = simple_routers.Scored(np.zeros((3, 1)), scores, np.array(["s"] * 3), np.array(["t"] * 3))
    catalog = Catalog((CatalogModel("a", 1e-3), CatalogModel("c", 2e-3), CatalogModel("other", 3e-3)))
    costs = routers.costs_of(catalog, ("a", "b", "c"))
    np.testing.assert_array_equal(costs, [1e-3, np.nan, 2e-3])
    costs = routers.costs_of(catalog, ("a", "c", "b"))
    predicted, left = routers.with_costs({"x": np.arange(9.0).reshape(3, 3)}, test, np.array([1e-3, 2e-3, np.nan]))
    np.testing.assert_array_equal(left.scores, scores[[0, 2], :2])  # on the second prompt only the third model has a score
    np.testing.assert_array_equal(predicted["x"], [[0, 1], [6, 7]])
    with pytest.raises(ValueError, match="expected costs of models of the pool, found none"):
        routers.costs_of(catalog, ("b",))
    with pytest.raises(ValueError, match="unit: expected 'USD per request', got 'cents'"):
        routers.costs_of(replace(catalog, unit="cents"), ("a",))


def test_model_effects_are_least_squares(rng):
    """Against the regression on indicators of all prompts and models."""
    scores = np.where(rng.random((30, 5)) < 0.6, rng.random((30, 5)), np.nan)
    rows, columns = np.nonzero(np.isfinite(scores))
    design = np.zeros((len(rows), 35))
    design[np.arange(len(rows)), rows] = 1
    design[np.arange(len(rows)), 30 + columns] = 1
    expected = np.linalg.lstsq(design, scores[rows, columns], rcond=None)[0][30:]
    found = left_out.model_effects(scores)
    np.testing.assert_allclose(found, expected - expected.mean(), atol=1e-10)
    shifted = scores + rng.random((30, 1))  # how hard a prompt is changes nothing
    np.testing.assert_allclose(left_out.model_effects(shifted), found, atol=1e-10)
    of_prompts = left_out.without_prompts(simple_routers.Scored(np.zeros((30, 1)), scores, *[np.array(["s"] * 30)] * 2), found)
    np.testing.assert_allclose(np.nanmean(of_prompts.scores - found, 1), 0, atol=1e-10)
    np.testing.assert_array_equal(np.isfinite(of_prompts.scores), np.isfinite(scores))
    apart = np.array([[1.0, 0.0, np.nan, np.nan, np.nan], [np.nan, np.nan, 0.2, 0.8, np.nan], [np.nan] * 4 + [1.0]])
    np.testing.assert_allclose(left_out.model_effects(apart), [0.5, -0.5, -0.3, 0.3, 0], atol=1e-10)


class Fits:
    """Heads that know nothing, and the prompts that they were fitted to."""

    def __init__(self):
        self.seen = []

    def fit(self, training, chosen_on):
        self.seen.append((training, chosen_on))
        return self

    def among(self, models):
        self.models = models
        return self

    def shrunk(self, rows):
        for kept in (1.0, 0.5, 0.0):
            yield trained_heads.Shrunk(str(kept), np.zeros((len(rows), 6)), kept, 1.0 - kept / 2)


def test_what_is_left_out_is_not_learned_from(rng, monkeypatch):
    """Neither the part itself nor prompts that it shares with others, whatever their case and punctuation."""
    world, _ = scored_world(rng)
    world = replace(world, source=np.array(["one", "two/j", "two/k"] * 80))
    texts = [f"Question {i}?" for i in range(240)]
    texts[1] = "question 0!"  # of another source than the first
    seen = []

    def spied(training, validation, test):
        seen.append((training, validation, test))
        return {name: np.zeros_like(test.scores) for name in ("source", "task", "ridge")}

    monkeypatch.setattr(left_out, "predictions", spied)
    heads, parts = Fits(), [np.arange(0, 200), np.arange(200, 240), np.arange(240)]
    found, losses = left_out.left_out(heads, world, parts, texts, "source", lambda line: None, 20)
    assert {row.router for row in found} == {"single", "ridge", "head", "shrunk", "leaderboard", "oracle"}
    assert {row.source for row in found} == {"all", "one", "two"}
    for (training, validation, test), of_head in zip(seen, heads.seen, strict=True):
        tested = set(test.sources().tolist())
        assert len(tested) == 1
        for part, rows in zip((training, validation), of_head, strict=True):
            assert not tested & set(part.sources().tolist())
            np.testing.assert_array_equal(part.features, world.features[rows])  # heads learn from the same prompts
        shared = world.features[1] if "one" in tested else world.features[0]
        assert not (training.features == shared).all(1).any()
    assert all(row.points == 0 for row in found if row.router == "single")
    of_losses = {(row.source, row.router): (row.kept, row.log_loss) for row in losses}
    each = {"head": (1.0, 0.5), "shrunk": (1.0, 0.5), "leaderboard": (0.0, 1.0)}
    names = [name for source in ("one", "two") for name in (source, f"known, without {source}")]
    assert of_losses == {(of, name): pair for of in names for name, pair in each.items()}


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        # The others' mean losses: a 4, 1, 1.5; b 2, 2.5, 1; c 2, 1.5, 2.5. Never the last, the leaderboard alone.
        ([0.0, 0.0, 0.0, 0.0], {"a": 1, "b": 2, "c": 1}),
        ([0.0, 0.2, 3.0, 0.0], {"a": 1, "b": 0, "c": 1}),
        ([0.0, 4.0, 4.0, 4.0], {"a": 0, "b": 0, "c": 0}),
    ],
)
def test_the_way_to_fall_back_is_chosen_on_the_other_parts(rng, monkeypatch, known, expected):
    """Each of three sources alone has another way of least log-loss; known: losses on prompts of the others."""
    world, _ = scored_world(rng)
    world = replace(world, source=np.array(["a", "b", "c"] * 80), scores=rng.random((240, 6)))
    losses = {"a": [0.0, 3.0, 2.0, 9.0], "b": [4.0, 0.0, 3.0, 9.0], "c": [4.0, 2.0, 0.0, 9.0]}
    monkeypatch.setattr(
        left_out, "predictions", lambda _, __, test: {n: np.zeros_like(test.scores) for n in ("source", "task")}
    )

    class Ways(Fits):
        def shrunk(self, rows):
            of = set(world.source[rows].tolist())
            for way, loss in enumerate(known if len(of) > 1 else losses[of.pop()]):
                theta = np.zeros((len(rows), 6))
                theta[:, way] = 1.0
                yield trained_heads.Shrunk(str(way), theta, float(way), loss)

    rows = [np.arange(0, 200), np.arange(200, 240), np.arange(240)]
    said = []
    found, of_losses = left_out.left_out(Ways(), world, rows, [str(i) for i in range(240)], "source", said.append, 20)
    together = np.array([[8.0, 5.0, 5.0]]) + 3 * np.array(known[:3])
    assert said[-1] == f"of least log-loss on all parts together: {together.argmin()}"
    chosen = {row.source: int(row.kept) for row in of_losses if row.router == "shrunk"}
    assert {name: way for name, way in chosen.items() if len(name) == 1} == expected
    assert {name[-1]: way for name, way in chosen.items() if len(name) > 1} == expected
    for row in found:
        if row.router == "shrunk" and row.source != "all":
            assert row.score == pytest.approx(world.scores[world.source == row.source, chosen[row.source]].mean())


def pool_votes(tmp_path, rng, prompts=240):
    """Heads of a pool of two sources, whose models are right by what the hidden state says; and the pool."""
    rows, hidden = [], rng.normal(size=(prompts, 4))
    for i in range(prompts):
        for m, model in enumerate("wxyz"):
            score = float(rng.random() < 1 / (1 + np.exp(-2 * hidden[i, m])))
            source = ("one", "two")[i % 2]
            rows.append(
                {"prompt": json.dumps([f"Question {i}?"]), "task": f"{source} {i % 3}", "model": model, "score": score}
                | {"source": source}
            )
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pool.parquet")
    pool = pooled.read_pool(tmp_path / "pool.parquet")
    config = TrainConfig.load(routers.CONFIG).model_copy(update={"train_data_path": str(tmp_path / "pool.parquet")})
    heads = trained_heads.PoolVotes.read(config, config.head_optimum, pool, hidden, rng.normal(size=(prompts, 3)))
    return heads, pool


def test_heads_are_those_of_training(tmp_path, rng):
    """Fitted to the training part of a split, as ``data.load`` and ``frozen.fitted`` make them; log-losses are torch's."""
    heads, pool = pool_votes(tmp_path, rng)
    config = TrainConfig.load(routers.CONFIG).model_copy(update={"train_data_path": str(tmp_path / "pool.parquet")})
    training, validation, held_out = (pool.part(k) for k in range(3))
    parts, row = data.load(config), {prompt: i for i, prompt in enumerate(pool.prompts)}

    def known(votes):
        rows = [row[prompt] for prompt in votes.prompts]
        return frozen.Known(votes, heads.hidden[rows], heads.words[rows])

    expected = frozen.fitted(heads.feedback, heads.wanted, known(parts.training), known(parts.validation))
    found = heads.fit(training, validation)
    unseen = known(parts.held_out)
    read = expected.topics(torch.from_numpy(unseen.hidden), torch.from_numpy(unseen.words))
    rows = np.array([row[prompt] for prompt in parts.held_out.prompts])
    outputs = expected.best.head(read if expected.shrinkage is None else expected.shrinkage(read)[0], None, 0.0)
    theta = outputs[:, [parts.held_out.models.index(model) for model in pool.models]]
    np.testing.assert_allclose(found.theta(rows), theta, atol=2e-3)
    votes = parts.held_out
    of = [torch.from_numpy(each) for each in (votes.prompt, votes.a, votes.b)]
    likelihood = heads.feedback.log_likelihood(
        outputs[of[0], of[1]], outputs[of[0], of[2]], outputs[of[0], -1], torch.from_numpy(votes.outcome)
    )
    loss = float(-(likelihood.double() * torch.from_numpy(votes.weight)).sum() / votes.weight.sum())
    losses = found.log_losses(held_out)
    assert losses["head"] == pytest.approx(loss, abs=1e-3)
    assert losses["leaderboard"] > losses["head"] + 0.02


def test_shrunk_coefficients_lie_between_their_own_and_the_leaderboard(tmp_path, rng):
    heads, pool = pool_votes(tmp_path, rng)
    training, validation, test = (pool.part(k) for k in range(3))
    unshrunk = replace(heads, wanted=heads.wanted.model_copy(update={"shrinkage": None})).fit(training, validation)
    head = heads.fit(training, validation)
    assert (head.fitted.shrinkage is None, unshrunk.fitted.shrinkage is None) == (False, True)
    ways = list(head.shrunk(test))
    (configured,) = [way for way in ways if way.way == trained_heads.CONFIGURED]
    np.testing.assert_allclose(configured.theta, head.theta(test), atol=1e-4)
    assert configured.kept == pytest.approx(head.kept(test).mean(), abs=1e-5)
    assert configured.log_loss == pytest.approx(head.log_losses(test)["head"], abs=1e-5)
    np.testing.assert_allclose(ways[0].theta, unshrunk.theta(test), atol=1e-5)
    assert (ways[0].kept, ways[-1].kept) == (1.0, 0.0)
    np.testing.assert_array_equal(ways[-1].theta, np.tile(ways[-1].theta[0], (len(test), 1)))
    of = {name: loss for name, loss in unshrunk.log_losses(test).items()}
    assert ways[0].log_loss == pytest.approx(of["head"], abs=1e-6)
    assert ways[-1].log_loss == pytest.approx(of["leaderboard"], abs=1e-3)  # outputs at the anchor are those, to rounding
    low, high = np.minimum(ways[0].theta, ways[-1].theta), np.maximum(ways[0].theta, ways[-1].theta)
    for way in ways[1:-1]:
        assert ((way.theta >= low - 1e-6) & (way.theta <= high + 1e-6)).all()
        assert 0 < way.kept <= 1


def test_prompts_without_votes_do_not_count(tmp_path, rng):
    heads, pool = pool_votes(tmp_path, rng)
    training, validation, test = (pool.part(k) for k in range(3))
    without = replace(heads, of_row=np.where(np.isin(np.arange(len(pool.prompts)), [test[3], training[5]]), -1, heads.of_row))
    found, few = without.fit(training, validation), np.delete(test, 3)
    expected = heads.fit(np.delete(training, 5), validation)
    assert found.log_losses(test) == pytest.approx(found.log_losses(few), rel=1e-6)
    assert found.log_losses(test) == pytest.approx(expected.log_losses(few), rel=1e-6)
    for way, other in zip(found.shrunk(test), found.shrunk(few), strict=True):
        assert way.log_loss == pytest.approx(other.log_loss, rel=1e-6)
        np.testing.assert_allclose(np.delete(way.theta, 3, 0), other.theta, atol=1e-5)  # it has coefficients all the same


def test_heads_among_some_models_read_their_votes_alone(tmp_path, rng):
    heads, pool = pool_votes(tmp_path, rng)
    training, validation, test = (pool.part(k) for k in range(3))
    few = heads.among(np.array([0, 2]))
    counts = np.isin(heads.votes.a, heads.column[[0, 2]]) & np.isin(heads.votes.b, heads.column[[0, 2]])
    np.testing.assert_array_equal(few.votes.weight, np.where(counts, heads.votes.weight, 0))
    other = replace(heads.votes, outcome=np.where(counts, heads.votes.outcome, 3 - heads.votes.outcome))
    same = replace(heads, votes=other).among(np.array([0, 2]))  # what others' votes say changes nothing
    np.testing.assert_array_equal(few.fit(training, validation).theta(test), same.fit(training, validation).theta(test))


def test_models_with_few_shared_prompts_are_unknown():
    """As the pool's rule has it: until all that stay share enough with others that stay."""
    scores = np.full((30, 4), np.nan)
    scores[:20, 0] = scores[:20, 1] = 0.5  # the first two share 20 prompts
    scores[20:, 1] = scores[20:28, 2] = 1.0  # the third shares 8 with the second
    scores[:9, 3] = 0.0
    assert left_out.known_models(scores, 9).tolist() == [0, 1, 3]
    assert left_out.known_models(scores, 8).tolist() == [0, 1, 2, 3]
    assert left_out.known_models(scores, 21).tolist() == []
    chain = np.full((12, 3), np.nan)
    chain[:6, :2] = chain[6:8, 1:] = 1.0  # without the third, the second shares six
    assert left_out.known_models(chain, 6).tolist() == [0, 1]


def test_each_task_is_left_out_once(rng):
    task = np.array([f"t{i % 37}" for i in range(400)])
    groups = left_out.groups_of(task, "task")
    assert len(set(groups)) == left_out.GROUPS
    for name in set(task):
        assert len(set(groups[task == name])) == 1
    sizes = [len(set(task[groups == group])) for group in range(left_out.GROUPS)]
    assert max(sizes) - min(sizes) <= 1


def test_ridge_is_the_penalised_optimum(rng):
    x, y = rng.normal(size=(40, 6)) + 3, rng.normal(size=40)
    for penalty, (weight, intercept) in zip((0.1, 10.0), prompts_needed.ridge(x, y, (0.1, 10.0)), strict=True):
        residual = x @ weight + intercept - y
        assert residual.sum() == pytest.approx(0, abs=1e-9)
        np.testing.assert_allclose(x.T @ residual + penalty * weight, 0, atol=1e-9)


def test_more_prompts_predict_better(rng):
    """Of models whose scores depend on the features; of coins, prompts predict nothing."""
    x = rng.normal(size=(1500, 8))
    scores = 1 / (1 + np.exp(-x @ rng.normal(size=(8, 4))))
    scores[rng.random(scores.shape) < 0.2] = np.nan
    few, many, most = prompts_needed.measured("s", x, scores, (30, 300, 900), 2)
    assert few.gain < many.gain
    assert many.gain > 50
    assert (many.models, most.prompts) == (4, 900)
    assert prompts_needed.measured("s", x, scores, (1400,), 2) == []  # no model has so many
    coins = prompts_needed.measured("s", x, rng.random((1500, 4)), (800,), 2)[0]
    assert abs(coins.gain) < 4


def test_a_pool_is_measured_from_its_texts(tmp_path, monkeypatch, capsys, rng):
    """Models that are good at one subject each: words say who is right."""
    rows = []
    for i in range(60):
        subject = ("apples pears", "rivers lakes")[i % 2]
        for m, model in enumerate(("x", "y", "z")):
            score = float(m == i % 2) if m < 2 else float(rng.random())
            prompt = f'["Question {i} on {subject}"]'
            rows.append({"prompt": prompt, "task": "t", "model": model, "score": score, "source": "one"})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pool.parquet")
    monkeypatch.setattr(prompts_needed, "LEAST", 50)
    monkeypatch.setattr(prompts_needed, "COMPONENTS", 3)
    table = tmp_path / "rows.csv"
    monkeypatch.setattr(sys, "argv", ["prompts_needed", str(tmp_path / "pool.parquet"), "--sizes", "40", "--csv", str(table)])
    prompts_needed.main()
    with table.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["source"], row["prompts"], row["models"]) == ("one", "40", "3")
    assert float(row["gain"]) > 30
    assert "one" in capsys.readouterr().out

"""Costs that depend on the prompt: tokens at the catalog's prices, wherever models are chosen."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2l_engine import Catalog, Engine, Router, routing
from p2l_engine.backbone.lengths import FILE
from p2l_engine.batch import BatchConfig, Route, run
from p2l_engine.batch.decide import at_price
from p2l_engine.catalog import CatalogModel
from p2l_engine.chooser import Chooser
from p2l_engine.coefficients import Coefficients, ExpectedUsage
from p2l_engine.constraints import Constraints
from p2l_engine.errors import CatalogError
from p2l_engine.feedback import feedback_model
from p2l_engine.routing import BudgetPacer, Resource
from tests.support import tiny
from tests.support.catalogs import catalog
from tests.support.command import p2l_engine
from tests.support.lengths import length_head

NAMES = tuple(tiny.MODELS)
PROMPTS = ["one", "two words", "a", "three more words " * 20]


def prices(price_in=2.0, price_out=30.0):
    """In USD per million tokens: of all models but gamma, which has a price for each request."""
    of = [(price_in * (k + 1), price_out * (k + 1)) for k in range(len(NAMES))]
    models = tuple(CatalogModel(name, 0.001, {}, *of[k]) for k, name in enumerate(NAMES) if name != "gamma")
    return Catalog((*models, CatalogModel("gamma", 0.002)))


def coefficients(rng, n, seconds=True, observed=(True, True, False, True, True), deviation=False):
    theta = rng.normal(0, 1, (n, 5)).astype(np.float32)
    usage = ExpectedUsage(
        rng.integers(0, 2000, n).astype(np.float32),
        np.exp(rng.normal(5, 1, (n, 5))).astype(np.float32),
        np.exp(rng.normal(0, 1, (n, 5))).astype(np.float32) if seconds else None,
        np.array(observed),
    )
    spread = np.full((n, 5), 0.3, np.float32) if deviation else None
    return Coefficients(theta, None, NAMES, feedback_model("bt"), spread, usage)


def chooser(of=None, **more):
    return Chooser(NAMES, feedback_model("bt"), of or prices(), **more)


@pytest.mark.slow
@given(st.integers(0, 6), st.integers(0, 2**32 - 1), st.lists(st.booleans(), min_size=5, max_size=5))
def test_a_cost_is_tokens_times_prices(n, seed, observed):
    """The oracle: one model and prompt at a time; what the catalog says where there is no price, or nothing was observed."""
    c, own = coefficients(np.random.default_rng(seed), n, observed=observed), chooser()
    found = own.costs_of(c)
    for k, (name, model) in enumerate(zip(own.names, own.catalog.models, strict=True)):
        m = NAMES.index(name)
        for i in range(n):
            expected = model.cost
            if model.per_token and observed[m]:
                tokens = float(c.usage.tokens_in[i]), float(c.usage.tokens_out[i, m])
                expected = (model.usd_per_m_in * tokens[0] + model.usd_per_m_out * tokens[1]) / 1e6
            assert np.broadcast_to(found, (n, 5))[i, k] == pytest.approx(expected, rel=1e-12)
    if not any(seen for seen, name in zip(observed, NAMES, strict=True) if name != "gamma"):
        assert found is own.costs


def test_without_usage_or_prices_costs_are_the_catalogs(rng):
    c = coefficients(rng, 3)
    plain = Coefficients(c.theta, None, NAMES, c.feedback)
    assert chooser().costs_of(plain).tolist() == [0.001] * 4 + [0.002]
    assert chooser(catalog()).costs_of(c).tolist() == [1, 2, 3, 4, 5]
    decision = chooser(catalog()).decide(c, ["a", "b", "c"])[0]
    assert decision.expected_tokens is not None
    assert chooser().decide(plain, ["a", "b", "c"])[0].expected_tokens is None


@pytest.mark.parametrize("scope", ["prompt", "batch"])
def test_policies_hold_the_budget_at_the_prompts_own_costs(scope, rng):
    c, own = coefficients(rng, 40), chooser()
    prompts = [f"prompt {i}" for i in range(40)]
    costs, v = own.costs_of(c), own.win_rates(c)
    budget = 1.3 * float(costs.min(1).max() if scope == "prompt" else costs.min(1).mean())
    found = own.decide(c, prompts, Constraints(budget, scope))
    expected = routing.solve(routing.Problem(v, costs, budget, scope), "highs")
    assert np.mean([d.win_rate for d in found]) == pytest.approx(expected.value.mean(), abs=1e-6)
    spent = np.array([d.expected_cost for d in found])
    assert (spent.max() if scope == "prompt" else spent.mean()) <= budget * (1 + 1e-9)
    for i, decision in enumerate(found):
        mixed = [(p, own.names.index(name), NAMES.index(name)) for name, p in decision.policy.items()]
        assert decision.expected_cost == pytest.approx(sum(p * costs[i, k] for p, k, _ in mixed))
        assert decision.expected_tokens == pytest.approx(sum(p * c.usage.tokens_out[i, m] for p, _, m in mixed))
        assert decision.expected_seconds == pytest.approx(sum(p * c.usage.seconds[i, m] for p, _, m in mixed))


def test_seconds_are_a_resource(rng):
    c, own = coefficients(rng, 30), chooser()
    bound = 1.2 * float(own.seconds_of(c).min(1).mean())
    limits = Constraints(resources=[Resource("seconds", own.seconds_of(c), bound, "batch")])
    found = own.decide(c, ["p"] * 30, limits)
    assert np.mean([d.expected_seconds for d in found]) <= bound * (1 + 1e-9)
    assert np.mean([d.expected_seconds for d in own.decide(c, ["p"] * 30)]) > bound
    with pytest.raises(ValueError, match="has learned how long answers take, got one without seconds"):
        own.seconds_of(coefficients(rng, 3, seconds=False))


def test_a_pacer_pays_the_prompts_own_cost(rng):
    c, own = coefficients(rng, 20), chooser()
    costs = own.costs_of(c)
    pacer, alone = (BudgetPacer(float(costs.mean()) / 2) for _ in range(2))
    for i in range(20):
        decision = own.pace(c.row(i), pacer)
        k = alone.choose(own.win_rates(c.row(i))[0], costs[i])
        assert decision.model == own.names[k]
        assert decision.expected_cost == costs[i, k]
        assert decision.expected_seconds == pytest.approx(c.usage.seconds[i, NAMES.index(decision.model)])
    assert pacer.mean_cost == alone.mean_cost


def test_a_router_that_explores_holds_the_prompts_own_budget(rng):
    c, own = coefficients(rng, 12, deviation=True), chooser(explore="thompson")
    costs = own.costs_of(c)
    budget = 1.5 * float(costs.min(1).max())
    found = own.decide(c, [f"p{i}" for i in range(12)], Constraints(budget), [f"d{i}" for i in range(12)])
    assert max(d.expected_cost for d in found) <= budget * (1 + 1e-9)
    assert all(0 < d.propensity <= 1 for d in found)
    assert all(d.expected_tokens is not None for d in found)
    paced = own.pace(c.row(0), BudgetPacer(budget), "p0", "d0")
    assert paced.expected_cost == pytest.approx(costs[0, own.names.index(paced.model)])


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.01, 1.0, 100.0]))
def test_at_a_price_each_prompt_gets_the_best_of_its_own_costs(seed, price):
    rng = np.random.default_rng(seed)
    v, costs = rng.integers(0, 3, (6, 4)) / 2, rng.integers(0, 3, (6, 4)) / 2
    found = at_price(v, costs, price)
    for i, (model, _) in enumerate(found.indices.tolist()):
        best = min(range(4), key=lambda k: (-(v[i, k] - price * costs[i, k]), costs[i, k], k))
        assert model == best
        assert (found.value[i], found.cost[i]) == (v[i, best], costs[i, best])
    shared = at_price(v, costs[0], price)
    np.testing.assert_array_equal(shared.indices, at_price(v, np.tile(costs[0], (6, 1)), price).indices)


def test_catalogs_keep_the_prices_of_tokens(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "models:\n  a: {usd_per_m_in: 1, usd_per_m_out: 4, tokens_in: 500, tokens_out: 100}\n  b: {cost: 0.1}\n"
    )
    found = Catalog.from_yaml(tmp_path / "c.yaml")
    assert [model.per_token for model in found.models] == [True, False]
    assert found.costs.tolist() == [0.0009, 0.1]
    np.testing.assert_allclose(found.prices, [[1e-6, np.nan], [4e-6, np.nan]])
    with pytest.raises(CatalogError, match="a: expected both usd_per_m_in and usd_per_m_out, got usd_per_m_out"):
        Catalog((CatalogModel("a", 1, {}, None, 3.0),))
    with pytest.raises(CatalogError, match=r"a\.usd_per_m_in: expected a finite number >= 0, got -1"):
        Catalog((CatalogModel("a", 1, {}, -1, 3.0),))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tiny.write(tmp_path_factory.mktemp("costs"))
    length_head().write(found / FILE)
    entries = [
        f"  {name}: {{usd_per_m_in: {k + 1}, usd_per_m_out: {9 * k + 9}, tokens_in: 50, tokens_out: 60}}"
        for k, name in enumerate(NAMES)
    ]
    (found / "catalog.yaml").write_text("\n".join(["models:", *entries]) + "\n")
    return found


@pytest.mark.slow
def test_a_router_and_batches_agree_on_costs(folder, tmp_path):
    engine = Engine.from_pretrained(folder, device="cpu", dtype="float32")
    router = Router(engine, Catalog.from_yaml(folder / "catalog.yaml"))
    prompts = [*PROMPTS, PROMPTS[1], "another"]
    costs = router.costs_of(engine.coefficients(prompts))
    budget = 1.05 * float(costs.min(1).max())
    single = [router.route(prompt, budget) for prompt in prompts]
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    run(router, BatchConfig([source], tmp_path / "each", budget=budget))
    each = pq.read_table(tmp_path / "each").to_pylist()
    own = Route(str(folder), device="cpu", dtype="float32", budget=budget)({"prompt": np.array(prompts)})
    for i, (decision, row) in enumerate(zip(single, each, strict=True)):
        assert row["model"] == decision.model == own["model"][i]
        for name in ("expected_cost", "expected_tokens", "expected_seconds"):
            assert row[name] == pytest.approx(getattr(decision, name), rel=1e-4)
            assert own[name][i] == pytest.approx(getattr(decision, name), rel=1e-4)
    # Over the batch: the costs lie on disk.
    together = router.route_batch(prompts, budget, "batch")
    run(router, BatchConfig([source], tmp_path / "over", budget=budget, budget_scope="batch", rows_per_part=4))
    over = pq.read_table(tmp_path / "over").to_pylist()
    assert [row["expected_cost"] for row in over] == pytest.approx([d.expected_cost for d in together], rel=1e-4)
    assert np.mean([row["expected_cost"] for row in over]) <= budget * (1 + 1e-6)
    run(router, BatchConfig([source], tmp_path / "price", price=100.0))
    priced = pq.read_table(tmp_path / "price").to_pylist()
    best = (router.win_rates(engine.coefficients(prompts)) - 100 * costs).argmax(1)
    assert [row["model"] for row in priced] == [router.names[k] for k in best]
    router.close()


def test_prompts_beyond_a_budget_of_their_own_say_so(folder, tmp_path):
    """Which they are is known only when their costs are; the others are routed."""
    engine = Engine.from_pretrained(folder, device="cpu", dtype="float32")
    router = Router(engine, Catalog.from_yaml(folder / "catalog.yaml"))
    costs = router.costs_of(engine.coefficients(PROMPTS))
    budget = float(np.sort(costs.min(1))[-2])
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    run(router, BatchConfig([source], tmp_path / "each", budget=budget * (1 + 1e-6)))
    run(router, BatchConfig([source], tmp_path / "over", budget=budget * (1 + 1e-6), max_share={"alpha": 0.9}))
    for name in ("each", "over"):
        rows = pq.read_table(tmp_path / name).to_pylist()
        beyond = int(costs.min(1).argmax())
        assert [i for i, row in enumerate(rows) if row["error"]] == [beyond]
        assert rows[beyond]["model"] is None
        assert "the cheapest model is expected to cost" in rows[beyond]["error"]
        assert all(row["expected_cost"] <= budget * (1 + 1e-5) for i, row in enumerate(rows) if i != beyond)
    rows = Route(str(folder), device="cpu", dtype="float32", budget=budget * (1 + 1e-6))({"prompt": np.array(PROMPTS)})
    assert [error is not None for error in rows["error"]] == [i == beyond for i in range(len(PROMPTS))]
    router.close()


def test_the_frontier_is_over_the_prompts_own_costs(folder, tmp_path):
    (tmp_path / "p.txt").write_text("one\ntwo words\n")
    ended = p2l_engine(
        "frontier",
        str(tmp_path / "p.txt"),
        "--checkpoint",
        str(folder),
        "--json",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--all",
    )
    assert ended.status == 0, ended.err
    lines = [json.loads(line) for line in ended.out.splitlines()]
    engine = Engine.from_pretrained(folder, device="cpu", dtype="float32")
    router = Router(engine, Catalog.from_yaml(folder / "catalog.yaml"))
    costs = router.costs_of(engine.coefficients(["one", "two words"]))
    shown = {line["model"]: line["mean_cost"] for line in lines if "model" in line}
    assert shown == pytest.approx(dict(zip(router.names, costs.mean(0), strict=True)), rel=1e-4)
    router.close()

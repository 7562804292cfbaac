"""The router: decisions against the LP's own answers, reproducible draws, matching catalogs, bad input."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from p2l_engine import CatalogError, Chooser, Constraints, InfeasibleBudget, PromptError, Router, routing
from p2l_engine.feedback import feedback_model
from p2l_engine.prompts import parse
from p2l_engine.routing import BudgetPacer, Infeasible, Resource
from tests.support.catalogs import COSTS, catalog, same
from tests.support.tiny import MODELS

PROMPTS = [f"prompt number {i}" * (1 + i % 3) for i in range(40)]


@pytest.fixture(scope="module")
def router(engine):
    return Router(engine, catalog())


@pytest.mark.parametrize("budget", [None, 1.0, 2.5])
def test_decisions_are_the_optimum(router, budget):
    decisions = router.route_batch(PROMPTS, budget)
    theta = router.engine.coefficients(PROMPTS).theta
    v = routing.win_rates(theta, np.full(5, 0.2))
    best = routing.solve_budget(v, np.array(COSTS), budget, solver="highs")
    scores = routing.bt_score(theta, np.full(5, 0.2), best.value)
    for d, value, score in zip(decisions, best.value, scores, strict=True):
        assert d.win_rate == pytest.approx(value, abs=1e-7)
        assert d.score == pytest.approx(score, abs=1e-5)
        assert sum(d.policy.values()) == pytest.approx(1)
        assert d.model in d.policy
        assert d.expected_cost == pytest.approx(sum(p * COSTS[MODELS.index(m)] for m, p in d.policy.items()))
        assert budget is None or d.expected_cost <= budget
        assert len(d.policy) <= 2
        assert d.why.startswith("highest win rate")


def test_a_batch_is_routed_as_its_prompts_are_in_any_order(router, rng):
    together = router.route_batch(PROMPTS, 1.5)
    assert any(len(d.policy) == 2 for d in together)
    order = rng.permutation(len(PROMPTS))
    shuffled = router.route_batch([PROMPTS[i] for i in order], 1.5)
    for place, i in enumerate(order):
        same(shuffled[place], together[i])
        if i < 10:
            same(router.route(PROMPTS[i], 1.5), together[i])


@pytest.mark.slow
def test_draws_follow_the_policy_and_the_seed(engine):
    theta = np.tile(np.array([[0.0, 1.0, 0.0, 0.0, 0.0]], np.float32), (4000, 1))
    prompts = [f"p{i}" for i in range(4000)]
    coefficients = type(engine.coefficients([]))(theta, None, engine.models, engine.feedback)
    draws = {}
    for seed in (0, 1):
        decisions = Router(engine, catalog(), seed=seed).decide(coefficients, prompts, Constraints(1.25))
        assert decisions[0].policy == {"alpha": 0.75, "beta": 0.25}
        draws[seed] = [d.model for d in decisions]
        # 4 standard errors of a share of 0.25 over 4,000 draws
        assert draws[seed].count("beta") / 4000 == pytest.approx(0.25, abs=0.028)
    assert draws[0] != draws[1]


def test_strings_turns_and_messages_draw_alike(router):
    forms = ["hello", ["hello"], [{"role": "user", "content": "hello"}]]
    first, *others = router.route_batch(forms, 2.5)
    for other in others:
        same(first, other)


def test_opponents(engine):
    theta = engine.coefficients(["x"]).theta.astype(float)
    for opponents, q in (
        ({"beta": 1.0}, [0, 1, 0, 0, 0]),
        ([0.5, 0, 0, 0, 0.5], [0.5, 0, 0, 0, 0.5]),
        ("uniform", [0.2] * 5),
    ):
        d = Router(engine, catalog(), opponents=opponents).route("x")
        assert d.win_rate == pytest.approx(routing.win_rates(theta, np.array(q, float)).max(), abs=1e-6)
    with pytest.raises(ValueError, match="opponents: the checkpoint does not know zeta"):
        Router(engine, catalog(), opponents={"zeta": 1.0})
    with pytest.raises(ValueError, match=r"opponents: expected weights that sum to 1, got a sum of 0.5"):
        Router(engine, catalog(), opponents={"beta": 0.5})
    with pytest.raises(ValueError, match="opponents: expected 'uniform'"):
        Router(engine, catalog(), opponents="even")


def test_models_that_only_one_side_knows(engine):
    partly = catalog(["beta", "zeta", "alpha"], [1.0, 2.0, 3.0])
    with pytest.raises(CatalogError, match="does not know zeta; the catalog lacks gamma, delta, epsilon") as caught:
        Router(engine, partly)
    assert "unmatched='leave_out'" in str(caught.value)
    known = partly.only(["beta", "alpha"])
    assert Router(engine, replace(known, left_out=("gamma", "delta", "epsilon"))).names == ("beta", "alpha")
    with pytest.raises(CatalogError, match="does not know eta; the catalog lacks delta, epsilon"):
        Router(engine, replace(known, left_out=("gamma", "eta")))
    router = Router(engine, partly, unmatched="leave_out")
    assert router.names == ("beta", "alpha")
    assert router.route("hi", budget=1.0).model == "beta"
    with pytest.raises(CatalogError, match="knows none of its models"):
        Router(engine, catalog(["x"], [1.0]), unmatched="leave_out")


def test_infeasible_budget(router):
    with pytest.raises(InfeasibleBudget) as caught:
        router.route("hi", budget=0.5)
    assert caught.value.smallest == 1.0
    assert router.route("hi", budget=caught.value.smallest).policy == {"alpha": 1.0}
    with pytest.raises(InfeasibleBudget, match="for prompt 1"):
        router.route_batch(["a", "b"], budget=[2.0, 0.25])


def test_batch_scope_dominates_and_shares_hold(router):
    each, mean = router.route_batch(PROMPTS, 2.5), router.route_batch(PROMPTS, 2.5, "batch")
    assert np.mean([d.expected_cost for d in mean]) <= 2.5 + 1e-6
    assert np.mean([d.win_rate for d in mean]) >= np.mean([d.win_rate for d in each]) - 1e-7
    top = max(MODELS, key=lambda name: np.mean([d.policy.get(name, 0) for d in mean]))
    capped = router.route_batch(PROMPTS, None, "batch", max_share={top: 0.1})
    assert np.mean([d.policy.get(top, 0) for d in capped]) <= 0.1 + 1e-6


def test_shares_of_groups_resources_and_masks_hold(router):
    allowed = np.ones((len(PROMPTS), 5), bool)
    allowed[::2, 4] = False
    seconds = np.array([5.0, 1.0, 1.0, 2.0, 4.0])
    decisions = router.route_batch(
        PROMPTS,
        3.0,
        max_share={tuple(MODELS[3:]): 0.4},
        min_share={MODELS[0]: 0.2},
        resources=[Resource("seconds", seconds, 2.5, "batch")],
        allowed=allowed,
    )
    p = np.array([[d.policy.get(name, 0.0) for name in MODELS] for d in decisions])
    assert (p @ np.array(COSTS) <= 3.0 + 1e-8).all()
    assert p[:, 3:].sum(1).mean() <= 0.4 + 1e-9
    assert p[:, 0].mean() >= 0.2 - 1e-9
    assert (p @ seconds).mean() <= 2.5 + 1e-8
    assert (p[::2, 4] == 0).all()
    with pytest.raises(Infeasible, match=f"min_share of {MODELS[4]} = 0.6") as caught:
        router.route_batch(PROMPTS, min_share={MODELS[4]: 0.6}, allowed=allowed)
    assert caught.value.nearest == pytest.approx(0.5)


@pytest.mark.slow
def test_a_pacer_holds_the_mean_over_a_stream(router):
    pacer = BudgetPacer(2.0, horizon=20)
    decisions = [router.route(prompt, pacer=pacer) for prompt in PROMPTS * 5]
    assert all(d.policy == {d.model: 1.0} for d in decisions)
    assert np.mean([d.expected_cost for d in decisions]) == pytest.approx(2.0, rel=0.1)
    assert decisions[0].score == pytest.approx(
        router.engine.coefficients(PROMPTS[:1]).theta[0, MODELS.index(decisions[0].model)], abs=1e-4
    )
    assert decisions[-1].why.startswith("highest win rate less cost at ")
    pacer.settle(1000.0)
    overspent = router.route("hi", pacer=pacer)
    assert overspent.expected_cost == min(COSTS)
    assert overspent.why == "lowest cost: a mean budget of 2 was overspent by 8 or more"
    with pytest.raises(ValueError, match="budget: expected None with a pacer"):
        router.route("hi", budget=1.0, pacer=pacer)


@pytest.mark.parametrize("objective", ["half-ties", "not-bad"])
def test_other_objectives(engine, objective):
    c = engine.coefficients(PROMPTS)
    v = routing.win_rates(c.theta, np.full(5, 0.2), objective, c.eta, c.feedback.name)
    decisions = Router(engine, catalog(), objective=objective).decide(c, PROMPTS, Constraints(2.5))
    assert np.mean([d.win_rate for d in decisions]) == pytest.approx(routing.solve_budget(v, COSTS, 2.5).value.mean(), abs=1e-7)
    assert all(np.isfinite(d.score) for d in decisions)
    with pytest.raises(ValueError, match="objective: expected 'bt', 'half-ties' or 'not-bad', got 'elo'"):
        Router(engine, catalog(), objective="elo")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": float("nan")}, "budget: expected a number"),
        ({"budget": [1.0, 2.0, 3.0]}, r"budget: expected a number or shape \[2\]"),
        ({"budget_scope": "day"}, "budget_scope: expected 'prompt' or 'batch', got 'day'"),
        ({"min_share": {"alpha": 1.5}}, "min_share of alpha: expected a share in .0, 1., got 1.5"),
        ({"max_share": {("alpha", "beta"): float("nan")}}, "max_share of alpha, beta: expected a share in .0, 1., got nan"),
        ({"budget_scope": "batch", "max_share": {"zeta": 0.5}}, "max_share: expected models of the catalog, got zeta"),
        ({"budget_scope": "batch", "budget": [1.0, 2.0]}, "budget: expected one number in scope 'batch'"),
    ],
)
def test_bad_arguments_are_named(router, arguments, message):
    with pytest.raises(ValueError, match=message):
        router.route_batch(["a", "b"], **arguments)


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        (["alpha"], "max_share: expected a mapping of names to shares, got list"),
        ({3: 0.5}, "max_share: expected a model's name, or a tuple of names, got 3"),
        ({"alpha": "0.5"}, "max_share of alpha: expected a share in .0, 1., got '0.5'"),
        ({"alpha": True}, "max_share of alpha: expected a share in .0, 1., got True"),
    ],
)
def test_shares_of_wrong_types_are_named(router, shares, message):
    with pytest.raises(TypeError, match=message):
        router.route_batch(["a", "b"], max_share=shares)


def test_the_path_of_a_catalog_is_no_catalog(engine):
    with pytest.raises(TypeError, match="catalog: expected a Catalog .Catalog.from_yaml reads a file., got str"):
        Router(engine, "catalog.yaml")


@pytest.mark.slow
def test_prompts_at_the_edge(router):
    assert router.route_batch([]) == []
    assert router.route_batch([], 2.0, "batch") == []
    for prompt in ("", "   \n", "x" * 200_000, " ".join(router.engine.encoder.tokenizer.special_tokens.values())):
        assert router.route(prompt).model in MODELS
    with pytest.raises(PromptError, match=r"prompts\[1\]"):
        router.route_batch(["fine", "\ud83d", "fine"])


def test_coefficients_of_another_engine_are_refused(router):
    with pytest.raises(ValueError, match="coefficients: expected those of 2 prompts"):
        router.decide(router.engine.coefficients(["a"]), ["a", "b"])


def test_a_chooser_decides_without_an_engine(router):
    c, constraints = router.engine.coefficients(PROMPTS), Constraints(2.5, max_share={"beta": 0.3})
    chooser = Chooser(c.models, c.feedback, catalog())
    for one, other in zip(chooser.decide(c, PROMPTS, constraints), router.decide(c, PROMPTS, constraints), strict=True):
        same(one, other)
    assert chooser.decide(c, PROMPTS)[0].policy == router.route(PROMPTS[0]).policy
    with pytest.raises(TypeError, match=r"constraints: expected Constraints\(budget=...\), got 2.5"):
        chooser.decide(c, PROMPTS, 2.5)
    with pytest.raises(ValueError, match="got 'ols', whose coefficients give no win rates"):
        Chooser(c.models, feedback_model("ols"), catalog())


def test_a_prompt_is_parsed_once(router, monkeypatch):
    parsed = []
    turn = parse._turn
    monkeypatch.setattr(parse, "_turn", lambda item, *where: parsed.append(item) or turn(item, *where))
    router.route(["a", "b"], 2.5)
    assert parsed == ["a", "b"]
    parsed.clear()
    router.route_batch([["c"], ["d", "e"]], 2.5)
    assert parsed == ["c", "d", "e"]

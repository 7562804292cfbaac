"""Thompson sampling: propensities against closed forms and long-run frequencies, budgets, reproducible draws, bad input."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, chi2, kstest, norm

from p2l_engine import Chooser, Constraints, Engine, Router
from p2l_engine.backbone.uncertainty import FILE, Uncertainty
from p2l_engine.catalog import Catalog, CatalogModel
from p2l_engine.coefficients import Coefficients
from p2l_engine.decision import Draws
from p2l_engine.feedback import feedback_model
from p2l_engine.routing import BudgetPacer, InfeasibleBudget, Resource, bt_score, solve_budget, thompson, values, win_rates
from tests.support import tiny
from tests.support.cases import slow_but
from tests.support.catalogs import COSTS, catalog, same
from tests.support.tiny import MODELS

COUNT = 1200
SURELY = 1e-6  # a test fails wrongly with this probability, for a random seed


def chooser(m=5, seed=0, costs=COSTS, feedback="bt", explore="thompson", **options):
    names = MODELS[:m]
    return Chooser(names, feedback_model(feedback), catalog(names, costs[:m]), seed=seed, explore=explore, **options)


def believed(theta, deviation, count=1, feedback="bt", eta=None):
    """The same prompt ``count`` times."""
    rows = [np.tile(np.array([part], np.float32), (count, 1)) for part in (theta, deviation)]
    ties = None if eta is None else np.full(count, eta, np.float32)
    return Coefficients(rows[0], ties, tuple(MODELS[: len(theta)]), feedback_model(feedback), rows[1])


def decisions(theta, deviation, constraints=None, count=COUNT, **options):
    """What a prompt gets in ``count`` requests of their own."""
    found = believed(theta, deviation, count)
    ids = [f"request {i}" for i in range(count)]
    return chooser(len(theta), **options).decide(found, ["hello"] * count, constraints or Constraints(), ids)


def narrow(numbers):
    """As coefficients hold them."""
    return np.asarray(numbers, np.float32).astype(float)


def within(successes, count, p):
    """Whether a binomial count is one that happens but with probability SURELY."""
    return binom.cdf(successes, count, p) > SURELY / 2 and binom.sf(successes - 1, count, p) > SURELY / 2


def frequency(theta, deviation, budget, q=None, draws=200_000, seed=9):
    """The probability of each model by plain simulation, from the definition."""
    rng = np.random.default_rng(seed)
    m = len(theta)
    drawn = np.asarray(theta, float) + np.asarray(deviation, float) * rng.standard_normal((draws, m))
    p = solve_budget(win_rates(drawn, np.full(m, 1 / m) if q is None else q), np.array(COSTS[:m]), budget)
    return np.array([(p.probabilities * (p.indices == k)).sum(1).mean() for k in range(m)])


@pytest.mark.parametrize("budget", slow_but((1.25,), [None, 1.25, 2.0]))
@pytest.mark.parametrize(
    ("theta", "deviation"), [([0.0, 0.3], [0.0, 0.5]), ([1.0, 0.9], [0.7, 0.2]), ([0.5, -0.2], [0.3, 0.0])]
)
def test_two_models_have_a_closed_form(theta, deviation, budget):
    found = decisions(theta, deviation, Constraints(budget))
    mean, around = narrow(theta), narrow(deviation)
    dearer = float(norm.cdf((mean[1] - mean[0]) / np.hypot(*around)))
    share = dearer * (1.0 if budget is None else min(budget - 1.0, 1.0))  # costs 1 and 2
    expected = {"alpha": 1 - share, "beta": share}
    assert {d.propensity_error for d in found} == {0.0}
    for d in found:
        assert d.propensity == pytest.approx(expected[d.model], abs=1e-9)
    assert within(sum(d.model == "beta" for d in found), COUNT, share)


@pytest.mark.slow
def test_a_new_model_beside_certain_ones_has_a_closed_form():
    """Of many models only the best certain one and the uncertain one are ever chosen: a normal cdf again."""
    found = decisions([0.2, 1.0, -0.3, 0.9, 0.8], [0.0, 0.0, 0.0, 0.0, 0.6])
    p = float(norm.cdf((narrow(0.8) - 1) / narrow(0.6)))
    assert {(d.model, d.propensity_error) for d in found} == {("beta", 0.0), ("epsilon", 0.0)}
    for d in found:
        assert d.propensity == pytest.approx(p if d.model == "epsilon" else 1 - p, abs=1e-9)
    assert within(sum(d.model == "epsilon" for d in found), COUNT, p)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("theta", "deviation", "budget"),
    [
        ([0.0, 0.2, 0.3, 0.4, 0.2], [0.3, 0.0, 0.5, 0.1, 0.8], None),
        ([0.0, 0.2, 0.3, 0.9, 1.2], [0.2, 0.1, 0.4, 0.1, 0.7], 2.6),
        ([0.0, 0.5, 0.7, 0.8], [0.0, 0.0, 0.0, 0.9], 1.7),
    ],
)
def test_propensities_are_long_run_frequencies(theta, deviation, budget):
    found = decisions(theta, deviation, Constraints(budget))
    expected = frequency(theta, deviation, budget)
    weights = np.zeros(len(theta))
    for d in found:
        k = MODELS.index(d.model)
        assert 0 < d.propensity_error <= 0.5 / np.sqrt(1000)
        # 7 standard errors, and the bias of one draw in 1,001
        assert abs(d.propensity - expected[k]) < 7 * np.sqrt(expected[k] * (1 - expected[k]) / 1000) + 0.002
        weights[k] += 1 / d.propensity / COUNT
        assert budget is None or d.expected_cost <= budget
    for k, p in enumerate(expected):
        assert within(sum(d.model == MODELS[k] for d in found), COUNT, p)
        if p > 0.01:  # inverse propensity weights have the mean 1; their variance is about 1 / p - 1
            assert abs(weights[k] - 1) < 5.5 * np.sqrt((1 / p - 1) / COUNT)


@pytest.mark.slow
def test_few_draws_are_unbiased_too(monkeypatch):
    """Weights by the propensity given the draws have the mean 1 for any number of draws."""
    monkeypatch.setattr(thompson, "DRAWS", 3)
    monkeypatch.setattr(thompson, "FEWEST", 3)
    theta, deviation = [0.0, 0.2, 0.3], [0.3, 0.3, 0.3]
    # A model that none of the four draws chooses counts as weight 0: the mean is the probability that one of them does.
    found = decisions(theta, deviation)
    for k, p in enumerate(frequency(theta, deviation, None)):
        weights = np.array([(d.model == MODELS[k]) / d.propensity for d in found])
        assert abs(weights.mean() - (1 - (1 - p) ** 4)) < 5.5 * weights.std() / np.sqrt(COUNT)


@pytest.mark.slow
def test_budgets_over_the_batch_hold_at_the_realised_price():
    theta, deviation = [0.0, 0.4, 0.6, 0.7, 0.9], [0.1, 0.3, 0.2, 0.5, 0.4]
    constraints = Constraints(2.2, "batch", max_share={"gamma": 0.15})
    found = decisions(theta, deviation, constraints, 800)
    assert np.mean([d.expected_cost for d in found]) <= 2.2 * (1 + 1e-12)
    assert np.mean([d.policy.get("gamma", 0) for d in found]) <= 0.15 * (1 + 1e-9)
    # All prompts are alike, so the price of these draws is nearly the price of all: shares are the propensities.
    for name in MODELS:
        own = [d.propensity for d in found if d.model == name]
        if own:
            assert len(own) / 800 == pytest.approx(np.mean(own), abs=0.06)


@pytest.mark.slow
def test_a_pacers_choice_has_its_propensity():
    theta, deviation = [0.0, 0.4, 0.6, 0.7, 0.9], [0.1, 0.3, 0.2, 0.5, 0.4]
    one, router = believed(theta, deviation), chooser()
    found = [router.pace(one, BudgetPacer(2.0, price=0.05), "hello", f"request {i}") for i in range(600)]
    counted = {name: [d for d in found if d.model == name] for name in {d.model for d in found}}
    assert len(counted) > 2
    for own in counted.values():
        p = np.mean([d.propensity for d in own])
        assert abs(len(own) / 600 - p) < 5.5 * np.sqrt(p * (1 - p) / 600) + 0.002
    pacer = BudgetPacer(2.0)
    mean = np.mean([router.pace(one, pacer, "hello", str(i)).expected_cost for i in range(200)])
    assert mean <= 2.0 + pacer.allowance / 200


@pytest.mark.slow
@given(st.data())
def test_paced_rows_are_what_the_pacer_chooses(data):
    m = data.draw(st.integers(1, 5))
    levels = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])
    costs = np.array(data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 30.0, 1000.0]), min_size=m, max_size=m)))
    rows = np.array(data.draw(st.lists(st.lists(levels, min_size=m, max_size=m), min_size=1, max_size=6)))
    spent = data.draw(st.sampled_from([0.0, 10.0, -50.0, 99.0, 101.0, 300.0]))
    for v in rows:
        pacer = BudgetPacer(1.0)  # an allowance of 100
        pacer.settle(spent)
        choice = pacer.choose_at(v, costs)
        assert thompson.paced(v[None], costs, choice.price, choice.most).tolist() == [choice.model]


@pytest.mark.slow
@given(st.data())
def test_any_posterior_gives_a_sound_decision(data):
    m = data.draw(st.integers(1, 5), label="models")
    theta = data.draw(st.lists(st.sampled_from([0.0, 0.5, -1.0, 2.0]), min_size=m, max_size=m), label="theta")  # ties too
    size = st.sampled_from([0.0, 1e-38, 1e-12, 1e-3, 1.0, 50.0, 3e38])
    deviation = data.draw(st.lists(size, min_size=m, max_size=m), label="deviation")
    budget = data.draw(st.sampled_from([None, 1.0, 1.5, 2.5, 5.0, 9.0]), label="budget")
    scope = data.draw(st.sampled_from(["prompt", "batch"]), label="scope")
    feedback = data.draw(st.sampled_from(["bt", "rk", "grk"]), label="feedback")
    objective = data.draw(st.sampled_from(["bt", "half-ties", "not-bad"]), label="objective")
    found = believed(theta, deviation, 2, feedback, None if feedback == "bt" else 20.0)
    constraints, prompts = Constraints(budget, scope), ["one", "two"]
    explored = chooser(m, feedback=feedback, objective=objective).decide(found, prompts, constraints)
    greedy = chooser(m, feedback=feedback, objective=objective, explore=None).decide(found, prompts, constraints)
    assert budget is None or np.mean([d.expected_cost for d in explored]) <= budget * (1 + 1e-12)
    for d, certain in zip(explored, greedy, strict=True):
        assert 0 < d.propensity <= 1
        assert 0 <= d.propensity_error <= 0.5
        assert d.policy[d.model] > 0
        assert sum(d.policy.values()) == pytest.approx(1)
        v = win_rates(found.theta[:1], np.full(m, 1 / m))[0] if objective == "bt" else None
        if v is not None:  # of the mean coefficients
            assert d.win_rate == pytest.approx(sum(p * v[MODELS.index(n)] for n, p in d.policy.items()), abs=1e-9)
            if 0 < d.win_rate < 1:
                assert d.score == pytest.approx(
                    bt_score(found.theta[:1], np.full(m, 1 / m), np.array([d.win_rate]))[0], abs=1e-6
                )
        if not any(deviation):
            same(d, certain)
            assert (d.propensity, d.propensity_error) == (certain.propensity, 0.0)


@pytest.mark.slow
@given(st.lists(st.tuples(st.floats(-5, 5), st.sampled_from([0.0, 1e-9, 0.1, 2.0])), min_size=1, max_size=6))
def test_models_without_a_chance_are_found(rows):
    theta, deviation = np.array(rows).T.copy()
    kept = thompson.contenders(theta, deviation)
    assert len(kept)
    scale = np.hypot(deviation[:, None], deviation[None, :])
    for j in range(len(theta)):
        loses = [theta[i] - theta[j] > thompson.BEYOND * scale[i, j] for i in range(len(theta))]
        assert (j in kept) == (not any(loses))
    if len(rows) > 1 and scale[0, 1]:
        expected = norm.cdf((theta[0] - theta[1]) / scale[0, 1])
        assert thompson.higher(theta[:2], deviation[:2]) == pytest.approx(expected, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("kind", ["prompt", "request", "seed"])
def test_draws_are_normal_and_independent(kind):
    """Kolmogorov's and Smirnov's test, of each model and of all together, over prompts, requests and seeds."""
    theta, deviation = np.array([0.3, -1.0, 2.0]), np.array([0.5, 2.0, 1e-3])
    found = []
    for i in range(3000):
        generator = Draws(i if kind == "seed" else 0, "abc").generator(
            [f"prompt {i}" if kind == "prompt" else "hello"], f"request {i}" if kind == "request" else None
        )
        found.append((thompson.Posterior(theta, deviation, generator).drawn - theta) / deviation)
    z = np.array(found)
    for column in z.T:
        assert kstest(column, "norm").pvalue > SURELY
        assert abs(np.corrcoef(column[1:], column[:-1])[0, 1]) < 5 / np.sqrt(3000)
    assert kstest((z**2).sum(1), chi2(3).cdf).pvalue > SURELY


@pytest.mark.slow
def test_draws_are_alike_in_all_processes():
    drawn = "Draws(3, 'ab').generator(['one', 'two'], 'x').standard_normal(3).tolist()"
    code = f"from p2l_engine.decision import Draws; print({drawn})"
    found = {
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, text=True, check=True,
                       capture_output=True).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert found == {f"{Draws(3, 'ab').generator(['one', 'two'], 'x').standard_normal(3).tolist()}\n"}
    others = [(["one", "two"], "y"), (["one", "two"], None), (["x", "one", "two"], None), (["two"], "x"), (["one"], "x")]
    different = {Draws(3, "ab").generator(turns, token).standard_normal() for turns, token in others}
    assert len(different) == len(others)  # a text and the turns are not run together


@pytest.mark.slow
def test_masks_hold_and_bounds_of_several_kinds_are_refused():
    theta, deviation = [0.0, 0.4, 0.6, 0.7, 0.9], [0.1, 0.3, 0.2, 0.5, 0.4]
    allowed = np.tile([True, False, True, False, True], (200, 1))
    found = decisions(theta, deviation, Constraints(2.0, allowed=allowed), 200)
    assert {d.model for d in found} == {"alpha", "gamma", "epsilon"}
    two = np.tile([True, False, False, False, True], (200, 1))
    assert {d.propensity_error for d in decisions(theta, deviation, Constraints(allowed=two), 200)} == {0.0}
    one = np.tile([False, False, True, False, False], (200, 1))
    assert {(d.model, d.propensity) for d in decisions(theta, deviation, Constraints(allowed=one), 200)} == {("gamma", 1.0)}
    with pytest.raises(ValueError, match="one bound for each prompt at most where the router explores, got budget, seconds"):
        decisions(theta, deviation, Constraints(2.0, resources=[Resource("seconds", np.ones(5), 1.0)]))
    with pytest.raises(InfeasibleBudget):
        decisions(theta, deviation, Constraints(0.5))


def test_draws_depend_on_seed_prompt_and_text_alone():
    theta, deviation = np.zeros(5), np.ones(5)
    prompts = [f"prompt {i % 20}" for i in range(40)]
    together = chooser().decide(believed(theta, deviation, 40), prompts)
    assert together[:20] == together[20:]
    assert len({d.model for d in together}) == 5
    for i in (3, 39):
        assert chooser().decide(believed(theta, deviation), [prompts[i]]) == [together[i]]
    others = [
        chooser(seed=1).decide(believed(theta, deviation, 40), prompts),
        chooser().decide(believed(theta, deviation, 40), prompts, draws=["a"] * 40),
        chooser().decide(believed(theta, deviation, 40), prompts, draws=["b"] * 40),
    ]
    models = [[d.model for d in found] for found in (together, *others)]
    assert len({tuple(row) for row in models}) == 4
    # Draws of mixed policies follow the text too, without exploring.
    flat = Coefficients(np.tile(np.float32([0, 1, 0, 0, 0]), (400, 1)), None, tuple(MODELS), feedback_model("bt"))
    mixed = chooser(explore=None).decide(flat, ["hello"] * 400, Constraints(1.5), list(map(str, range(400))))
    assert within(sum(d.model == "beta" for d in mixed), 400, 0.5)
    assert {d.propensity for d in mixed} == {0.5}


@pytest.fixture(scope="module")
def uncertain(tmp_path_factory):
    folder = tiny.write(tmp_path_factory.mktemp("explore"))
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(5, 3, 3, generator=generator).tril()
    Uncertainty(torch.randn(49, 3, generator=generator) / 2, factors, tuple(MODELS)).write(folder / FILE)
    return Engine.from_pretrained(folder, device="cpu", dtype="float32")


@pytest.mark.slow
def test_a_router_explores_in_every_call(uncertain):
    prompts = [f"prompt number {i}" * (1 + i % 3) for i in range(30)]
    with Router(uncertain, catalog(), explore="thompson") as router:
        batch = router.route_batch(prompts, 2.5)
        for prompt, decision in zip(prompts, batch, strict=True):
            same(router.route(prompt, 2.5), decision)
        same(asyncio.run(router.aroute(prompts[0], 2.5)), batch[0])
        assert any(
            d.model != g.model for d, g in zip(batch, Router(uncertain, catalog()).route_batch(prompts, 2.5), strict=True)
        )
        assert all(d.why.endswith("its coefficients drawn from their posterior") for d in batch)
        tokens = [f"request {i}" for i in range(30)]
        spread = router.route_batch([prompts[0]] * 30, 2.5, draws=tokens)
        assert len({d.model for d in spread}) > 1
        same(router.route(prompts[0], 2.5, draw=tokens[7]), spread[7])
        pacer = BudgetPacer(2.5)
        assert 0 < router.route(prompts[0], pacer=pacer, draw="x").propensity <= 1
        assert router.route_batch([]) == []


def test_exploring_needs_an_uncertainty_and_says_how_to_get_it(engine):
    with pytest.raises(ValueError, match="checkpoint that knows how sure it is.*'p2l-engine adapt' makes one from votes"):
        Router(engine, catalog(), explore="thompson")
    certain = Coefficients(np.zeros((1, 5), np.float32), None, tuple(MODELS), feedback_model("bt"))
    with pytest.raises(ValueError, match="'p2l-engine adapt'"):
        chooser().decide(certain, ["hello"])
    with pytest.raises(ValueError, match="'p2l-engine adapt'"):
        chooser().pace(certain, BudgetPacer(1.0), "hello")
    with pytest.raises(ValueError, match="explore: expected 'thompson' or None, got 'greedy'"):
        chooser(explore="greedy")
    with pytest.raises(ValueError, match="prompt: expected the prompt of these coefficients"):
        chooser().pace(believed(np.zeros(5), np.ones(5)), BudgetPacer(1.0))
    for wrong in ([-1.0] * 5, [np.nan] * 5):
        with pytest.raises(ValueError, match="deviation"):
            chooser().decide(believed(np.zeros(5), wrong), ["hello"])
    for draws, error in (("abc", ValueError), (["a", "b"], ValueError), ([7], TypeError)):
        with pytest.raises(error, match="draws"):
            chooser().decide(believed(np.zeros(5), np.ones(5)), ["hello"], draws=draws)


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(1, 23), st.sampled_from(["bt", "rk", "grk"]),
    st.sampled_from(["bt", "half-ties", "not-bad"]), st.sampled_from([0.01, 1.0, 4.0, 30.0, 200.0]), st.booleans(),
)  # fmt: skip
def test_models_that_no_policy_would_choose_are_left_out_and_nothing_changes(seed, models, name, objective, spread, equal):
    """The bits of win rates and of propensities are those over all models: also with equal costs and wide coefficients."""
    rng = np.random.default_rng(seed)
    feedback = feedback_model(name)
    theta = rng.normal(0, spread, (12, models))
    if equal:
        theta = theta.round(1)
    eta = rng.normal(0, min(spread, 5), 12) if feedback.has_eta else None
    objective = objective if objective != "not-bad" or feedback.grounded else "bt"
    costs = rng.integers(0, 4, models).astype(float) if equal else rng.random(models)
    q = rng.dirichlet(np.ones(models))
    q[rng.random(models) < 0.2] = 0
    q = q / q.sum() if q.sum() > 0 else np.full(models, 1 / models)
    whole = values.compute(theta, q, objective, eta, name)
    some = np.flatnonzero(rng.random(models) < 0.8)
    some = some if len(some) else np.arange(models)
    found = values.contending(theta, q, objective, eta, name, some, costs[some])
    kept = found != 0
    assert (found == np.where(kept, whole[:, some], 0)).all()
    for row, of in zip(theta[:, some], kept | (whole[:, some] == 0), strict=True):
        for j in np.flatnonzero(~of):
            assert (row[costs[some] < costs[some][j]] > row[j]).any()
    v = np.ascontiguousarray(whole[:, some])
    for price, most in ((0.0, np.inf), (0.3, np.inf), (2.0, float(np.median(costs[some]))), (np.inf, np.inf)):
        np.testing.assert_array_equal(
            thompson.paced(found, costs[some], price, most), thompson.paced(v, costs[some], price, most)
        )
    for budget in (None, float(costs[some].min()), float(np.median(costs[some])), 9.0):
        problem = Constraints(budget).problem(v, costs[some], [str(i) for i in some])
        for model in range(len(some)):
            every, few = (thompson.chances(problem, {}, 0, model, of) for of in (v, found))
            np.testing.assert_array_equal(every, few)


@pytest.mark.slow
def test_propensities_are_those_over_all_models_with_rows_over_the_batch_and_masks(rng, monkeypatch):
    n, names = 12, tuple("abcdefgh")
    theta, deviation = rng.normal(0, 2, (n, 8)).astype(np.float32), np.full((n, 8), 0.7, np.float32)
    eta = rng.normal(0, 1, n).astype(np.float32)
    costs = np.array([1.0, 1.0, 2.0, 3.0, 3.0, 5.0, 8.0, 9.0])
    models = Catalog(tuple(CatalogModel(name, cost) for name, cost in zip(names, costs, strict=True)))
    allowed = rng.random((n, 8)) < 0.7
    allowed[:, 0] = True
    coefficients = Coefficients(theta, eta, names, feedback_model("grk"), deviation)
    prompts = [[str(i)] for i in range(n)]
    cases = [
        Constraints(), Constraints(2.5), Constraints(2.5, "batch"), Constraints(2.5, "batch", {"f": 0.1}),
        Constraints(4.0, max_share={"a": 0.3}), Constraints(2.5, allowed=allowed), Constraints(2.5, "batch", allowed=allowed),
    ]  # fmt: skip
    for objective in ("bt", "half-ties"):
        explorer = Chooser(names, feedback_model("grk"), models, objective=objective, explore="thompson")
        fast = [explorer.decide(coefficients, prompts, case) for case in cases]
        with monkeypatch.context() as patch:
            patch.setattr(thompson, "only_cost", lambda *_: None)
            assert [explorer.decide(coefficients, prompts, case) for case in cases] == fast

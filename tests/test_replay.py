"""Off-policy replay: its estimators, what it refuses, and how often its intervals hold the truth."""

from __future__ import annotations

import itertools
import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import replay_coverage
from p2l_engine import Catalog, routing
from p2l_engine.catalog import CatalogModel
from p2l_engine.coefficients import Coefficients
from p2l_engine.feedback import feedback_model
from p2l_engine.replay import expected_score
from p2l_engine.replay.compare import replay
from p2l_engine.replay.estimators import doubly_robust, figure, freedom, ips, snips, standard_error
from p2l_engine.replay.expected_score import FOLDS, PRIOR, ExpectedScore
from p2l_engine.replay.logged import LoggedDecisions, ScoreMatrix
from p2l_engine.replay.mixture import Mixture
from p2l_engine.replay.policies import PolicySpec

MODELS = ("a", "b", "c")
CATALOG = Catalog(tuple(CatalogModel(name, cost) for name, cost in zip(MODELS, (1.0, 2.0, 5.0), strict=True)))


class Known:
    """Coefficients of the log's prompts, and a catalog, as a checkpoint would give them."""

    def __init__(self, theta, models=MODELS, catalog=CATALOG):
        theta = np.asarray(theta, np.float32)
        self.asked, self._catalog = [], catalog
        self._coefficients = Coefficients(theta, None, tuple(models), feedback_model("bt"))

    def coefficients(self, checkpoint, prompts):
        self.asked.append(checkpoint)
        assert len(prompts) == len(self._coefficients)
        return self._coefficients

    def catalog(self, checkpoint):
        return self._catalog


def logged(p, chosen, reward, **changes):
    """Decisions of the policy p [N, 3], each on a prompt of its own."""
    n = len(chosen)
    p, chosen = np.asarray(p, np.float64), np.asarray(chosen, np.int32)
    values = {
        "models": MODELS,
        "chosen": chosen,
        "propensity": p[np.arange(n), chosen],
        "error": np.zeros(n),
        "logged": Mixture(np.tile(np.arange(3, dtype=np.int32), (n, 1)), p),
        "known": np.ones(n, bool),
        "allowed": None,
        "reward": np.asarray(reward, np.float64),
        "cost": np.array([1.0, 2.0, 5.0])[chosen],
        "real": np.ones(n, bool),
        "prompt": np.arange(n),
        "keys": [str(i) for i in range(n)],
        "texts": [(str(i),) for i in range(n)],
    }
    return LoggedDecisions(**{**values, **changes})


def drawn(rng, n, p=None, **changes):
    p = rng.dirichlet([2.0, 2.0, 2.0], n) if p is None else np.tile(p, (n, 1))
    chosen = np.minimum((rng.random(n)[:, None] > p.cumsum(1)).sum(1), 2)
    reward = (rng.random(n) < np.array([0.2, 0.5, 0.7])[chosen]).astype(float)
    return logged(p, chosen, changes.pop("reward", reward), **changes)


def shares(total, parts):
    return [Fraction(part, total) for part in parts]


@st.composite
def worlds(draw):
    """A few contexts and models: p(x), the two policies and the rewards, all exact, and another guess of the rewards."""
    contexts, models = draw(st.integers(1, 2)), draw(st.integers(2, 3))

    def distribution(n, least):
        parts = draw(st.lists(st.integers(least, 6), min_size=n, max_size=n).filter(any))
        return shares(sum(parts), parts)

    def numbers():
        some = st.fractions(-2, 2, max_denominator=7)
        return [[draw(some) for _ in range(models)] for _ in range(contexts)]

    px = distribution(contexts, 1)
    mu, pi = ([distribution(models, least) for _ in range(contexts)] for least in (1, 0))
    return px, mu, pi, numbers(), numbers()


@pytest.mark.slow
@settings(max_examples=40)
@given(worlds(), st.integers(1, 2))
def test_the_expectation_over_all_logs_is_the_true_value(world, n):
    px, mu, pi, reward, guess = world
    cells = [(x, a, px[x] * mu[x][a]) for x in range(len(px)) for a in range(len(mu[0]))]
    truth = sum(px[x] * pi[x][a] * reward[x][a] for x, a, _ in cells)
    expected = {"ips": Fraction(0), "dr": Fraction(0)}
    for rows in itertools.product(cells, repeat=n):
        probability = Fraction(1)
        for *_, p in rows:
            probability *= p
        w = np.array([pi[x][a] / mu[x][a] for x, a, _ in rows], object)
        y, predicted = (np.array([of[x][a] for x, a, _ in rows], object) for of in (reward, guess))
        direct = np.array([sum(p * r for p, r in zip(pi[x], guess[x], strict=True)) for x, *_ in rows], object)
        expected["ips"] += probability * ips(w, y)[0]
        expected["dr"] += probability * doubly_robust(w, y, predicted, direct)[0]
    assert expected == {"ips": truth, "dr": truth}


@pytest.mark.slow
@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 9), st.fractions(-3, 3, max_denominator=9)), min_size=1, max_size=8))
def test_snips_is_ips_where_the_weights_have_mean_1(rows):
    total = sum(w for w, _ in rows)
    if not total:
        with pytest.raises(ZeroDivisionError, match="expected some above 0"):
            snips(np.zeros(len(rows)), np.ones(len(rows)))
        return
    w = np.array([Fraction(w * len(rows), total) for w, _ in rows], object)
    y = np.array([y for _, y in rows], object)
    assert snips(w, y)[0] == ips(w, y)[0]
    value, influence = snips(w, y)
    for i in range(len(w)):  # the jackknife's influence
        others = [k for k in range(len(w)) if k != i]
        if w[others].sum():
            assert influence[i] == len(w) * (value - snips(w[others], y[others])[0])


@pytest.mark.slow
@settings(max_examples=40)
@given(st.lists(st.tuples(*[st.fractions(0, 3, max_denominator=9)] * 3), min_size=1, max_size=8))
def test_doubly_robust_is_exact_where_the_rewards_model_is(rows):
    w, y, direct = (np.array(column, object) for column in zip(*rows, strict=True))
    assert doubly_robust(w, y, y, direct)[0] == sum(direct) / len(direct)


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 3), st.integers(1, 4))
def test_rows_of_one_cell_share_their_mean_mixture(seed, n, width, models):
    rng = np.random.default_rng(seed)
    indices = rng.integers(0, models, (n, width)).astype(np.int32)
    mixture = Mixture(indices, rng.dirichlet(np.ones(width), n) * (rng.random((n, 1)) < 0.9))
    cells = np.unique(rng.integers(0, 4, n), return_inverse=True)[1]
    mixture.probabilities[mixture.probabilities.sum(1) == 0, 0] = 1
    firsts = np.unique(cells, return_index=True)[1]

    def dense(of):
        return of.of(np.tile(np.arange(models), (len(of), 1)))

    expected = np.stack([dense(mixture)[cells == cell].mean(0) for cell in range(len(firsts))])
    np.testing.assert_allclose(dense(mixture.averaged(cells, firsts)), expected, atol=1e-12)


def test_the_standard_error_of_one_row_each_is_that_of_a_mean(rng):
    x = rng.normal(size=50)
    assert standard_error(x - x.mean(), []) == pytest.approx(x.std(ddof=1) / np.sqrt(50))
    twice = np.repeat(x - x.mean(), 2)  # rows that say the same say it once
    assert standard_error(twice, [np.repeat(np.arange(50), 2)]) == pytest.approx(x.std(ddof=1) / np.sqrt(50))
    both = [np.repeat(np.arange(50), 2), np.arange(100)]  # nested: the coarser kind counts
    assert standard_error(twice, both) == pytest.approx(x.std(ddof=1) / np.sqrt(50))


def test_one_cluster_says_nothing_about_the_spread(rng):
    found = figure(ips(np.ones(40), rng.random(40)), np.ones(40), [np.zeros(40, np.int64)])
    assert (found.low, found.high) == (-np.inf, np.inf)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), min_size=1, max_size=12))
def test_freedom_is_that_of_the_effective_rows_or_clusters(rows):
    w, labels = np.array(rows).T
    labels = np.unique(labels, return_inverse=True)[1]
    sums = [int(w[labels == of].sum()) for of in range(labels.max() + 1)]
    total = sum(sums)
    kish = [Fraction(total**2, sum(int(x) ** 2 for x in of)) if total else 0 for of in (w, sums)]
    assert freedom(w.astype(float), [labels]) == pytest.approx(float(min(kish)) - 1)


@pytest.mark.parametrize("prompts", [2, 10])
def test_few_clusters_are_no_reason_to_doubt_the_propensities(prompts):
    """By chance they agree about a wrong mean weight: of 150 logs with true propensities, none is doubted."""
    doubted = 0
    for seed in range(150):
        rng = np.random.default_rng([prompts, seed])
        log = drawn(rng, 300, [0.4, 0.3, 0.3], prompt=np.arange(300) % prompts, keys=list("abcdefghij")[:prompts],
                    texts=[(of,) for of in "abcdefghij"][:prompts])  # fmt: skip
        (found,) = replay(log, [PolicySpec("x", always="b")]).policies
        doubted += any("the propensities are not those" in reason for reason in found.reasons)
    assert doubted == 0


def test_weights_and_rewards_that_are_huge_are_no_overflow(rng):
    log = drawn(rng, 200, [0.5, 0.3, 0.2], propensity=np.full(200, 1e-50), known=np.zeros(200, bool), reward=np.full(200, 1e50))
    with np.errstate(all="raise"):
        (found,) = replay(log, [PolicySpec("x", always="a")]).policies
    assert "the weights' mean is" in found.reasons[0]


@pytest.mark.parametrize("level", [0, 1, float("nan"), True, "0.95"])
def test_a_level_is_a_probability(rng, level):
    with pytest.raises(ValueError, match="level: expected a probability between 0 and 1"):
        replay(drawn(rng, 50), [PolicySpec("was", logged=True)], level=level)


@pytest.mark.parametrize("rates", [False, True])
def test_the_expected_score_is_the_least_squares_fit_to_the_other_parts(rng, rates):
    n, prompts = 400, 60
    models, prompt = rng.integers(0, 3, n), rng.integers(0, prompts, n)
    fold, v = prompt % FOLDS, rng.random((prompts, 3)) if rates else None
    y = rng.random(n) + models
    found = ExpectedScore.fit(y, models, prompt, fold, 3, v)
    for part in range(FOLDS):
        others = fold != part
        x = np.zeros((others.sum(), 5))
        x[:, 0], x[np.arange(len(x)), 2 + models[others]] = 1, 1
        x[:, 1] = 0 if v is None else v[prompt[others], models[others]]
        penalty = np.diag([0, 0 if rates else 1e-9, PRIOR, PRIOR, PRIOR])
        b = np.linalg.solve(x.T @ x + penalty, x.T @ y[others])
        rows = np.flatnonzero(~others)
        expected = b[0] + b[2 + models[rows]] + (0 if v is None else b[1] * v[prompt[rows], models[rows]])
        np.testing.assert_allclose(found.of(models[rows], prompt[rows], fold[rows]), expected, atol=1e-6)


@pytest.mark.parametrize("at_once", [1, 7, 100])
def test_win_rates_are_those_of_the_known_models(rng, monkeypatch, at_once):
    monkeypatch.setattr(expected_score, "AT_ONCE", at_once)
    theta = rng.normal(size=(20, 3)).astype(np.float32)
    theta[3, 1] = np.inf
    found = expected_score.rates_of(theta, MODELS, ("c", "new", "a"))
    for row in range(20):
        for column, model in enumerate((2, None, 0)):
            if model is None or row == 3:
                assert np.isnan(found[row, column])
            else:
                wins = [1 / (1 + np.exp(float(theta[row, a]) - float(theta[row, model]))) for a in range(3)]
                assert found[row, column] == pytest.approx(np.mean(wins), abs=1e-6)
    np.testing.assert_array_equal(expected_score.rates_of(theta[:3], MODELS, ("b",), of_values=True), theta[:3, 1:2])


def test_the_logged_policy_earns_and_costs_what_it_did(rng):
    log = drawn(rng, 500)
    (found,) = replay(log, [PolicySpec("as it was", logged=True)]).policies
    for of in ("dr", "snips", "ips"):
        assert found.value[of].value == pytest.approx(log.reward.mean(), rel=1e-12)
        assert found.cost[of].value == pytest.approx(log.cost.mean(), rel=1e-12)
    assert (found.verdict, found.effective_rows, found.mean_weight, found.taken) == ("judged", pytest.approx(500), 1, 1)


def test_the_order_of_rows_changes_nothing(rng):
    log = drawn(rng, 400, prompt=rng.integers(0, 200, 400))
    log = log.__class__(**{**_fields(log), "keys": [f"k{i}" for i in range(200)], "texts": [(f"k{i}",) for i in range(200)]})
    theta = rng.normal(size=(200, 3))
    order = rng.permutation(400)
    moved = {name: of[order] for name, of in _fields(log).items() if isinstance(of, np.ndarray)}
    other = log.__class__(**{**_fields(log), **moved, "logged": log.logged.take(order)})
    specs = [
        PolicySpec("one", always="c"),
        PolicySpec("routed", budget=2.0),
        PolicySpec("batch", budget=2.0, budget_scope="batch"),
    ]
    for mine, theirs in zip(*(replay(of, specs, Known(theta)).policies for of in (log, other)), strict=True):
        assert mine.shares == pytest.approx(theirs.shares)
        for side in ("value", "cost"):
            for of, one in getattr(mine, side).items():
                same = getattr(theirs, side)[of]
                assert (one.value, one.low, one.high) == pytest.approx((same.value, same.low, same.high), rel=1e-9)


def _fields(log):
    return {name: getattr(log, name) for name in log.__dataclass_fields__}


def test_values_are_near_the_truth(rng):
    log = drawn(rng, 20_000)
    report = replay(log, [PolicySpec(name, always=name) for name in MODELS])
    for found, truth, cost in zip(report.policies, (0.2, 0.5, 0.7), (1.0, 2.0, 5.0), strict=True):
        assert found.verdict == "judged"
        assert found.shares == {found.name: 1}
        for one in found.value.values():
            assert abs(one.value - truth) < 0.04
        assert found.cost["snips"].value == pytest.approx(cost)


def test_what_the_log_never_chose_is_refused_by_name(rng):
    log = drawn(rng, 1000, p=[0.6, 0.4, 0.0])
    one, other = replay(log, [PolicySpec("x", always="c"), PolicySpec("y", always="a")]).policies
    assert (one.verdict, one.value, one.unsupported, other.verdict) == ("refused", {}, {"c": 1.0}, "judged")
    assert "100.0% of its choices" in one.reasons[0]
    assert "c (100.0%)" in one.reasons[0]
    # Chosen elsewhere, but never on the rows where the policy would choose it.
    half = np.where(np.arange(1000)[:, None] < 500, [[0.5, 0.5, 0.0]], [[0.0, 0.5, 0.5]])
    chosen = np.where(rng.random(1000) < 0.5, 1, np.where(np.arange(1000) < 500, 0, 2))
    (found,) = replay(logged(half, chosen, np.ones(1000)), [PolicySpec("x", always="c")]).policies
    assert found.unsupported == {"c": 0.5}
    # Without the logging policy, what was never chosen at all; or the weights' mean tells.
    (found,) = replay(logged(half, chosen, np.ones(1000), logged=None), [PolicySpec("x", always="c")]).policies
    assert "the weights' mean is" in found.reasons[0]
    assert found.verdict == "refused"


def test_a_model_that_the_log_does_not_know_is_refused_and_a_misspelt_one_is_an_error(rng):
    log = drawn(rng, 100)
    wider = Catalog((*CATALOG.models, CatalogModel("new-model", 1.0)))
    (found,) = replay(log, [PolicySpec("x", always="new-model")], Known(np.zeros((100, 3)), catalog=wider)).policies
    assert found.unsupported == {"new-model": 1.0}
    with pytest.raises(ValueError, match=r"always: neither .* knows 'new-modle'; did you mean 'new-model'\?"):
        replay(log, [PolicySpec("x", always="new-modle")], Known(np.zeros((100, 3)), catalog=wider))
    with pytest.raises(ValueError, match="models: its models do not include 'd'"):
        replay(log, [PolicySpec("x", models=("d",))], Known(np.zeros((100, 3))))


def test_few_rows_and_heavy_rows_are_refused(rng):
    p = np.tile([0.96, 0.02, 0.02], (400, 1))
    chosen = np.array([2] * 8 + [1] * 8 + [0] * 384)
    (found,) = replay(logged(p, chosen, np.ones(400)), [PolicySpec("x", always="c")]).policies
    assert "so rarely that one such row would carry more than 5% of all weight: c (100.0%)" in found.reasons[0]
    (found,) = replay(logged(p, chosen, np.ones(400), logged=None), [PolicySpec("x", always="c")]).policies
    assert "effective sample size 8.0 of 400 rows" in found.reasons[0]
    assert "c is 100% of its choices, and was chosen on 8 of 400 rows" in found.reasons[0]
    p = np.tile([0.5, 0.0, 0.5], (400, 1))
    p[0] = [0.97, 0.0, 0.03]
    chosen = np.arange(400) % 2 * 2
    chosen[0] = 2
    (found,) = replay(logged(p, chosen, np.ones(400), logged=None), [PolicySpec("x", always="c")]).policies
    assert "one row of c carries 8% of all weight" in found.reasons[0]


@pytest.mark.parametrize(("sessions", "effective"), [(np.zeros(500, int), "1.0"), (np.arange(500) % 9, "[89].."),
                                                     (np.where(np.arange(500) < 400, 0, np.arange(500)), "1.6")])  # fmt: skip
def test_few_sessions_give_no_interval(rng, sessions, effective):
    session = np.unique(sessions, return_inverse=True)[1]
    (found,) = replay(drawn(rng, 500, [0.3, 0.4, 0.3], session=session), [PolicySpec("was", logged=True)]).policies
    assert len(found.reasons) == 1
    assert re.match(f"the rows with feedback are of {effective} effective prompts or sessions, expected 10", found.reasons[0])


def test_a_cost_that_is_known_too_rarely_or_by_model_is_none(rng):
    cost = np.full(500, np.nan)
    cost[0] = 1.0
    (found,) = replay(drawn(rng, 500, [0.3, 0.4, 0.3], cost=cost), [PolicySpec("x", always="b")]).policies
    assert (found.verdict, found.cost) == ("judged", {})
    assert "no cost: it is known for" in found.warnings[0]
    log = drawn(rng, 500, [0.3, 0.4, 0.3])
    partly = np.where((log.chosen == 1) & (rng.random(500) < 0.6), np.nan, log.cost)
    (found,) = replay(log.__class__(**{**_fields(log), "cost": partly}), [PolicySpec("x", always="b")]).policies
    assert found.cost == {}
    assert "whether it is known depends on the model" in found.warnings[0]


def test_propensities_that_are_not_those_of_the_draws_are_refused(rng):
    log = drawn(rng, 2000, p=[0.2, 0.3, 0.5])
    wrong = log.__class__(**{**_fields(log), "propensity": np.full(2000, 0.9), "known": np.zeros(2000, bool)})
    (found,) = replay(wrong, [PolicySpec("x", always="c")]).policies
    assert "the propensities are not those of the draws" in found.reasons[0]


def test_feedback_that_depends_on_the_model_is_said(rng):
    log = drawn(rng, 4000, p=[0.2, 0.3, 0.5])
    reward = np.where((log.chosen == 2) & (rng.random(4000) < 0.7), np.nan, log.reward)
    (found,) = replay(log.__class__(**{**_fields(log), "reward": reward}), [PolicySpec("x", always="c")]).policies
    assert "whether feedback came depends on the model" in found.warnings[0]


def test_rewards_that_do_not_vary_are_said(rng):
    log = drawn(rng, 500, [0.3, 0.4, 0.3])
    always_good = log.__class__(**{**_fields(log), "reward": np.where(log.chosen == 1, 1.0, log.reward)})
    b, c = replay(always_good, [PolicySpec("b", always="b"), PolicySpec("c", always="c")]).policies
    assert (b.verdict, c.warnings) == ("judged", ())
    assert b.warnings[0].startswith(
        f"all {int((log.chosen == 1).sum())} rewards of its choices are 1: of how they vary nothing"
    )


def test_candidates_bound_what_a_policy_may_choose(rng):
    allowed = np.ones((300, 3), bool)
    allowed[:100, 2] = False
    p = np.where(allowed, 1.0, 0.0) / allowed.sum(1, keepdims=True)
    chosen = np.where(np.arange(300) < 100, np.arange(300) % 2, np.arange(300) % 3)
    log, theta = logged(p, chosen, np.ones(300), allowed=allowed), np.tile([0.0, 1.0, 2.0], (300, 1))
    best, only, within = replay(
        log, [PolicySpec("best"), PolicySpec("only", models=("c",)), PolicySpec("within", budget=0.5)], Known(theta)
    ).policies
    assert best.shares == pytest.approx({"c": 2 / 3, "b": 1 / 3})
    assert best.expected_cost == pytest.approx((200 * 5 + 100 * 2) / 300)
    assert only.reasons == ("on 100 of 300 rows none of its models could take the request (column candidates)",)
    assert "budget 0.5 is infeasible" in within.reasons[0]


def test_a_policy_needs_the_texts_of_the_prompts(rng):
    log = drawn(rng, 100, texts=[None] * 100)
    with pytest.raises(ValueError, match=r"100 of 100 prompts lack: let the server log them \(serve.log_prompts: true\)"):
        replay(log, [PolicySpec("routed", budget=2.0)], Known(np.zeros((100, 3))))
    assert replay(log, [PolicySpec("was", logged=True)]).policies[0].verdict == "judged"
    with pytest.raises(ValueError, match="100 decisions have no feedback"):
        replay(drawn(rng, 100, reward=np.full(100, np.nan)), [PolicySpec("one", always="b")])


@pytest.mark.parametrize("spec", [
    PolicySpec("always", always="b"),
    PolicySpec("unbounded"),
    PolicySpec("per prompt", budget=2.5),
    PolicySpec("batch", budget=2.5, budget_scope="batch"),
    PolicySpec("share", max_share={"c": 0.25}),
    PolicySpec("two", models=("a", "b"), budget=1.5),
], ids=lambda spec: spec.name)  # fmt: skip
def test_a_matrix_is_replayed_exactly(rng, spec):
    scores, costs, theta = rng.random((60, 3)), rng.random((60, 3)), rng.normal(size=(60, 3))
    matrix = ScoreMatrix(MODELS, [(str(i),) for i in range(60)], scores, costs)
    (found,) = replay(matrix, [spec], Known(theta)).policies
    # By brute force: each prompt's policy as a row of the LP over all of them.
    v = routing.win_rates(theta.astype(np.float32).astype(np.float64), np.full(3, 1 / 3))
    allowed = None if spec.models is None else np.tile([name in spec.models for name in MODELS], (60, 1))
    share = [routing.Share(2, at_most=0.25)] if spec.max_share else []
    p = np.zeros((60, 3))
    if spec.always:
        p[:, 1] = 1
    else:
        problem = routing.Problem(v, CATALOG.costs, spec.budget, spec.budget_scope, shares=share, allowed=allowed)
        solved = routing.solve(problem)
        for row, (indices, probabilities) in enumerate(zip(solved.indices, solved.probabilities, strict=True)):
            for k, q in zip(indices, probabilities, strict=True):
                p[row, k] += q
    assert found.verdict == "exact"
    assert found.value["exact"].value == pytest.approx(sum(p[i] @ scores[i] for i in range(60)) / 60, abs=1e-9)
    assert found.cost["exact"].value == pytest.approx(sum(p[i] @ costs[i] for i in range(60)) / 60, abs=1e-9)
    assert found.expected_cost == pytest.approx(float((p @ CATALOG.costs).mean()), abs=1e-9)
    assert sum(found.shares.values()) == pytest.approx(1)


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_a_log_of_every_choice_as_often_as_it_is_probable_is_as_exact_as_a_matrix(seed, sessions):
    """All estimators are then the truth, whatever is expected of the rewards: enumeration, through all that replay does."""
    rng = np.random.default_rng(seed)
    prompts, each = 60, 12
    times = 1 + rng.multinomial(each - 3, np.ones(3) / 3, prompts)  # of 12 rows of a prompt; no model is rarer than 1/12
    scores, costs, theta = rng.random((prompts, 3)), rng.random((prompts, 3)), rng.normal(size=(prompts, 3))
    prompt = np.repeat(np.arange(prompts), each)
    chosen = np.concatenate([np.repeat(np.arange(3), row) for row in times])
    order = rng.permutation(len(prompt))
    prompt, chosen = prompt[order], chosen[order]
    keys, texts = [f"p{i}" for i in range(prompts)], [(f"p{i}",) for i in range(prompts)]
    log = logged(
        (times / each)[prompt], chosen, scores[prompt, chosen], cost=costs[prompt, chosen], prompt=prompt, keys=keys,
        texts=texts, session=prompt // 2 if sessions else None,
    )  # fmt: skip
    specs = [
        PolicySpec("one", always="b"),
        PolicySpec("best"),
        PolicySpec("per prompt", budget=2.5),
        PolicySpec("batch", budget=2.5, budget_scope="batch"),
        PolicySpec("share", max_share={"c": 0.25}),
        PolicySpec("two", models=("a", "b"), budget=1.5),
    ]
    exact = replay(ScoreMatrix(MODELS, texts, scores, costs), specs, Known(theta)).policies
    for mine, known in zip(replay(log, specs, Known(theta)).policies, exact, strict=True):
        assert mine.verdict == "judged", mine.reasons
        assert mine.shares == pytest.approx(known.shares, abs=1e-9)
        assert mine.expected_cost == pytest.approx(known.expected_cost, abs=1e-9)
        assert mine.mean_weight == pytest.approx(1)
        for of in ("dr", "snips", "ips"):
            assert mine.value[of].value == pytest.approx(known.value["exact"].value, abs=1e-9)
            assert mine.cost[of].value == pytest.approx(known.cost["exact"].value, abs=1e-9)
    (was,) = replay(log, [PolicySpec("was", logged=True)]).policies
    assert [of.value for of in was.value.values()] == pytest.approx([log.reward.mean()] * 3, rel=1e-12)


def test_a_matrix_of_one_prompt_is_refused():
    with pytest.raises(ValueError, match="a matrix of two prompts at least, got 1"):
        replay(ScoreMatrix(MODELS, [("x",)], np.ones((1, 3))), [PolicySpec("x", always="b")])


def test_a_matrix_has_no_logging_policy_and_names_models_that_it_lacks(rng):
    matrix = ScoreMatrix(("a", "b"), [("x",), ("y",)], rng.random((2, 2)))
    was, lacking = replay(
        matrix, [PolicySpec("was", logged=True), PolicySpec("c", always="c")], Known(np.zeros((2, 3)))
    ).policies
    assert was.reasons == ("a matrix of scores has no logging policy",)
    assert lacking.reasons == ("the matrix has no scores of c",)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pair", "n"),
    [("greedy with 30% uniform -> greedy", 400), ("softmax, in sessions -> budget of 4, without m4", 2000)],
)
def test_intervals_hold_the_truth(pair, n):
    true = replay_coverage.truth(pair, 100_000)
    rows = replay_coverage.measure(pair, n, 60, true)
    for row in rows:  # fewer than 48 of 60 have a probability of 3e-4 where the coverage is 0.93
        assert row.refused == 0
        assert row.covered >= 0.8, row
    assert rows[0].half_width <= rows[2].half_width  # doubly robust is more precise than inverse propensity

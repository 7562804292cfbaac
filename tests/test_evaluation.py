"""Figures against brute force, baselines that they must know, and a report that holds together."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, norm, poisson, spearmanr, t
from sklearn.metrics import roc_auc_score

from p2l_engine import Engine
from p2l_engine.bootstrap import interval
from p2l_engine.coefficients import Coefficients
from p2l_engine.evaluation import clusters, features, html, routed, strengths
from p2l_engine.evaluation.calibration import BINS, bin_of, calibration_error, hits
from p2l_engine.evaluation.growth import growth
from p2l_engine.evaluation.metrics import Prediction, calibration, difference, figures
from p2l_engine.evaluation.predictors import compare, predictions, value_figures
from p2l_engine.evaluation.report import ReportOptions, Scores, evaluate
from p2l_engine.evaluation.resampled import Resampled
from p2l_engine.feedback import Outcome, feedback_model
from p2l_engine.jsonable import from_json, to_json
from p2l_engine.reports import Evaluation
from p2l_engine.votes import Votes
from p2l_engine.votes.marginal import category_fits, marginal_fit, marginal_values
from tests.support import tiny
from tests.support.cases import slow_but
from tests.support.simulate import Simulator


def simulated(name="grk", m=5, n=120, each=10):
    simulator = Simulator.of(name, m)
    prompts = simulator.prompts(n)
    return simulator.truth(prompts), simulator.votes(prompts, each)


@pytest.mark.slow
def test_figures_are_what_a_loop_gives():
    c, votes = simulated()
    votes = Votes.make(
        votes.prompts, votes.models, votes.prompt, votes.a, votes.b, votes.outcome, np.random.default_rng(0).random(len(votes))
    )
    prediction = Prediction.of(c.feedback, c.theta, c.eta, votes)
    found = figures(prediction, votes, bootstrap=20)
    total = dict.fromkeys(("log_loss", "accuracy_4", "accuracy_3", "brier"), 0.0)
    decided = {"cross_entropy": 0.0, "squared_error": 0.0, "accuracy_2": 0.0}
    weight_of_decided = 0.0
    for i in range(len(votes)):
        p = c.feedback.probabilities(
            torch.tensor(float(c.theta[votes.prompt[i], votes.a[i]])),
            torch.tensor(float(c.theta[votes.prompt[i], votes.b[i]])), torch.tensor(float(c.eta[votes.prompt[i]])),
        ).double().numpy()  # fmt: skip
        y, w = int(votes.outcome[i]), votes.weight[i]
        total["log_loss"] -= w * np.log(p[y])
        total["accuracy_4"] += w * (p.argmax() == y)
        total["accuracy_3"] += w * (np.array([p[0], p[1], p[2] + p[3]]).argmax() == min(y, 2))
        total["brier"] += w * ((p - np.eye(4)[y]) ** 2).sum()
        if y < Outcome.TIE:
            of_a = p[0] / (p[0] + p[1])
            weight_of_decided += w
            decided["cross_entropy"] -= w * np.log(of_a if y == 0 else 1 - of_a)
            decided["squared_error"] += w * (of_a - (y == 0)) ** 2
            decided["accuracy_2"] += w * ((of_a > 0.5) == (y == 0))
    for name, value in total.items():
        assert found[name].value == pytest.approx(value / votes.weight.sum(), abs=1e-5), name
    for name, value in decided.items():
        assert found[name].value == pytest.approx(value / weight_of_decided, abs=1e-5), name
    assert all(figure.low <= figure.value <= figure.high or figure.low == figure.high for figure in found.values())


def test_the_constant_is_right_by_chance():
    _, votes = simulated()
    found = figures(Prediction.constant(4, len(votes)), votes, bootstrap=5)
    assert found["accuracy_4"].value == pytest.approx(0.25)
    assert found["accuracy_2"].value == pytest.approx(0.5)
    assert found["log_loss"].value == pytest.approx(np.log(4))
    assert found["tie_auc"].value == pytest.approx(0.5)


def test_the_area_under_the_curve_is_sklearns_with_weights_and_equal_scores(rng):
    n = 300
    weight, score, is_so = rng.random(n) * (rng.random(n) > 0.1), rng.integers(9, size=n) / 9, rng.random(n) < 0.3
    votes = Votes.make(
        [(str(i),) for i in range(n)], ["x", "y"], np.arange(n), np.zeros(n, int), np.ones(n, int), np.zeros(n, int), weight
    )
    samples = np.concatenate([np.ones((1, n)), rng.integers(3, size=(20, n))])
    found = Resampled(votes, samples)
    expected = [roc_auc_score(is_so, score, sample_weight=weight * sample) for sample in samples]
    figure = found.auc(score, is_so)
    assert figure.value == pytest.approx(expected[0], abs=1e-12)
    ends = interval(expected[0], np.array(expected[1:]) - expected[0], found.weights())
    assert (figure.low, figure.high) == (pytest.approx(ends[0], abs=1e-12), pytest.approx(min(ends[1], 1.0), abs=1e-12))
    assert found.auc(score, np.zeros(n, bool)) is None


@pytest.mark.slow
def test_the_truth_is_calibrated_and_beats_the_marginal():
    c, votes = simulated(n=600, each=20)
    prediction = Prediction.of(c.feedback, c.theta, c.eta, votes)
    found = figures(prediction, votes, bootstrap=50)
    assert found["ece"].value < 0.02
    assert abs(found["tie_bias"].value) < 0.02
    marginal = predictions(c, marginal_fit(c.feedback, votes), votes)["marginal"]
    assert difference(prediction, marginal, votes).low > 0
    curve = calibration(prediction, votes)
    assert sum(curve.weight) == pytest.approx(len(votes))
    np.testing.assert_allclose(curve.predicted, curve.came, atol=0.12)
    ends = np.array([curve.low, curve.came, curve.high])
    assert (np.diff(ends, axis=0) >= -1e-12).all()
    inside = (ends[0] <= curve.predicted) & (curve.predicted <= ends[2])
    assert inside[np.array(curve.weight) > 200].mean() > 0.6
    # An overconfident copy is not.
    sharp = Coefficients(3 * c.theta, c.eta, c.models, c.feedback)
    assert figures(Prediction.of(c.feedback, sharp.theta, sharp.eta, votes), votes, bootstrap=5)["ece"].value > 0.05


@pytest.mark.slow
@pytest.mark.parametrize(("sharper", "n", "each"), [(1.0, 100, 10), (1.0, 300, 20), (1.5, 100, 10)])
def test_the_calibration_errors_interval_covers_the_true_error(sharper, n, each):
    """450 times for 95%: of a calibrated predictor, whose error is 0, and of an overconfident one."""
    simulator, found = Simulator.of("grk", 5), []
    many = simulator.prompts(5000, seed=77)
    true = 0.0 if sharper == 1 else plain_error(sharpened(simulator.truth(many), simulator.votes(many, 60, seed=5), sharper))
    for seed in range(150):
        prompts = simulator.prompts(n, seed=1000 + seed)
        prediction, votes = sharpened(simulator.truth(prompts), simulator.votes(prompts, each, seed=seed), sharper)
        top, hit = prediction.probabilities.max(1), hits(prediction.probabilities, votes.outcome.astype(np.int64))
        error = calibration_error(top, hit, votes.weight, Resampled.of(votes, 200, seed))
        assert 0 <= error.low <= error.value <= error.high <= 1
        found.append((error.value, error.low <= true <= error.high))
    values, covered = np.array(found).T
    assert 0.88 <= covered.mean() <= 1.0
    assert np.median(values) == pytest.approx(true, abs=0.015)


def sharpened(c, votes, times):
    return Prediction.of(c.feedback, times * c.theta.astype(np.float64), c.eta, votes), votes


def plain_error(of):
    prediction, votes = of
    top, hit = prediction.probabilities.max(1), hits(prediction.probabilities, votes.outcome.astype(np.int64))
    return np.abs(np.bincount(bin_of(top, BINS), top - hit, BINS)).sum() / len(votes)


@pytest.mark.slow
@given(seed=st.integers(0, 10**6), n=st.integers(1, 40), each=st.integers(1, 4))
@settings(max_examples=12, deadline=None)
def test_the_calibration_errors_interval_holds_its_estimate(seed, n, each):
    simulator = Simulator.of("grk", 3, seed=seed % 7)
    prompts = simulator.prompts(n, seed=seed)
    c, votes = simulator.truth(prompts), simulator.votes(prompts, each, seed=seed)
    weight = np.random.default_rng(seed).random(len(votes)) ** 3
    votes = Votes.make(votes.prompts, votes.models, votes.prompt, votes.a, votes.b, votes.outcome, weight)
    error = figures(Prediction.of(c.feedback, c.theta, c.eta, votes), votes, bootstrap=30)["ece"]
    assert 0 <= error.low <= error.value <= error.high <= 1
    assert figures(Prediction.constant(4, len(votes)), votes, bootstrap=30)["ece"].value == pytest.approx(0, abs=1e-12)


def test_a_bin_that_no_sample_holds_has_the_widest_interval():
    c, votes = simulated(n=12, each=2)
    prediction = Prediction.of(c.feedback, c.theta, c.eta, votes)
    curves = [calibration(prediction, votes, bootstrap=1, seed=seed) for seed in range(10)]
    ends = np.array([(low, high) for curve in curves for low, high in zip(curve.low, curve.high, strict=True)])
    assert np.isfinite(ends).all()
    assert (ends == (0, 1)).all(1).any()


def test_intervals_are_over_prompts():
    """Votes that say the same ten times over make no interval narrower."""
    c, votes = simulated(each=1)
    often = Votes.make(
        votes.prompts, votes.models, *(np.repeat(x, 10) for x in (votes.prompt, votes.a, votes.b, votes.outcome))
    )
    one, ten = (figures(Prediction.of(c.feedback, c.theta, c.eta, v), v, bootstrap=300)["log_loss"] for v in (votes, often))
    assert one.value == pytest.approx(ten.value)
    assert one.high - one.low == pytest.approx(ten.high - ten.low, rel=1e-6)


@pytest.mark.parametrize("name", slow_but(("bt", "grk"), ["bt", "bt-tie", "rk", "rk-reparam", "grk"]))
def test_every_feedback_model_has_its_figures(name):
    c, votes = simulated(name)
    of = predictions(c, marginal_fit(c.feedback, votes), votes)
    report = compare(of, votes, bootstrap=5)
    known = len(c.feedback.outcomes)
    assert ("accuracy_4" in report.overall["p2l"]) == (known == 4)
    assert ("accuracy_3" in report.overall["p2l"]) == (known > 2)
    losses = {predictor: report.overall[predictor]["log_loss"].value for predictor in of}
    assert losses["p2l"] < losses["marginal"] < losses["constant"]


@pytest.mark.parametrize("name", slow_but(("bt", "grk"), ["bt", "bt-tie", "rk", "rk-reparam", "grk"]))
def test_a_leaderboard_for_each_category_is_the_one_of_its_votes(name):
    c, votes = simulated(name, n=400, each=20)
    votes = replace(votes, category=tuple("even" if i % 2 == 0 else "odd" for i in range(len(votes.prompts))))
    marginal = marginal_fit(c.feedback, votes)
    fits = category_fits(c.feedback, votes, marginal)
    alone = marginal_fit(c.feedback, votes.of(range(0, 400, 2)))
    np.testing.assert_allclose(fits["even"].theta - fits["even"].theta[0], alone.theta - alone.theta[0], atol=0.02)
    of = predictions(c, marginal, votes, fits)
    assert of["category"].loss.mean() < of["marginal"].loss.mean()  # each fits its own training votes better
    # A category that training never saw, and one with a single vote, stay with the marginal leaderboard.
    unseen = predictions(c, marginal, replace(votes, category=("new",) * 400), fits)
    np.testing.assert_allclose(unseen["category"].loss, of["marginal"].loss)
    single = replace(votes.where(np.arange(len(votes)) == 0), category=("lonely",))
    near = category_fits(c.feedback, single, marginal)["lonely"]
    assert np.abs((near.theta - near.theta.mean()) - (marginal.theta - marginal.theta.mean())).max() < 0.5
    with pytest.raises(ValueError, match="with categories"):
        category_fits(c.feedback, replace(votes, category=None), marginal)


@pytest.mark.parametrize("name", ["ols", "poisson"])
def test_values_have_figures_of_their_own(name):
    c, votes = simulated(name)
    votes = replace(
        votes,
        weight=np.random.default_rng(0).random(len(votes)).round(1),
        category=tuple(f"c{i % 2}" for i in range(len(votes.prompts))),
    )
    report = value_figures(c, votes, votes, bootstrap=20)
    found, theta = report.overall, c.theta.astype(np.float64)
    linear = np.array(
        [theta[p, a] - (theta[p, b] if b >= 0 else 0) for p, a, b in zip(votes.prompt, votes.a, votes.b, strict=True)]
    )
    predicted = np.exp(linear) if name == "poisson" else linear
    mean = np.average(votes.outcome, weights=votes.weight)
    variance = np.average((votes.outcome - mean) ** 2, weights=votes.weight)
    error = np.average((predicted - votes.outcome) ** 2, weights=votes.weight)
    density = poisson.logpmf(votes.outcome, predicted) if name == "poisson" else norm.logpdf(votes.outcome, predicted)
    some = votes.weight > 0
    for figure, value in (
        ("squared_error", error),
        ("absolute_error", np.average(np.abs(predicted - votes.outcome), weights=votes.weight)),
        ("explained", 1 - error / variance),
        ("bias", np.average(predicted, weights=votes.weight) - mean),
        ("log_loss", -np.average(density, weights=votes.weight)),
        ("rank_correlation", spearmanr(predicted[some], votes.outcome[some]).statistic),
    ):
        assert found["p2l"][figure].value == pytest.approx(value, rel=1e-5), figure
        assert found["p2l"][figure].low <= value <= found["p2l"][figure].high
    assert found["p2l"]["log_loss"].value < found["marginal"]["log_loss"].value < found["constant"]["log_loss"].value
    assert found["constant"]["explained"].value == pytest.approx(0)
    assert "rank_correlation" not in found["constant"]
    assert set(report.categories) == {"c0", "c1"}


@pytest.mark.parametrize("name", ["ols", "poisson"])
def test_one_regression_for_all_values_is_the_likeliest(name):
    _, votes = simulated(name)
    feedback = feedback_model(name)
    theta = marginal_values(feedback, votes)

    def loss(theta):
        linear = theta[votes.a] - np.where(votes.b < 0, 0, theta[votes.b])
        wide = torch.from_numpy(linear)
        return -feedback.log_likelihood(wide, torch.zeros_like(wide), None, torch.from_numpy(votes.outcome)).mean().item()

    at_best = loss(theta)
    for step in np.eye(len(theta)) * 0.01:
        assert loss(theta + step) >= at_best - 1e-9
        assert loss(theta - step) >= at_best - 1e-9
    with pytest.raises(ValueError, match="expected values and a feedback model of values, got votes or 'grk'"):
        marginal_values(feedback_model("grk"), votes)


@pytest.mark.slow
def test_the_leaderboard_comes_near_with_more_prompts():
    c, votes = simulated(n=400, each=40)
    report = growth(c, votes, votes, sizes=(1, 10, 400), repeats=5)
    means = [row.mean for row in report.distances]
    assert means[0] > means[1] > means[2]
    assert means[2] < 0.01
    assert report.marginal_of_training == 0
    assert report.categories is None


@pytest.mark.slow
def test_the_leaderboard_comes_near_that_of_each_category():
    c, votes = simulated(n=200, each=10)
    names = ["large"] * 120 + ["also large"] * 60 + ["small"] * 20
    votes = replace(votes, category=tuple(names))
    found = growth(c, votes, votes, sizes=(1, 20, 200), repeats=3).categories
    assert list(found) == ["large", "also large"]
    some = np.arange(120, 180)
    alone = growth(c.rows(some), replace(votes.of(some.tolist()), category=None), None, sizes=(1, 20, 200), repeats=3)
    assert found["also large"].distances == alone.distances
    assert found["also large"].marginal_of_training == 0


def test_routing_tables_are_sums_of_true_scores():
    rng = np.random.default_rng(0)
    scores, known = rng.random((30, 3)), rng.random((40, 3))
    known[:, 1] += 0.2
    tasks, known_tasks = ["a", "b"] * 15, ["a", "b"] * 20
    theta = scores + 0.1 * rng.normal(size=scores.shape)
    chosen = routed.choices(theta, known, known_tasks, tasks)
    report = routed.table(chosen, scores, ("x", "y", "z"), tasks)
    assert report.best_single_model == "y"
    assert report.choices["oracle"].mean_score == pytest.approx(scores.max(1).mean())
    assert report.choices["routed"].mean_score == pytest.approx(np.mean([s[t.argmax()] for s, t in zip(scores, theta)]))  # noqa: B905
    assert report.tasks["a"].choices["oracle"] == pytest.approx(scores[::2].max(1).mean())
    costs = np.array([1.0, 2.0, 3.0])
    rows = routed.under_budgets(theta, scores, known, costs, (0.5, 1.5, 3.0), ("x", "y", "z"))
    assert [row.budget for row in rows] == [1.5, 3.0]  # nothing costs 0.5
    assert rows[0].routers["batch"].mean_cost <= 1.5 + 1e-9
    assert rows[1].routers["oracle"].mean_score == pytest.approx(scores.max(1).mean())
    assert rows[0].tasks is None
    by_task = routed.under_budgets(theta, scores, known, costs, (1.5,), ("x", "y", "z"), tasks)[0]
    for figure in ("mean_score", "mean_cost"):
        for way in ("batch", "prompt", "oracle"):
            whole = np.mean([getattr(by_task.tasks[task].routers[way], figure) for task in "ab"])
            assert whole == pytest.approx(getattr(by_task.routers[way], figure))
    within = int(known[:, :1].mean(0).argmax())
    assert by_task.tasks["b"].best_single.mean_score == pytest.approx(scores[1::2, within].mean())
    share = routed.distribution(theta.argmax(1), 3, tasks)
    assert all(sum(of) == pytest.approx(1) for of in share.values())
    first = np.arange(30) < 2
    share = routed.distribution(theta.argmax(1), 3, tasks, first)
    assert share["a"][theta[0].argmax()] == share["b"][theta[1].argmax()] == 1


def test_a_replacement_names_what_gets_worse():
    feedback = feedback_model("grk")
    theta = np.zeros((60, 2), np.float32)
    theta[:30, 1], theta[30:, 1] = 2.0, -2.0
    theta += 0.1 * np.random.default_rng(0).normal(size=theta.shape).astype(np.float32)
    c = Coefficients(theta, np.zeros(60, np.float32), ("old", "new"), feedback)
    categories = ["sums"] * 30 + ["poems"] * 30
    swap = strengths.replacement(c, categories, "old", "new")
    assert [(entry.category, entry.verdict) for entry in swap.categories] == [("poems", "worse"), ("sums", "better")]
    assert swap.overall.verdict == "unclear"
    of = strengths.by_category(c, categories, "old").categories
    assert to_json(of["sums"].win_rate["old"]) == pytest.approx({"value": 0.5, "low": 0.5, "high": 0.5})
    assert of["sums"].reliability["new"].value == pytest.approx(0.88, abs=0.02)
    weights = np.where(np.arange(60) < 45, 1.0, 0.0)  # as if only those prompts were there
    some = strengths.by_category(c.rows(np.arange(45)), categories[:45], "old").categories
    of = strengths.by_category(c, categories, "old", weights=weights, models=["new"]).categories
    assert list(of["poems"].win_rate) == ["new"]
    for name in ("sums", "poems"):
        assert of[name].win_rate["new"].value == pytest.approx(some[name].win_rate["new"].value)
        assert of[name].win_rate["new"].low == pytest.approx(some[name].win_rate["new"].low, abs=0.01)
    weighted = strengths.replacement(c, categories, "old", "new", weights=weights)
    rate = {name: of[name].win_rate["new"].value for name in of}
    assert weighted.overall.win_rate == pytest.approx((2 * rate["sums"] + rate["poems"]) / 3)
    with pytest.raises(ValueError, match="expected a prompt of a weight above 0 in the category 'poems', got none: leave"):
        strengths.by_category(c, categories, "old", weights=np.arange(60) < 30)
    with pytest.raises(ValueError, match="model: expected one of old, new, got 'newer'"):
        strengths.replacement(c, categories, "old", "newer")
    with pytest.raises(ValueError, match="categories: expected one for each of the 60 prompts"):
        strengths.by_category(c, categories[1:], "old")


def test_clusters_are_found_and_named():
    rng = np.random.default_rng(0)
    centres = 6 * rng.normal(size=(3, 40))
    hidden = np.concatenate([centre + rng.normal(size=(25, 40)) for centre in centres])
    words = ("river poem verse", "integral algebra proof", "tax salary invoice")
    texts = [f"please write {words[i // 25]} {i}" for i in range(75)]
    names = clusters.cluster(hidden, texts)
    assert len(set(names) - {clusters.OTHER}) == 3
    assert sum(name == clusters.OTHER for name in names) < 10
    of = {name for name in names[:25] if name != clusters.OTHER}
    assert len(of) == 1
    assert set(of.pop().split(", ")) & set(words[0].split())
    assert names == clusters.cluster(hidden, texts)
    assert set(clusters.cluster(hidden, ["123"] * 75)) - {clusters.OTHER}  # no words: clusters by number
    with pytest.raises(ValueError, match="at least 16"):
        clusters.cluster(hidden[:10], texts[:10])


@pytest.mark.slow
def test_probes_predict_scores_from_features():
    rng = np.random.default_rng(0)
    features_of = rng.normal(size=(400, 12))
    scores = 1 / (1 + np.exp(-features_of[:, :3]))
    predicted = features.probes(features_of[:300], scores[:300], features_of[300:])
    for name in ("ridge", "mlp"):
        assert np.corrcoef(predicted[name][:, 0], scores[300:, 0])[0, 1] > 0.9
    assert predicted["knn"].shape == (100, 3)


N = 12  # prompts of the smallest report with figures by category


class Page(HTMLParser):
    """Checks that tags are balanced, and lists the addresses that the page loads."""

    def __init__(self):
        super().__init__()
        self.open, self.links = [], []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)
        self.links += [value.partition(",")[0] for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("name", ["grk", "bt", "ols"])
@pytest.mark.slow
def test_a_report_is_complete_and_reproducible(name, tmp_path):
    head = "rk" if name == "grk" else "bt"
    engine = Engine.from_pretrained(
        tiny.write(tmp_path / "c", loss_type=name, head_type=head), device="cpu", dtype=torch.float32
    )
    simulator = Simulator.of(name, 5)
    prompts = simulator.prompts(N)
    raw = simulator.votes(prompts, 6)
    named = Votes.make(
        raw.prompts,
        engine.models,
        raw.prompt,
        raw.a,
        raw.b,
        raw.outcome,
        category=["even", "odd"] * (N // 2),
    )
    rng = np.random.default_rng(0)
    scores = Scores(rng.random((N, 5)), rng.random((N, 5)), np.arange(1.0, 6.0), "USD <per> request")
    options = ReportOptions(bootstrap=10, replacements=[("alpha", "beta")] if name != "ols" else [])
    report = evaluate(engine, named, named, scores if name != "ols" else None, options)
    written = json.dumps(to_json(report), allow_nan=False)
    assert from_json(Evaluation, json.loads(written)) == report
    html.write(report, tmp_path / "report.html")
    first = (tmp_path / "report.html").read_bytes()
    html.write(report, tmp_path / "report.html")
    assert first == (tmp_path / "report.html").read_bytes()
    page = Page()
    page.feed(first.decode())
    assert page.open == []
    assert "mathdefault" not in first.decode()  # tick labels that were left as formulas
    assert all(place.startswith(("#", "data:")) for place in page.links)
    other = Votes.make(raw.prompts, raw.models, raw.prompt, raw.a, raw.b, raw.outcome)
    with pytest.raises(ValueError, match="expected the checkpoint's models"):
        evaluate(engine, other)


@pytest.mark.slow
def test_few_votes_of_a_likely_outcome_do_not_make_a_share_certain(rng):
    """Of 60 draws of 100 votes, nearly all intervals hold the probability that was right, in the last tenth too: by the
    bootstrap alone, half of those there missed it."""
    inside, last = [], []
    one = np.arange(100)
    for seed in range(60):
        theta = np.c_[rng.normal(0, 2, 100), np.zeros(100)]
        votes = Votes.make(
            [(str(i),) for i in one], "ab", one, 0 * one, 0 * one + 1, (rng.random(100) > 1 / (1 + np.exp(-theta[:, 0]))) * 1
        )
        curve = calibration(Prediction.of(feedback_model("bt"), theta, None, votes), votes, bootstrap=50, seed=seed)
        found = [low <= p <= high for p, low, high in zip(curve.predicted, curve.low, curve.high, strict=True)]
        inside += found
        last.append(found[-1])
    assert np.mean(inside) > 0.94
    assert np.mean(last) > 0.9


@pytest.mark.slow
@given(st.integers(2, 40), st.integers(0, 40), st.integers(0, 5))
def test_a_share_of_independent_prompts_is_wilsons(n, hits, seed):
    """With Student's quantile for the normal one."""
    some = np.arange(n)
    votes = Votes.make([(str(i),) for i in some], "ab", some, 0 * some, 0 * some + 1, 0 * some)
    hit = (some < hits) * 1.0
    found = Resampled.of(votes, 2000, seed).share(hit, np.ones(n))
    p, low, high = hit.mean(), found.low, found.high
    assert 0 <= low <= p == found.value <= high <= 1
    assert high > low
    if p in (0, 1) and n > 6:
        exact = binomtest(int(hit.sum()), n).proportion_ci(norm.cdf(t.ppf(0.975, n - 1)) * 2 - 1, method="wilson")
        assert (low, high) == pytest.approx((exact.low, exact.high), abs=1e-6)

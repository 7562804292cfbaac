"""Calibration: the optimum against other solvers, what is recovered in the simulator, and what the engine makes of it."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import mpmath
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit

from p2l_engine import Engine, checkpoint
from p2l_engine.backbone.theta_map import FILE, MonotoneStep, ThetaMap
from p2l_engine.backbone.uncertainty import FILE as UNCERTAINTY_FILE
from p2l_engine.backbone.uncertainty import Uncertainty
from p2l_engine.checkpoint.export import export
from p2l_engine.coefficients import Coefficients
from p2l_engine.errors import CheckpointError
from p2l_engine.feedback import Outcome, feedback_model
from p2l_engine.learning import calibrated, likelihood
from p2l_engine.learning.calibration import among_known, calibrate
from p2l_engine.learning.candidates import WIDE, Candidate, CoefficientMap, Design, candidates, piecewise
from p2l_engine.learning.crossed import Crossed, mean_and_error
from p2l_engine.learning.newton import errors, minimise
from p2l_engine.votes import Votes, conversations, folds
from tests.support import tiny
from tests.support.cases import slow_but
from tests.support.command import p2l_engine
from tests.support.simulate import Simulator

NAMES = ("bt", "bt-tie", "rk", "rk-reparam", "grk", "ols", "poisson")
PROMPTS = ["hello", "what is 2 + 2?", "a longer prompt, of several words", "ok", "x y z"]


def world(name, prompts=300, each=4, seed=0, scale=1.0, shift=0.0, models=5):
    """Votes, and the coefficients of a checkpoint that gives scale times the true theta, plus shift."""
    simulator = Simulator(feedback_model(name), models, seed=seed, spread=0.5)
    texts = simulator.prompts(prompts)
    truth = simulator.truth(texts)
    return replace(truth, theta=(scale * truth.theta + shift).astype(np.float32)), simulator.votes(texts, each)


def optimum(candidate, c, votes):
    design = Design(candidate, c, votes)
    return design, minimise(design.objective, design.start)


# The optimum


@pytest.mark.parametrize("name", NAMES)
def test_derivatives_are_those_of_the_loss(name, rng):
    feedback = feedback_model(name)
    linear = rng.normal(0, 2, (3, 20)) + np.array([[0.0], [0.0], [5.0 if name == "rk" else 0.0]])
    outcome = rng.poisson(2, 20).astype(float) if feedback.of_values else rng.integers(0, len(feedback.outcomes), 20)
    first, second = likelihood.curvature(feedback, linear, outcome)
    losses, gradient = likelihood.gradient(feedback, linear, outcome)
    np.testing.assert_allclose(gradient, first, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(losses, likelihood.losses(feedback, linear, outcome), rtol=1e-13)
    h = 1e-5
    for i in range(3):
        step = np.zeros((3, 1))
        step[i] = h
        plus, minus = linear + step, linear - step
        slope = (likelihood.losses(feedback, plus, outcome) - likelihood.losses(feedback, minus, outcome)) / (2 * h)
        above, below = (likelihood.gradient(feedback, at, outcome)[1] for at in (plus, minus))
        bend = (above - below) / (2 * h)
        np.testing.assert_allclose(first[i], slope, atol=1e-7)
        np.testing.assert_allclose(second[i], bend, atol=1e-6)


def test_a_temperature_of_few_votes_is_mpmaths(rng):
    c, votes = world("bt", 12, 3, scale=2.0)
    _, x = optimum(Candidate("temperature"), c, votes)
    theta = c.theta.astype(float)
    gap = theta[votes.prompt, votes.a] - theta[votes.prompt, votes.b]
    gap = [mpmath.mpf(d) for d in np.where(votes.outcome == Outcome.A, gap, -gap)]

    def slope(s):
        return sum(-d / (1 + mpmath.exp(s * d)) for d in gap) + (s - 1) / WIDE**2

    assert x[0] == pytest.approx(float(mpmath.findroot(slope, 0.5)), abs=1e-9)


@pytest.mark.parametrize("kind", ["temperature", "offsets", "both"])
def test_the_optimum_of_a_tie_model_is_scipys(kind):
    c, votes = world("grk", 60, 3, scale=1.4, shift=0.3)
    spread = 0.3 if kind in ("offsets", "both") else None
    design, x = optimum(Candidate(kind, spread), c, votes)
    theta, eta = c.theta.astype(float), c.eta.astype(float)
    weight = 1 / design.objective.precision

    def negative(x):
        """The paper's formulas, plainly."""
        at = dict(zip(design.names, x, strict=True))
        offset = np.array([at.get("shift", 0.0) + at.get(f"offset {name}", 0.0) for name in c.models])
        new = np.exp(at.get("scale", 1.0) * theta + offset)
        tie = eta if kind == "offsets" else eta.mean() + at["eta scale"] * (eta - eta.mean()) + at["eta offset"]
        lam, a, b = np.exp(tie[votes.prompt]) + 1 + 1e-6, new[votes.prompt, votes.a], new[votes.prompt, votes.b]
        win, lose, bad = a / (a + lam * b + 1), b / (b + lam * a + 1), 1 / (1 + a + b)
        p = np.stack([win, lose, 1 - win - lose - bad, bad])[votes.outcome, np.arange(len(votes))]
        return -np.log(p).sum() + 0.5 * ((x - design.start) ** 2 / weight).sum()

    # Each prompt has three votes: the mean of eta over votes is that over prompts.
    assert design.objective.value(x) == pytest.approx(negative(x), abs=1e-8)
    found = minimize(negative, design.start, method="BFGS", options={"gtol": 1e-6})
    np.testing.assert_allclose(x, found.x, atol=2e-4)
    assert negative(x) <= found.fun + 1e-8


@pytest.mark.parametrize("name", NAMES)
def test_every_candidate_ends_where_no_parameter_improves(name):
    c, votes = world(name, 120, 3, scale=1.5, shift=0.4)
    for candidate in candidates():
        design, x = optimum(candidate, c, votes)
        theta, eta = design.map_of(x)(c)
        linear = design.objective.linear(x)
        np.testing.assert_allclose(linear[0], theta[votes.prompt, votes.a], atol=1e-9)
        if eta is not None:
            np.testing.assert_allclose(linear[2], eta[votes.prompt], atol=1e-9)
        if len(x):
            slope, _ = design.objective.derivatives(x)
            slope[(x <= design.objective.least) & (slope > 0)] = 0
            assert np.abs(slope).max() < 1e-4, candidate


@pytest.mark.slow
@pytest.mark.parametrize("winner", [Outcome.A, Outcome.B])
def test_votes_that_all_agree_or_all_contradict_have_an_optimum(winner):
    c, votes = world("grk", 60, 3)
    theta = c.theta[votes.prompt]
    rows = np.arange(len(votes))
    better = np.where(theta[rows, votes.a] > theta[rows, votes.b], Outcome.A, Outcome.B)
    agree = replace(votes, outcome=np.where(winner == Outcome.A, better, 1 - better).astype(np.int64))
    found, report = calibrate(c, agree, bootstrap=20)
    assert np.isfinite(found(c)[0]).all()
    assert report.after["log_loss"].value <= report.before["log_loss"].value + 1e-9
    knots = Design(Candidate("isotonic"), c, agree).knots
    assert knots is not None
    assert (np.diff(piecewise(knots, np.array([*knots]), np.array([*knots]))) > 0).all()


# The simulated world


@pytest.mark.parametrize("name", slow_but(("bt", "grk", "poisson"), NAMES))
def test_a_scaled_and_shifted_checkpoint_is_recovered_within_its_error(name):
    c, votes = world(name, 1500, 4, scale=1.5, shift=0.4)
    kind = "both" if c.feedback.grounded else "temperature"  # where the ground counts, a shift is an offset
    design, x = optimum(Candidate(kind, 0.1 if kind == "both" else None), c, votes)
    found = dict(zip(design.names, zip(x, errors(design.objective, x, votes.prompt), strict=True), strict=True))
    wanted = {"scale": 1 / 1.5}
    if c.feedback.grounded or c.feedback.of_values:
        wanted["shift"] = -0.4 / 1.5
    if c.feedback.has_eta:
        wanted |= {"eta scale": 1.0, "eta offset": 0.0}
    for parameter, true in wanted.items():
        value, error = found[parameter]
        assert abs(value - true) < 4 * error, parameter
        assert error < 0.3


@pytest.mark.parametrize("kind", ["temperature", "offsets", "both"])
@pytest.mark.parametrize("size", [800.0, 1e4])
def test_counts_of_coefficients_beyond_float64_have_no_map(kind, size):
    """Their loss is infinite from the start: no step may pass for an optimum."""
    c = Coefficients(np.full((40, 2), size, np.float32), None, ("a", "b"), feedback_model("poisson"))
    some = np.arange(40)
    votes = Votes.make([(str(i),) for i in some], c.models, some, some % 2, np.full(40, -1), np.ones(40))
    design = Design(Candidate(kind, None if kind == "temperature" else 0.3), c, votes)
    with pytest.raises(ArithmeticError, match="beyond float64"):
        minimise(design.objective, design.start)


@pytest.mark.slow
def test_errors_are_how_far_estimates_spread():
    estimates, stated = [], []
    for seed in range(60):
        c, votes = world("bt", 150, 2, seed=0, scale=1.5)
        votes = Simulator(c.feedback, 5, seed=0, spread=0.5).votes([p[0] for p in votes.prompts], 2, seed=100 + seed)
        design, x = optimum(Candidate("temperature"), c, votes)
        estimates.append(x[0])
        stated.append(errors(design.objective, x, votes.prompt)[0])
    assert np.mean(stated) == pytest.approx(np.std(estimates), rel=0.3)


@pytest.mark.slow
def test_a_calibrated_checkpoint_stays_in_most_draws():
    chosen = [calibrate(*world("bt", 150, 2, seed=seed), bootstrap=2)[1].chosen for seed in range(12)]
    assert chosen.count("none") >= 8, chosen


@pytest.mark.parametrize("name", slow_but(("grk",), ["bt", "grk", "poisson"]))
def test_a_miscalibrated_one_is_mended(name):
    c, votes = world(name, 250, 3, scale=2.0)
    found, report = calibrate(c, votes, ("none", "temperature"), bootstrap=50)
    assert report.chosen == "temperature"
    assert report.gain is not None
    assert report.gain.low > 0
    assert found.scale == pytest.approx(0.5, abs=0.12)
    assert report.after["log_loss"].value < report.before["log_loss"].value


@pytest.mark.slow
@settings(max_examples=8)
@given(
    name=st.sampled_from(("bt", "bt-tie", "ols")), seed=st.integers(0, 10**6), scale=st.floats(0.3, 3), shift=st.floats(-1, 1)
)
def test_new_votes_are_predicted_no_worse_by_more_than_the_losss_error(name, seed, scale, shift):
    c, votes = world(name, 160, 2, seed, scale, shift)
    found, report = calibrate(c, votes, bootstrap=2)
    simulator = Simulator(c.feedback, 5, seed=seed, spread=0.5)
    fresh = simulator.prompts(1500, seed=9)
    known, new = simulator.truth(fresh), simulator.votes(fresh, 2, seed=10)
    given = replace(known, theta=(scale * known.theta + shift).astype(np.float32))
    loss = []
    for theta in (given.theta.astype(float), found(given)[0]):
        linear = np.stack([theta[new.prompt, new.a], theta[new.prompt, new.b] * (new.b >= 0), np.zeros(len(new))])
        loss.append(likelihood.losses(c.feedback, linear, new.outcome))
    before, _ = mean_and_error(loss[0], new.weight, new.prompt)
    after, _ = mean_and_error(loss[1], new.weight, new.prompt)
    _, error = mean_and_error(loss[0][: len(votes)], new.weight[: len(votes)], new.prompt[: len(votes)])
    assert after <= before + error, report.chosen


@pytest.mark.slow
def test_held_out_maps_have_not_seen_the_votes_that_they_are_judged_on():
    c, votes = world("bt", 100, 3, scale=1.7)
    fold, group = folds(votes, 5), conversations(votes)
    some = candidates(("none", "temperature", "offsets"))
    once = Crossed(some, c, votes, fold, group)
    turned = np.where(fold[votes.prompt] == 2, 1 - votes.outcome, votes.outcome)
    again = Crossed(some, c, replace(votes, outcome=turned), fold, group)
    assert once.held_out()[2] == again.held_out()[2]
    for i in range(len(some)):
        np.testing.assert_allclose(once.without[i][2], again.without[i][2], atol=1e-6)  # they start elsewhere


def test_folds_keep_conversations_whole(rng):
    prompts = [(f"Opening {i % 40}", *(["then"] * (i // 40))) for i in range(100)] + [("opening  3!",)]
    n = len(prompts)
    votes = Votes.make(prompts, "ab", np.arange(n), np.zeros(n, int), np.ones(n, int), rng.integers(0, 2, n))
    fold = folds(votes, 5, seed=3)
    assert set(fold.tolist()) == set(range(5))
    assert np.ptp(np.bincount(fold)) <= 3
    for opening in range(40):
        assert len({fold[i] for i in range(100) if i % 40 == opening}) == 1
    assert fold[100] == fold[3]
    np.testing.assert_array_equal(fold, folds(votes, 5, seed=3))
    with pytest.raises(ValueError, match="expected 1 to 40 parts, as there are 40 different first turns, got 41"):
        folds(votes, 41)


# Bad input


def test_too_few_votes_say_how_many_are_needed():
    c, votes = world("bt", 30, 2)
    with pytest.raises(
        ValueError, match="at least 100 of a weight above 0, on at least 20 prompts that begin differently, got 60 on 30"
    ):
        calibrate(c, votes)
    c, votes = world("bt", 10, 20)
    with pytest.raises(ValueError, match="got 200 on 10"):
        calibrate(c, votes)


def test_votes_without_weight_are_none():
    c, votes = world("bt", 100, 2)
    with pytest.raises(ValueError, match="got 0 on 0"):
        calibrate(c, replace(votes, weight=np.zeros(len(votes))))


def test_ties_alone_are_refused():
    c, votes = world("grk", 60, 3)
    for outcome in (Outcome.TIE, Outcome.BOTH_BAD):
        with pytest.raises(ValueError, match="all are ties"):
            calibrate(c, replace(votes, outcome=np.full_like(votes.outcome, outcome)))


def test_coefficients_that_are_not_finite_are_named():
    c, votes = world("grk", 60, 3)
    for name, value in (("theta", np.nan), ("theta", np.inf), ("eta", -np.inf)):
        wrong = getattr(c, name).copy()
        wrong[7] = value
        with pytest.raises(ValueError, match=rf"c: expected finite coefficients, got {name} .*{value}.* for prompt 7"):
            calibrate(replace(c, **{name: wrong}), votes)


def test_weights_and_outcomes_that_are_none_are_refused():
    c, votes = world("bt", 60, 3)
    for wrong, message in (
        ({"weight": np.full(len(votes), 1e300)}, r"weight: expected at most 1e\+09 for a vote"),
        ({"weight": np.full(len(votes), np.inf)}, "weight: expected finite numbers"),
        ({"outcome": np.full(len(votes), Outcome.TIE)}, "knows no ties"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate(c, replace(votes, **wrong))


def test_where_theta_has_too_few_values_to_bend_another_map_is_chosen():
    c, votes = world("bt", 40, 3, models=2)
    c = replace(c, theta=c.theta * np.float32(1e-30))  # all different, but not by more than rounding
    _, report = calibrate(c, votes, ("none", "isotonic"), bootstrap=2)
    assert [of.candidate for of in report.candidates] == ["none"]
    with pytest.raises(ValueError, match="isotonic: expected theta of at least three different values"):
        calibrate(c, votes, ("isotonic",))


def test_votes_on_other_models_are_left_out_and_counted():
    _, votes = world("bt", 100, 3)
    models = ("new", "model-003", "model-001", "model-002")
    known, others = among_known(votes, models)
    assert len(known) + others == len(votes)
    assert known.models == models
    names = {tuple(sorted((models[a], models[b]))) for a, b in zip(known.a, known.b, strict=True)}
    assert names == {(f"model-00{i}", f"model-00{j}") for i in range(1, 4) for j in range(i + 1, 4)}
    with pytest.raises(ValueError, match="expected some on the checkpoint's models, x, y"):
        among_known(votes, ("x", "y"))
    with pytest.raises(ValueError, match="expected some between two models of the checkpoint, which knows only model-003"):
        among_known(votes, ("x", "model-003"))


@pytest.mark.slow
def test_models_of_values_need_no_pairs():
    c, votes = world("ols", 150, 5, scale=1.5, shift=1.0)
    found, report = calibrate(c, replace(votes, weight=(votes.a == 2).astype(float)), bootstrap=20)
    assert report.votes == (votes.a == 2).sum()
    assert report.chosen != "none"
    assert np.isfinite(found(c)[0]).all()


# The map in a checkpoint


@settings(max_examples=50)
@given(
    knots=st.lists(st.floats(-20, 20), min_size=2, max_size=8, unique=True),
    rises=st.lists(st.floats(0.01, 5), min_size=8, max_size=8),
    theta=st.lists(st.floats(-40, 40, width=32), min_size=3, max_size=3),
)
def test_a_monotone_step_is_interpolation_that_goes_on_beyond_its_ends(knots, rises, theta):
    knots = sorted(knots)
    if min(np.diff(knots)) < 1e-3:
        return
    values = np.cumsum(rises)[: len(knots)].tolist()
    found = ThetaMap(("a", "b", "c"), (MonotoneStep(tuple(knots), tuple(values), {"b": 0.5}),))
    mapped, slope = found.with_slope(torch.tensor([theta], dtype=torch.float64))
    slopes = np.diff(values) / np.diff(knots)
    for x, y, s, offset in zip(theta, mapped[0].tolist(), slope[0].tolist(), (0, 0.5, 0), strict=True):
        expected = np.interp(x, knots, values) + slopes[0] * min(x - knots[0], 0) + slopes[-1] * max(x - knots[-1], 0)
        assert y - offset == pytest.approx(expected, rel=1e-9, abs=1e-9)
        assert min(abs(s - slopes)) <= 1e-9 * max(slopes)
    order = np.argsort(theta)
    raw = mapped[0].numpy() - [0, 0.5, 0]
    assert (np.diff(raw[order]) >= -1e-9).all()


def test_not_a_number_stays_so():
    found = ThetaMap(("a",), (MonotoneStep((0.0, 1.0), (0.0, 3.0)),))(torch.tensor([[float("nan")], [1.0]]))
    assert torch.isnan(found[0, 0])
    assert found[1, 0] == 3
    assert found.dtype == torch.float32


def of(folder):
    return Engine.from_pretrained(folder, device="cpu", dtype=torch.float32).coefficients(PROMPTS)


@cache
def report_of(name="grk"):
    return calibrate(*world(name, 60, 2), bootstrap=2)[1]


LINEAR = CoefficientMap(Candidate("both", 0.3), 0.6, -0.2, {"alpha": 0.1, "gamma": -0.4}, eta_scale=1.2, eta_offset=0.3)
BENT = CoefficientMap(Candidate("isotonic"), knots=(-3.0, 0.0, 2.0), values=(-5.0, 0.5, 1.0), eta_scale=0.9, eta_offset=-0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "steps", [(LINEAR,), (BENT,), (LINEAR, LINEAR), (LINEAR, BENT), (BENT, LINEAR), (BENT, LINEAR, BENT, LINEAR)]
)
def test_a_calibrated_checkpoint_gives_the_mapped_coefficients(tmp_path, steps):
    folder, report = tiny.write(tmp_path / "0"), report_of()
    expected = of(folder)
    for i, step in enumerate(steps, 1):
        theta, eta = step(expected)
        expected = Coefficients(theta, eta, expected.models, expected.feedback)
        calibrated.write(checkpoint.load(folder), tmp_path / str(i), step, report)
        folder = tmp_path / str(i)
    found = of(folder)
    np.testing.assert_allclose(found.theta, expected.theta, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.eta, expected.eta, rtol=1e-4, atol=1e-4)
    assert (folder / FILE).exists() == (BENT in steps)
    assert len(json.loads((folder / "training_config.json").read_text())["calibrations"]) == len(steps)


@pytest.mark.parametrize("steps", [(LINEAR,), (BENT,), (BENT, LINEAR)])
def test_deviations_are_multiplied_by_the_slope(tmp_path, steps, rng):
    folder, report = tiny.write(tmp_path / "0"), report_of()
    basis = torch.from_numpy(rng.normal(0, 0.1, (49, 2))).float()
    factors = torch.from_numpy(np.tril(rng.normal(0, 1, (2, 2, 2)))).float()
    Uncertainty(basis, factors, ("beta", "delta")).write(folder / UNCERTAINTY_FILE)
    before = of(folder)
    slope, theta = np.ones_like(before.theta, float), before.theta.astype(float)
    for i, step in enumerate(steps, 1):
        c = Coefficients(theta, before.eta, before.models, before.feedback)
        above, below = (step(replace(c, theta=theta + h))[0] for h in (1e-6, -1e-6))
        slope *= (above - below) / 2e-6
        theta = step(c)[0]
        calibrated.write(checkpoint.load(folder), tmp_path / str(i), step, report)
        folder = tmp_path / str(i)
    np.testing.assert_allclose(of(folder).deviation, before.deviation * slope, rtol=1e-3, atol=1e-6)


def test_a_scaled_posterior_keeps_its_basis(tmp_path, rng):
    """Adapted again, its directions are in units of theta still: the first is the constant 1."""
    folder = tiny.write(tmp_path / "0")
    basis = torch.from_numpy(np.c_[np.eye(49)[:, -1], rng.normal(0, 0.1, 49)]).float()
    Uncertainty(basis, torch.eye(2)[None], ("beta",), trained=("beta",)).write(folder / UNCERTAINTY_FILE)
    calibrated.write(checkpoint.load(folder), tmp_path / "1", CoefficientMap(Candidate("temperature"), 0.5), report_of())
    found = checkpoint.load(tmp_path / "1").uncertainty
    assert torch.equal(found.basis, basis)
    assert torch.equal(found.factors, torch.eye(2)[None] / 2)
    assert found.trained == ("beta",)


def test_no_map_leaves_every_coefficient(tmp_path):
    tiny.write(tmp_path / "c")
    calibrated.write(checkpoint.load(tmp_path / "c"), tmp_path / "n", CoefficientMap(Candidate("none")), report_of())
    np.testing.assert_array_equal(of(tmp_path / "n").theta, of(tmp_path / "c").theta)


def test_a_monotone_map_is_not_exported(tmp_path):
    calibrated.write(checkpoint.load(tiny.write(tmp_path / "c")), tmp_path / "n", BENT, report_of())
    with pytest.raises(
        CheckpointError, match=r"a monotone map of theta, which lmarena/p2l's code cannot read.*--map temperature"
    ):
        export(tmp_path / "n", tmp_path / "e")
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    "contents",
    [
        "",
        "[]",
        "{}",
        '{"steps": []}',
        '{"steps": [{"knots": [0], "values": [1], "offsets": {}}]}',
        '{"steps": [{"knots": [0, 1], "values": [1, 1], "offsets": {}}]}',
        '{"steps": [{"knots": [0, 1], "values": [1, NaN], "offsets": {}}]}',
        '{"steps": [{"knots": [0, 1], "values": [1, 2], "offsets": {"alpha": Infinity}}]}',
        '{"steps": [{"knots": [1, 0], "values": [1, 2]}]}',
    ],
)
def test_a_damaged_map_is_named(tmp_path, contents):
    tiny.write(tmp_path / "c")
    (tmp_path / "c" / FILE).write_text(contents)
    with pytest.raises(CheckpointError, match=r"calibration\.json: expected JSON with steps of knots, values and offsets"):
        checkpoint.load(tmp_path / "c")


# The command


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint, and votes under 0.5 times its theta."""
    folder = tmp_path_factory.mktemp("calibrate")
    tiny.write(folder / "c", loss_type="bt", head_type="bt")
    rng = np.random.default_rng(1)
    prompts = [f"{rng.integers(10**9)} {i}" for i in range(150)]
    c = Engine.from_pretrained(folder / "c", device="cpu", dtype=torch.float32).coefficients(prompts)
    rows = []
    for i, prompt in enumerate(prompts):
        for _ in range(2):
            a, b = rng.choice(5, 2, replace=False)
            won = rng.random() < expit(0.5 * (c.theta[i, a] - c.theta[i, b]))
            rows.append(
                {"prompt": prompt, "model_a": c.models[a], "model_b": c.models[b], "winner": "model_a" if won else "model_b"}
            )
    pq.write_table(pa.Table.from_pylist([*rows, rows[0] | {"model_b": "unknown"}]), folder / "votes.parquet")
    return folder


@pytest.mark.slow
def test_calibrate_writes_a_checkpoint_a_plot_and_figures(files, monkeypatch, tmp_path):
    monkeypatch.chdir(files)
    more = (
        "--map",
        "none",
        "--map",
        "temperature",
        "--plot",
        tmp_path / "r.png",
        "--json",
        tmp_path / "r.json",
        "--bootstrap",
        "20",
    )
    ended = p2l_engine("calibrate", "c", "--votes", "votes.parquet", "-o", tmp_path / "n", "--dtype", "float32", *more)
    assert ended.status == 0, ended.err
    assert "skipped 1 votes on models that the checkpoint does not know: unknown" in ended.message
    assert "log-loss falls by" in ended.message
    figures = json.loads((tmp_path / "r.json").read_text())
    assert figures["chosen"] == "temperature"
    assert figures["skipped"] == 1
    assert figures["parameters"]["scale"]["value"] == pytest.approx(0.5, abs=0.2)
    assert (tmp_path / "r.png").stat().st_size > 10_000
    before, after = of(files / "c"), of(tmp_path / "n")
    np.testing.assert_allclose(after.theta, figures["parameters"]["scale"]["value"] * before.theta, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_calibrate_refuses_what_it_cannot_do(files, monkeypatch):
    monkeypatch.chdir(files)
    ended = p2l_engine("calibrate", "c", "--votes", "votes.parquet", "-o", "x", "--map", "platt")
    assert (ended.status, "expected some of none, temperature" in ended.message) == (2, True)
    ended = p2l_engine("calibrate", "c", "--votes", "votes.parquet", "-o", "c")
    assert (ended.status, "expected a folder that does not exist yet, or an empty one" in ended.message) == (2, True)


@pytest.mark.slow
def test_adapt_refuses_a_checkpoint_with_a_monotone_map(files, tmp_path):
    calibrated.write(checkpoint.load(files / "c"), tmp_path / "n", BENT, report_of("bt"))
    ended = p2l_engine("adapt", tmp_path / "n", "--votes", files / "votes.parquet", "-o", tmp_path / "a")
    assert ended.status == 2
    assert "calibrated by a monotone map (calibration.json), behind which rows cannot be learned" in ended.message
    assert not (tmp_path / "a").exists()

"""Traffic over time: periods and groups, tests of change with their exact level, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from scipy.stats import binom

from p2l_engine.bootstrap import student
from p2l_engine.coefficients import Coefficients
from p2l_engine.feedback import feedback_model
from p2l_engine.learning import drift
from p2l_engine.learning.traffic import Traffic, consecutive, period_of, read_traffic, rows_of
from tests.support import tiny
from tests.support.cases import slow_but
from tests.support.command import p2l_engine
from tests.support.simulate import Simulator

BT = feedback_model("bt")


def coefficients(theta, name="bt"):
    theta = np.asarray(theta, np.float32)
    return Coefficients(theta, None, tuple(f"m{i}" for i in range(theta.shape[1])), feedback_model(name))


def sessions_of(rng, sessions, models=4, shift=0.0, spread=1.0):
    """theta and sessions: one to four prompts each, which resemble each other."""
    sizes = rng.integers(1, 5, sessions)
    number = np.repeat(np.arange(sessions), sizes)
    theta = spread * rng.normal(0, 1, (sessions, models))[number] + rng.normal(0, 0.3, (len(number), models))
    theta[:, 0] += shift
    return theta, number


def drawn(rng, shift=0.0, permutations=99, spread=1.0, sessions=12):
    one, two = sessions_of(rng, sessions), sessions_of(rng, sessions, shift=shift, spread=spread)
    seed = int(rng.integers(2**31))
    return drift.change(coefficients(one[0]), coefficients(two[0]), (one[1], 1000 + two[1]), permutations, seed)


# The tests of change


@pytest.mark.slow
def test_the_level_of_both_tests_is_exact(rng):
    """Of sessions that are alike, 5% are called changed, by either test: within what 400 draws let one expect."""
    n = 400
    found = [drawn(rng) for _ in range(n)]
    for rejected in (sum(of.p <= 0.05 for of in found), sum(min(gain.p for gain in of.gains) <= 0.05 for of in found)):
        assert binom.ppf(0.0005, n, 0.05) <= rejected <= binom.ppf(0.9995, n, 0.05)


@pytest.mark.slow
def test_permuting_prompts_instead_would_not_be(rng):
    """Why sessions are exchanged: prompts of one session resemble each other."""
    rejected = 0
    for _ in range(60):
        (one, a), (two, b) = sessions_of(rng, 12), sessions_of(rng, 12)
        ids = np.arange(len(a) + len(b))
        of = drift.change(coefficients(one), coefficients(two), (ids[: len(a)], ids[len(a) :]), 99)
        rejected += of.p <= 0.05
    assert rejected > binom.ppf(0.999, 60, 0.05)


def test_what_has_changed_is_found(rng):
    found = drawn(rng, shift=1.5, sessions=40)
    assert found.p <= 0.02
    assert found.gains[0].model == "m0"
    assert found.gains[0].p <= 0.02
    assert found.gains[0].low > 0
    assert found.sessions == (40, 40)
    wider = drawn(rng, spread=3.0, sessions=40)  # means are the same
    assert wider.p <= 0.02


def test_the_distance_is_that_of_its_definition(rng):
    (one, a), (two, b) = sessions_of(rng, 9), sessions_of(rng, 7, shift=1.0)
    x, y = (theta.astype(np.float32).astype(float) for theta in (one, two))
    x, y = (z - z.mean(1, keepdims=True) for z in (x, y))
    expected = 2 * cdist(x, y).mean() - cdist(x, x).mean() - cdist(y, y).mean()
    found = drift.change(coefficients(one), coefficients(two), (a, 100 + b), 19)
    assert found.distance == pytest.approx(expected, abs=1e-9)


def test_the_gain_is_the_difference_of_mean_win_rates(rng):
    (one, a), (two, b) = sessions_of(rng, 9), sessions_of(rng, 7, shift=1.0)
    found = {gain.model: gain for gain in drift.change(coefficients(one), coefficients(two), (a, 100 + b), 19).gains}
    for m in range(4):
        others = [k for k in range(4) if k != m]
        rates = [np.mean(1 / (1 + np.exp(theta[:, others] - theta[:, [m]]))) for theta in (one, two)]
        gain = found[f"m{m}"]
        assert gain.gain == pytest.approx(rates[1] - rates[0], abs=1e-6)
        assert gain.low < gain.gain < gain.high


def test_equal_traffic_has_not_changed():
    theta = np.ones((30, 3))
    found = drift.change(coefficients(theta), coefficients(theta), (np.arange(30), np.arange(30, 60)), 99)
    assert (found.p, found.distance) == (1.0, 0.0)
    assert {gain.p for gain in found.gains} == {1.0}


def test_a_shift_of_all_coefficients_counts_only_where_there_is_a_ground(rng):
    theta, number = sessions_of(rng, 30)
    other, more = sessions_of(rng, 30)
    for name, changed in (("bt", False), ("ols", True), ("grk", True)):
        two = drift.change(coefficients(theta, name), coefficients(other + 5, name), (number, 100 + more), 199)
        assert (two.p <= 0.01) == changed, name


def test_many_prompts_are_compared_by_a_sample_of_sessions(rng, monkeypatch):
    monkeypatch.setattr(drift, "MOST_PROMPTS", 60)
    assert drawn(rng, shift=2.0, sessions=100).p <= 0.05


def test_too_few_sessions_are_named():
    theta, number = np.zeros((12, 2)), np.arange(12)
    with pytest.raises(ValueError, match="sessions: expected at least 5 in each period, got 12 and 0"):
        drift.change(coefficients(theta), coefficients(theta[:0]), (number, number[:0]))


def popular(rng, sizes, shift=0.0):
    """Two periods of prompts that come again and again, the popular ones of other coefficients than the rare ones; those of m1
    more popular in the later period, by the shift."""
    share = np.arange(1, 301) ** -1.0
    theta = rng.normal(size=(300, 4))
    theta[:, 0] -= np.log(share)
    later = share * np.exp(shift * theta[:, 1])
    drawn_from = [rng.choice(300, n, p=p / p.sum()) for n, p in zip(sizes, (share, later), strict=True)]
    seed = int(rng.integers(2**31))
    return drift.change(*(coefficients(theta[i]) for i in drawn_from), tuple(drawn_from), 99, seed)


@pytest.mark.parametrize("sizes", slow_but([(50, 250)], [(150, 150), (50, 250), (250, 50)]))
def test_sessions_in_both_periods_do_not_look_like_a_change(rng, sizes):
    """Were their later prompts counted for the earlier period, half of the draws would be called changed."""
    found = [popular(rng, sizes) for _ in range(40)]
    gains = [next(gain for gain in of.gains if gain.model == "m0") for of in found]
    for rejected in (sum(of.p <= 0.05 for of in found), sum(min(gain.p for gain in of.gains) <= 0.05 for of in found)):
        assert rejected <= binom.ppf(0.9995, 40, 0.05)
    mean = np.mean([gain.gain for gain in gains])
    assert abs(mean) < 4 * np.std([gain.gain for gain in gains]) / np.sqrt(40)
    assert sum(gain.low <= 0 <= gain.high for gain in gains) >= binom.ppf(0.0005, 40, 0.9)


def test_a_change_among_sessions_in_both_periods_is_found(rng):
    assert sum(popular(rng, (300, 300), shift=1.0).p <= 0.05 for _ in range(5)) >= 3


def test_the_same_few_sessions_all_the_time_are_tested(rng):
    theta = rng.normal(size=(12, 4))
    one, two = (rng.integers(0, 12, 90) for _ in range(2))
    noise = lambda ids: theta[ids] + rng.normal(0, 0.3, (len(ids), 4))  # noqa: E731
    same = drift.change(coefficients(noise(one)), coefficients(noise(two)), (one, two), 199)
    assert same.p > 0.01
    theta[:, 0] += 2.0
    assert drift.change(coefficients(noise(one) - [2.0, 0, 0, 0]), coefficients(noise(two)), (one, two), 199).p <= 0.02


@pytest.mark.slow
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=4, max_size=20), st.integers(0, 9))
def test_exchanged_sessions_keep_their_numbers(prompts, seed):
    is_late = np.array([late for late, _ in prompts])
    session = np.array([number for _, number in prompts])
    parts = drift.Parts.of(session[~is_late], session[is_late])
    ordered = np.concatenate([session[~is_late], session[is_late]])
    labels = parts.exchanged(20, np.random.default_rng(seed))
    assert np.array_equal(labels[0][parts.of_prompt], np.sort(is_late))
    assert len(set(zip(ordered, np.sort(is_late), strict=True))) == len(parts.late)
    assert (labels.sum(1) == parts.counts[1]).all()  # as many sessions in each period
    for one in set(session[is_late]) & set(session[~is_late]):
        two = np.unique(parts.of_prompt[ordered == one])
        assert (labels[:, two[0]] != labels[:, two[1]]).all()  # one part in each


def test_errors_of_gains_are_those_of_redrawn_sessions(rng):
    """Sessions in both periods: the difference of means varies less than if they were others."""
    theta, gains = rng.normal(size=(4000, 2)), []
    for _ in range(300):
        drawn_sessions = rng.integers(0, 4000, 40)
        values = np.concatenate([theta[drawn_sessions], theta[drawn_sessions]]) + rng.normal(0, 0.5, (80, 2))
        parts = drift.Parts.of(np.arange(40), np.arange(40))
        gains.append((values[40:].mean(0) - values[:40].mean(0), parts.errors(values)))
    spread = np.std([gain for gain, _ in gains], 0)
    np.testing.assert_allclose(np.mean([error for _, error in gains], 0), spread, rtol=0.15)


def test_a_few_long_sessions_leave_a_gain_uncertain(rng):
    """With a degree of freedom for each session, 82% of the intervals would hold the truth, which is 0."""
    n, held = 200, 0
    for _ in range(n):
        early, late = (np.repeat(np.arange(k, k + 20), np.minimum(rng.zipf(1.7, 20), 80)) for k in (0, 20))
        number = np.concatenate([early, late])
        shown = (rng.normal(size=40)[number] + rng.normal(0, 0.7, len(number)))[:, None]
        parts = drift.Parts.of(early, late)
        gain = shown[len(early) :].mean() - shown[: len(early)].mean()
        held += abs(gain) <= student(0.95, parts.freedom()) * parts.errors(shown)[0]
    assert held >= binom.ppf(0.0005, n, 0.95)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holms_p_values(p):
    found = drift.holm(p)
    for i, x in enumerate(p):
        smaller = [(y, j) for j, y in enumerate(p) if (y, j) <= (x, i)]
        expected = max(min(1.0, y * (len(p) - rank)) for rank, (y, _) in enumerate(sorted(smaller)))
        assert found[i] == pytest.approx(expected)


# Calibration of a period


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bt", "grk", "poisson"])
def test_the_level_of_the_calibration_test(name):
    n, rejected = 120, 0
    for seed in range(n):
        simulator = Simulator(feedback_model(name), 4, seed=seed, spread=0.4)
        texts = simulator.prompts(120)
        rejected += drift.still_calibrated(simulator.truth(texts), simulator.votes(texts, 2)).p <= 0.05
    assert rejected <= binom.ppf(0.999, n, 0.06)


@pytest.mark.parametrize("name", ["bt", "bt-tie", "rk", "rk-reparam", "grk", "ols", "poisson"])
def test_a_checkpoint_that_is_too_sure_is_no_longer_calibrated(name):
    simulator = Simulator(feedback_model(name), 4, spread=0.6)
    texts = simulator.prompts(400)
    truth, votes = simulator.truth(texts), simulator.votes(texts, 4)
    found = drift.still_calibrated(replace(truth, theta=2 * truth.theta), votes)
    assert found.p < 0.01
    fine = drift.still_calibrated(truth, votes)
    assert fine.log_loss < found.log_loss
    if fine.expected is not None:
        assert fine.log_loss == pytest.approx(fine.expected, abs=0.08)


# Groups and periods


@given(st.floats(0, 4e9))
def test_periods_are_those_of_the_calendar(seconds):
    when = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)
    assert period_of(seconds, "day") == when.date().isoformat()
    assert period_of(seconds, "month") == f"{when.year}-{when.month:02}"
    week = period_of(seconds, "week")
    assert (
        datetime.strptime(f"{week}-1", "%G-W%V-%u").date()
        <= when.date()
        < datetime.strptime(f"{week}-7", "%G-W%V-%u").date() + timedelta(days=1)
    )


def table(tmp_path, rows):
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "decisions.parquet")
    return tmp_path


ROWS = [
    {"time": datetime(2026, 1, 5, tzinfo=UTC), "key": "b", "session": "s", "prompt": ["one"]},
    {"time": datetime(2026, 2, 1, tzinfo=UTC), "key": "a", "session": "s", "prompt": ["two", "turns"]},
    {"time": datetime(2026, 1, 31, 23, 59, tzinfo=UTC), "key": "a", "session": None, "prompt": ["two"]},
    {"time": datetime(2026, 1, 1, tzinfo=UTC), "key": None, "session": "s", "prompt": ["four"]},
    {"time": datetime(2026, 3, 1, tzinfo=UTC), "key": "a", "session": "t", "prompt": None},
]


def test_groups_periods_and_sessions_of_a_log_export(tmp_path):
    found = read_traffic(table(tmp_path, ROWS), "key", "month")
    assert found.prompts == (("four",), ("one",), ("two",), ("two", "turns"))
    assert found.group == ("none", "b", "a", "a")
    assert found.period == ("2026-01", "2026-01", "2026-01", "2026-02")
    assert len(set(found.session.tolist())) == 4  # a session is one of its group
    assert found.skipped == {"no prompt": 1}
    rows = rows_of(found)
    assert [*rows] == [("a", "2026-01"), ("a", "2026-02"), ("b", "2026-01"), ("none", "2026-01")]
    assert consecutive([*rows]) == [(("a", "2026-01"), ("a", "2026-02"))]
    assert set(read_traffic(tmp_path, None, "day").group) == {"all"}


def test_traffic_that_cannot_be_read_is_named(tmp_path):
    table(tmp_path, ROWS)
    with pytest.raises(ValueError, match="expected the columns team; it has"):
        read_traffic(tmp_path, "team", "day")
    with pytest.raises(ValueError, match="no row has one: were texts logged"):
        read_traffic(table(tmp_path, [ROWS[-1] | {"prompt": None}]), None, "day")
    table(tmp_path, [{"time": "yesterday", "prompt": "x"}])
    with pytest.raises(ValueError, match="row 0: timestamp: expected seconds"):
        read_traffic(tmp_path, None, "day")
    table(tmp_path, [{"prompt": "x"}])
    with pytest.raises(ValueError, match="expected the columns time or timestamp"):
        read_traffic(tmp_path, None, "day")


# The command


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """A checkpoint, and a log export in which one key's prompts change in March."""
    folder, rng = tmp_path_factory.mktemp("drift"), np.random.default_rng(0)
    tiny.write(folder / "c")
    rows = []
    for i in range(120):
        key, month = "ab"[i % 2], 1 + i % 3
        kind = "write code in python" if (key, month) == ("a", 3) else rng.choice(["sum of numbers", "a poem of rivers"])
        when = datetime(2026, month, int(rng.integers(1, 28)), tzinfo=UTC)
        rows.append({"time": when, "key": key, "session": f"s{i}", "prompt": [f"{kind} {i}"]})
    (folder / "log").mkdir()
    table(folder / "log", rows)
    votes = [
        {
            "prompt": row["prompt"],
            "model_a": "alpha",
            "model_b": ("beta", "gamma")[i % 2],
            "winner": ("model_a", "tie")[i % 3 > 0],
            "timestamp": row["time"],
        }
        for i, row in enumerate(rows)
    ]
    pq.write_table(pa.Table.from_pylist(votes), folder / "log" / "votes.parquet")
    return folder


@pytest.mark.slow
def test_leaderboards_over_time(log, monkeypatch, tmp_path):
    monkeypatch.chdir(log)
    more = ("--prompts", "log", "--by", "key", "--period", "month", "--bootstrap", "10")
    ended = p2l_engine("leaderboard", *more, "--checkpoint", "c", "--plot", tmp_path / "t.png")
    assert ended.status == 0, ended.err
    assert "a: coefficients" in ended.out
    assert "changed" in ended.out
    assert "not calibrated" in ended.out
    assert (tmp_path / "t.png").stat().st_size > 10_000
    ended = p2l_engine("leaderboard", *more, "--checkpoint", "c", "--json")
    lines = [json.loads(line) for line in ended.out.splitlines()]
    boards = [line for line in lines if "rank" in line]
    assert len(boards) == 2 * 3 * 5
    changes = {(line["group"], line["from"], line["to"]): line for line in lines if "distance" in line}
    assert len(changes) == 4
    assert changes["a", "2026-02", "2026-03"]["p_of_all"] <= 0.05
    assert min(line["p_of_all"] for key, line in changes.items() if key[2] != "2026-03" or key[0] == "b") > 0.05
    assert [line["period"] for line in lines if "log_loss" in line] == ["2026-01", "2026-02", "2026-03"]


def test_options_over_time_need_a_period(log, monkeypatch):
    monkeypatch.chdir(log)
    ended = p2l_engine("leaderboard", "--prompts", "log", "--by", "key", "--checkpoint", "c")
    assert (ended.status, "needs --period" in ended.message) == (2, True)
    ended = p2l_engine("leaderboard", "x", "--period", "day", "--checkpoint", "c")
    assert (ended.status, "needs --prompts" in ended.message) == (2, True)


@pytest.mark.parametrize("seconds", [1.7e12, 1.7e18, -1e12, 1e300])
def test_times_of_other_units_are_named_with_their_row(tmp_path, seconds):
    file = tmp_path / "log.csv"
    file.write_text(f"prompt,time\nhello,1700000000\nhello,{seconds!r}\n")
    with pytest.raises(ValueError, match=r"row 1.*time: expected seconds since 1970.*milliseconds"):
        read_traffic(file, None, "week")


@pytest.mark.slow
@given(st.lists(st.tuples(st.text(max_size=3), st.integers(0, 3)), min_size=1, max_size=20))
def test_rows_of_groups_are_found_whatever_their_names(rows):
    group, period = zip(*((name, f"2026-0{1 + month}") for name, month in rows), strict=True)
    found = rows_of(Traffic((("p",),) * len(rows), group, period, np.zeros(len(rows), np.int64), {}))
    assert {key: [i for i in range(len(rows)) if (group[i], period[i]) == key] for key in zip(group, period, strict=True)} == {
        key: of.tolist() for key, of in found.items()
    }
    sizes = [group.count(name) for name, _ in found]
    assert sizes == sorted(sizes, reverse=True)

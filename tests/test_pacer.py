"""A mean budget over a stream: against the optimum in hindsight, and what holds exactly on hostile streams."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.streams import measure
from bench.traffic import KINDS, stream, streams
from p2l_engine import routing
from p2l_engine.routing import BudgetPacer, exact
from p2l_engine.routing import pacer as pacer_module
from tests.support.cases import slow_but


@pytest.mark.slow
@pytest.mark.parametrize("seed", slow_but([1], range(10)))
def test_the_mean_holds_within_one_percent_when_the_mix_shifts(seed):
    v, past, costs = stream(seed, 10_000)
    unbounded = min(costs[half.argmax(1)].mean() for half in (v[:5000], v[5000:]))
    budget = float(costs.min() + 0.4 * (unbounded - costs.min()))
    best = routing.solve_batch_budget(v, costs, budget)
    for pacer, points in ((BudgetPacer.learned(past, costs, budget), 0.5), (BudgetPacer(budget), 1.0)):
        chosen = np.array([pacer.choose(row, costs) for row in v])
        assert pacer.count == 10_000
        assert pacer.mean_cost == pytest.approx(costs[chosen].mean())
        assert abs(pacer.mean_cost / budget - 1) < 0.01
        lost = best.value.mean() - v[np.arange(len(v)), chosen].mean()
        assert 100 * lost < points


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_streams_lose_no_more_than_under_dual_mirror_descent(kind):
    """In the mean of eight streams, with the mirror map and the step that lose least on all kinds together; both are told the
    number of prompts. A pacer that is not saves less, which costs win rate where the first half's stakes are faint.
    """
    runs = [run for i, one in enumerate(streams(kind, 8, 10_000)) for run in measure(kind, i, one, [("entropy", 1.0)])]
    own = [run for run in runs if run.router in ("pacer", "open")]
    assert all(run.off_percent <= 1 for run in own)
    # Sorted down, the best models cost less than the budget at last.
    assert all(run.off_percent >= -1 for run in own if kind != "sorted down")
    for first_price in ("past", "none"):
        lost = {"pacer": 0.0, "open": 0.0, "entropy 1.0": 0.0}
        for run in runs:
            lost[run.router] += run.lost_points if run.first_price == first_price else 0.0
        most = 0.5 if kind == "stationary" else 1.0
        assert lost["pacer"] <= most * lost["entropy 1.0"]
        assert lost["open"] <= (1.2 if kind == "faint half" else 1.01 * most) * lost["entropy 1.0"]


@pytest.mark.parametrize(("prompts", "credit"), [(1, 10.0), (1000, 50.0), (10_000, 500.0), (None, 100.0)])
def test_what_may_be_saved_is_less_the_fewer_prompts_are_to_come(prompts, credit):
    """Worthless prompts save; what the credit may not hold is in reserve."""
    pacer = BudgetPacer(1.0, prompts=prompts)
    for n in range(1, 501):
        pacer.choose([0.5, 0.5], [0.0, 1.0])
        left = max(0, (prompts or 0) - n)
        limit = credit if prompts is None else min(credit, 0.12 * pacer.horizon + 0.08 * left)
        assert pacer._credit / exact.UNIT == pytest.approx(min(n, limit))
        assert (pacer._credit + pacer._reserve) / exact.UNIT == n


@pytest.mark.parametrize("seed", slow_but([1], range(8)))
def test_streams_of_a_known_length_end_within_one_percent(seed):
    """Of 1,000 prompts, too, where a pacer that is not told may be 100 budgets off."""
    v, past, costs = stream(seed, 1000)
    unbounded = min(costs[half.argmax(1)].mean() for half in (v[:500], v[500:]))
    budget = float(costs.min() + 0.4 * (unbounded - costs.min()))
    for pacer in (BudgetPacer.learned(past, costs, budget, prompts=1000), BudgetPacer(budget, prompts=1000)):
        for row in v:
            pacer.choose(row, costs)
        assert abs(pacer.mean_cost / budget - 1) <= 0.01


def test_a_budget_that_does_not_bind_takes_the_best():
    v, _, costs = stream(1, 2000, shift=False)
    pacer = BudgetPacer(float(costs.max()), price=0.0)
    chosen = np.array([pacer.choose(row, costs) for row in v])
    assert (chosen[200:] == v[200:].argmax(1)).all()


def test_an_infeasible_budget_warns_once(caplog):
    pacer = BudgetPacer(0.1, horizon=10)
    with caplog.at_level(logging.WARNING):
        for _ in range(100):
            assert pacer.choose([0.5, 0.9], [1.0, 2.0]) in (0, 1)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "may be infeasible" in caplog.text


def test_masks_and_settlements(rng):
    pacer = BudgetPacer(1.0)
    assert pacer.choose([0.1, 0.9, 0.2], [1.0, 1.0, 1.0], np.array([True, False, True])) == 2
    pacer.settle(4.0)
    assert pacer.spent == 5.0
    before = pacer.price
    pacer.settle(1.0)
    assert pacer.price > before


@pytest.mark.slow
def test_state_survives_saving(tmp_path):
    v, past, costs = stream(3, 4000)
    budget = float(np.quantile(costs, 0.3))
    whole = BudgetPacer.learned(past, costs, budget)
    expected = [whole.choose(row, costs) for row in v]
    half = BudgetPacer.learned(past, costs, budget)
    first = [half.choose(row, costs) for row in v[:2000]]
    half.save(tmp_path / "pacer.json")
    again = BudgetPacer.load(tmp_path / "pacer.json")
    assert first + [again.choose(row, costs) for row in v[2000:]] == expected
    assert (again.count, again.spent, again.price) == (whole.count, whole.spent, whole.price)
    assert list(tmp_path.iterdir()) == [tmp_path / "pacer.json"]
    for text in (
        "{}",
        "no json",
        '{"budget": 0, "horizon": 500}',
        (tmp_path / "pacer.json").read_text().replace("2000", "null"),
    ):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=r"bad.json: expected the state of a BudgetPacer"):
            BudgetPacer.load(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("count", -5), ("count", 2.5), ("count", "5"), ("count", True), ("count", 10**400), ("level", math.nan), ("level", 1),
        ("spent", 3.0), ("spent", [math.inf]), ("spent", [True]), ("spent", [-1e9]), ("reserve", [-1.0]), ("reserve", None),
        ("reserve", [1e9]), ("reserve", [102.0]),
        ("budget", -1.0), ("budget", "1"), ("horizon", 5.5), ("horizon", None), ("version", 1), ("version", None),
        ("prompts", 0), ("prompts", 2.0), ("prompts", "9"), ("prompts", True),
    ],
)  # fmt: skip
def test_states_that_no_pacer_saves_are_refused(name, wrong, tmp_path):
    pacer = BudgetPacer(1.0)
    pacer.choose([0.5, 0.9], [0.1, 2.0])
    pacer.save(tmp_path / "pacer.json")
    state = json.loads((tmp_path / "pacer.json").read_text())
    assert name in state
    (tmp_path / "pacer.json").write_text(json.dumps(state | {name: wrong}))
    with pytest.raises(ValueError, match=r"pacer.json: expected the state of a BudgetPacer, version 2, got"):
        BudgetPacer.load(tmp_path / "pacer.json")


def test_a_state_of_the_first_version_names_the_pacer_that_continues(tmp_path):
    old = {"budget": 2.0, "horizon": 100, "learned": -1.5, "credit": 3.0, "spent": 8.0, "count": 7}
    (tmp_path / "pacer.json").write_text(json.dumps(old))
    with pytest.raises(ValueError, match=r"BudgetPacer\(budget=2.0, price=math.exp\(-1.5\), horizon=100\)"):
        BudgetPacer.load(tmp_path / "pacer.json")
    assert BudgetPacer(budget=2.0, price=math.exp(-1.5), horizon=100).price == pytest.approx(math.exp(-1.5))


def test_the_last_of_many_threads_saves_the_newest_state(tmp_path):
    pacer, path = BudgetPacer(1.0), tmp_path / "pacer.json"

    def work(_):
        for _ in range(5):
            pacer.choose([0.5, 0.9], [0.1, 2.0])
            pacer.save(path)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert BudgetPacer.load(path).count == pacer.count == 40
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_forked_children_of_busy_threads_go_on(tmp_path, monkeypatch):
    """Each finds a pacer between two prompts, and no lock that is held for ever."""
    pacer, parent, done, writing = BudgetPacer(1.0), os.getpid(), threading.Event(), threading.Event()
    write = pacer_module.write_file

    def write_slowly(path, text):
        if os.getpid() == parent:
            writing.set()
            done.wait()
        write(path, text)

    def choose():
        while not done.is_set():
            pacer.choose([0.5, 0.9], [0.25, 2.0])

    def child(path):
        signal.alarm(20)  # ends a child that hangs
        balanced = Fraction(pacer.spent) + Fraction(pacer._credit + pacer._reserve, exact.UNIT) == pacer.count
        pacer.choose([0.5, 0.9], [0.25, 2.0])
        pacer.save(path)
        return balanced and BudgetPacer.load(path).count == pacer.count

    monkeypatch.setattr(pacer_module, "write_file", write_slowly)
    threads = [threading.Thread(target=work) for work in (lambda: pacer.save(tmp_path / "parent"), choose, choose)]
    for thread in threads:
        thread.start()
    statuses = []
    try:
        writing.wait()
        for i in range(4):
            process = os.fork()
            if process == 0:
                right = False
                try:
                    right = child(tmp_path / str(i))
                finally:
                    os._exit(not right)
            statuses.append(os.waitpid(process, 0)[1])
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert statuses == [0] * 4


@pytest.mark.slow
def test_threads_lose_nothing():
    v, _, costs = stream(4, 4000)
    pacer = BudgetPacer(float(np.quantile(costs, 0.4)))
    with ThreadPoolExecutor(8) as pool:
        chosen = list(pool.map(lambda row: pacer.choose(row, costs), v))
    assert pacer.count == 4000
    assert pacer.spent == pytest.approx(costs[chosen].sum())


HOSTILE = [0.0, 5e-324, 1e-300, 1e-9, 0.1, 0.5, 1.0, 1.5, 2.0, 20.0, 1e5, 1e300, sys.float_info.max]
AMOUNTS = st.sampled_from(HOSTILE) | st.floats(0, 10) | st.floats(0, allow_infinity=False)
RATES = st.sampled_from([0.0, 0.5, 0.9, 1.0]) | st.floats(0, 1) | st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def hostile_streams(draw):
    """A pacer's arguments, and prompts: win rates, costs, allowed models, and the difference settled after each one."""
    m = draw(st.integers(1, 4))
    budget = draw(st.sampled_from([1.0, 1e-300, 5e-324, 1e300]) | st.floats(0.01, 100))
    price = draw(st.none() | st.sampled_from([0.0, 1e-300, 0.3, 1e300]))
    kinds = []
    for _ in range(draw(st.integers(1, 4))):
        scale = draw(st.sampled_from([1.0, budget]))
        costs = [min(cost * scale, sys.float_info.max) for cost in draw(st.lists(AMOUNTS, min_size=m, max_size=m))]
        allowed = draw(st.none() | st.lists(st.booleans(), min_size=m, max_size=m).filter(any))
        difference = draw(st.just(0.0) | st.sampled_from([-1e300, -1e5, -1.0, 1.0, 1e5, 1e300]))
        kinds.append((draw(st.lists(RATES, min_size=m, max_size=m)), costs, allowed, difference * draw(st.booleans())))
    prompts = draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=60))
    known = draw(st.none() | st.sampled_from([1, 30, 60, 20 * 10**9]))
    return (budget, price, draw(st.sampled_from([10, 13, 500])), known), prompts


def check_choice(v, costs, allowed, chosen):
    """The chosen model is allowed, and none that is allowed dominates it or equals it at a lower index."""
    assert allowed[chosen]
    for other in np.flatnonzero(allowed):
        if v[other] >= v[chosen] and costs[other] <= costs[chosen]:
            assert (v[other], costs[other]) == (v[chosen], costs[chosen])
            assert other >= chosen


@pytest.mark.slow
@settings(max_examples=100)
@given(hostile_streams())
def test_no_stream_spends_more_than_the_allowance_or_gets_a_dominated_model(stream):
    (budget, _price, horizon, _), prompts = stream
    pacer = BudgetPacer(*stream[0])
    spent, allowance = Fraction(0), Fraction(budget) * horizon / 5
    assert pacer.allowance == pytest.approx(min(budget * horizon / 5, sys.float_info.max))
    for count, (v, costs, allowed, difference) in enumerate(prompts, start=1):
        chosen = pacer.choose(v, costs, None if allowed is None else np.array(allowed))
        mask = [True] * len(v) if allowed is None else allowed
        check_choice(v, costs, mask, chosen)
        spent += Fraction(costs[chosen])
        if spent > Fraction(budget) * count + allowance:
            assert costs[chosen] == min(cost for cost, free in zip(costs, mask, strict=True) if free)
        assert pacer.spent == (float(spent) if spent <= sys.float_info.max else sys.float_info.max)
        assert pacer.count == count
        if difference:
            pacer.settle(difference)
            spent += Fraction(difference)
        assert pacer.price >= 0


@pytest.mark.slow
@settings(max_examples=60)
@given(hostile_streams(), st.integers(0, 60))
def test_a_saved_pacer_continues_exactly(tmp_path, stream, stop):
    arguments, prompts = stream
    pacer = BudgetPacer(*arguments)
    other = pacer
    for i, (v, costs, allowed, difference) in enumerate(prompts):
        if i == stop:
            pacer.save(tmp_path / "pacer.json")
            other = BudgetPacer.load(tmp_path / "pacer.json")
        chosen = [one.choose(v, costs, None if allowed is None else np.array(allowed)) for one in (pacer, other)]
        assert other is pacer or chosen[0] == chosen[1]
        for one in {pacer, other}:
            one.settle(difference)
        assert (other.spent, other.count, other.price) == (pacer.spent, pacer.count, pacer.price)


@pytest.mark.slow
@settings(max_examples=60)
@given(
    st.integers(1, 400), st.lists(st.sampled_from([1.2, 2.0, 5.0, 7.0]), min_size=1, max_size=40), st.sampled_from([0.0, 0.3])
)
def test_what_was_saved_is_spent_at_a_bounded_rate(cheap, dear, least):
    pacer = BudgetPacer(1.0, horizon=10)
    for _ in range(cheap):
        pacer.choose([0.5, 0.5], [least, 1.0])
    spent = np.zeros(len(dear) + 1)
    for i, cost in enumerate(dear):
        before = pacer.spent
        pacer.choose([0.1, 0.9], [least, cost])
        spent[i + 1] = spent[i] + pacer.spent - before
        n = i + 1 - np.arange(i + 1)
        assert (spent[i + 1] - spent[: i + 1] <= 2 * n + 4 + 1e-9).all()


@pytest.mark.slow
@settings(max_examples=100)
@given(
    st.integers(1, 300),
    st.lists(st.tuples(st.sampled_from([0.0, 0.5, 0.9]), st.sampled_from([1.08, 1.1, 1.6, 2.1, 4.0]), RATES), max_size=4),
)
def test_what_was_saved_for_a_known_end_is_spent_by_then(prompts, kinds):
    """Where the best models cost enough for it, at most 3/25 of the horizon and 1.08 budgets are left. The rate is bounded."""
    pacer, paid = BudgetPacer(1.0, horizon=10, prompts=prompts), [0.0]
    for n in range(prompts):
        low, high, gain = kinds[n * len(kinds) // prompts] if kinds else (0.0, 1.08, 1e-12)
        before = pacer.spent
        pacer.choose([0.5, 0.5 + min(abs(gain), 1) + 1e-12], [low, high])
        paid.append(paid[-1] + pacer.spent - before)
    assert (pacer._credit + pacer._reserve) / exact.UNIT <= 1.2 + 1.08 + 1e-9
    sums = np.array(paid)
    for n in range(1, prompts + 1):
        assert (sums[n:] - sums[:-n]).max() <= 2.08 * n + 12 + 1e-9


@pytest.mark.slow
def test_deep_debt_takes_the_cheapest_allowed_model():
    for allowed, right in ((None, 2), ([False, True, True], 2), ([True, True, False], 0)):
        pacer = BudgetPacer(100.0)
        mask = None if allowed is None else np.array(allowed)
        chosen = [pacer.choose([0.9, 0.8, 0.1], [1e6, 2e6, 2e4], mask) for _ in range(3000)]
        assert chosen == [right] * 3000


@pytest.mark.parametrize(
    ("v", "costs", "right"),
    [([0.5, 0.9], [1.0, 1.0], 1), ([0.9, 0.5], [1.0, 1.0], 0), ([0.7, 0.7], [2.0, 1.0], 1), ([0.7, 0.7], [1.0, 2.0], 0)],
)
def test_dominated_models_are_chosen_at_no_price(v, costs, right):
    """At each credit and level; and where no price matters, none is learned."""
    for debt in (0.0, 99.0, 1e3, 1e9, 1e300, -99.0, -1e3, -1e300):
        for price in (0.0, 1e-300, 1.0, 1e12, 1e300):
            pacer = BudgetPacer(1.0, price)
            pacer.settle(debt)
            assert [pacer.choose(v, costs) for _ in range(20)] == [right] * 20
    pacer = BudgetPacer(1.5, 0.1)
    for _ in range(5000):
        assert pacer.choose(v, costs) == right
    assert pacer._level == BudgetPacer(1.5, 0.1)._level


@pytest.mark.slow
def test_one_dear_prompt_does_not_break_the_mean():
    pacer = BudgetPacer(1.0)
    for n in range(1, 20_001):
        chosen = pacer.choose([0.5, 0.9], [0.1, 1e5 if n % 376 == 0 else 3.0])
        assert pacer.spent <= n + 100
        assert not (chosen == 1 and n % 376 == 0)
    assert pacer.mean_cost == pytest.approx(1.0, abs=0.01)
    pacer = BudgetPacer(1.0)
    assert [pacer.choose([0.5, 0.9], [0.1, 1e5]) for _ in range(20_000)] == [0] * 20_000


@pytest.mark.parametrize("direction", slow_but((1,), [1, -1]))
def test_costs_that_drift_by_twenty_times_keep_the_mean(rng, direction):
    base = np.geomspace(0.01, 2, 8)
    v = routing.win_rates(rng.normal(size=(10_000, 8)) + 0.4 * np.log(base), np.full(8, 1 / 8))
    costs = base * np.geomspace(1, 20, 10_000)[::direction, None]
    pacer = BudgetPacer(0.4)
    for row, prices in zip(v, costs, strict=True):
        pacer.choose(row, prices)
    assert pacer.mean_cost == pytest.approx(0.4, rel=0.01)


@pytest.mark.slow
def test_after_ten_thousand_cheap_prompts_the_next_thousand_cost_little_more_than_twice_the_budget():
    pacer = BudgetPacer(1.0)
    for _ in range(10_000):
        pacer.choose([0.9, 0.5], [0.1, 5.0])
    before = pacer.spent
    for _ in range(1000):
        pacer.choose([0.1, 0.9], [0.1, 5.0])
    assert (pacer.spent - before) / 1000 < 2.2


@pytest.mark.slow
@settings(max_examples=50)
@given(st.lists(st.floats(-1e300, 1e300), max_size=8), st.randoms(use_true_random=False))
def test_settled_differences_of_any_size_cancel_exactly(differences, random):
    pacer = BudgetPacer(1.0)
    signed = differences + [-difference for difference in differences]
    random.shuffle(signed)
    for difference in signed:
        pacer.settle(difference)
    assert pacer.spent == 0
    for _ in range(600):  # what went into the reserve pays the debt
        pacer.choose([0.1, 0.9], [0.1, 1.0])
    assert pacer.choose([0.1, 0.9], [0.1, 1.0]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 0}, "budget: expected a number > 0, got 0"),
        ({"budget": math.nan}, "budget: expected a number > 0"),
        ({"budget": True}, "budget: expected a number > 0, got True"),
        ({"budget": 1.0, "price": -1}, "price: expected a number >= 0"),
        ({"budget": 1.0, "price": math.inf}, "price: expected a number >= 0"),
        ({"budget": 1.0, "horizon": 5}, "horizon: expected a whole number from 10 to 1000000000, got 5"),
        ({"budget": 1.0, "prompts": 0}, "prompts: expected a whole number from 1 to 20000000000, got 0"),
        ({"budget": 1.0, "prompts": 1e4}, "prompts: expected a whole number from 1 to 20000000000, got 10000.0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        BudgetPacer(**arguments)


def test_bad_prompts_are_named():
    pacer = BudgetPacer(1.0)
    for v, costs, allowed, message in [
        ([0.1, np.nan], [1, 1], None, r"v\[0, 1\]: expected a finite number"),
        ([0.1, 0.2], [1, -1], None, "costs.*expected a cost >= 0"),
        ([0.1, 0.2], [1], None, "costs: expected shape"),
        ([0.1, 0.2], [1, 1], [False, False], "allowed: expected bools"),
        ([0.1, 0.2], [1, 1], [1, 0], "allowed: expected bools"),
    ]:
        with pytest.raises(ValueError, match=message):
            pacer.choose(v, costs, allowed)
    assert pacer.count == 0

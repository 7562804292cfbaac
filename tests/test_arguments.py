"""Arguments of a wrong kind are errors that name the argument, what was expected and what came."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2l_engine import Catalog, Engine, Leaderboard, Router, arguments, checkpoint, routing
from p2l_engine.catalog import CatalogModel
from p2l_engine.routing import BudgetPacer, LazyWinRates, Problem, Resource, Share
from tests.support.catalogs import catalog

V = np.array([[0.2, 0.5, 0.7], [0.3, 0.4, 0.6]])
COSTS, Q, THETA, ETA = np.array([1.0, 2.0, 3.0]), np.full(3, 1 / 3), np.array([[0.0, 1.0, 2.0], [1.0, 0.0, 2.0]]), np.zeros(2)
HOSTILE = ["a", b"a", True, 1.5, math.nan, math.inf, -1, 10**400, 1j, None, [1], {1: 2}, object(), np.array(math.nan)]


@pytest.fixture(scope="module")
def loaded(engine):
    return checkpoint.load(engine.folder)


@pytest.fixture
def at(engine, router, loaded):
    """By "Class.argument": the call with that argument, and which hostile values it takes."""
    answers = engine.coefficients(["a", "b", "c"])
    paces = BudgetPacer(2.0)
    one = (CatalogModel("x", 1.0),)

    def solved(**more):
        return routing.solve(Problem(V, COSTS, 2.0, **more))

    whole, some, real, none = (10**400,), (10**400, None), (1.5,), (None,)
    return {
        "Engine.loaded": (lambda x: Engine(x, "cpu"), ()),
        "Engine.device": (lambda x: Engine(loaded, x), none),
        "Engine.dtype": (lambda x: Engine(loaded, "cpu", x), none),
        "Engine.tokens_per_batch": (lambda x: Engine(loaded, "cpu", "float32", tokens_per_batch=x), some),
        "Engine.max_tokens": (lambda x: Engine(loaded, "cpu", "float32", max_tokens=x), some),
        "Engine.from_pretrained.tokens_per_batch": (lambda x: Engine.from_pretrained(engine.folder, "cpu", None, x), some),
        "Engine.from_pretrained.date": (lambda x: Engine.from_pretrained(engine.folder, "cpu", date=x), none),
        "Engine.coefficients.prompts": (lambda x: engine.coefficients(x), ()),
        "Engine.coefficients.progress": (lambda x: engine.coefficients([], x), none),
        "Router.engine": (lambda x: Router(x, catalog()), ()),
        "Router.catalog": (lambda x: Router(engine, x), ()),
        "Router.opponents": (lambda x: Router(engine, catalog(), opponents=x), ()),
        "Router.seed": (lambda x: Router(engine, catalog(), seed=x), (-1, 10**400)),
        "Router.unmatched": (lambda x: Router(engine, catalog(), unmatched=x), ()),
        "Router.objective": (lambda x: Router(engine, catalog(), objective=x), ()),
        "Router.wait": (lambda x: Router(engine, catalog(), wait=x), real),
        "Router.route.budget": (lambda x: router.route("a", x), (math.inf, 1.5, None, [1])),
        "Router.route.pacer": (lambda x: router.route("a", pacer=x), none),
        "Router.route_batch.budget_scope": (lambda x: router.route_batch(["a"], 2.0, x), ()),
        "Router.route_batch.max_share": (lambda x: router.route_batch(["a"], max_share=x), none),
        "Router.route_batch.min_share": (lambda x: router.route_batch(["a"], min_share=x), none),
        "Router.route_batch.resources": (lambda x: router.route_batch(["a"], resources=x), none),
        "Router.route_batch.allowed": (lambda x: router.route_batch(["a"], allowed=x), none),
        "Router.route_batch.progress": (lambda x: router.route_batch([], progress=x), none),
        "Catalog.models": (lambda x: Catalog(x), ()),
        "Catalog.unit": (lambda x: Catalog(one, x), ("a",)),
        "Catalog.name": (lambda x: Catalog((CatalogModel(x, 1.0),)), ("a",)),
        "Catalog.cost": (lambda x: Catalog((CatalogModel("x", x),)), real),
        "Catalog.from_yaml.path": (lambda x: Catalog.from_yaml(x), ("a",)),
        "BudgetPacer.budget": (lambda x: BudgetPacer(x), real),
        "BudgetPacer.price": (lambda x: BudgetPacer(1.0, x), (1.5, None)),
        "BudgetPacer.horizon": (lambda x: BudgetPacer(1.0, horizon=x), none),
        "BudgetPacer.prompts": (lambda x: BudgetPacer(1.0, prompts=x), none),
        "BudgetPacer.learned.v": (lambda x: BudgetPacer.learned(x, COSTS, 2.0), ()),
        "BudgetPacer.learned.costs": (lambda x: BudgetPacer.learned(V, x, 2.0), ()),
        "BudgetPacer.learned.budget": (lambda x: BudgetPacer.learned(V, COSTS, x), real),
        "BudgetPacer.learned.horizon": (lambda x: BudgetPacer.learned(V, COSTS, 2.0, x), none),
        "BudgetPacer.choose.costs": (lambda x: paces.choose(V[0], x), ()),
        "BudgetPacer.choose.allowed": (lambda x: paces.choose(V[0], COSTS, x), none),
        "BudgetPacer.settle.difference": (lambda x: paces.settle(x), (1.5, -1)),
        "BudgetPacer.load.path": (lambda x: BudgetPacer.load(x), ("a",)),
        "Leaderboard.over.coefficients": (lambda x: Leaderboard.over(x), ()),
        "Leaderboard.over.weights": (lambda x: Leaderboard.over(answers, x), none),
        "Leaderboard.over.pair_weights": (lambda x: Leaderboard.over(answers, pair_weights=x), none),
        "Leaderboard.over.bootstrap": (lambda x: Leaderboard.over(answers, bootstrap=x), whole),  # more than memory holds
        "Leaderboard.over.seed": (lambda x: Leaderboard.over(answers, bootstrap=2, seed=x), whole),
        "Leaderboard.over.level": (lambda x: Leaderboard.over(answers, level=x), ()),
        "Leaderboard.of.index": (lambda x: Leaderboard.of(answers, x), (-1, 10**400)),
        "Leaderboard.of.opponents": (lambda x: Leaderboard.of(answers, 0, x), none),
        "win_rates.theta": (lambda x: routing.win_rates(x, Q), ()),
        "win_rates.q": (lambda x: routing.win_rates(THETA, x), ()),
        "win_rates.objective": (lambda x: routing.win_rates(THETA, Q, x), ()),
        "win_rates.eta": (lambda x: routing.win_rates(THETA, Q, "half-ties", x, "rk"), ()),
        "win_rates.feedback": (lambda x: routing.win_rates(THETA, Q, "half-ties", ETA, x), ()),
        "LazyWinRates.theta": (lambda x: next(iter(LazyWinRates(x, Q).chunks())), ()),
        "LazyWinRates.q": (lambda x: LazyWinRates(THETA, x), ()),
        "solve_budget.v": (lambda x: routing.solve_budget(x, COSTS), ()),
        "solve_budget.costs": (lambda x: routing.solve_budget(V, x), ()),
        "solve_budget.budget": (lambda x: routing.solve_budget(V, COSTS, x), (math.inf, 1.5, None)),
        "solve_budget.solver": (lambda x: routing.solve_budget(V, COSTS, 2.0, x), ()),
        "solve_batch_budget.budget": (lambda x: routing.solve_batch_budget(V, COSTS, x), (math.inf, 1.5, None)),
        "solve_batch_budget.max_share": (lambda x: routing.solve_batch_budget(V, COSTS, 2.0, x), none),
        "solve_batch_budget.min_share": (lambda x: routing.solve_batch_budget(V, COSTS, 2.0, None, x), none),
        "solve_batch_budget.solver": (lambda x: routing.solve_batch_budget(V, COSTS, 2.0, solver=x), ()),
        "bt_score.theta": (lambda x: routing.bt_score(x, Q, V[:, 0]), ()),
        "bt_score.q": (lambda x: routing.bt_score(THETA, x, V[:, 0]), ()),
        "bt_score.rate": (lambda x: routing.bt_score(THETA, Q, x), ()),
        "solve.problem": (lambda x: routing.solve(x), ()),
        "solve.solver": (lambda x: routing.solve(Problem(V, COSTS, 2.0), x), ()),
        "solve.time_limit": (lambda x: routing.solve(Problem(V, COSTS, 2.0), "highs", x), (1.5, None)),
        "Problem.budget_scope": (lambda x: solved(budget_scope=x), ()),
        "Problem.resources": (lambda x: solved(resources=x), ()),
        "Problem.shares": (lambda x: solved(shares=x), ()),
        "Problem.allowed": (lambda x: solved(allowed=x), none),
        "Share.models": (lambda x: solved(shares=[Share(x, 0.5)]), ([1],)),
        "Share.at_most": (lambda x: solved(shares=[Share(0, x)]), ()),
        "Share.at_least": (lambda x: solved(shares=[Share(0, 1.0, x)]), ()),
        "Resource.amounts": (lambda x: solved(resources=[Resource("amounts", x, 1.0)]), ()),
        "frontier.v": (lambda x: routing.frontier(x, COSTS), ()),
        "frontier.costs": (lambda x: routing.frontier(V, x), ()),
        "Policies.cost_bound.delta": (lambda x: routing.solve_budget(V, COSTS, 2.0).cost_bound(x), ()),
        "Policies.cost_bound.draws": (lambda x: routing.solve_budget(V, COSTS, 2.0).cost_bound(0.1, x), none),
    }  # fmt: skip


@pytest.mark.slow
def test_arguments_of_a_wrong_kind_are_named(at):
    wrong = []
    for name, (call, takes) in at.items():
        argument = name.rpartition(".")[2]
        for value in HOSTILE:
            if any(value is taken or (type(value) is type(taken) and value == taken) for taken in takes):
                continue
            try:
                call(value)
            except (TypeError, ValueError) as error:
                if argument in str(error) and re.search("expected|does not know|not available|infeasible|needs", str(error)):
                    continue
                wrong.append(f"{name} = {value!r:.40}: {type(error).__name__}: {error}")
            except Exception as error:
                wrong.append(f"{name} = {value!r:.40}: {type(error).__name__}: {error}")
            else:
                wrong.append(f"{name} = {value!r:.40} is taken")
    assert not wrong, "\n".join(wrong)


numbers = st.one_of(
    st.integers(-(10**400), 10**400), st.floats(), st.fractions(), st.decimals(), st.booleans(), st.complex_numbers(),
    st.text(), st.floats().map(np.float64), st.floats(width=32).map(np.float32), st.integers(-5, 5).map(np.int8),
    st.floats().map(np.array),
)  # fmt: skip


@pytest.mark.slow
@given(value=numbers)
def test_finite_numbers_are_those_that_a_float_holds(value):
    real = isinstance(value, int | float | Fraction | Decimal | np.number | np.ndarray) and not isinstance(value, bool)
    try:
        exact = float(value) if real else math.nan
    except (OverflowError, ValueError):
        exact = math.nan
    if math.isfinite(exact):
        assert arguments.finite_number("x", value, "a number") == exact
    else:
        with pytest.raises(ValueError, match="x: expected a number, got "):
            arguments.finite_number("x", value, "a number")


@given(value=numbers, least=st.integers(-5, 5), span=st.none() | st.integers(0, 10))
def test_whole_numbers_are_ints_within_their_bounds(value, least, span):
    most = None if span is None else least + span
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if whole and least <= value <= (value if most is None else most):
        found = arguments.whole_number("n", value, least, most)
        assert type(found) is int
        assert found == value
    else:
        with pytest.raises(ValueError, match="n: expected a whole number .*, got "):
            arguments.whole_number("n", value, least, most)

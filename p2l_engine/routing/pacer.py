"""A mean budget over a stream of prompts that come one by one."""

from __future__ import annotations

import json
import logging
import math
import os
import threading
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from p2l_engine import arguments
from p2l_engine.arguments import finite_number, whole_number
from p2l_engine.routing import arrays, exact
from p2l_engine.routing.arrays import Array, Float64
from p2l_engine.routing.pace import KNOWN_END, OPEN_END
from p2l_engine.routing.problem import Problem
from p2l_engine.routing.solve import solve
from p2l_engine.routing.values import Values
from p2l_engine.tables.atomic import write_file

logger = logging.getLogger(__name__)

VERSION = 2  # of the saved state
HORIZON = 500  # where the number of prompts is not known
PER_HORIZON = 20  # prompts for each of the horizon where their number is known: their mean then ends within 1% of the budget
FIRST_PRICE = 0.12  # of one budget, without a learned price: extra cost of one budget must add 12 points of win rate
LEAST_PRICE = 1e-3  # of one budget: the price where the budget did not bind in the past
EXTREME = 300.0  # bounds the log of the learned price: far beyond any win rate, and exp stays finite

# One lock for all pacers: each holds it for microseconds, and forks wait for it. So a forked child finds every pacer between
# two prompts, and no lock that another thread holds.
_choosing = threading.Lock()
_saving = threading.Lock()  # for the length of a write


def _after_fork() -> None:
    global _saving
    _saving = threading.Lock()
    _choosing.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_choosing.acquire, after_in_parent=_choosing.release, after_in_child=_after_fork)


class PacedChoice(NamedTuple):
    """What a pacer chose, and at what price: the win rate that one unit of cost had to add; infinite: the cheapest was taken.
    limit: on the cost, in units of ``exact``."""

    model: int
    price: float
    limit: int

    @property
    def most(self) -> float:
        """The highest cost that it could afford."""
        return exact.at_most(self.limit)


class BudgetPacer:
    """Routes each prompt by the argmax of v - price * cost, and adapts the price so that the mean cost meets the budget.

    At the best price in hindsight this is the optimum under the batch budget, except for one mixed prompt (the Lagrangian of
    ``solve_batch_budget``). The credit is the budget of all prompts so far less their cost. The price is a learned level near
    credit 0; it falls to 0 as the credit grows to horizon / 5 budgets, and rises without bound as the debt grows to as much.
    The level follows slowly; not where no other price would change the choice.

    Exactly, whatever the stream:

    - ``spent <= budget * count + allowance`` after a choice, or the cheapest allowed model was chosen. ``allowance`` is
      horizon / 5 budgets. What ``settle`` adds counts as spent.
    - Credit beyond its limit is kept in reserve and returns at one budget per prompt. However much was saved before, n prompts
      cost no more than 2 n + 2/5 horizon budgets, settlements aside, as long as an allowed model fits into credit and
      allowance.
    - With ``prompts``, the limit is 3/25 horizon budgets and 8% of a budget more for each prompt to come, up to horizon
      budgets; 1.08 budgets return per prompt; and n prompts cost no more than 2.08 n + 6/5 horizon budgets. Where the best
      models cost at least 1.08 budgets, and no more than fits into credit and allowance, at most 3/25 horizon + 1.08 budgets
      are left at the end.
    - No chosen model has an allowed alternative of no less win rate and no greater cost that is better in one of them. Ties:
      the higher win rate, then the lower cost, then the lower index.

    A model that costs a budget more than limit and allowance is chosen only where it is the cheapest. Deterministic: the same
    stream gives the same choices. Thread-safe; a forked child continues with a copy.

    budget: mean cost per prompt, > 0. price: win rate per unit of cost (``solve_batch_budget(...).prices["budget"]`` of past
    traffic, or ``BudgetPacer.learned``). horizon: a number of prompts from 10 to 10^9, the scale of the credit: the mean of n
    prompts is off the budget by at most horizon / (5 n) of it, unless even the cheapest models cost more, or the best less. A
    larger one loses less win rate. By default it is 500. prompts: how many the mean is taken over, where that is known: more
    may be saved for later ones then, the more of them there are, and horizon is prompts / 20 (at least 10), for a mean within
    1% at the end.
    """

    def __init__(
        self, budget: float, price: float | None = None, horizon: int | None = None, prompts: int | None = None
    ) -> None:
        self.budget = _positive("budget", budget)
        if price is not None:
            price = finite_number("price", price, "a number >= 0, or None", lambda x: x >= 0)
        self.prompts = None if prompts is None else whole_number("prompts", prompts, 1, PER_HORIZON * 10**9)
        if horizon is None:
            horizon = HORIZON if self.prompts is None else max(10, self.prompts // PER_HORIZON)
        self.horizon = whole_number("horizon", horizon, 10, 10**9)
        self._pace = OPEN_END if self.prompts is None else KNOWN_END
        self._level = math.log(FIRST_PRICE if price is None else LEAST_PRICE)  # log of the learned price of one budget
        if price:
            self._level = min(max(math.log(price) + math.log(self.budget), self._level), EXTREME)
        self._income = exact.units(self.budget)
        self._limit = self._income * self.horizon // 5  # of the debt; and of the credit, where the end is not known
        self._later = 0 if self.prompts is None else self._income * 2 // 25  # what more may be saved for each prompt to come
        self._credit = self._reserve = self._spent = self._count = 0
        self._most = self._highest_credit()
        self._warned = False

    @classmethod
    def learned(
        cls,
        v: Array | Values,
        costs: Array,
        budget: float,
        horizon: int | None = None,
        allowed: Array | None = None,
        prompts: int | None = None,
    ) -> Self:
        """A pacer that starts from the price of past traffic: v [N, M], costs [M] or [N, M]."""
        policies = solve(Problem(v, costs, _positive("budget", budget), "batch", allowed=allowed))
        return cls(budget, policies.prices.get("budget", 0.0), horizon, prompts)

    def choose(self, v: Array, costs: Array, allowed: Array | None = None) -> int:
        """The model for the next prompt: v [M] its win rates, costs [M] >= 0, allowed [M] bool or None."""
        return self.choose_at(v, costs, allowed).model

    def choose_at(self, v: Array, costs: Array, allowed: Array | None = None) -> PacedChoice:
        """``choose``, with the price at which it chose."""
        w, x, lowest, highest = _checked(v, costs)
        models = None
        if allowed is not None:
            mask = arrays.to_numpy(allowed)
            if mask.dtype != np.bool_ or mask.shape != w.shape or not mask.any():
                raise ValueError(f"allowed: expected bools [{len(w)}], one of them true, got {mask!r}")
            models = np.flatnonzero(mask)
            w, x = w[models], x[models]
            lowest, highest = float(x[x.argmin()]), float(x[x.argmax()])
        with _choosing:
            limit, response = self._credit + self._income + self._limit, self._response()
            price = math.exp(self._level) * response
            if response == math.inf or exact.units(lowest) > limit:
                k, settled, price = _best(-x, w, x), True, math.inf
            else:
                if exact.units(highest) > limit:
                    within = np.flatnonzero(x <= exact.at_most(limit))
                    models = within if models is None else models[within]
                    w, x = w[within], x[within]
                k = _best(w - price * (x / self.budget), w, x)
                # Where no lower, or no higher, price would change the choice, learning would only wind the price up.
                settled = w[k] == w[w.argmax()] if self._credit > 0 else x[k] == lowest
            if not settled:
                step = self._pace.step(response, self._count, self.horizon)
                self._level = min(max(self._level + step, -EXTREME), EXTREME)
            overspent = self._pay(exact.units(float(x[k])))
        if overspent:  # without the lock, which a handler of the warning may need
            logger.warning(
                "BudgetPacer: %d prompts cost %.4g on average for a budget of %.4g, though the cheapest models were chosen: "
                "the budget may be infeasible for this traffic",
                self._count, self.mean_cost, self.budget,
            )  # fmt: skip
        return PacedChoice(k if models is None else int(models[k]), price / self.budget, limit)

    def settle(self, difference: float) -> None:
        """Adds what a prompt really cost beyond the cost given to ``choose`` (negative: less)."""
        more = exact.units(finite_number("difference", difference, "a finite amount"))
        with _choosing:
            self._spent += more
            self._gain(-more)

    @property
    def price(self) -> float:
        """The current price: the win rate that one unit of cost must add. Infinite where the debt is ``allowance``: only the
        cheapest models are chosen."""
        with _choosing:
            return math.exp(self._level) * self._response() / self.budget

    @property
    def allowance(self) -> float:
        """How much may be spent beyond the budget of the prompts so far while something cheaper is allowed."""
        return exact.amount(self._limit)

    @property
    def count(self) -> int:
        """Prompts so far."""
        return self._count

    @property
    def spent(self) -> float:
        """Their cost."""
        return exact.amount(self._spent)

    @property
    def mean_cost(self) -> float:
        """Cost per prompt so far; NaN before the first."""
        with _choosing:
            return exact.amount(self._spent) / self._count if self._count else math.nan

    def save(self, path: str | Path) -> None:
        """Writes the state as JSON, atomically. Of several threads that save, the last writes the newest state."""
        with _saving:
            with _choosing:
                state: dict[str, Any] = {"version": VERSION, "budget": self.budget, "horizon": self.horizon}
                state |= {"prompts": self.prompts, "level": self._level, "count": self._count}
                state |= {"spent": exact.summands(self._spent), "reserve": exact.summands(self._reserve)}
            write_file(arguments.path("path", path), json.dumps(state) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """A pacer that continues from a saved state. Raises ValueError for any other file, and for a state of version 0.1.0,
        with the arguments of a new pacer that continues at its price."""
        expected = f"{path}: expected the state of a BudgetPacer, version {VERSION}"
        try:
            state = json.loads(arguments.path("path", path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{expected}, got no JSON: {error}") from None
        if isinstance(state, dict) and "version" not in state and {"budget", "learned", "credit"} <= set(state):
            raise ValueError(
                f"{expected}, got one of p2l_engine 0.1.0; start a new one: BudgetPacer(budget={state['budget']!r}, "
                f"price=math.exp({state['learned']!r}), horizon={state.get('horizon')!r})"
            )
        try:
            if state["version"] != VERSION:
                raise ValueError(f"version {state['version']!r}")
            horizon = whole_number("horizon", state["horizon"], 10)
            pacer = cls(state["budget"], horizon=horizon, prompts=state.get("prompts"))
            pacer._restore(state)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{expected}, got {error!r}") from None
        return pacer

    def _restore(self, state: dict[str, Any]) -> None:
        count = state["count"]
        if type(count) is not int or not 0 <= count < 2**63:
            raise ValueError(f"count: expected a whole number >= 0, got {count!r}")
        for name, value in (("level", [state["level"]]), ("spent", state["spent"]), ("reserve", state["reserve"])):
            if not isinstance(value, list) or not all(isinstance(part, float) and math.isfinite(part) for part in value):
                raise ValueError(f"{name}: expected finite numbers, got {value!r}")
        self._level, self._count = min(max(state["level"], -EXTREME), EXTREME), count
        self._spent, self._reserve = sum(map(exact.units, state["spent"])), sum(map(exact.units, state["reserve"]))
        self._credit = count * self._income - self._spent - self._reserve
        self._most = self._highest_credit()
        in_debt = self._reserve > 0 and self._credit < -self._limit  # which the reserve would have paid
        if self._reserve < 0 or self._credit > self._most or in_debt:
            raise ValueError(f"reserve: expected the credit beyond its limit after {count} prompts, got {state['reserve']!r}")

    def _highest_credit(self) -> int:
        """The credit's limit: what may be saved, and spent by the end where that is known."""
        if self.prompts is None:
            return self._limit
        return min(self._limit * 3 // 5 + self._later * max(self.prompts - self._count, 0), 5 * self._limit)

    def _response(self) -> float:
        return self._pace.response(self._credit, self._limit, self._most)

    def _pay(self, cost: int) -> bool:
        """Counts a prompt of so many units; true once, when the cheapest models cost far more than the budget."""
        self._count += 1
        if self.prompts is not None:
            self._most = self._highest_credit()
        self._spent += cost
        self._gain(self._income - cost)
        returned = min(self._reserve, self._income + self._later, self._most - self._credit)
        self._reserve -= returned
        self._credit += returned
        if self._warned or self._credit >= -10 * self.horizon * self._income:
            return False
        self._warned = True
        return True

    def _gain(self, credit: int) -> None:
        """Adds to the credit. The reserve takes what exceeds the credit's limit, and pays debt beyond the allowance."""
        self._credit += credit
        kept = max(0, self._credit - self._most) - min(self._reserve, max(0, -self._limit - self._credit))
        self._reserve += kept
        self._credit -= kept


def _checked(v: Array, costs: Array) -> tuple[Float64, Float64, float, float]:
    """Win rates [M], finite; costs [M], finite and >= 0; the lowest and the highest cost."""
    w, x = arrays.to_float64("v", v), arrays.to_float64("costs", costs)
    if w.ndim == 1 and len(w) and w.shape == x.shape:
        # NaN, where there is one; ten times as fast as min
        lowest, highest = float(x[x.argmin()]), float(x[x.argmax()])
        if -math.inf < w[w.argmin()] and w[w.argmax()] < math.inf and lowest >= 0 and highest < math.inf:
            return w, x, lowest, highest
    rates = arrays.matrix("v", w[None])
    x = arrays.costs(x[None], rates.shape)[0]
    return rates[0], x, float(x.min()), float(x.max())


def _best(scores: Float64, w: Float64, x: Float64) -> int:
    """The index of the highest score; of equal ones, of the highest win rate, then of the lowest cost, then the lowest."""
    k = int(scores.argmax())
    if k + int(scores[::-1].argmax()) == len(scores) - 1:
        return k
    tied = np.flatnonzero(scores == scores[k])
    return int(tied[np.lexsort((x[tied], -w[tied]))[0]])


def _positive(name: str, value: object) -> float:
    return finite_number(name, value, "a number > 0", lambda x: x > 0)

"""A mean budget over a stream of prompts that come one by one."""

from __future__ import annotations

import json
import logging
import math
import threading
from pathlib import Path
from typing import Any, Self

import numpy as np

from p2l_engine.routing import arrays
from p2l_engine.routing.arrays import Array
from p2l_engine.routing.problem import Problem
from p2l_engine.routing.solve import solve
from p2l_engine.routing.values import Values
from p2l_engine.tables.atomic import write_file

logger = logging.getLogger(__name__)

FIRST_PRICE = 0.05  # of one budget, without a learned price: extra cost of one budget must add 5 points of win rate
LEAST_PRICE = 1e-3  # of one budget: the price where the budget did not bind in the past
GAIN = 8.0  # a credit of one horizon lowers the log price by this much
FASTEST = 0.05  # the largest change of the log price per prompt: limits what one expensive prompt does


class BudgetPacer:
    """Routes each prompt by the argmax of v - price * cost, and adapts the price so that the mean cost meets the budget.

    At the best price in hindsight this is the optimum under the batch budget, except for one mixed prompt (the Lagrangian of
    ``solve_batch_budget``). A proportional-integral controller sets the price from the credit, the budget of all prompts so
    far less their cost: log price = learned - gain * credit / budget, where ``learned`` follows the integral of the credit, at
    critical damping. It is deterministic: the same stream gives the same choices.

    budget: mean cost per prompt, > 0. price: win rate per unit of cost (``solve_batch_budget(...).prices["budget"]`` of past
    traffic, or ``BudgetPacer.learned``). horizon: about how many prompts it takes to correct a drift. Budget left unspent while
    even the best models cost less is spent later. Thread-safe.
    """

    def __init__(self, budget: float, price: float | None = None, horizon: int = 500) -> None:
        self.budget = _positive("budget", budget)
        if isinstance(horizon, bool) or not isinstance(horizon, int) or horizon < 10:
            raise ValueError(f"horizon: expected a whole number of prompts >= 10, got {horizon!r}")
        if price is not None and not (isinstance(price, int | float) and 0 <= price < math.inf):
            raise ValueError(f"price: expected a number >= 0, or None, got {price!r}")
        self.horizon = horizon
        start = FIRST_PRICE / self.budget if price is None else max(float(price), LEAST_PRICE / self.budget)
        self._learned = math.log(start)
        self._credit = 0.0  # in budgets: count - spent / budget
        self._spent, self._count = 0.0, 0
        self._warned = False
        self._lock = threading.Lock()

    @classmethod
    def learned(cls, v: Array | Values, costs: Array, budget: float, horizon: int = 500, allowed: Array | None = None) -> Self:
        """A pacer that starts from the price of past traffic: v [N, M], costs [M] or [N, M]."""
        policies = solve(Problem(v, costs, _positive("budget", budget), "batch", allowed=allowed))
        return cls(budget, policies.prices.get("budget", 0.0), horizon)

    def choose(self, v: Array, costs: Array, allowed: Array | None = None) -> int:
        """The model for the next prompt: v [M] its win rates, costs [M] >= 0, allowed [M] bool or None."""
        rates = arrays.matrix("v", arrays.to_numpy(v)[None])
        prices = arrays.costs(arrays.to_numpy(costs)[None], rates.shape)[0]
        w = rates[0]
        if allowed is not None:
            mask = arrays.to_numpy(allowed)
            if mask.dtype != np.bool_ or mask.shape != w.shape or not mask.any():
                raise ValueError(f"allowed: expected bools [{len(w)}], one of them true, got {mask!r}")
            w = np.where(mask, w, -np.inf)
        with self._lock:
            chosen = int(np.argmax(w - self._price() * prices))
            best = int(np.argmax(w))
            cheapest = int(np.argmin(prices if allowed is None else np.where(mask, prices, np.inf)))
            self._pay(float(prices[chosen]), saturated=chosen == (best if self._credit > 0 else cheapest))
        return chosen

    def settle(self, difference: float) -> None:
        """Adds what a prompt really cost beyond the cost given to ``choose`` (negative: less)."""
        if not math.isfinite(difference):
            raise ValueError(f"difference: expected a finite amount, got {difference!r}")
        with self._lock:
            self._spent += difference
            self._credit -= difference / self.budget

    @property
    def price(self) -> float:
        """The current price: the win rate that one unit of cost must add."""
        with self._lock:
            return self._price()

    @property
    def count(self) -> int:
        """Prompts so far."""
        return self._count

    @property
    def spent(self) -> float:
        """Their cost."""
        return self._spent

    @property
    def mean_cost(self) -> float:
        """Cost per prompt so far; NaN before the first."""
        return self._spent / self._count if self._count else math.nan

    def save(self, path: str | Path) -> None:
        """Writes the state as JSON, atomically."""
        with self._lock:
            state = {"budget": self.budget, "horizon": self.horizon, "learned": self._learned, "credit": self._credit}
            state |= {"spent": self._spent, "count": self._count}
        write_file(path, json.dumps(state) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """A pacer that continues from a saved state. Raises ValueError for any other file."""
        try:
            state: Any = json.loads(Path(path).read_text(encoding="utf-8"))
            pacer = cls(state["budget"], horizon=state["horizon"])
            numbers = {name: float(state[name]) for name in ("learned", "credit", "spent")}
            pacer._count = int(state["count"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: expected the state of a BudgetPacer: {error!r}") from None
        if not all(map(math.isfinite, numbers.values())):
            raise ValueError(f"{path}: expected finite numbers, got {numbers}")
        pacer._learned, pacer._credit, pacer._spent = numbers["learned"], numbers["credit"], numbers["spent"]
        return pacer

    def _price(self) -> float:
        return math.exp(min(max(self._learned - GAIN / self.horizon * self._credit, -700.0), 700.0))

    def _pay(self, cost: float, saturated: bool) -> None:
        self._count += 1
        self._spent += cost
        self._credit += 1 - cost / self.budget
        # Where no price would change the choice, learning from the credit would only wind the price up.
        if not saturated:
            gain = GAIN / self.horizon
            self._learned -= max(-FASTEST, min(FASTEST, gain * gain / 4 * self._credit))
        if self._credit < -10 * self.horizon and saturated and not self._warned:
            self._warned = True
            logger.warning(
                "BudgetPacer: %d prompts cost %.4g on average for a budget of %.4g, though the cheapest models were chosen: "
                "the budget may be infeasible for this traffic",
                self._count, self.mean_cost, self.budget,
            )  # fmt: skip


def _positive(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating) or not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a number > 0, got {value!r}")
    return float(value)

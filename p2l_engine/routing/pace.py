"""How the price of a mean budget follows the credit of a stream."""

from __future__ import annotations

import math
from typing import NamedTuple

LINEAR = 0.1  # share of the price's response that is linear in the credit; the rest is cubic: flat near 0, steep at the ends
FASTEST = 0.05  # the largest change of the log of the learned price per prompt


class Pace(NamedTuple):
    """rate: what the log of the learned price moves per prompt, as a multiple of the log of the response, times the horizon; at
    first it is ``first`` / (prompts + ``after``), since the price is a guess. falling: downwards it moves that much slower.
    savings: the credit that divides the price by e, in allowances; None: only the credit's limit lowers it."""

    rate: float
    falling: float
    first: float
    after: int
    savings: float | None

    def response(self, credit: int, allowance: int, most: int) -> float:
        """The price as a multiple of the learned one: 1 at credit 0, 0 at its limit ``most``, infinite at a debt of the
        allowance."""
        if credit <= -allowance:
            return math.inf
        z = credit / (allowance if credit < 0 else most)
        z *= LINEAR + (1 - LINEAR) * z * z
        if z <= -1:
            return math.inf
        response = (1 - z) / (1 + z)
        if self.savings is not None and credit > 0:
            response *= math.exp(-credit / allowance / self.savings)
        return response

    def step(self, response: float, count: int, horizon: int) -> float:
        """By how much the log of the learned price moves after so many prompts."""
        step = max(self.rate / horizon, self.first / (count + self.after)) * math.log(max(response, 1e-9))
        return min(max(step * self.falling if step < 0 else step, -FASTEST), FASTEST)


# Where the end is known, much may be saved: the credit lowers the price, and little of that is learned, so that stakes that
# return find the price that they had.
OPEN_END = Pace(0.5, 1.0, 1.0, 100, None)
KNOWN_END = Pace(0.15, 0.05, 0.3, 30, 1.5)

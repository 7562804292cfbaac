"""Functions of a pair's coefficients with their first and second derivatives, in numpy.

The formulas of ``formulas`` are a few sums and logarithms of sums of exponentials: to carry derivatives along is several times
as fast as torch's differentiation of its own graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]

VARIABLES = 4  # a, b, ground and eta


@dataclass(frozen=True, slots=True, eq=False)
class Taylor:
    """P functions of the variables: value [P], slope [4, P] and bend [4, 4, P], float64. The last axis of slope and bend may
    be 1 where they are the same for all."""

    value: Float64
    slope: Float64
    bend: Float64

    __array_ufunc__ = None  # an array is no operand

    @classmethod
    def variables(cls, *values: Float64) -> tuple[Taylor, ...]:
        """The variables a, b, ground and eta themselves, at values [P] of each."""
        flat = np.zeros((VARIABLES, VARIABLES, 1))
        return tuple(cls(value, np.eye(VARIABLES)[i, :, None], flat) for i, value in enumerate(values))

    def constant(self, value: float) -> Taylor:
        """This value for each of the P."""
        nothing = np.zeros((VARIABLES, VARIABLES, 1))
        return Taylor(np.full(len(self.value), value), nothing[0], nothing)

    def __add__(self, other: Taylor | float) -> Taylor:
        if isinstance(other, Taylor):
            return Taylor(self.value + other.value, self.slope + other.slope, self.bend + other.bend)
        return Taylor(self.value + other, self.slope, self.bend)

    def __sub__(self, other: Taylor | float) -> Taylor:
        return self + -other

    def __mul__(self, factor: float) -> Taylor:
        return Taylor(self.value * factor, self.slope * factor, self.bend * factor)

    def __neg__(self) -> Taylor:
        return self * -1.0

    __radd__, __rmul__ = __add__, __mul__

    def through(self, value: Float64, first: Float64, second: Float64) -> Taylor:
        """f of this: from f's value, first and second derivative there, [P] each."""
        return Taylor(value, first * self.slope, first * self.bend + second * self.slope[:, None] * self.slope)


def log_sum_exp(terms: Sequence[Taylor]) -> Taylor:
    """log(exp(term) + ...): derivatives are sums of terms of one sign in the terms' shares, so that nothing cancels."""
    value = terms[0].value
    for term in terms[1:]:
        value = np.logaddexp(value, term.value)
    shares = [np.exp(term.value - value) for term in terms]
    slope = sum((share * term.slope for share, term in zip(shares, terms, strict=True)), start=np.zeros(()))
    bend = np.zeros(())
    for share, term in zip(shares, terms, strict=True):
        away = term.slope - slope
        bend = bend + share * (term.bend + away[:, None] * away)
    return Taylor(value, slope, bend)

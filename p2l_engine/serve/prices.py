"""What a request costs at a model: expected before it is sent, at most, and exactly from the provider's usage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from p2l_engine.apis.api import Usage
from p2l_engine.serve.settings import Model

Float64 = npt.NDArray[np.float64]
MILLION = 10**6


class Prices:
    """Prices of the K models, in USD. Fractions are exact: a price counts as the decimal that the file says."""

    def __init__(self, models: Mapping[str, Model]) -> None:
        entries = list(models.values())
        self._flat = [_exact(model.cost or 0) for model in entries]
        self._in = [_exact(model.usd_per_m_in or 0) / MILLION for model in entries]
        self._out = [_exact(model.usd_per_m_out or 0) / MILLION for model in entries]
        self._cached = [_exact(_or(model.usd_per_m_cached, model.usd_per_m_in)) / MILLION for model in entries]
        self._written = [_exact(_or(model.usd_per_m_cache_write, model.usd_per_m_in)) / MILLION for model in entries]
        self.flat, self.per_in, self.per_out, self.per_cached = map(_floats, (self._flat, self._in, self._out, self._cached))
        self.max_output = [model.max_output for model in entries]

    def expected(self, tokens_in: float, cached: Float64, tokens_out: Float64) -> Float64:
        """The expected cost [K] of a request of these input tokens, of which cached [K] are read from a model's cache."""
        return self.flat + (tokens_in - cached) * self.per_in + cached * self.per_cached + tokens_out * self.per_out

    def cost(self, k: int, usage: Usage) -> Fraction:
        """What a request cost at model k."""
        plain = max(usage.tokens_in - usage.cached - usage.written, 0)
        parts = plain * self._in[k] + usage.cached * self._cached[k] + usage.written * self._written[k]
        return self._flat[k] + parts + usage.tokens_out * self._out[k]

    def worst(self, k: int, tokens_in: int, max_tokens: int | None, outputs: int) -> Fraction:
        """The most that a request can cost at model k; tokens_in is a bound too."""
        limits = [most for most in (max_tokens, self.max_output[k]) if most is not None]
        dearest = max(self._in[k], self._cached[k], self._written[k])
        return self._flat[k] + tokens_in * dearest + (min(limits) if limits else 0) * outputs * self._out[k]

    def is_free(self, k: int) -> bool:
        """Whether model k costs nothing."""
        return not (self._flat[k] or self._in[k] or self._out[k] or self._cached[k] or self._written[k])


def _exact(amount: float) -> Fraction:
    return Fraction(Decimal(str(amount)))


def _or(amount: float | None, other: float | None) -> float:
    return amount if amount is not None else other or 0.0


def _floats(amounts: Sequence[Fraction]) -> Float64:
    return np.array([float(amount) for amount in amounts])

"""What a request costs at a model: expected before it is sent, at most, and exactly from the provider's usage."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from p2l_engine.apis.api import Usage
from p2l_engine.serve.model_entry import Model

Float64 = npt.NDArray[np.float64]
MILLION = 10**6


class Prices:
    """Prices of the K models, in USD. They are exact: a price counts as the decimal that the file says, and is kept as a whole
    number of the largest part of a dollar of which all prices are multiples."""

    def __init__(self, models: Mapping[str, Model]) -> None:
        entries = list(models.values())
        flat = [_exact(model.cost or 0) for model in entries]
        per_in = [_exact(model.usd_per_m_in or 0) / MILLION for model in entries]
        per_out = [_exact(model.usd_per_m_out or 0) / MILLION for model in entries]
        cached = [_exact(_or(model.usd_per_m_cached, model.usd_per_m_in)) / MILLION for model in entries]
        written = [_exact(_or(model.usd_per_m_cache_write, model.usd_per_m_in)) / MILLION for model in entries]
        lasting = [_exact(_hour(model)) / MILLION for model in entries]
        calls = [_exact(model.usd_per_tool_call or 0) for model in entries]
        audio_in = [_exact(_or(model.usd_per_m_audio_in, model.usd_per_m_in)) / MILLION for model in entries]
        image_in = [_exact(_or(model.usd_per_m_image_in, model.usd_per_m_in)) / MILLION for model in entries]
        audio_out = [_exact(_or(model.usd_per_m_audio_out, model.usd_per_m_out)) / MILLION for model in entries]
        self.flat, self.per_in, self.per_out, self.per_cached = map(_floats, (flat, per_in, per_out, cached))
        self.per_audio_in, self.per_audio_out = map(_floats, (audio_in, audio_out))
        self.audio_rate = np.array([model.audio_tokens_per_s for model in entries])
        self.max_output = [model.max_output for model in entries]
        kinds = (flat, per_in, per_out, cached, written, lasting, calls, audio_in, image_in, audio_out)
        self._parts = math.lcm(*(amount.denominator for amounts in kinds for amount in amounts))  # of a dollar
        whole = ([int(amount * self._parts) for amount in amounts] for amounts in kinds)
        self._flat, self._in, self._out, self._cached, self._written, self._lasting, self._call, *media = whole
        self._audio_in, self._image_in, self._audio_out = media

    def expected(
        self,
        tokens_in: float | npt.NDArray[Any],
        cached: Float64,
        tokens_out: Float64,
        sound: float = 0.0,
        spoken: bool = False,
    ) -> Float64:
        """The expected cost [K] of a request. tokens_in: its input tokens, at all models or [K], of which cached [K] are read
        from a model's cache; sound: seconds of audio beside them; spoken: whether the answer is audio."""
        per_out = self.per_audio_out if spoken else self.per_out
        found = self.flat + (tokens_in - cached) * self.per_in + cached * self.per_cached + tokens_out * per_out
        return found + sound * self.audio_rate * self.per_audio_in if sound else found

    def cost(self, k: int, usage: Usage) -> Fraction:
        """What a request cost at model k. Of cached tokens, as many as can be were text: providers do not tell."""
        media = usage.audio_in + usage.image_in
        cached = min(usage.cached, max(usage.tokens_in - media, 0)) if media else usage.cached
        plain = max(usage.tokens_in - cached - usage.written - media, 0)
        parts = plain * self._in[k] + cached * self._cached[k] + (usage.written - usage.lasting) * self._written[k]
        parts += usage.lasting * self._lasting[k] + usage.calls * self._call[k]
        parts += usage.audio_in * self._audio_in[k] + usage.image_in * self._image_in[k]
        parts += (usage.tokens_out - usage.audio_out) * self._out[k] + usage.audio_out * self._audio_out[k]
        return Fraction(self._flat[k] + parts, self._parts)

    def worst(
        self,
        k: int,
        tokens_in: int,
        max_tokens: int | None,
        outputs: int,
        lasting: bool = False,
        predicted: int = 0,
        calls: int = 0,
        audio: bool = False,
        images: bool = False,
    ) -> Fraction:
        """The most that a request can cost at model k. tokens_in and calls are bounds too; lasting: whether it writes to the
        cache for an hour; predicted: output tokens that may be billed beside max_tokens; audio, images: whether it may have
        some."""
        limits = [most for most in (max_tokens, self.max_output[k]) if most is not None]
        dearest = max(self._in[k], self._cached[k], self._written[k], self._lasting[k] if lasting else 0)
        dearest = max(dearest, self._audio_in[k] if audio else 0, self._image_in[k] if images else 0)
        per_out = max(self._out[k], self._audio_out[k]) if audio else self._out[k]
        out = (min(limits) if limits else 0) * outputs + predicted
        return Fraction(self._flat[k] + tokens_in * dearest + out * per_out + calls * self._call[k], self._parts)

    def is_free(self, k: int) -> bool:
        """Whether model k costs nothing."""
        tokens = (self._in, self._out, self._cached, self._written, self._audio_in, self._image_in, self._audio_out)
        prices = (self._flat, *tokens, self._call)
        return not any(price[k] for price in prices)


def _exact(amount: float) -> Fraction:
    return Fraction(Decimal(str(amount)))


def _hour(model: Model) -> float:
    """Where it is not stated, twice the price of input, as Anthropic's is; not where writing costs nothing of its own."""
    if model.usd_per_m_cache_write_1h is not None or model.usd_per_m_cache_write is None:
        return _or(model.usd_per_m_cache_write_1h, model.usd_per_m_in)
    return max(2 * (model.usd_per_m_in or 0.0), model.usd_per_m_cache_write)


def _or(amount: float | None, other: float | None) -> float:
    return amount if amount is not None else other or 0.0


def _floats(amounts: Sequence[Fraction]) -> Float64:
    return np.array([float(amount) for amount in amounts])

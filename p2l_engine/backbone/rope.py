"""Rotary position embedding (RoPE): the frequencies of the scalings whose tables do not depend on the sequence's length.

Default (Su et al. 2021), linear (position interpolation), llama3 (Llama 3.1) and yarn (Peng et al. 2023), with the names and
defaults of Hugging Face configs; equal to ``transformers.modeling_rope_utils``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}  # by kind; the other kinds (dynamic, longrope) change with the length of the sequence
OPTIONAL = {"yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")}


class UnsupportedConfig(ValueError):
    """A decoder that cannot be computed over packed tokens; the message says why."""


@dataclass(frozen=True, slots=True)
class Rope:
    """kind: a key of ``REQUIRED``; theta: the base of the wavelengths; values: the kind's own parameters."""

    kind: str
    theta: float
    values: Mapping[str, float] = field(default_factory=dict)
    truncate: bool = True  # yarn: whether the corrected range ends at whole dimensions

    @classmethod
    def read(cls, config: Mapping[str, Any], max_positions: int) -> Rope:
        """From a config in either spelling: ``rope_parameters`` (transformers 5), or ``rope_theta`` and ``rope_scaling`` (4).

        Raises UnsupportedConfig for a kind that is not in ``REQUIRED``, and for missing or wrong values.
        """
        given = config.get("rope_scaling") or config.get("rope_parameters") or {}
        if not isinstance(given, Mapping):
            raise UnsupportedConfig(f"rope_parameters are a {type(given).__name__}")
        kind = given.get("rope_type", given.get("type", "default"))
        if kind not in REQUIRED:
            raise UnsupportedConfig(f"rope_type {kind!r} is not one of {', '.join(REQUIRED)}")
        theta = given.get("rope_theta", config.get("rope_theta", 10_000.0))
        original = config.get("original_max_position_embeddings", given.get("original_max_position_embeddings", max_positions))
        parameters = {**given, "rope_theta": theta, "original_max_position_embeddings": original}
        values = {}
        for name in ("rope_theta", *REQUIRED[kind], *OPTIONAL.get(kind, ())):
            value = parameters.get(name)
            if value is None and name in OPTIONAL.get(kind, ()):
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise UnsupportedConfig(f"{name} of the RoPE {kind!r} is {value!r}")
            values[name] = value
        partial = given.get("partial_rotary_factor", config.get("partial_rotary_factor"))
        if kind != "default" and partial not in (None, 1, 1.0):
            raise UnsupportedConfig(f"partial_rotary_factor is {partial!r}")
        if any(isinstance(value, Mapping) for value in given.values()):
            raise UnsupportedConfig("its RoPE differs from layer to layer")
        return cls(kind, values.pop("rope_theta"), values, bool(given.get("truncate", True)))

    def frequencies(self, size: int) -> tuple[Tensor, float]:
        """The inverse frequencies [size / 2] float32 of heads of ``size``, and the factor that cos and sin are scaled by."""
        if self.kind == "yarn":
            return self._yarn(size)
        frequencies = 1.0 / _wavelengths(self.theta, size)
        if self.kind == "linear":
            frequencies /= self.values["factor"]
        if self.kind == "llama3":
            frequencies = self._llama3(frequencies)
        return frequencies, 1.0

    def _llama3(self, frequencies: Tensor) -> Tensor:
        """Long wavelengths are stretched by the factor, short ones kept, and those between interpolated."""
        factor, low, high = (self.values[name] for name in ("factor", "low_freq_factor", "high_freq_factor"))
        context = self.values["original_max_position_embeddings"]
        wavelengths = 2 * math.pi / frequencies
        scaled = torch.where(wavelengths > context / low, frequencies / factor, frequencies)
        smooth = (context / wavelengths - low) / (high - low)
        between = (1 - smooth) * scaled / factor + smooth * scaled
        return torch.where(~(wavelengths < context / high) * ~(wavelengths > context / low), between, scaled)

    def _yarn(self, size: int) -> tuple[Tensor, float]:
        """Interpolated and original frequencies, blended by a ramp between two numbers of rotations over the context."""
        factor, context = self.values["factor"], self.values["original_max_position_embeddings"]

        def dimension(rotations: float) -> float:
            return (size * math.log(context / (rotations * 2 * math.pi))) / (2 * math.log(self.theta))

        low, high = dimension(self.values.get("beta_fast") or 32), dimension(self.values.get("beta_slow") or 1)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, size - 1)
        if low == high:
            high += 0.001  # the ramp's slope must be finite
        kept = 1 - torch.clamp((torch.arange(size // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
        wavelengths = _wavelengths(self.theta, size)
        frequencies = 1.0 / (factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept
        return frequencies, self._yarn_scale(factor)

    def _yarn_scale(self, factor: float) -> float:
        if "attention_factor" in self.values:
            return self.values["attention_factor"]

        def scale(weight: float) -> float:
            return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

        mscale, every = self.values.get("mscale"), self.values.get("mscale_all_dim")
        return scale(mscale) / scale(every) if mscale and every else scale(1)


def _wavelengths(theta: float, size: int) -> Tensor:
    """theta ** (2 i / size) for i < size / 2; the wavelengths over 2 pi."""
    exponents: Tensor = torch.arange(0, size, 2, dtype=torch.float) / size
    return torch.pow(theta, exponents)

"""The head: from a prompt's CLS hidden state to its coefficients theta and its tie parameter eta."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from p2l_engine.errors import CheckpointError

Layer = tuple[Tensor, Tensor]  # weight [out, in], bias [out]


@dataclass(frozen=True, slots=True)
class Head:
    """Linear layers with nothing between them, in float32. ``eta`` is empty for heads without a tie parameter."""

    theta: tuple[Layer, ...]
    eta: tuple[Layer, ...]

    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """hidden [N, D] -> theta [N, M] and eta [N] or None, float32."""
        hidden = hidden.float()
        theta, eta = hidden, hidden
        for weight, bias in self.theta:
            theta = F.linear(theta, weight, bias)
        for weight, bias in self.eta:
            eta = F.linear(eta, weight, bias)
        return theta, eta.squeeze(-1) if self.eta else None

    def to(self, device: torch.device) -> Head:
        """The same head on another device."""
        return Head(*(tuple((w.to(device), b.to(device)) for w, b in layers) for layers in (self.theta, self.eta)))

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], hidden: int, n_models: int, training: dict[str, Any], where: str) -> Head:
        """A head from published weight names (without the prefix ``head.``), every shape checked.

        With linear_head_downsize_factor f the head is two layers over an inner width of int(M // f); with head_config's
        eta_downsize the tie parameter starts from the same inner layer.
        """
        factor, config = training.get("linear_head_downsize_factor"), training.get("head_config") or {}
        if factor is not None and (isinstance(factor, bool) or not isinstance(factor, int | float) or not factor > 0):
            raise CheckpointError(f"{where}: linear_head_downsize_factor: expected a number > 0, found {factor!r}")
        if not isinstance(config, dict):
            raise CheckpointError(f"{where}: head_config: expected a mapping, found {config!r}")
        downsized_eta = bool(config.get("eta_downsize")) and bool(factor)
        inner = int(n_models // factor) if factor else 0
        wide = [("0", (inner, hidden)), ("1", (n_models, inner))] if factor else [("", (n_models, hidden))]
        eta = [("0", (inner, hidden)), ("1", (1, inner))] if downsized_eta else [("", (1, hidden))]
        if training["head_type"] == "bt":
            eta = []

        def layers(name: str, shapes: list[tuple[str, tuple[int, int]]]) -> tuple[Layer, ...]:
            return tuple(_layer(tensors, ".".join(filter(None, (name, part))), shape, where) for part, shape in shapes)

        return cls(layers("head", wide), layers("eta_head", eta))


def _layer(tensors: dict[str, Tensor], name: str, shape: tuple[int, int], where: str) -> Layer:
    found = []
    for part, expected in (("weight", shape), ("bias", shape[:1])):
        key = f"{name}.{part}"
        if key not in tensors:
            known = ", ".join(sorted(f"head.{k}" for k in tensors)) or "none"
            raise CheckpointError(f"{where}: expected the key head.{key} of shape {list(expected)}; head keys found: {known}")
        if tuple(tensors[key].shape) != expected:
            raise CheckpointError(f"{where}: head.{key}: expected shape {list(expected)}, found {list(tensors[key].shape)}")
        found.append(tensors[key].float())
    return found[0], found[1]

"""The head: from a prompt's CLS hidden state to its coefficients theta and its tie parameter eta."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from p2l_engine.errors import CheckpointError

Layer = tuple[Tensor, Tensor]  # weight [out, in], bias [out]
Outputs = TypeVar("Outputs", Tensor, npt.NDArray[np.float32])


@dataclass(frozen=True, slots=True)
class Head:
    """weight [K, D] and bias [K], float32: the first ``n_models`` outputs are theta; the last one of K > n_models is eta."""

    weight: Tensor
    bias: Tensor
    n_models: int

    @property
    def has_eta(self) -> bool:
        """Whether the last output is the tie parameter."""
        return len(self.bias) > self.n_models

    @property
    def width(self) -> int:
        """K, the number of outputs per prompt."""
        return len(self.bias)

    def split(self, outputs: Outputs) -> tuple[Outputs, Outputs | None]:
        """Outputs [N, K] -> views of them: theta [N, M], and eta [N] or None where the head has no tie parameter."""
        return outputs[:, : self.n_models], outputs[:, self.n_models] if self.has_eta else None

    def __call__(self, hidden: Tensor, norm: Tensor | None, eps: float) -> Tensor:
        """hidden [N, D] -> outputs [N, K] float32; applies the final norm (norm [D], eps) first where there is one."""
        if hidden.is_cuda:
            from p2l_engine.kernels.pool_head import pool_head  # needs Triton

            return pool_head(hidden, self.weight, self.bias, norm, eps)
        return F.linear(after_norm(hidden, norm, eps), self.weight, self.bias)

    def to(self, device: torch.device) -> Head:
        """The same head on another device."""
        return Head(self.weight.to(device), self.bias.to(device), self.n_models)

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], hidden: int, n_models: int, training: dict[str, Any], where: str) -> Head:
        """A head from published weight names (without the prefix ``head.``). Raises CheckpointError for wrong keys or shapes.

        With linear_head_downsize_factor f the head is two layers with an inner width of int(M // f); with head_config's
        eta_downsize the tie parameter starts from the same inner layer. There is no activation between the two layers, so
        they are multiplied here. where: the checkpoint, for messages.
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

        whole = [_product(layers(name, shapes)) for name, shapes in (("head", wide), ("eta_head", eta)) if shapes]
        weight, bias = (torch.cat(parts).float() for parts in zip(*whole, strict=True))
        return cls(weight, bias, n_models)


def after_norm(hidden: Tensor, norm: Tensor | None, eps: float) -> Tensor:
    """hidden [N, D] -> float32, through the final norm (norm [D], eps) where there is one."""
    wide = hidden.float()
    return wide if norm is None else F.rms_norm(wide, norm.shape, norm.float(), eps)


def _product(layers: tuple[Layer, ...]) -> Layer:
    """The product of successive linear layers, in float64."""
    weight, bias = (part.double() for part in layers[0])
    for outer, outer_bias in layers[1:]:
        weight, bias = outer.double() @ weight, outer.double() @ bias + outer_bias.double()
    return weight, bias


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

"""Prompts far from those of training: the head reads their hidden states nearer to an anchor, where it has one leaderboard."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from p2l_engine.backbone import tensor_file
from p2l_engine.errors import CheckpointError

FILE = "shrinkage.safetensors"  # in a checkpoint's folder
VECTORS = ("anchor", "centre", "spread")  # tensors [D]
NUMBERS = ("rest", "radius", "power")  # tensors [1]


@dataclass(frozen=True, slots=True, eq=False)
class Shrinkage:
    """The head reads anchor + s (h - anchor) in place of a hidden state h [D] after the final norm, with
    s = min(1, (radius / d)^power).

    The head is linear, so that its outputs are s of the way from those at the anchor, which are the coefficients of one
    leaderboard for all training prompts, to the prompt's own. d is the distance of h to the training prompts' states, of which
    the root mean square is 1: Mahalanobis's, for a covariance of low rank and a diagonal (probabilistic PCA of the standardised
    states; Tipping and Bishop 1999). With z = (h - centre) / spread and p = z basis,
    d^2 D = sum p^2 / deviations^2 + (|z|^2 - |p|^2) / rest^2.

    anchor, centre, spread [D]; basis [D, r], of orthonormal columns; deviations [r] >= rest: all float32, spread, rest,
    deviations, radius and power above 0. Raises ValueError for other shapes and numbers.
    """

    anchor: Tensor
    centre: Tensor
    spread: Tensor
    basis: Tensor
    deviations: Tensor
    rest: float
    radius: float
    power: float
    _folded: tuple[Tensor, ...] = field(init=False, repr=False)  # |scale h + shift|^2 - |h inner + at|^2 = d^2

    def __post_init__(self) -> None:
        width = len(self.anchor) if self.anchor.ndim == 1 else 0
        rank = self.basis.shape[-1] if self.basis.ndim == 2 else 0
        shapes = {name: (width,) for name in VECTORS} | {"basis": (width, rank), "deviations": (rank,)}
        for name, shape in shapes.items():
            part: Tensor = getattr(self, name)
            if not width or not rank or part.shape != shape:
                raise ValueError(
                    f"{name}: expected {list(shape) if width and rank else '[D] or [D, r]'}, found {list(part.shape)}"
                )
            if not part.is_floating_point() or not bool(part.isfinite().all()):
                raise ValueError(f"{name}: expected finite numbers, found {part.dtype} with others")
        for name in NUMBERS:
            value: float = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: expected a finite number above 0, got {value!r}")
        if not bool((self.spread > 0).all()):
            raise ValueError("spread: expected numbers above 0")
        if not bool((self.deviations >= self.rest).all()):
            raise ValueError(f"deviations: expected numbers from rest ({self.rest:g}) up, got {float(self.deviations.min()):g}")
        if not torch.allclose(self.basis.T @ self.basis, torch.eye(rank, device=self.basis.device), atol=1e-3):
            raise ValueError("basis: expected orthonormal columns")
        wide, basis, root = self.spread.double(), self.basis.double(), math.sqrt(width)
        scale = 1 / (wide * self.rest * root)
        inner = basis * (1 / self.rest**2 - 1 / self.deviations.double() ** 2).clamp_min(0).sqrt() / (wide * root)[:, None]
        centre = self.centre.double()
        folded = (scale, -centre * scale, inner, -centre @ inner)
        object.__setattr__(self, "_folded", tuple(part.float().contiguous() for part in folded))

    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What the head reads, [N, D] float32, and s [N] in [0, 1], for hidden states [N, D] after the final norm, on their
        device. Where s is 1 the states keep their bits."""
        states = hidden.float()
        kept = (self._squares(states) / self.radius**2).pow(-self.power / 2).clamp_max(1.0)
        return torch.lerp(self.anchor, states, kept[:, None]), kept

    def distance(self, hidden: Tensor) -> Tensor:
        """d [N] float32 >= 0 of hidden states [N, D]."""
        return self._squares(hidden.float()).sqrt()

    def _squares(self, states: Tensor) -> Tensor:
        scale, shift, inner, at = self._folded
        whole, main = torch.addcmul(shift, states, scale), torch.addmm(at, states, inner)
        return (whole.square().sum(1) - main.square().sum(1)).clamp_min(0.0)

    def to(self, device: torch.device) -> Shrinkage:
        """The same shrinkage on another device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in (*VECTORS, "basis", "deviations")})

    def write(self, path: Path) -> None:
        """Writes a safetensors file with these tensors in float32, numbers as [1]; the same gives the same bytes. Raises
        OSError."""
        tensors = {name: getattr(self, name).detach().to("cpu", torch.float32) for name in (*VECTORS, "basis", "deviations")}
        numbers = {name: torch.tensor([getattr(self, name)], dtype=torch.float32) for name in NUMBERS}
        tensor_file.write(path, tensors | numbers)

    @classmethod
    def read(cls, path: Path, hidden: int) -> Shrinkage:
        """Reads what ``write`` wrote, for a checkpoint of hidden states [D = hidden]. Raises CheckpointError for a file that
        cannot be read, and for tensors that do not fit."""
        tensors, _ = tensor_file.read(path)
        expected = sorted((*VECTORS, "basis", "deviations", *NUMBERS))
        if sorted(tensors) != expected:
            raise CheckpointError(
                f"{path}: expected the tensors {', '.join(expected)}, found {', '.join(sorted(tensors)) or 'none'}"
            )
        for name in NUMBERS:
            if tensors[name].shape != (1,):
                raise CheckpointError(f"{path}: {name}: expected one number, found {list(tensors[name].shape)}")
        if tensors["anchor"].shape != (hidden,):
            raise CheckpointError(f"{path}: anchor: expected {[hidden]}, found {list(tensors['anchor'].shape)}")
        anchor, centre, spread, basis, deviations = (tensors[name].float() for name in (*VECTORS, "basis", "deviations"))
        rest, radius, power = (float(tensors[name]) for name in NUMBERS)
        try:
            return cls(anchor, centre, spread, basis, deviations, rest, radius, power)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from None

"""Prompts of other kinds than those of training: the head reads their hidden states nearer to an anchor, where it has one
leaderboard."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from p2l_engine.backbone import tensor_file
from p2l_engine.errors import CheckpointError

FILE = "shrinkage.safetensors"  # in a checkpoint's folder
TENSORS = ("anchor", "directions", "offset", "between", "centres")
NUMBERS = ("middle", "width")  # tensors [1]


@dataclass(frozen=True, slots=True, eq=False)
class Shrinkage:
    """The head reads anchor + s (x - anchor) in place of x [W]: a hidden state h [D] after the final norm, and what else it
    reads beside it. s = 1 / (1 + exp((d - middle) / width)).

    The head is linear, so that its outputs are s of the way from those at the anchor, which are the coefficients of one
    leaderboard for all training prompts, to the prompt's own. d says how much likelier a new kind of prompts is than the
    nearest of the K kinds of training prompts, such as tasks. With y = directions^T h - offset in the r directions that tell
    these kinds apart best (linear discriminants), where states of one kind have variance 1,

        d = min_k |y - centres_k|^2 - sum(y^2 / (1 + between)):

    the relative Mahalanobis distance (Ren et al. 2021, https://arxiv.org/abs/2106.09022). But for a constant it is twice the
    logarithm of a likelihood ratio where the kinds' centres are normal themselves, with variances ``between`` (probabilistic
    linear discriminant analysis, Ioffe 2006), and s the probability of a known kind; ``width`` is 2 in theory, and ``middle``
    has the odds of a new kind.

    anchor [W], W >= D; directions [D, r]; offset, between [r]; centres [K, r]: float32, between >= 0, width > 0. Raises
    ValueError for other shapes and numbers.
    """

    anchor: Tensor
    directions: Tensor
    offset: Tensor
    between: Tensor
    centres: Tensor
    middle: float
    width: float
    _folded: tuple[Tensor, Tensor, Tensor] = field(init=False, repr=False)  # weights of y^2; 2 centres^T; -|centres|^2

    def __post_init__(self) -> None:
        size, rank = self.directions.shape if self.directions.ndim == 2 else (0, 0)
        count = len(self.centres) if self.centres.ndim == 2 else 0
        if not size or not rank:
            raise ValueError(f"directions: expected [D, r], found {list(self.directions.shape)}")
        if self.anchor.ndim != 1 or len(self.anchor) < size:
            raise ValueError(f"anchor: expected [W], W at least {size}, found {list(self.anchor.shape)}")
        for name, shape in (("offset", (rank,)), ("between", (rank,)), ("centres", (max(count, 1), rank))):
            part: Tensor = getattr(self, name)
            if part.shape != shape:
                raise ValueError(f"{name}: expected {list(shape)}, found {list(part.shape)}")
        for name in TENSORS:
            part = getattr(self, name)
            if not part.is_floating_point() or not bool(part.isfinite().all()):
                raise ValueError(f"{name}: expected finite numbers, found {part.dtype} with others")
        if not bool((self.between >= 0).all()):
            raise ValueError("between: expected numbers from 0 up")
        if not math.isfinite(self.middle):
            raise ValueError(f"middle: expected a finite number, got {self.middle!r}")
        if not (math.isfinite(self.width) and self.width > 0):
            raise ValueError(f"width: expected a finite number above 0, got {self.width!r}")
        between, centres = self.between.double(), self.centres.double()
        folded = (between / (1 + between), 2 * centres.T, -centres.square().sum(1))
        parts = tuple(part.float().contiguous() for part in folded)
        if not all(bool(part.isfinite().all()) for part in parts):
            raise ValueError("centres: expected numbers whose squares are finite in float32")
        object.__setattr__(self, "_folded", parts)

    def __call__(self, read: Tensor) -> tuple[Tensor, Tensor]:
        """What the head reads, [N, W] float32, and s [N] in [0, 1], for x [N, W], on their device. Where s is 1, x keeps its
        bits."""
        read = read.float()
        kept = ((self.middle - self.distance(read)) / self.width).sigmoid()
        return torch.lerp(self.anchor, read, kept[:, None]), kept

    def distance(self, read: Tensor) -> Tensor:
        """d [N] float32, of any sign, of x [N, W]."""
        of_squares, twice, less = self._folded
        y = torch.addmm(-self.offset, read.float()[:, : len(self.directions)], self.directions)
        return torch.mv(y.square(), of_squares) - torch.addmm(less, y, twice).amax(1)

    def to(self, device: torch.device) -> Shrinkage:
        """The same shrinkage on another device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in TENSORS})

    def write(self, path: Path) -> None:
        """Writes a safetensors file with these tensors in float32, numbers as [1]; the same gives the same bytes. Raises
        OSError."""
        tensors = {name: getattr(self, name).detach().to("cpu", torch.float32) for name in TENSORS}
        numbers = {name: torch.tensor([getattr(self, name)], dtype=torch.float32) for name in NUMBERS}
        tensor_file.write(path, tensors | numbers)

    @classmethod
    def read(cls, path: Path, hidden: int, width: int) -> Shrinkage:
        """Reads what ``write`` wrote, for hidden states of [D = hidden] and a head that reads [W = width]. Raises
        CheckpointError for a file that cannot be read, and for tensors that do not fit."""
        tensors, _ = tensor_file.read(path)
        expected = sorted((*TENSORS, *NUMBERS))
        if sorted(tensors) != expected:
            raise CheckpointError(
                f"{path}: expected the tensors {', '.join(expected)}, found {', '.join(sorted(tensors)) or 'none'}"
            )
        for name, tensor in tensors.items():
            if tensor.dtype != torch.float32:
                raise CheckpointError(f"{path}: {name}: expected float32, found {tensor.dtype}")
        for name in NUMBERS:
            if tensors[name].shape != (1,):
                raise CheckpointError(f"{path}: {name}: expected one number, found {list(tensors[name].shape)}")
        if tensors["anchor"].shape != (width,):
            raise CheckpointError(f"{path}: anchor: expected {[width]}, found {list(tensors['anchor'].shape)}")
        if tensors["directions"].shape[:1] != (hidden,):
            raise CheckpointError(f"{path}: directions: expected {hidden} rows, found {list(tensors['directions'].shape)}")
        anchor, directions, offset, between, centres = (tensors[name] for name in TENSORS)
        middle, spread = (float(tensors[name]) for name in NUMBERS)
        try:
            return cls(anchor, directions, offset, between, centres, middle, spread)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from None

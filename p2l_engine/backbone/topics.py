"""What a prompt is about: probabilities of topics, which the head reads beside the hidden state."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from p2l_engine.errors import CheckpointError

FILE = "topics.safetensors"  # in a checkpoint's folder
TENSORS = ("bias", "weight")


@dataclass(frozen=True, slots=True, eq=False)
class Topics:
    """Softmax regression of T topics, such as the tasks of the training prompts, on a hidden state h [D] after the final norm:
    p = softmax(weight h + bias). The head reads [h; p], so that its last T weights of a model are what each topic adds to it:
    a mixture of leaderboards, by how likely the prompt belongs to each (a mixture of experts whose experts are constant;
    Jacobs et al. 1991).

    weight [T, D], bias [T]: float32; names: the T topics. Raises ValueError for other shapes, names and numbers.
    """

    weight: Tensor
    bias: Tensor
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        count = len(self.names)
        if not count or len(set(self.names)) < count:
            raise ValueError(f"names: expected different names, at least one, got {count} of {len(set(self.names))} kinds")
        if self.weight.ndim != 2 or len(self.weight) != count or not self.weight.shape[1]:
            raise ValueError(f"weight: expected [{count}, D], found {list(self.weight.shape)}")
        if self.bias.shape != (count,):
            raise ValueError(f"bias: expected {[count]}, found {list(self.bias.shape)}")
        for name in TENSORS:
            part: Tensor = getattr(self, name)
            if part.dtype != torch.float32 or not bool(part.isfinite().all()):
                raise ValueError(f"{name}: expected finite numbers in float32, found {part.dtype} or others")

    def __call__(self, hidden: Tensor) -> Tensor:
        """What the head reads, [N, D + T] float32: hidden states [N, D] after the final norm, and their probabilities."""
        states = hidden.float()
        return torch.cat([states, self.probabilities(states)], 1)

    def probabilities(self, hidden: Tensor) -> Tensor:
        """p [N, T] float32 of hidden states [N, D]."""
        return F.linear(hidden.float(), self.weight, self.bias).softmax(1)

    def to(self, device: torch.device) -> Topics:
        """The same on another device."""
        return replace(self, weight=self.weight.to(device), bias=self.bias.to(device))

    def write(self, path: Path) -> None:
        """Writes a safetensors file with both tensors, and the names in its metadata; the same gives the same bytes. Raises
        OSError."""
        tensors = {name: getattr(self, name).detach().cpu().contiguous() for name in TENSORS}
        try:
            save_file(tensors, path, metadata={"names": json.dumps(self.names)})
        except SafetensorError as error:  # a full disk, among others
            raise OSError(f"{path.name}: {error}") from error
        path.chmod(0o644)

    @classmethod
    def read(cls, path: Path, hidden: int) -> Topics:
        """Reads what ``write`` wrote, for a backbone of hidden states [D = hidden]. Raises CheckpointError for a file that
        cannot be read, and for tensors or names that do not fit."""
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
                stored = (file.metadata() or {}).get("names", "null")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: damaged, truncated or no safetensors file: {error}; fetch it again") from error
        if sorted(tensors) != sorted(TENSORS):
            raise CheckpointError(
                f"{path}: expected the tensors {', '.join(TENSORS)}, found {', '.join(sorted(tensors)) or 'none'}"
            )
        try:
            names = json.loads(stored)
        except ValueError:
            names = None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise CheckpointError(f"{path}: names: expected a list of names as JSON in the metadata, found {stored!r:.60}")
        try:
            found = cls(tensors["weight"], tensors["bias"], tuple(names))
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from None
        if found.weight.shape[1] != hidden:
            raise CheckpointError(
                f"{path}: weight: expected {[len(names), hidden]}, as the backbone's hidden states have it, found "
                f"{list(found.weight.shape)}"
            )
        return found

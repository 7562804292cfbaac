"""What a prompt is about: probabilities of topics, which the head reads beside the hidden state."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from p2l_engine.backbone import tensor_file
from p2l_engine.errors import CheckpointError

FILE = "topics.safetensors"  # in a checkpoint's folder
TENSORS = ("bias", "weight")
OF_WORDS = "of_words"  # where topics read words


@dataclass(frozen=True, slots=True, eq=False)
class Topics:
    """Softmax regression of T topics, such as the tasks of the training prompts, on a hidden state h [D] after the final norm,
    and on the prompt's words w [E] (see ``words``): p = softmax(weight h + of_words w + bias). The head reads [h; p], so that
    its last T weights of a model are what each topic adds to it: a mixture of leaderboards, by how likely the prompt belongs to
    each (a mixture of experts whose experts are constant; Jacobs et al. 1991).

    weight [T, D], bias [T]: float32; names: the T topics; of_words [T, E]: float32, None: they read no words. Raises ValueError
    for other shapes, names and numbers.
    """

    weight: Tensor
    bias: Tensor
    names: tuple[str, ...]
    of_words: Tensor | None = None

    def __post_init__(self) -> None:
        count = len(self.names)
        if not count or len(set(self.names)) < count:
            raise ValueError(f"names: expected different names, at least one, got {count} of {len(set(self.names))} kinds")
        if self.weight.ndim != 2 or len(self.weight) != count or not self.weight.shape[1]:
            raise ValueError(f"weight: expected [{count}, D], found {list(self.weight.shape)}")
        if self.bias.shape != (count,):
            raise ValueError(f"bias: expected {[count]}, found {list(self.bias.shape)}")
        if self.of_words is not None and (self.of_words.ndim != 2 or len(self.of_words) != count or not self.of_words.shape[1]):
            raise ValueError(f"{OF_WORDS}: expected [{count}, E], found {list(self.of_words.shape)}")
        for name, part in self._tensors().items():
            if part.dtype != torch.float32 or not bool(part.isfinite().all()):
                raise ValueError(f"{name}: expected finite numbers in float32, found {part.dtype} or others")

    def __call__(self, hidden: Tensor, words: Tensor | None = None) -> Tensor:
        """What the head reads, [N, D + T] float32: hidden states [N, D] after the final norm, and the probabilities of these
        prompts (see ``probabilities``)."""
        states = hidden.float()
        return torch.cat([states, self.probabilities(states, words)], 1)

    def probabilities(self, hidden: Tensor, words: Tensor | None = None) -> Tensor:
        """p [N, T] float32 of prompts with these hidden states [N, D] and words [N, E]. Raises ValueError where words are None
        and topics read them, or the other way round."""
        if (words is None) != (self.of_words is None):
            raise ValueError(f"words: expected {'none' if self.of_words is None else 'some: the topics read them'}")
        logits = F.linear(hidden.float(), self.weight, self.bias)
        if words is not None and self.of_words is not None:
            logits += F.linear(words, self.of_words)
        return logits.softmax(1)

    def to(self, device: torch.device) -> Topics:
        """The same on another device."""
        of_words = None if self.of_words is None else self.of_words.to(device)
        return replace(self, weight=self.weight.to(device), bias=self.bias.to(device), of_words=of_words)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"weight": self.weight, "bias": self.bias}
        return tensors if self.of_words is None else tensors | {OF_WORDS: self.of_words}

    def write(self, path: Path) -> None:
        """Writes a safetensors file with the tensors, and the names in its metadata; the same gives the same bytes. Raises
        OSError."""
        tensor_file.write(path, self._tensors(), {"names": json.dumps(self.names)})

    @classmethod
    def read(cls, path: Path, hidden: int) -> Topics:
        """Reads what ``write`` wrote, for a backbone of hidden states [D = hidden]. Raises CheckpointError for a file that
        cannot be read, and for tensors or names that do not fit."""
        tensors, metadata = tensor_file.read(path)
        stored = metadata.get("names", "null")
        if sorted(set(tensors) - {OF_WORDS}) != sorted(TENSORS):
            raise CheckpointError(
                f"{path}: expected the tensors {', '.join(TENSORS)}, with or without {OF_WORDS}, found "
                f"{', '.join(sorted(tensors)) or 'none'}"
            )
        try:
            names = json.loads(stored)
        except ValueError:
            names = None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise CheckpointError(f"{path}: names: expected a list of names as JSON in the metadata, found {stored!r:.60}")
        try:
            found = cls(tensors["weight"], tensors["bias"], tuple(names), tensors.get(OF_WORDS))
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from None
        if found.weight.shape[1] != hidden:
            raise CheckpointError(
                f"{path}: weight: expected {[len(names), hidden]}, as the backbone's hidden states have it, found "
                f"{list(found.weight.shape)}"
            )
        return found

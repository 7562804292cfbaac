"""What follows the backbone: hidden states to outputs, and outputs to coefficients."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from p2l_engine.backbone import Backbone
from p2l_engine.backbone.head import after_norm
from p2l_engine.backbone.packing import Tokens
from p2l_engine.backbone.topics import FILE as TOPICS_FILE
from p2l_engine.backbone.words import words
from p2l_engine.checkpoint import Checkpoint
from p2l_engine.coefficients import Coefficients, ExpectedUsage
from p2l_engine.errors import CheckpointError


class OutputLayers:
    """The head of a checkpoint, the topics and the shrinkage of what it reads, the map of theta, its uncertainty and expected
    lengths, each None where there is none.

    Outputs [n, K] float32 are the head's (see ``Head.split``), its theta through the map, then the M deviations of theta, then
    the share that is kept of the differences between models, where there is a shrinkage, then what answers are expected to
    take, and last each prompt's number of tokens, where there are lengths. ``width`` is K, ``usage_width`` what the last two
    take of it. template: the number of the chat template's tokens.

    States [n, S] are what the head and its topics read: the backbone's hidden states [n, D], with the prompts' words [n, E]
    behind them where topics read these. Raises CheckpointError for topics of words that are not this backbone's.
    """

    def __init__(self, loaded: Checkpoint, device: torch.device, backbone: Backbone, template: int) -> None:
        self.models, self.feedback, self.template = loaded.models, loaded.feedback, template
        self.norm, self.eps, self.embedding = backbone.norm, backbone.eps, backbone.embedding
        self.head = loaded.head.to(device)
        self.uncertainty = None if loaded.uncertainty is None else loaded.uncertainty.to(device)
        self.theta_map = None if loaded.theta_map is None else loaded.theta_map.to(device)
        self.lengths = None if loaded.lengths is None else loaded.lengths.to(device)
        self.topics = None if loaded.topics is None else loaded.topics.to(device)
        of_words = None if self.topics is None else self.topics.of_words
        if of_words is not None and of_words.shape[1] != (size := self.embedding.shape[1]):
            raise CheckpointError(
                f"{loaded.folder / TOPICS_FILE}: of_words: expected {[len(of_words), size]}, as the backbone's embeddings have "
                f"it, found {list(of_words.shape)}"
            )
        self.reads_words = of_words is not None
        self.shrinkage = None if loaded.shrinkage is None else loaded.shrinkage.to(device)
        self.usage_width = 0 if self.lengths is None else self.lengths.outputs + 1
        deviations = 0 if self.uncertainty is None else len(self.models)
        self.width = self.head.width + deviations + (self.shrinkage is not None) + self.usage_width
        if self.lengths is not None:
            self._observed = np.array([name in self.lengths.tokens.models for name in self.models])

    def with_words(self, hidden: Tensor, tokens: Sequence[Tokens]) -> Tensor:
        """States [n, S] of these prompts' hidden states [n, D]: with their words where topics read them."""
        return torch.cat([hidden.float(), words(tokens, self.embedding)], 1) if self.reads_words else hidden

    def __call__(self, states: Tensor) -> Tensor:
        """The outputs for states [n, S], without the numbers of tokens."""
        read = kept = slope = None
        if self.reads_hidden:
            out = self.head(states, self.norm, self.eps)
        else:
            read, kept = self.read(states)
            out = self.head(read, None, 0.0)
        if self.theta_map is not None:
            theta, slope = self.theta_map.with_slope(out[:, : self.head.n_models])
            out[:, : self.head.n_models] = theta
        if self.uncertainty is None and self.lengths is None and kept is None:
            return out
        parts = [out]
        if read is None:
            read, _ = self.read(states)
        if self.uncertainty is not None:
            deviation = self.uncertainty.deviation(read)
            parts.append(deviation if slope is None else deviation * slope)
        if kept is not None:
            parts.append(kept[:, None])
        if self.lengths is not None:
            parts.append(self.lengths(read))
        return torch.cat(parts, 1)

    def read(self, states: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the head reads of states [n, S], and the share [n] that is kept of it, None where all of it is."""
        return self.read_normed(self.normed(states))

    def normed(self, states: Tensor) -> Tensor:
        """States [n, S] float32, their hidden states through the final norm."""
        if not self.reads_words:
            return after_norm(states, self.norm, self.eps)
        hidden, behind = states.split([self.hidden_size, self.embedding.shape[1]], 1)
        return torch.cat([after_norm(hidden, self.norm, self.eps), behind], 1)

    def read_normed(self, states: Tensor) -> tuple[Tensor, Tensor | None]:
        """``read`` of states after the final norm."""
        if self.topics is not None:
            hidden, behind = states[:, : self.hidden_size], states[:, self.hidden_size :]
            states = self.topics(hidden, behind if self.reads_words else None)
        return (states, None) if self.shrinkage is None else self.shrinkage(states)

    @property
    def reads_hidden(self) -> bool:
        """Whether the head reads hidden states as they are, so that a kernel can apply norm and head together."""
        return self.topics is None and self.shrinkage is None

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.head.weight.shape[1] - (0 if self.topics is None else len(self.topics.names))

    @property
    def state_size(self) -> int:
        """S."""
        return self.hidden_size + (self.embedding.shape[1] if self.reads_words else 0)

    def with_counts(self, outputs: Tensor, tokens: Sequence[Tokens]) -> Tensor:
        """Outputs with each prompt's number of tokens, without the template's, where there are lengths."""
        if self.lengths is None:
            return outputs
        counts = torch.tensor([[max(len(ids) - self.template, 0)] for ids in tokens], dtype=torch.float32)
        return torch.cat([outputs, counts.to(outputs.device)], 1)

    def split(self, out: npt.NDArray[np.float32]) -> Coefficients:
        """See ``Engine.split``."""
        theta, eta = self.head.split(out)
        eta, m, end = None if eta is None else eta.copy(), len(self.models), self.head.width
        deviation = kept = usage = None
        if self.uncertainty is not None:
            deviation, end = np.ascontiguousarray(out[:, end : end + m]), end + m
        if self.shrinkage is not None:
            kept, end = out[:, end].copy(), end + 1
        if self.lengths is not None and out.shape[1] == self.width:
            seconds = None if self.lengths.seconds is None else np.ascontiguousarray(out[:, end + m : end + 2 * m])
            usage = ExpectedUsage(out[:, -1].copy(), np.ascontiguousarray(out[:, end : end + m]), seconds, self._observed)
        return Coefficients(np.ascontiguousarray(theta), eta, self.models, self.feedback, deviation, usage, kept)

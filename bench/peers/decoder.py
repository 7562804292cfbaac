"""A checkpoint's decoder as its peers are given it: float32 weights, and those of its products in whole numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from bench.peers.peer import head_of
from p2l_engine.backbone.families import DecoderConfig
from p2l_engine.backbone.head import Head
from p2l_engine.backbone.weights import Layer, Linear, layers
from p2l_engine.checkpoint import Checkpoint
from p2l_engine.prompts.encode import MAX_TOKENS

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Decoder:
    """embedding [V, D] and final norm [D]; layers of float32 tensors, with joined matrices."""

    config: DecoderConfig
    embedding: Floats
    norm: Floats
    layers: list[Layer[Linear]]
    head: Head

    @classmethod
    def of(cls, loaded: Checkpoint) -> Decoder:
        """Raises ValueError for a backbone that runs through transformers alone, and as ``head_of``."""
        if not isinstance(loaded.config, DecoderConfig):
            raise ValueError(f"--peers: expected a backbone of Llama's or Qwen2's kind, got {loaded.config.model_type}")
        single, weights = (torch.device("cpu"), torch.float32), loaded.weights.read()
        return cls(
            loaded.config,
            weights["embed_tokens.weight"].to(*single).numpy(),
            weights["norm.weight"].to(*single).numpy(),
            layers(loaded.config, weights, *single),
            head_of(loaded),
        )

    def rotations(self) -> tuple[Floats, Floats]:
        """cos and sin [MAX_TOKENS, size / 2] of the rotary embedding."""
        frequencies, scale = self.config.rope.frequencies(self.config.head_dim)
        angles = torch.arange(MAX_TOKENS).float()[:, None] * frequencies
        return (scale * angles.cos()).numpy(), (scale * angles.sin()).numpy()

    def outputs(self, hidden: Floats) -> Floats:
        """The head's outputs [n, K] of hidden states [n, D] after the final norm."""
        found: Floats = F.linear(torch.from_numpy(hidden), self.head.weight, self.head.bias).numpy()
        return found


def rounded(weight: Floats, block: int, bits: int) -> tuple[npt.NDArray[np.int8], Floats]:
    """weight [out, in] as whole numbers [out, in / block, block] times scales [out, in / block, 1].

    Up to 8 bits: -(2^(bits - 1) - 1) to 2^(bits - 1) - 1. 4 bits: -8 to 7, where -8 is the number of largest magnitude, of
    either sign, as in GGUF's Q4_0: a seventh less error.
    """
    blocks = weight.reshape(len(weight), -1, block)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=2, keepdims=True), axis=2)
    scales = (largest / -8 if bits == 4 else np.abs(largest) / (2 ** (bits - 1) - 1)).astype(np.float32)
    scales[scales == 0] = 1
    return np.rint(blocks / scales).clip(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).astype(np.int8), scales


def nibbles(values: npt.NDArray[np.int8]) -> npt.NDArray[np.uint8]:
    """Whole numbers of four bits, two to a byte along the last axis, the first one in the lower half."""
    low, high = values[..., 0::2].view(np.uint8), values[..., 1::2].view(np.uint8)
    packed: npt.NDArray[np.uint8] = np.bitwise_or(low & 15, high << 4, dtype=np.uint8)
    return packed

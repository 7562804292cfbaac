"""How much of a forward pass on a CPU is matrix products and attention."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from p2l_engine import Engine
from p2l_engine.backbone import PackedDecoder
from p2l_engine.backbone.families import DecoderConfig
from p2l_engine.backbone.on_cpu import CpuOperations
from p2l_engine.backbone.packed import rounds
from p2l_engine.backbone.packing import Packed
from p2l_engine.backbone.ready import DecoderWeights
from p2l_engine.backbone.weights import Linear
from p2l_engine.checkpoint import Checkpoint
from p2l_engine.native.panels import Panels


@dataclass
class Spent:
    """Seconds of wall time: of all that was computed, and of two of its parts."""

    whole: float = 0.0
    products: float = 0.0
    attention: float = 0.0

    @property
    def elsewhere(self) -> float:
        """The share of the time that is in neither."""
        return 1 - (self.products + self.attention) / self.whole


class TimedOperations(CpuOperations):
    """A decoder's steps, each called from Python, as in the layers that the engine computes in one call (same bits). Adds the
    seconds of products and attention to ``spent``, with the few microseconds of each call."""

    def __init__(self, dtype: torch.dtype, rounded: bool, spent: Spent) -> None:
        super().__init__(dtype, rounded=rounded)
        self._spent = spent

    def linear(self, x: Tensor, layer: Linear | Panels, name: str) -> Tensor:
        """See CpuOperations."""
        start = time.perf_counter()
        out = super().linear(x, layer, name)
        self._spent.products += time.perf_counter() - start
        return out

    def attend(self, q: Tensor, kv: Tensor, packed: Packed, last: bool = False) -> Tensor:
        """See CpuOperations."""
        start = time.perf_counter()
        out = super().attend(q, kv, packed, last)
        self._spent.attention += time.perf_counter() - start
        return out


def measured(loaded: Checkpoint, engine: Engine, compute: Callable[[], object]) -> Spent | None:
    """What ``compute`` spends, which calls an engine of ``loaded``. None where a GPU or transformers computes."""
    kept, config = engine.backbone, loaded.config
    if engine.device.type != "cpu" or not isinstance(kept, PackedDecoder) or not isinstance(config, DecoderConfig):
        return None
    assert kept.norm is not None
    spent, weights = Spent(), DecoderWeights(kept.embedding, kept.norm, kept.layers)
    rounded = rounds(kept.layers)
    timed = PackedDecoder(config, weights, kept.device, kept.dtype, lambda: TimedOperations(kept.dtype, rounded, spent))
    timed.share(kept.prefix)
    engine.backbone = timed
    try:
        compute()  # fills the buffers
        spent.products = spent.attention = 0.0
        start = time.perf_counter()
        compute()
        spent.whole = time.perf_counter() - start
    finally:
        engine.backbone = kept
    return spent

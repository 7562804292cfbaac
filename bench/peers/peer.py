"""What the benchmarks ask of a runtime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from bench.peers.batches import Batch
from p2l_engine.backbone.head import Head
from p2l_engine.checkpoint import Checkpoint


class Peer(Protocol):
    """One runtime with the decoder in one precision, a key of ``expected.TOLERANCE``."""

    name: str
    precision: str

    def run(self, batches: Sequence[Batch]) -> list[npt.NDArray[np.float32]]:
        """The head's outputs [n, K] of each batch of n prompts."""


def head_of(loaded: Checkpoint) -> Head:
    """The head, where it reads hidden states alone: peers compute nothing else. Raises ValueError where it does not."""
    beside = [name for name in ("topics", "shrinkage") if getattr(loaded, name) is not None]
    if beside:
        raise ValueError(
            f"--checkpoint: expected a head that reads hidden states alone, which is all that transformers and other runtimes "
            f"compute here; {loaded.folder} has {' and '.join(beside)}: take builtin/llmrouter-9"
        )
    return loaded.head

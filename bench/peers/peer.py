"""What the benchmarks ask of a runtime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from bench.peers.batches import Batch


class Peer(Protocol):
    """One runtime with the decoder in one precision, a key of ``expected.TOLERANCE``."""

    name: str
    precision: str

    def run(self, batches: Sequence[Batch]) -> list[npt.NDArray[np.float32]]:
        """The head's outputs [n, K] of each batch of n prompts."""

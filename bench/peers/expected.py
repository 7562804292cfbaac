"""Theta as the engine computes it in float32, which every peer has to come near to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bench.demo import PROMPTS
from bench.peers.batches import Batch
from bench.peers.peer import Peer
from p2l_engine import Engine

# Of ``Expected.off``; a decoder that computes something else is at 1 and above. Float32 differs by the order of sums (1e-5), in
# llama.cpp also by attention in half precision (1e-3); bfloat16 rounds to 8 bits at each step. Whole numbers of 8 and 4 bits
# round weights by up to 1/254 and 1/16 of the largest that shares their scale, and activations by 1/254 of theirs, which in
# some layers is hundreds of times most others: few of 8 bits are left where a row, or all rows, share a scale ("int8").
TOLERANCE = {"float32": 5e-3, "bfloat16": 0.05, "int8": 0.7, "int8 blocks": 0.2, "int4 blocks": 0.6}


@dataclass(frozen=True)
class Expected:
    """theta [n, M] of a dozen real prompts of several kinds and languages, and their token ids."""

    tokens: Batch
    theta: npt.NDArray[np.float32]

    @classmethod
    def of(cls, engine: Engine) -> Expected:
        """What an engine in float32 computes."""
        return cls(engine.encoder.encode(PROMPTS), engine.coefficients(PROMPTS).theta)

    def off(self, peer: Peer) -> float:
        """The root mean square of its theta's difference, over theta's standard deviation; half of the prompts run one by one,
        the others in one batch.

        Raises ValueError where it is above the tolerance of the peer's precision.
        """
        half = len(self.tokens) // 2
        theta = np.concatenate(peer.run([*([ids] for ids in self.tokens[:half]), self.tokens[half:]]))[:, : self.theta.shape[1]]
        found = float(np.sqrt(np.mean((theta - self.theta) ** 2)) / self.theta.std())
        if not found <= TOLERANCE[peer.precision]:  # NaN too
            raise ValueError(
                f"{peer.name} {peer.precision}: expected theta within {TOLERANCE[peer.precision]} of its standard deviation of "
                f"the engine's in float32, got {found:.3g}: it does not compute the same model"
            )
        return found

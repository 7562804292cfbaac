"""Computes equal prompts once: finds the new prompts of each block, and where the coefficients of all its rows are."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from p2l_engine.batch.blocks import Block, Unroutable

MAX_PROMPTS = 1 << 22  # prompts to remember, about 170 bytes each; equal prompts beyond them are computed again
BLOCK_STRIDE = 1 << 24  # a reference is block number * BLOCK_STRIDE + index among the block's new prompts
NO_REFERENCE = -1  # the row cannot be routed


@dataclass(frozen=True, slots=True)
class DeduplicatedBlock:
    """A block, its new prompts, for each row a reference [rows] int64 to a prompt's coefficients (see ``locate``), and a hash
    of the new prompts, by which their coefficients are known."""

    block: Block
    new_prompts: list[list[str]]
    references: npt.NDArray[np.int64]
    digest: str

    def hashed(self) -> bytes:
        """8 bytes that tell blocks of other prompts, or of other rows that cannot be kept, apart."""
        told = repr((self.digest, sorted(self.block.problems)))
        return hashlib.blake2b(self.references.tobytes() + told.encode(), digest_size=8).digest()


class Deduplicator:
    """Remembers prompts by a 128-bit hash. Its result for a block depends only on that block and the blocks before it."""

    def __init__(self, max_prompts: int = MAX_PROMPTS) -> None:
        self._known: dict[bytes, int] = {}
        self._max_prompts = max_prompts

    def add(self, block: Block) -> DeduplicatedBlock:
        """Looks up the rows of the next block and remembers its new prompts."""
        new_prompts: list[list[str]] = []
        new: dict[bytes, int] = {}
        references = np.full(len(block.prompts), NO_REFERENCE, np.int64)
        for row, prompt in enumerate(block.prompts):
            if isinstance(prompt, Unroutable):
                continue
            key = hashlib.blake2b(json.dumps(prompt).encode(), digest_size=16).digest()
            reference = self._known.get(key)
            if reference is None:
                reference = new.get(key)
            if reference is None:
                reference = new[key] = block.number * BLOCK_STRIDE + len(new_prompts)
                new_prompts.append(list(prompt))
            references[row] = reference
        self._known.update(islice(new.items(), max(0, self._max_prompts - len(self._known))))
        digest = hashlib.blake2b(b"".join(new), digest_size=8).hexdigest()
        return DeduplicatedBlock(block, new_prompts, references, digest)


def locate(references: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Block numbers and indices among the blocks' new prompts."""
    return references // BLOCK_STRIDE, references % BLOCK_STRIDE

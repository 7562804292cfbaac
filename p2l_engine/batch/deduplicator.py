"""Equal prompts are computed once: which rows have new prompts, and where the coefficients of the others are."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from p2l_engine.batch.blocks import Block
from p2l_engine.tables.rows import Unroutable

REMEMBERED = 1 << 22  # prompts that later rows are compared with, some 170 bytes each; those after them are computed again
PLACE = 1 << 24  # a reference is the block times this, plus the place in it
NOWHERE = -1  # the reference of a row that cannot be routed


@dataclass(frozen=True, slots=True)
class Unit:
    """A block's new prompts, and each of its rows' reference [rows] int64 to a prompt's coefficients (see ``split``)."""

    block: Block
    new: list[list[str]]
    references: npt.NDArray[np.int64]


class Distinct:
    """Remembers prompts by a 128-bit hash. What it makes of a block depends on the blocks before it alone."""

    def __init__(self, remembered: int = REMEMBERED) -> None:
        self._known: dict[bytes, int] = {}
        self._remembered = remembered

    def unit(self, block: Block) -> Unit:
        """The next block's."""
        new: list[list[str]] = []
        here: dict[bytes, int] = {}
        references = np.full(len(block.prompts), NOWHERE, np.int64)
        for row, prompt in enumerate(block.prompts):
            if isinstance(prompt, Unroutable):
                continue
            key = hashlib.blake2b(json.dumps(prompt).encode(), digest_size=16).digest()
            reference = self._known.get(key)
            if reference is None:
                reference = here.get(key)
            if reference is None:
                reference = here[key] = block.number * PLACE + len(new)
                new.append(list(prompt))
            references[row] = reference
        room = self._remembered - len(self._known)
        if len(here) <= room:
            self._known |= here
        else:
            self._known |= dict(list(here.items())[: max(room, 0)])
        return Unit(block, new, references)


def split(references: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Blocks and places of references to coefficients."""
    return references // PLACE, references % PLACE

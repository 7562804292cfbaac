"""What the first reading of a batch leaves for the second: a problem over all rows that can be routed, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from p2l_engine.batch.decide import KEY, Decider
from p2l_engine.batch.deduplicator import DeduplicatedBlock
from p2l_engine.batch.run_folder import COSTS
from p2l_engine.routing.arrays import Float64
from p2l_engine.routing.values import Values


class FirstPass:
    """The rows of a batch that can be routed, block by block: 8 bytes for each, and 16 more where the router explores."""

    def __init__(self, decider: Decider) -> None:
        self._decider = decider
        self._references: list[npt.NDArray[np.int64]] = []
        self._read: list[bytes] = []  # a hash of each block, by which a second reading is known to be the same
        self._keys: list[bytes] = []  # see ``Decider.keys``

    def add(self, block: DeduplicatedBlock, tokens: Sequence[str | None] | None) -> None:
        """The next block, whose coefficients are on disk. tokens: see ``Decider.decide``."""
        routable, _ = self._decider.routable(block)
        self._read.append(block.hashed())
        self._references.append(block.references[routable])
        self._keys.append(self._decider.keys(block, routable, tokens))

    def win_rates(self) -> SpilledWinRates:
        """Of all routable rows."""
        return SpilledWinRates(self._decider, self._references, self._keys)

    def costs(self, folder: Path) -> npt.NDArray[np.float64] | None:
        """Of all routable rows [N, K], on disk, where each prompt has costs of its own; None: those of the catalog."""
        rows, router = sum(map(len, self._references)), self._decider.router
        if not rows or not router.costs_vary:
            return None
        found = np.lib.format.open_memmap(folder / COSTS, "w+", np.float64, (rows, len(router.names)))
        first = 0
        for references in self._references:
            found[first : first + len(references)] = self._decider.costs(references)
            first += len(references)
        return found

    def again(self, blocks: Iterable[DeduplicatedBlock]) -> Iterator[tuple[DeduplicatedBlock, slice]]:
        """The blocks of the second reading, with the places of their routable rows among all. Raises ValueError where there are
        others than in the first."""
        first = row = 0
        for block, read, references in zip_longest(blocks, self._read, self._references):
            if block is None or block.hashed() != read:
                raise ValueError(f"the rows from {row:,} on are others than when they were first read")
            yield block, slice(first, first + len(references))
            first, row = first + len(references), row + len(block.block.prompts)


class SpilledWinRates(Values):
    """Win rates [N, K] computed from spilled coefficients each time they are read.

    references: of the routable rows of each block, in order. keys: of each block, see ``Decider.keys``; where the router
    explores, the win rates are those of the rows' draws.
    """

    def __init__(self, decider: Decider, references: Sequence[npt.NDArray[np.int64]], keys: Sequence[bytes] = ()) -> None:
        self.decider, self._sizes = decider, [len(some) for some in references]
        self._keys = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY)
        self.references = np.concatenate([np.zeros(0, np.int64), *references])
        self.shape = (len(self.references), len(decider.router.names))

    def chunks(self) -> Iterator[Float64]:
        first = 0
        for size in self._sizes:
            if size:
                yield self.take(slice(first, first + size))
            first += size

    def take(self, prompts: Any) -> Float64:
        references, router = self.references[prompts], self.decider.router
        if router.explore is not None:
            coefficients = self.decider.coefficients(references)
            keys = [key.tobytes() for key in self._keys[prompts]]
            return np.ascontiguousarray(router.win_rates(coefficients, router.drawn(coefficients, keys)))
        if (references[1:] > references[:-1]).all():  # as of a block whose prompts are all new
            return np.ascontiguousarray(router.win_rates(self.decider.coefficients(references)))
        unique, inverse = np.unique(references, return_inverse=True)
        return np.ascontiguousarray(self.decider.router.win_rates(self.decider.coefficients(unique))[inverse])

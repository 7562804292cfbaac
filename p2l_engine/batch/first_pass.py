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
from p2l_engine.routing.scratch import Scratch
from p2l_engine.routing.values import Values


class FirstPass:
    """The rows of a batch that can be routed, block by block: 8 bytes for each, and 16 more where the router explores, in
    nameless files of a local ``folder``, as is what solvers note of each row."""

    def __init__(self, decider: Decider, folder: Path) -> None:
        self._decider, self._scratch = decider, Scratch(folder)
        self._references = self._scratch.column(np.int64)
        self._keys = self._scratch.column(np.uint8)  # see ``Decider.keys``
        self._sizes: list[int] = []  # of the blocks' routable rows
        self._read: list[bytes] = []  # a hash of each block, by which a second reading is known to be the same

    def add(self, block: DeduplicatedBlock, tokens: Sequence[str | None] | None) -> None:
        """The next block, whose coefficients are on disk. tokens: see ``Decider.decide``. Raises OSError."""
        routable, _ = self._decider.routable(block)
        self._read.append(block.hashed())
        self._sizes.append(int(routable.sum()))
        self._references.add(block.references[routable])
        self._keys.add(np.frombuffer(self._decider.keys(block, routable, tokens), np.uint8))

    def win_rates(self) -> SpilledWinRates:
        """Of all routable rows, which are all added."""
        return SpilledWinRates(self._decider, self._references.array(), self._sizes, self._scratch, self._keys.array())

    def costs(self, rates: SpilledWinRates, folder: Path) -> npt.NDArray[np.float64] | None:
        """Of all routable rows [N, K], on disk, where each prompt has costs of its own; None: those of the catalog."""
        rows, router = sum(self._sizes), self._decider.router
        if not rows or not router.costs_vary:
            return None
        found = np.lib.format.open_memmap(folder / COSTS, "w+", np.float64, (rows, len(router.names)))
        for some in rates.blocks():
            found[some] = self._decider.costs(rates.references[some])
        return found

    def again(self, blocks: Iterable[DeduplicatedBlock]) -> Iterator[tuple[DeduplicatedBlock, slice]]:
        """The blocks of the second reading, with the places of their routable rows among all. Raises ValueError where there are
        others than in the first."""
        first = row = 0
        for block, read, size in zip_longest(blocks, self._read, self._sizes):
            if block is None or block.hashed() != read:
                raise ValueError(f"the rows from {row:,} on are others than when they were first read")
            yield block, slice(first, first + size)
            first, row = first + size, row + len(block.block.prompts)


class SpilledWinRates(Values):
    """Win rates [N, K] computed from spilled coefficients each time they are read.

    references [N]: of the routable rows, block by block; sizes: how many each block has. keys: those of ``Decider.keys``; where
    the router explores, the win rates are those of the rows' draws.
    """

    def __init__(
        self,
        decider: Decider,
        references: npt.NDArray[np.int64],
        sizes: Sequence[int],
        scratch: Scratch,
        keys: npt.NDArray[np.uint8] | None = None,
    ) -> None:
        self.decider, self.references, self.scratch, self._sizes = decider, references, scratch, sizes
        self._keys = np.zeros(0, np.uint8) if keys is None else keys
        self.shape = (len(self.references), len(decider.router.names))

    def blocks(self) -> Iterator[slice]:
        """The rows of each block that has any."""
        first = 0
        for size in self._sizes:
            if size:
                yield slice(first, first + size)
            first += size

    def chunks(self) -> Iterator[Float64]:
        return map(self.take, self.blocks())

    def take(self, prompts: Any) -> Float64:
        references, router = self.references[prompts], self.decider.router
        if router.explore is not None:
            coefficients = self.decider.coefficients(references)
            keys = [key.tobytes() for key in self._keys.reshape(-1, KEY)[prompts]]
            return np.ascontiguousarray(router.win_rates(coefficients, router.drawn(coefficients, keys)))
        if (references[1:] > references[:-1]).all():  # as of a block whose prompts are all new
            return np.ascontiguousarray(router.win_rates(self.decider.coefficients(references)))
        unique, inverse = np.unique(references, return_inverse=True)
        return np.ascontiguousarray(self.decider.router.win_rates(self.decider.coefficients(unique))[inverse])

"""Coefficients on disk: one file a block, of its new prompts, written whole; what a run resumes from."""

from __future__ import annotations

import io
from collections import OrderedDict
from pathlib import Path

import numpy as np
import numpy.typing as npt

from p2l_engine.batch.deduplicator import split
from p2l_engine.tables.storage import write_local

OPEN = 64  # files that stay mapped


class Spill:
    """Engine outputs float32 [n, K] by block, in a local folder."""

    def __init__(self, folder: Path, width: int) -> None:
        self.folder, self.width = folder, width
        self._open: OrderedDict[int, npt.NDArray[np.float32]] = OrderedDict()

    def path(self, block: int) -> Path:
        return self.folder / f"coefficients-{block:06d}.npy"

    def has(self, block: int) -> bool:
        return self.path(block).is_file()

    def present(self) -> set[int]:
        """The blocks whose outputs are there."""
        return {int(path.stem.rpartition("-")[2]) for path in self.folder.glob("coefficients-*.npy")}

    def write(self, block: int, outputs: npt.NDArray[np.float32]) -> None:
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(outputs, np.float32), allow_pickle=False)
        write_local(self.path(block), buffer.getbuffer())

    def take(self, references: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """The outputs [n, K] that references [n] (none of them nowhere) point to."""
        out = np.empty((len(references), self.width), np.float32)
        blocks, places = split(references)
        for block in np.unique(blocks).tolist():
            rows, found = np.flatnonzero(blocks == block), self._mapped(block)
            if len(found) <= places[rows].max():
                raise ValueError(
                    f"{self.path(block)}: expected more than {places[rows].max()} rows, got {len(found)}; remove it"
                )
            out[rows] = found[places[rows]]
        return out

    def _mapped(self, block: int) -> npt.NDArray[np.float32]:
        found = self._open.get(block)
        if found is None:
            try:
                found = np.load(self.path(block), mmap_mode="r", allow_pickle=False)
            except (ValueError, EOFError) as error:
                raise ValueError(f"{self.path(block)}: cannot be read: {error}; remove it, and it is computed again") from error
            if found.ndim != 2 or found.shape[1] != self.width:
                raise ValueError(f"{self.path(block)}: expected [n, {self.width}], got {list(found.shape)}; remove it")
            self._open[block] = found
            if len(self._open) > OPEN:
                self._open.popitem(last=False)
        else:
            self._open.move_to_end(block)
        return found

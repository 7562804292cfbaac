"""Coefficients on disk, one file per block, written atomically. An interrupted run resumes from these files."""

from __future__ import annotations

import io
from collections import OrderedDict
from pathlib import Path

import numpy as np
import numpy.typing as npt

from p2l_engine.batch.deduplicator import locate
from p2l_engine.tables.atomic import write_file

MAX_MAPPED = 64  # memory-mapped files


class Spill:
    """The engine's outputs, float32 [n, K], of each block's new prompts, in a local folder.

    ``write``, ``has`` and ``present`` may be called from any thread, ``take`` only from one thread at a time.
    """

    def __init__(self, folder: Path, width: int) -> None:
        self.folder, self.width = folder, width
        self._mapped: OrderedDict[int, npt.NDArray[np.float32]] = OrderedDict()

    def path(self, block: int) -> Path:
        return self.folder / f"coefficients-{block:06d}.npy"

    def has(self, block: int) -> bool:
        return self.path(block).is_file()

    def present(self) -> set[int]:
        """Numbers of the blocks that have a file."""
        return {int(path.stem.rpartition("-")[2]) for path in self.folder.glob("coefficients-*.npy")}

    def write(self, block: int, outputs: npt.NDArray[np.float32]) -> None:
        """Writes a block's outputs [n, K]. Raises OSError."""
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(outputs, np.float32), allow_pickle=False)
        write_file(self.path(block), buffer.getbuffer())

    def take(self, references: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """The outputs [n, K] of references [n], none of them NO_REFERENCE. Raises ValueError for a damaged file."""
        out = np.empty((len(references), self.width), np.float32)
        blocks, indices = locate(references)
        for block in np.unique(blocks).tolist():
            rows, outputs = np.flatnonzero(blocks == block), self._map(block)
            if len(outputs) <= indices[rows].max():
                raise ValueError(
                    f"{self.path(block)}: expected more than {indices[rows].max()} rows, got {len(outputs)}; remove this file, "
                    "and the next run computes it again"
                )
            out[rows] = outputs[indices[rows]]
        return out

    def _map(self, block: int) -> npt.NDArray[np.float32]:
        if block in self._mapped:
            self._mapped.move_to_end(block)
            return self._mapped[block]
        remedy = "remove this file, and the next run computes it again"
        try:
            found: npt.NDArray[np.float32] = np.load(self.path(block), mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{self.path(block)}: cannot be read: {error}; {remedy}") from error
        if found.ndim != 2 or found.shape[1] != self.width:
            raise ValueError(f"{self.path(block)}: expected shape [n, {self.width}], got {list(found.shape)}; {remedy}")
        self._mapped[block] = found
        if len(self._mapped) > MAX_MAPPED:
            self._mapped.popitem(last=False)
        return found

"""Coefficients on disk, one file per block, written atomically. An interrupted run, or one with other options, uses them again.

A file's name has a hash of the prompts that its coefficients are of, so that they never serve others.
"""

from __future__ import annotations

import io
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from p2l_engine.batch.deduplicator import locate
from p2l_engine.tables.atomic import write_file

NAME = re.compile(r"coefficients-(\d{6,})-([0-9a-f]{16})\.npy")
MAX_MAPPED = 64  # memory-mapped files


def coefficient_files(folder: Path) -> dict[tuple[int, str], Path]:
    """The files of coefficients in a folder, by block and digest; other files, such as copies, are none of them."""
    found = ((NAME.fullmatch(path.name), path) for path in folder.glob("coefficients-*.npy"))
    return {(int(name[1]), name[2]): path for name, path in found if name is not None}


class Spill:
    """The engine's outputs, float32 [n, K], of each block's new prompts, in a local folder. digest: of these prompts, see
    ``DeduplicatedBlock``.

    ``write``, ``has`` and ``present`` may be called from any thread, ``take`` only from one thread at a time.
    """

    def __init__(self, folder: Path, width: int) -> None:
        self.folder, self.width = folder, width
        self._found: dict[int, dict[str, Path]] = {}  # by block and digest
        for (block, digest), path in coefficient_files(folder).items():
            self._found.setdefault(block, {})[digest] = path
        self._paths: dict[int, Path] = {}  # that ``take`` reads
        self._layouts: dict[Path, tuple[int, int]] = {}  # rows of each file that ``take`` has read, and where they begin
        self._mapped: OrderedDict[Path, npt.NDArray[np.float32]] = OrderedDict()

    def has(self, block: int, digest: str) -> bool:
        """Whether there are outputs of a block with these prompts; then ``take`` reads them."""
        path = self._found.get(block, {}).get(digest)
        if path is None:
            return False
        self._paths[block] = path
        return True

    def present(self) -> set[tuple[int, str]]:
        """Numbers and digests of the blocks that have a file."""
        return {(block, digest) for block, found in self._found.items() for digest in found}

    def write(self, block: int, digest: str, outputs: npt.NDArray[np.float32]) -> None:
        """Writes a block's outputs [n, K], and removes those of other prompts. Raises OSError."""
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(outputs, np.float32), allow_pickle=False)
        path = self.folder / f"coefficients-{block:06d}-{digest}.npy"
        write_file(path, buffer.getbuffer())
        self._paths[block] = path
        for other in self._found.pop(block, {}).values():
            other.unlink(missing_ok=True)
        self._found[block] = {digest: path}

    def take(self, references: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """The outputs [n, K] of references [n], none of them NO_REFERENCE, in blocks that were written or found before. Raises
        ValueError for a damaged file."""
        out = np.empty((len(references), self.width), np.float32)
        blocks, indices = locate(references)
        several = np.unique(blocks) if len(blocks) and (blocks != blocks[0]).any() else blocks[:1]
        for block in several.tolist():
            rows: Any = np.flatnonzero(blocks == block) if len(several) > 1 else slice(None)
            outputs = self._map(block)
            if len(outputs) <= indices[rows].max():
                raise ValueError(
                    f"{self._paths[block]}: expected more than {indices[rows].max()} rows, got {len(outputs)}; remove this "
                    "file, and the next run computes it again"
                )
            out[rows] = outputs[indices[rows]]
        return out

    def _map(self, block: int) -> npt.NDArray[np.float32]:
        path = self._paths[block]
        if path in self._mapped:
            self._mapped.move_to_end(path)
            return self._mapped[path]
        remedy = "remove this file, and the next run computes it again"
        try:
            if path not in self._layouts:
                self._layouts[path] = _layout(path, self.width)
            rows, offset = self._layouts[path]
            found: npt.NDArray[np.float32] = np.memmap(path, np.float32, "r", offset, (rows, self.width))
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path}: cannot be read: {error}; {remedy}") from error
        self._mapped[path] = found
        if len(self._mapped) > MAX_MAPPED:
            self._mapped.popitem(last=False)
        return found


def _layout(path: Path, width: int) -> tuple[int, int]:
    """The rows of a file of coefficients, and the byte at which they begin. Raises ValueError, EOFError."""
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        shape, by_columns, kind = np.lib.format.read_array_header_1_0(file)
        if len(shape) != 2 or shape[1] != width or by_columns or kind != np.float32:
            raise ValueError(f"expected {np.dtype(np.float32)} of shape [n, {width}], got {kind} of {list(shape)}")
        return shape[0], file.tell()

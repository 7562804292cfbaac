"""The ids of requests: each row's ``custom_id``, or one made of its file and row."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from p2l_engine.batch.json_values import json_text
from p2l_engine.tables.chunked import read_rows
from p2l_engine.tables.read_share import ReadShare, Told
from p2l_engine.tables.storage import File

CUSTOM_ID = "custom_id"


def made_id(file: str, row: int) -> str:
    """Of a row that has none. file: its name in the output (see ``sources``)."""
    return f"{file}:{row}"


def given_ids(kept: pa.Table) -> list[str | None]:
    """The rows' own ids, where the column is kept: objects, lists and booleans as JSON."""
    values = kept.column(CUSTOM_ID).to_pylist() if CUSTOM_ID in kept.column_names else [None] * len(kept)
    return [None if value is None else _text(value) for value in values]


def _text(value: Any) -> str:
    return json_text(value) if isinstance(value, bool | list | dict) else str(value)


def check_ids(files: Sequence[File], column: str, of: pa.Field, sources: Mapping[str, str], told: Told) -> None:
    """Reads all rows before any prompt is computed. Raises ValueError with the file and row of the first whose id is an earlier
    row's. column: of the prompts; of: the ids' column; sources: see ``source_names``; told: called with how much was read."""
    seen, share = DistinctIds(), ReadShare(files)
    for rows in read_rows(files, column, [of.name], pa.schema([of])):
        own = given_ids(rows.kept)
        ids = [made_id(sources[rows.file.shown], rows.first + i) if each is None else each for i, each in enumerate(own)]
        again = seen.add(ids)
        if again is not None:
            raise ValueError(
                f"{rows.file.shown}: row {rows.first + again}: {CUSTOM_ID}: {ids[again]!r:.80} is also an earlier row's, so "
                "that answers could not be told apart: leave the column out with --keep '', and ids are made of file and row"
            )
        told(share.after(rows.file, rows.read))


class DistinctIds:
    """Finds repeated texts among any number of them, by 64-bit hashes in sorted arrays: 8 bytes for each."""

    def __init__(self) -> None:
        self._known: list[npt.NDArray[np.uint64]] = []  # by falling length, at least halved each time

    def add(self, ids: Sequence[str]) -> int | None:
        """The place of the first of these that is equal to one before it, in this call or an earlier one."""
        digests = b"".join(hashlib.blake2b(each.encode(), digest_size=8).digest() for each in ids)
        hashes = np.frombuffer(digests, np.uint64)
        new, first = np.unique(hashes, return_index=True)
        repeated = np.ones(len(hashes), bool)
        repeated[first] = False
        for known in self._known:
            at = np.searchsorted(known, hashes)
            repeated |= known[np.minimum(at, len(known) - 1)] == hashes
        while self._known and len(self._known[-1]) < 2 * len(new):
            new = np.sort(np.concatenate([self._known.pop(), new]))
        if len(new):
            self._known.append(new)
        return int(repeated.argmax()) if repeated.any() else None

"""Routed rows as files of requests of OpenAI's batch API, which take one model each: https://platform.openai.com/docs/guides/batch"""

from __future__ import annotations

import hashlib
import json
import mmap
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from p2l_engine.batch.blocks import Block
from p2l_engine.batch.json_values import json_text
from p2l_engine.batch.output import Metadata, PartFiles
from p2l_engine.batch.parts import part_of
from p2l_engine.batch.requests import endpoint
from p2l_engine.batch.sources import source_columns

MAX_REQUESTS, MAX_BYTES = 50_000, 200_000_000  # of a file


class RequestWriter:
    """Writes each model's requests, in the order of the rows, into files within the API's limits, and rows without a model into
    files named errors-.

    folder: a local one for files that are not full yet. models: each model's name at its provider. sources: see
    ``source_names``.
    """

    def __init__(self, files: PartFiles, folder: Path, models: Mapping[str, str], sources: Mapping[str, str]) -> None:
        self._files, self._folder, self._models, self._sources = files, folder, models, sources
        self._open: dict[tuple[str | None, str], _Begun] = {}  # by model and the API's path
        self._numbers: dict[str | None, int] = {}  # files of each model
        self._ids = DistinctIds()

    def add(self, block: Block, table: pa.Table, _: Metadata) -> None:
        """Adds the rows of a block. Raises ValueError for an id that an earlier row has, and OSError."""
        ids, sources = self._named(block, table)
        urls = _texts(table, "url")
        models, errors = table.column("model").to_pylist(), table.column("error").to_pylist()
        assert block.bodies is not None
        for row, model in enumerate(models):
            if model is None:
                line = {"custom_id": ids[row], **sources[row], "error": errors[row]}
                self._add(None, "", line, block, row)
            else:
                body = {**json.loads(block.bodies[row].as_py()), "model": self._models[model]}
                url = endpoint(body, urls[row])
                self._add(model, url, {"custom_id": ids[row], "method": "POST", "url": url, "body": body}, block, row)

    def finish(self) -> None:
        """Writes the files that are not full."""
        for key in list(self._open):
            self._close(key)

    def _named(self, block: Block, table: pa.Table) -> tuple[list[str], list[dict[str, Any]]]:
        """Each row's id, and where it comes from. An id is that of the kept column ``custom_id``, else made of the source."""
        columns = {name: column.to_pylist() for name, column in source_columns(block.sources, self._sources).items()}
        sources = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        made = [f"{source['source_file']}:{source['source_row']}" for source in sources]
        ids = [own if given is None else given for given, own in zip(_texts(table, "custom_id"), made, strict=True)]
        again = self._ids.add(ids)
        if again is not None:
            raise ValueError(
                f"{block.where(again)}: custom_id: {ids[again]!r:.80} is also an earlier row's, so that answers could not be "
                "told apart: leave the column out with --keep '', and ids are made of file and row"
            )
        return ids, sources

    def _add(self, model: str | None, url: str, request: Mapping[str, Any], block: Block, row: int) -> None:
        line = f"{json_text(request)}\n".encode()
        if len(line) > MAX_BYTES:
            raise ValueError(f"{block.where(row)}: its request has {len(line):,} bytes, expected at most {MAX_BYTES:,}")
        key = (model, url)
        begun = self._open.get(key)
        if begun is not None and (begun.requests == MAX_REQUESTS or begun.size + len(line) > MAX_BYTES):
            self._close(key)
            begun = None
        if begun is None:
            number = self._numbers.get(model, 0)
            self._numbers[model] = number + 1
            name = part_of(model, number, "jsonl")
            begun = self._open[key] = _Begun(self._folder, name)
        begun.add(line)

    def _close(self, key: tuple[str | None, str]) -> None:
        begun = self._open.pop(key)
        with begun.stream as stream:
            stream.flush()
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as data:
                self._files.put(begun.name, data)


class _Begun:
    """A file that is not full yet: nameless, so that the system frees it whatever ends the process."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.stream: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed when it is full)
        self.requests = self.size = 0

    def add(self, line: bytes) -> None:
        self.stream.write(line)
        self.requests += 1
        self.size += len(line)


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


def _texts(table: pa.Table, name: str) -> list[str | None]:
    """The values of a column, if there is one, as texts."""
    values = table.column(name).to_pylist() if name in table.column_names else [None] * len(table)
    return [None if value is None else str(value) for value in values]

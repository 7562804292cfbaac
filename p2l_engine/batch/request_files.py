"""Routed rows as files of requests of OpenAI's batch API, which take one model each: https://platform.openai.com/docs/guides/batch"""

from __future__ import annotations

import json
import mmap
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from p2l_engine.batch.blocks import Block
from p2l_engine.batch.json_values import json_text
from p2l_engine.batch.output import Metadata, PartFiles
from p2l_engine.batch.parts import part_of
from p2l_engine.batch.request_ids import CUSTOM_ID, given_ids, made_id
from p2l_engine.batch.requests import endpoint
from p2l_engine.batch.sources import SOURCE_COLUMNS, source_columns

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

    def add(self, block: Block, table: pa.Table, _: Metadata) -> None:
        """Adds the rows of a block. Raises ValueError for a request that is too long, and OSError."""
        columns = [column.to_pylist() for column in source_columns(block.sources, self._sources).values()]
        sources = list(zip(*columns, strict=True))
        ids = [made_id(*source) if own is None else own for source, own in zip(sources, given_ids(table), strict=True)]
        urls = table.column("url").to_pylist() if "url" in table.column_names else [None] * len(table)
        models, errors = table.column("model").to_pylist(), table.column("error").to_pylist()
        assert block.bodies is not None
        for row, model in enumerate(models):
            if model is None:
                line = {CUSTOM_ID: ids[row], **dict(zip(SOURCE_COLUMNS, sources[row], strict=True)), "error": errors[row]}
                self._add(None, "", line, block, row)
            else:
                body = {**json.loads(block.bodies[row].as_py()), "model": self._models[model]}
                url = endpoint(body, None if urls[row] is None else str(urls[row]))
                self._add(model, url, {CUSTOM_ID: ids[row], "method": "POST", "url": url, "body": body}, block, row)

    def finish(self) -> None:
        """Writes the files that are not full."""
        for key in list(self._open):
            self._close(key)

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

"""The input of a run on a Ray cluster: new prompts by block, read by one task.

A module of its own, without torch: the process that reads starts a second sooner.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import pyarrow as pa
from ray.data import DataContext, Datasource, ReadTask
from ray.data.block import BlockMetadata

from p2l_engine.batch.blocks import blocks
from p2l_engine.batch.config import BatchConfig
from p2l_engine.batch.deduplicator import Deduplicator
from p2l_engine.tables.storage import File

Done = Collection[tuple[int, str]]  # numbers and digests of blocks
PROMPTS = pa.schema([("block", pa.int64()), ("prompts", pa.list_(pa.list_(pa.string())))])


class BlockSource(Datasource):
    """The new prompts of each block that is not in ``done``, one row per block, read by one task."""

    def __init__(self, files: Sequence[File], config: BatchConfig, done: Done) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.files, self.config, self.done = files, config, done

    def get_name(self) -> str:
        return "Blocks"

    @property
    def supports_distributed_reads(self) -> bool:
        return False  # local files are on the machine that started the run

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        unknown = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None)
        return [ReadTask(self._read, unknown, PROMPTS)]

    def _read(self) -> Iterator[pa.Table]:
        config, deduplicator = self.config, Deduplicator()
        for block in blocks(self.files, config.column, [], config.rows_per_part, config.plain_text):
            deduplicated = deduplicator.add(block)
            if deduplicated.new_prompts and (block.number, deduplicated.digest) not in self.done:
                yield pa.table([[block.number], [deduplicated.new_prompts]], PROMPTS)

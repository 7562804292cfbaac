"""Coefficients from a Ray cluster: one task reads the input's blocks, a pool of workers computes them, Ray Data does the rest.

What comes back is what one machine would have computed, block by block; spilling, deciding and writing stay with ``run``, so
that a run goes on after a kill, here or without Ray. For pipelines of one's own there is ``Route``.
"""

from __future__ import annotations

import logging
import socket
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.data import ActorPoolStrategy, DataContext, Dataset, Datasource, ReadTask, read_datasource
from ray.data.block import BlockMetadata
from ray.data.exceptions import SystemException
from ray.exceptions import ActorDiedError, RayError, RayTaskError
from ray.util.annotations import RayDeprecationWarning

from p2l_engine.batch.blocks import blocks
from p2l_engine.batch.config import Asked
from p2l_engine.batch.deduplicator import Distinct
from p2l_engine.batch.manifest import contents, how
from p2l_engine.batch.worker import Route
from p2l_engine.engine import Engine
from p2l_engine.engine.engine import TOKENS_PER_BATCH, Outputs, natural_dtype
from p2l_engine.tables.storage import File

__all__ = ["Cluster", "Route"]

logger = logging.getLogger(__name__)

RESTARTS = 3  # of a worker that died, and tries of the block that it had
WRAPPINGS = (RayError, SystemException)
PROMPTS = pa.schema([("block", pa.int64()), ("prompts", pa.list_(pa.list_(pa.string())))])


class Cluster:
    """Workers on a Ray cluster, for ``run(..., workers=cluster)``; a context manager.

    engine: of the run's router; it computes nothing here, and workers whose checkpoint is another stop the run. checkpoint: its
    folder or hub name as every node finds it, or None for the built-in default. address: "local" for a cluster on this machine,
    made for the run; else as ``ray.init`` takes it ("auto", HOST:PORT; this machine must be a node, and reads the input). Where
    Ray is connected already, its cluster is used. workers: None: one for each GPU or, where there is none, for each node. Each
    has a GPU, or as many CPUs as so many workers can have alike. device, dtype and tokens_per_batch: of the workers' engines.
    Raises ValueError, ConnectionError.
    """

    def __init__(
        self,
        engine: Engine,
        checkpoint: str | None,
        address: str = "local",
        workers: int | None = None,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        tokens_per_batch: int | None = None,
    ) -> None:
        self._ours = not ray.is_initialized()  # who began it ends it
        if self._ours:
            _check(address)
            ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        # What it logs as an error it raises too; everything is in Ray's own log files.
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        with ExitStack() as undo:
            undo.callback(self.close)
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            gpus, cpus = ([int(node.get(what, 0)) for node in nodes] for what in ("GPU", "CPU"))
            kind = torch.device(device or ("cuda" if sum(gpus) else "cpu")).type
            if kind not in TOKENS_PER_BATCH:
                raise ValueError(f"device: expected cpu or cuda, got {device!r}")
            there = sum(gpus if kind == "cuda" else cpus)
            self.workers = (sum(gpus) if kind == "cuda" else sum(n > 0 for n in cpus)) if workers is None else workers
            if not there:
                raise ValueError(f"device: the cluster at {address} has no {kind} device")
            if not 1 <= self.workers <= there:
                raise ValueError(f"workers: expected 1 to {there}, the cluster's {kind} devices, got {self.workers}")
            undo.pop_all()
        self._needs = {"num_gpus": 1, "num_cpus": 1} if kind == "cuda" else {"num_cpus": share(cpus, self.workers)}
        dtype = dtype or natural_dtype(torch.device(kind))
        tokens = tokens_per_batch or TOKENS_PER_BATCH[kind]
        self.how = how(kind, dtype, tokens)
        if checkpoint is not None and Path(checkpoint).exists():
            checkpoint = str(Path(checkpoint).resolve())  # workers have working folders of their own
        self._arguments = (checkpoint, kind, dtype, tokens, contents(engine))

    def close(self) -> None:
        """Ends the cluster, or the connection, that this object began."""
        if self._ours:
            ray.shutdown()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def outputs(self, files: Sequence[File], asked: Asked, done: set[int]) -> Generator[tuple[int, Outputs], None, None]:
        """Number and outputs of each block that is not done and has prompts of its own, in order. Raises what a worker raised;
        RuntimeError where workers die again and again."""
        dataset = self._dataset(files, asked, done)
        try:
            for row in dataset.iter_rows():
                found = np.frombuffer(row["outputs"], np.float32).reshape(row["rows"], -1)
                yield row["block"], Outputs(found, row["tokens"])
        except WRAPPINGS as error:
            raise _own(error) from error

    def _dataset(self, files: Sequence[File], asked: Asked, done: set[int]) -> Dataset:
        context = DataContext.get_current().copy()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        context.target_max_block_size = 1  # byte: a block of Ray's is one row, a block of ours
        context.raise_original_map_exception = True
        source = _Blocks(files, asked, done)
        with DataContext.current(context), warnings.catch_warnings():
            # Ray has no other argument for restarts yet, whose number it does not limit by itself.
            warnings.simplefilter("ignore", RayDeprecationWarning)
            dataset: Dataset = read_datasource(source, override_num_blocks=1, num_cpus=0).map_batches(
                _Compute,
                batch_format="pyarrow",
                batch_size=1,
                compute=ActorPoolStrategy(size=self.workers),
                fn_constructor_args=self._arguments,
                max_restarts=RESTARTS,
                max_task_retries=RESTARTS,
                **self._needs,
            )
        return dataset


def share(cpus: Sequence[int], workers: int) -> int:
    """The most CPUs that each of so many workers can have on nodes of so many CPUs."""
    return max(n for n in range(1, max(cpus) + 1) if sum(there // n for there in cpus) >= workers)


def _check(address: str) -> None:
    """Ray itself goes on trying for minutes."""
    if address in ("local", "auto"):
        return
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise ValueError(f"address: expected local, auto or HOST:PORT, got {address!r}")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(
            f"address: expected a Ray cluster's head at {address}, found nothing that answers: {error}"
        ) from None


class _Blocks(Datasource):
    """The new prompts of each block that is not done: a row each, read one after the other."""

    def __init__(self, files: Sequence[File], asked: Asked, done: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.files, self.asked, self.done = files, asked, done

    def get_name(self) -> str:
        return "Blocks"

    @property
    def supports_distributed_reads(self) -> bool:
        return False  # local files are on the machine that began the run

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        unknown = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None)
        return [ReadTask(self._read, unknown, PROMPTS)]

    def _read(self) -> Iterator[pa.Table]:
        distinct = Distinct()
        for block in blocks(self.files, self.asked.column, self.asked.keep, self.asked.rows_per_part, self.asked.plain_text):
            new = distinct.unit(block).new
            if new and block.number not in self.done:
                yield pa.table([[block.number], [new]], PROMPTS)


class _Compute:
    """Outputs of each row's prompts, in float32 bytes."""

    def __init__(
        self, checkpoint: str | None, device: str, dtype: torch.dtype, tokens_per_batch: int, expected: Mapping[str, Any]
    ) -> None:
        self.arguments, self.expected = (checkpoint, device, dtype, tokens_per_batch), expected

    @cached_property  # and not in the constructor, whose errors come back from Ray as text alone
    def engine(self) -> Engine:
        engine = Engine.from_pretrained(*self.arguments)
        found = contents(engine)
        if found != self.expected:
            other = [name for name in {**found, **self.expected} if found.get(name) != self.expected.get(name)]
            raise ValueError(
                f"checkpoint: {engine.folder} on {ray.util.get_node_ip_address()} is another than where the run began: "
                f"{', '.join(other)}"
            )
        return engine

    def __call__(self, batch: pa.Table) -> pa.Table:
        found = list(self.engine.outputs_of(batch.column("prompts").to_pylist()))
        rows, tokens = pa.array([len(one.outputs) for one in found]), pa.array([one.tokens for one in found])
        outputs = pa.array([np.ascontiguousarray(one.outputs, np.float32).tobytes() for one in found], pa.large_binary())
        return pa.table([batch.column("block"), rows, tokens, outputs], ["block", "rows", "tokens", "outputs"])


def _own(error: BaseException) -> Exception:
    """What a worker raised, without Ray's wrapping."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, Exception) and not isinstance(cause, WRAPPINGS):
            return cause
        if isinstance(cause, ActorDiedError):
            return RuntimeError(f"a worker died {RESTARTS + 1} times; was there not enough memory? Ray says: {cause}")
        cause = cause.cause if isinstance(cause, RayTaskError) else cause.__cause__
    return RuntimeError(f"the Ray cluster failed: {error or type(error).__name__}")

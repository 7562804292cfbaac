"""Coefficients from a Ray cluster: one task reads the input's blocks and a pool of workers computes them, through Ray Data.

The workers return what one machine would have computed, block by block. Spilling, deciding and writing stay with ``run``, so an
interrupted run can be resumed with or without Ray. ``Route`` is for Ray Data pipelines of your own.
"""

from __future__ import annotations

import logging
import socket
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.data import ActorPoolStrategy, DataContext, Dataset, read_datasource
from ray.data.exceptions import SystemException
from ray.exceptions import ActorDiedError, RayError, RayTaskError
from ray.util.annotations import RayDeprecationWarning

from p2l_engine.backbone import PackedDecoder
from p2l_engine.batch.block_source import BlockSource, Done
from p2l_engine.batch.config import BatchConfig
from p2l_engine.batch.identity import compute_signature
from p2l_engine.batch.worker import Route
from p2l_engine.checkpoint import fingerprint
from p2l_engine.engine import Engine
from p2l_engine.engine.auto_dtype import auto_dtype
from p2l_engine.engine.device import as_dtype, is_auto, parse_device
from p2l_engine.engine.engine import TOKENS_PER_BATCH
from p2l_engine.engine.pipeline import Outputs
from p2l_engine.tables.storage import File

__all__ = ["Cluster", "Route"]

logger = logging.getLogger(__name__)

MAX_RESTARTS = 3  # of a worker that died, and retries of its block
RAY_ERRORS = (RayError, SystemException)


class Cluster:
    """Workers on a Ray cluster, for ``run(..., workers=cluster)``; a context manager.

    engine: the router's engine. It computes nothing here; workers whose checkpoint differs from its checkpoint stop the run.
    checkpoint: a folder that exists on every node, or a name; None for the default. address: "local" starts a
    cluster on this machine for the run; otherwise "auto" or HOST:PORT of a cluster of which this machine is a node (it reads
    the input). A Ray connection that this process already has is used. workers: None for one per GPU or, without GPUs, one per
    node. Each worker gets one GPU, or an equal share of the CPUs. device, dtype, tokens_per_batch: of the workers' engines.
    Raises ValueError, and ConnectionError where no cluster answers.
    """

    def __init__(
        self,
        engine: Engine,
        checkpoint: str | None,
        address: str = "local",
        workers: int | None = None,
        device: str | None = None,
        dtype: str | torch.dtype | None = None,
        tokens_per_batch: int | None = None,
    ) -> None:
        of_workers = None if device is None else parse_device(device)
        self._owns_connection = not ray.is_initialized()
        if self._owns_connection:
            check_address(address)
            ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        # Ray Data raises what it logs as an error, and Ray's own log files have everything.
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        with ExitStack() as undo:
            undo.callback(self.close)
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            gpus, cpus = ([int(node.get(what, 0)) for node in nodes] for what in ("GPU", "CPU"))
            kind = ("cuda" if sum(gpus) else "cpu") if of_workers is None else of_workers.type
            devices = sum(gpus if kind == "cuda" else cpus)
            self.workers = (sum(gpus) if kind == "cuda" else sum(n > 0 for n in cpus)) if workers is None else workers
            if not devices:
                raise ValueError(f"device: the cluster at {address} has no {kind} device")
            if not 1 <= self.workers <= devices:
                raise ValueError(
                    f"workers: expected 1 to {devices}, the number of {kind} devices of the cluster, got {self.workers}"
                )
            undo.pop_all()
        self._resources = (
            {"num_gpus": 1, "num_cpus": 1} if kind == "cuda" else {"num_cpus": cpus_per_worker(cpus, self.workers)}
        )
        place = torch.device(kind)
        if is_auto(dtype):
            dtype = auto_dtype(engine.folder, engine.head, isinstance(engine.backbone, PackedDecoder), place)
        dtype = as_dtype(dtype, place)
        tokens = TOKENS_PER_BATCH[kind] if tokens_per_batch is None else tokens_per_batch
        self.compute = compute_signature(kind, dtype, tokens)
        if checkpoint is not None and Path(checkpoint).exists():
            checkpoint = str(Path(checkpoint).resolve())  # workers run in other working directories
        files = fingerprint.of_checkpoint(engine.folder, engine.base)
        # The dtype's name: a worker that reads it needs no torch before it computes.
        self._arguments = (checkpoint, kind, str(dtype), tokens, engine.date, files, self.compute)

    def close(self) -> None:
        """Ends the cluster or connection, if this object started it."""
        if self._owns_connection:
            ray.shutdown()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def outputs(self, files: Sequence[File], config: BatchConfig, done: Done) -> Generator[tuple[int, Outputs], None, None]:
        """Number and outputs of each block that has new prompts and is not in ``done``, in order.

        Raises what a worker raised, and RuntimeError where workers die more than MAX_RESTARTS times.
        """
        dataset = self._dataset(files, config, done)
        try:
            for row in dataset.iter_rows():
                found = np.frombuffer(row["outputs"], np.float32).reshape(row["rows"], -1)
                yield row["block"], Outputs(found, row["tokens"])
        except RAY_ERRORS as error:
            raise _original(error) from error

    def _dataset(self, files: Sequence[File], config: BatchConfig, done: Done) -> Dataset:
        context = DataContext.get_current().copy()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        context.target_max_block_size = 1  # byte: each of Ray's blocks is one row, which holds one of ours
        context.raise_original_map_exception = True
        source = BlockSource(files, config, done)
        with DataContext.current(context), warnings.catch_warnings():
            # Without these arguments, Ray restarts workers without end.
            warnings.simplefilter("ignore", RayDeprecationWarning)
            dataset: Dataset = read_datasource(source, override_num_blocks=1, num_cpus=0).map_batches(
                _Compute,
                batch_format="pyarrow",
                batch_size=1,
                compute=ActorPoolStrategy(size=self.workers),
                fn_constructor_args=self._arguments,
                max_restarts=MAX_RESTARTS,
                max_task_retries=MAX_RESTARTS,
                **self._resources,
            )
        return dataset


def cpus_per_worker(cpus: Sequence[int], workers: int) -> int:
    """The largest equal number of CPUs for each of the workers, on nodes with these numbers of CPUs."""
    return max(n for n in range(1, max(cpus) + 1) if sum(node // n for node in cpus) >= workers)


def check_address(address: str) -> None:
    """Fails at once where no server answers: Ray itself retries for minutes. Raises ValueError, ConnectionError."""
    if address in ("local", "auto"):
        return
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise ValueError(f"address: expected local, auto or HOST:PORT, got {address!r}")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(f"address: expected a Ray cluster's head at {address}, nothing answers there: {error}") from None


class _Compute:
    """The head's outputs for each row's prompts, as float32 bytes."""

    def __init__(
        self,
        checkpoint: str | None,
        device: str,
        dtype: str,
        tokens_per_batch: int,
        date: str | None,
        expected: Mapping[str, Any],
        compute: str,
    ) -> None:
        self.arguments, self.expected, self.compute = (checkpoint, device, dtype, tokens_per_batch, date), expected, compute

    @cached_property  # not in the constructor: Ray returns its errors only as text
    def engine(self) -> Engine:
        engine = Engine.from_pretrained(*self.arguments)
        found = fingerprint.of_checkpoint(engine.folder, engine.base)
        if found != self.expected:
            different = [name for name in {**found, **self.expected} if found.get(name) != self.expected.get(name)]
            raise ValueError(
                f"checkpoint: {engine.folder} on node {ray.util.get_node_ip_address()} differs from that of the machine "
                f"that started the run: {', '.join(different)}"
            )
        if (compute := compute_signature(engine.device.type, engine.dtype, engine.tokens_per_batch)) != self.compute:
            raise ValueError(
                f"dtype: expected what the machine that started the run computes, {self.compute}, got {compute} on node "
                f"{ray.util.get_node_ip_address()}: use CPUs of one instruction set, or float32"
            )
        return engine

    def __call__(self, batch: pa.Table) -> pa.Table:
        found = list(self.engine.outputs_of(batch.column("prompts").to_pylist()))
        rows, tokens = pa.array([len(chunk.outputs) for chunk in found]), pa.array([chunk.tokens for chunk in found])
        outputs = pa.array([np.ascontiguousarray(chunk.outputs, np.float32).tobytes() for chunk in found], pa.large_binary())
        return pa.table([batch.column("block"), rows, tokens, outputs], ["block", "rows", "tokens", "outputs"])


def _original(error: BaseException) -> Exception:
    """The error that a worker raised, out of Ray's wrappers."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, Exception) and not isinstance(cause, RAY_ERRORS):
            return cause
        if isinstance(cause, ActorDiedError):
            return RuntimeError(f"a worker died {MAX_RESTARTS + 1} times, perhaps for lack of memory; Ray reports: {cause}")
        cause = cause.cause if isinstance(cause, RayTaskError) else cause.__cause__
    return RuntimeError(f"the Ray cluster failed: {error or type(error).__name__}")

"""The stages of a batch run: read, compute each prompt once, decide, write.

Rows go in blocks. A block's new prompts are computed together and their coefficients spilled to one file; its output is one
part, or several where the kept columns are large or the models have files of their own. Both are written atomically, and their
bytes depend only on the input and the options: a resumed run produces byte-identical output. A budget over the batch takes two
passes: first all coefficients, then the decisions from them.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from p2l_engine.batch.blocks import Block, Unroutable, blocks
from p2l_engine.batch.columns import as_texts
from p2l_engine.batch.config import BatchConfig
from p2l_engine.batch.decide import Decider
from p2l_engine.batch.deduplicator import NO_REFERENCE, DeduplicatedBlock, Deduplicator
from p2l_engine.batch.first_pass import FirstPass
from p2l_engine.batch.job import Job
from p2l_engine.batch.output import PartFiles, TableWriter
from p2l_engine.batch.report import Recorder, Report
from p2l_engine.batch.request_files import RequestWriter
from p2l_engine.batch.sources import source_columns
from p2l_engine.batch.spill import Spill
from p2l_engine.engine.pipeline import Outputs
from p2l_engine.router import Router
from p2l_engine.routing import Policies
from p2l_engine.tables.storage import File

MAX_BLOCKS = 8  # in memory at the same time


class Workers(Protocol):
    """Computes coefficients instead of the router's engine. compute: see ``identity.compute_signature``."""

    compute: str

    def outputs(
        self, files: Sequence[File], config: BatchConfig, done: Collection[tuple[int, str]]
    ) -> Generator[tuple[int, Outputs], None, None]:
        """Number and outputs of each block that has new prompts and is not in ``done`` (numbers and digests), in order."""
        ...


class _PendingBlock(NamedTuple):
    """A block in the order of the input, and whether the coefficients of its new prompts are on disk."""

    block: DeduplicatedBlock
    spilled: threading.Event


class Pipeline:
    """The stages of one run, in three threads.

    The reader reads and deduplicates (in the thread in which the engine tokenises); the caller's thread computes and spills;
    the writer decides and writes. ``written`` and ``_first_pass`` belong to the writer until ``compute`` returns, then to the
    caller; the recorder has a lock of its own; all else that threads share is guarded by ``_lock``.
    """

    def __init__(
        self,
        router: Router,
        job: Job,
        spill: Spill,
        parts_to_keep: Callable[[], dict[str, int]],
        progress: Callable[[Report], object] = lambda _: None,
        workers: Workers | None = None,
    ) -> None:
        config = job.config
        self.router, self.job, self.config, self.spill = router, job, config, spill
        self.progress, self.workers = progress, workers
        per_prompt = config.budget if config.budget_scope == "prompt" else None
        self.decider = Decider(router, spill.take, per_prompt, config.price, config.coefficients, config.constraints)
        self.recorder = Recorder()
        self.schema = job.kept_schema()
        self._files = PartFiles(job.output, job.run, parts_to_keep)
        self.written = self._files.written  # bytes of the parts
        self.writer: TableWriter | RequestWriter = (
            TableWriter(self._files, config.format, split=config.split_by is not None)
            if config.write_as is None
            else RequestWriter(self._files, spill.folder, router.catalog.provider_names, job.sources)
        )
        self._slots = threading.Semaphore(MAX_BLOCKS)
        self._lock = threading.Lock()
        self._pending: deque[_PendingBlock] = deque()
        self._error: BaseException | None = None
        self._first_pass = FirstPass(self.decider, spill.folder)

    def compute(self) -> None:
        """Computes and spills the coefficients of all prompts; decides and writes unless the run has bounds over the batch."""
        computing: deque[_PendingBlock] = deque()
        with ThreadPoolExecutor(1, thread_name_prefix="p2l-writer") as writer:
            outputs = self._outputs(self._new_prompts(computing, writer))
            try:
                for chunk in outputs:
                    pending = computing.popleft()
                    with self.recorder.timed("spilling"):
                        self.spill.write(pending.block.block.number, pending.block.digest, chunk.outputs)
                    self.recorder.add(computed=len(chunk.outputs), tokens=chunk.tokens)
                    pending.spilled.set()
                    self._submit(writer)
            except BaseException as error:
                self._fail(error)
                raise
            finally:
                outputs.close()  # not left to the garbage collector: workers must end before their cluster
        if self._error is not None:
            raise self._error

    def _outputs(self, new_prompts: Iterator[list[list[str]]]) -> Generator[Outputs, None, None]:
        """The new prompts' outputs, block by block, from the router's engine or from the workers."""
        if self.workers is None:
            yield from self.router.engine.outputs_of(new_prompts)
            return
        with closing(self.workers.outputs(self.job.files, self.config, self.spill.present())) as found:
            for prompts in new_prompts:
                number, outputs = next(found, (None, None))
                if outputs is None or outputs.outputs.shape != (len(prompts), self.spill.width):
                    raise RuntimeError(f"block {number}: the workers read other prompts than this machine: did inputs change?")
                yield outputs

    def _fail(self, error: BaseException) -> None:
        """Keeps the first error, and wakes the reader, which may be waiting for a slot and then stops."""
        with self._lock:
            self._error = self._error or error
        self._slots.release()

    def _new_prompts(self, computing: deque[_PendingBlock], writer: ThreadPoolExecutor) -> Iterator[list[list[str]]]:
        """The prompts to compute, block by block; runs in the reader's thread."""
        for block in self._blocks():
            self._slots.acquire()
            if self._error is not None:
                return
            pending = _PendingBlock(block, threading.Event())
            with self._lock:
                self._pending.append(pending)
            if block.new_prompts and not self.spill.has(block.block.number, block.digest):
                computing.append(pending)
                yield block.new_prompts
            else:
                self.recorder.add(resumed=len(block.new_prompts))
                pending.spilled.set()
                self._submit(writer)

    def _blocks(self) -> Iterator[DeduplicatedBlock]:
        config, job, deduplicator = self.config, self.job, Deduplicator()
        reading = (config.column, config.keep, config.rows_per_part, config.plain_text)
        source = blocks(job.files, *reading, self.schema, self.spill.folder, config.write_as is not None)
        while True:
            with self.recorder.timed("reading"):
                block = next(source, None)
            if block is None:
                return
            self._check(block)
            with self.recorder.timed("deduplicating"):
                deduplicated = deduplicator.add(block)
            yield deduplicated

    def _check(self, block: Block) -> None:
        if self.config.strict:
            for row, prompt in enumerate(block.prompts):
                problem = prompt if isinstance(prompt, Unroutable) else block.problems.get(row)
                if problem is not None:
                    raise ValueError(f"{problem.where}: {problem.why}")

    def _submit(self, writer: ThreadPoolExecutor) -> None:
        """Gives blocks to the writer in order, so that the coefficients of repeated prompts, in earlier blocks, are on disk."""
        submitted = []
        with self._lock:
            while self._pending and self._pending[0].spilled.is_set():
                submitted.append(writer.submit(self._finish, self._pending.popleft().block))
        for future in submitted:  # not under the lock: the callback of a future that has failed already runs here, and takes it
            future.add_done_callback(self._finished)

    def _finished(self, future: Future[None]) -> None:
        error = future.exception()
        if error is not None:
            self._fail(error)
        self._slots.release()

    def _finish(self, block: DeduplicatedBlock) -> None:
        """Runs in the writer's thread."""
        if self._error is not None:
            return
        repeated = int((block.references != NO_REFERENCE).sum()) - len(block.new_prompts)
        self.recorder.add(rows=len(block.block.prompts), repeated=repeated)
        self.recorder.set_read(block.block.read)
        if self.config.over_batch:
            self._first_pass.add(block, self._tokens(block))
        else:
            self._write(block)
        self.progress(self.recorder.report)

    def decide_over_batch(self) -> None:
        """Solves one problem over all routable rows, then writes the output block by block."""
        found = self._first_pass
        with self.recorder.timed("solving"):
            rates = found.win_rates()
            solved = self.router.solve(rates, self.config.constraints, found.costs(rates, self.spill.folder))
        self.recorder.set_prices(solved.prices)
        for block, rows in found.again(self._blocks()):
            self._write(block, solved.of(rows))
            self.progress(self.recorder.report)

    def _tokens(self, block: DeduplicatedBlock) -> Sequence[str | None] | None:
        """What each row is drawn by, beside its prompt."""
        return None if self.config.draw is None else as_texts(block.block.kept, self.config.draw)

    def _write(self, block: DeduplicatedBlock, policies: Policies | None = None) -> None:
        with self.recorder.timed("deciding"):
            decided = self.decider.decide(block, policies, self._tokens(block))
        if decided.routed < len(decided.table):
            errors = [
                (why, block.block.where(row))
                for row, why in enumerate(decided.table.column("error").to_pylist())
                if why is not None
            ]
            if self.config.strict:
                why, where = errors[0]
                raise ValueError(f"{where}: {why}")
            self.recorder.add_errors(errors)
        self.recorder.add(routed=decided.routed, spend=decided.spend)
        with self.recorder.timed("writing"):
            metadata = {"p2l.unit": self.router.catalog.unit, "p2l.models": "\n".join(self.router.engine.models)}
            if policies is not None:
                metadata |= {f"p2l.price.{bound}": repr(price) for bound, price in policies.prices.items()}
            self.writer.add(block.block, self._table(block, decided.table), metadata)
        self._count_parts()

    def finish(self) -> None:
        """Every block was decided."""
        if not self.written and self.config.write_as is None:  # a folder without files opens nowhere
            nothing = Block(0, 0, [], self.schema.empty_table())
            self._write(DeduplicatedBlock(nothing, [], np.zeros(0, np.int64), ""))
        with self.recorder.timed("writing"):
            self.writer.finish()
            self._files.finish()
        self._count_parts()

    def _count_parts(self) -> None:
        self.recorder.add(parts=len(self.written) - self.recorder.report.parts)

    def _table(self, block: DeduplicatedBlock, decided: pa.Table) -> pa.Table:
        """The decided rows, with where they come from after the kept columns."""
        if not self.config.source:
            return decided
        at = block.block.kept.num_columns
        for place, (name, column) in enumerate(source_columns(block.block.sources, self.job.sources).items(), at):
            decided = decided.add_column(place, name, column)
        return decided

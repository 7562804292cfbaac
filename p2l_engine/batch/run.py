"""One batch run: read, compute each prompt once, decide, write; killed, it goes on where it was.

Rows go in blocks. A block's new prompts are computed together and spilled whole; its output is one parquet part, written whole.
What a block's bytes are depends on the input and on what was asked for alone, so that a run that was killed ends with the very
bytes of one that was not. A budget over the batch takes two passes: coefficients first, then, from what was spilled, decisions.
"""

from __future__ import annotations

import io
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from p2l_engine.batch.blocks import Block, blocks, check_files
from p2l_engine.batch.config import Asked
from p2l_engine.batch.decide import OURS, Decided, Decider, SpilledRates
from p2l_engine.batch.deduplicator import Distinct, Unit
from p2l_engine.batch.manifest import (
    begin,
    check_alone,
    check_unchanged,
    how,
    identity,
    part_name,
    parts,
    remove_state,
    write_manifest,
)
from p2l_engine.batch.report import Report
from p2l_engine.batch.spill import Spill
from p2l_engine.engine.engine import Outputs
from p2l_engine.router import Router
from p2l_engine.routing import Policies
from p2l_engine.tables.rows import Unroutable
from p2l_engine.tables.storage import File, Place, find

logger = logging.getLogger(__name__)

UNDER_WAY = 8  # blocks in memory


class Workers(Protocol):
    """Who computes coefficients, if not the router's engine: in what (``manifest.how``), and the number and outputs of each
    block whose coefficients are not there (done), in order."""

    how: str

    def outputs(self, files: Sequence[File], asked: Asked, done: set[int]) -> Generator[tuple[int, Outputs], None, None]: ...


class _Waiting(NamedTuple):
    """A unit in the order of the input, and whether its own coefficients are there."""

    unit: Unit
    ready: threading.Event


def run(
    router: Router,
    asked: Asked,
    restart: bool = False,
    progress: Callable[[Report], object] | None = None,
    workers: Workers | None = None,
) -> Report:
    """Routes all rows of the inputs into the output folder: parts in the order of the rows, and a manifest.

    An unfinished run of the same inputs, checkpoint, catalog and options goes on; a finished one is left as it is. progress is
    called whenever a block is done, from any thread. workers: who computes the coefficients instead of the router's
    engine (``ray.Cluster``). Raises ValueError where the folder holds something else or a run of
    something else (``restart`` throws that run away), or where inputs cannot be read; InfeasibleBudget and Infeasible; OSError
    where there is no room or no permission. Whatever is raised, what was written stays whole, and the next run goes on.
    """
    files, output = find(asked.inputs), Place.of(asked.output)
    for place in (*map(Place.of, asked.inputs), *(file.place for file in files)):
        if place.holds(output) or output.holds(place):
            raise ValueError(
                f"output: {output.shown} and the input {place.shown} lie in one another: parts would be read as prompts; name "
                "another folder"
            )
    engine = router.engine
    computed = how(engine.device.type, engine.dtype, engine.tokens_per_batch) if workers is None else workers.how
    now = identity(asked, router, files, computed)
    if asked.state is None and not output.is_local:
        raise ValueError(f"state: expected a local folder where the output is not local ({output.shown}), got None")
    # What no prompt can have is refused before any is read.
    router.solve(np.zeros((1, len(router.names))), asked.budget, asked.budget_scope, asked.max_share, asked.min_share)
    check_files(files, asked.column, asked.keep)
    output.make_folder()
    with output.alone():
        return _run(router, asked, files, output, now, restart, progress or (lambda _: None), workers)


def _run(
    router: Router,
    asked: Asked,
    files: Sequence[File],
    output: Place,
    now: dict[str, Any],
    restart: bool,
    progress: Callable[[Report], object],
    workers: Workers | None,
) -> Report:
    manifest, state = begin(asked, now, output, restart)
    if manifest["complete"]:
        logger.info("%s is finished already", output.shown)
        remove_state(state)
        report = Report(**manifest["report"])
        if asked.strict and report.routed < report.rows:
            raise ValueError(f"{output.shown}: {report.rows - report.routed:,} of its {report.rows:,} rows have an error")
        return report
    spill = Spill(state, router.engine.head.width)
    decider = Decider(router, spill.take, asked.budget, asked.price, asked.coefficients)
    work = _Run(router, asked, files, output, spill, decider, progress, workers)
    start = time.perf_counter()
    work.compute()
    if asked.over_batch:
        check_unchanged(asked, now)
        work.decide_over_batch()
    check_unchanged(asked, now)
    check_alone(output, work.bytes)
    report = work.report
    report.seconds["all"] = time.perf_counter() - start
    kept = {name: getattr(report, name) for name in ("rows", "routed", "repeated", "parts", "spend", "prices")}
    write_manifest(output, {"asked": manifest["asked"], "complete": True, "report": kept, "bytes": work.bytes})
    remove_state(state)
    return report


class _Run:
    """The stages of one run: the reader's thread (which also tokenises), the engine in the caller's, the writer's."""

    def __init__(
        self,
        router: Router,
        asked: Asked,
        files: Sequence[File],
        output: Place,
        spill: Spill,
        decider: Decider,
        progress: Callable[[Report], object],
        workers: Workers | None,
    ) -> None:
        self.router, self.asked, self.files, self.output, self.decider = router, asked, files, output, decider
        self.spill, self.progress, self.workers, self.report = spill, progress, workers, Report()
        self.written, self.bytes = parts(output), dict[str, int]()
        self._room = threading.Semaphore(UNDER_WAY)
        self._lock = threading.Lock()
        self._waiting: deque[_Waiting] = deque()
        self._failed: list[BaseException] = []
        self._references: list[npt.NDArray[np.int64]] = []

    def compute(self) -> None:
        """Coefficients of all prompts; and, where rows do not depend on each other, decisions and output."""
        computing: deque[_Waiting] = deque()
        with ThreadPoolExecutor(1, thread_name_prefix="p2l-writer") as writer:
            outputs = self._outputs(self._new_prompts(computing, writer))
            try:
                for chunk in outputs:
                    waiting, start = computing.popleft(), time.perf_counter()
                    self.spill.write(waiting.unit.block.number, chunk.outputs)
                    self.report.computed += len(chunk.outputs)
                    self.report.tokens += chunk.tokens
                    waiting.ready.set()
                    self.report.took("spilling", start)
                    self._hand_over(writer)
            except BaseException as error:
                self._fail(error)
                raise
            finally:
                outputs.close()  # left to the garbage collector, workers may outlive their cluster
        if self._failed:
            raise self._failed[0]

    def _outputs(self, new: Iterator[list[list[str]]]) -> Generator[Outputs, None, None]:
        """The new prompts' outputs, block by block: the router's engine's, or those of the workers."""
        if self.workers is None:
            yield from self.router.engine.outputs_of(new)
            return
        with closing(self.workers.outputs(self.files, self.asked, self.spill.present())) as found:
            for prompts in new:
                number, outputs = next(found, (None, None))
                if outputs is None or outputs.outputs.shape != (len(prompts), self.spill.width):
                    raise RuntimeError(f"block {number}: the workers read other prompts than this machine: did inputs change?")
                yield outputs

    def _fail(self, error: BaseException) -> None:
        """Nothing new is begun; the reader, which may be waiting for room, comes to its end."""
        self._failed.append(error)
        self._room.release()

    def _new_prompts(self, computing: deque[_Waiting], writer: ThreadPoolExecutor) -> Iterator[list[list[str]]]:
        """What the engine has to compute, block by block."""
        for unit in self._units():
            self._room.acquire()
            if self._failed:
                return
            waiting = _Waiting(unit, threading.Event())
            self._waiting.append(waiting)
            if unit.new and not self.spill.has(unit.block.number):
                computing.append(waiting)
                yield unit.new
            else:
                self.report.resumed += len(unit.new)
                waiting.ready.set()
                self._hand_over(writer)

    def _units(self) -> Iterator[Unit]:
        distinct, source = (
            Distinct(),
            blocks(self.files, self.asked.column, self.asked.keep, self.asked.rows_per_part, self.asked.plain_text),
        )
        while True:
            start = time.perf_counter()
            block = next(source, None)
            self.report.took("reading", start)
            if block is None:
                return
            self._check(block)
            start = time.perf_counter()
            unit = distinct.unit(block)
            self.report.took("comparing", start)
            yield unit

    def _check(self, block: Block) -> None:
        taken = [name for name in block.kept.column_names if name in OURS]
        if taken:
            raise ValueError(
                f"keep: the output has columns of its own named {', '.join(taken)}: name the ones to keep, or none (--keep '')"
            )
        if self.asked.strict:
            for prompt in block.prompts:
                if isinstance(prompt, Unroutable):
                    raise ValueError(f"{prompt.where}: {prompt.why}")

    def _hand_over(self, writer: ThreadPoolExecutor) -> None:
        """Units whose coefficients are all there, in order: a prompt that came before stands in a block before."""
        with self._lock:
            while self._waiting and self._waiting[0].ready.is_set():
                writer.submit(self._finish, self._waiting.popleft().unit).add_done_callback(self._finished)

    def _finished(self, future: Future[None]) -> None:
        error = future.exception()
        if error is not None:
            self._fail(error)
        self._room.release()

    def _finish(self, unit: Unit) -> None:
        if self._failed:
            return
        self.report.rows += len(unit.block.prompts)
        self.report.read = unit.block.read
        self.report.repeated += int((unit.references >= 0).sum()) - len(unit.new)
        if self.asked.over_batch:
            can, _ = self.decider.routable(unit)
            self._references.append(unit.references[can])
        else:
            self._write(unit)
        self.progress(self.report)

    def decide_over_batch(self) -> None:
        """One problem over all rows that can be routed; then the output, block by block."""
        start = time.perf_counter()
        rates = SpilledRates(self.decider, self._references)
        asked = self.asked
        found = self.router.solve(rates, asked.budget, asked.budget_scope, asked.max_share, asked.min_share)
        self.report.prices = dict(found.prices)
        self.report.took("solving", start)
        row = 0
        for unit, references in zip(self._units(), self._references, strict=True):
            some = slice(row, row + len(references))
            row += len(references)
            every = (found.indices, found.probabilities, found.value, found.cost)
            indices, probabilities, value, cost = (column[some] for column in every)
            self._write(unit, Policies(indices, probabilities, value, cost, prices=found.prices))
            self.progress(self.report)

    def _write(self, unit: Unit, policies: Policies | None = None) -> None:
        start = time.perf_counter()
        name = part_name(unit.block.number)
        decided: Decided = self.decider.decide(unit, policies)
        self.report.took("deciding", start)
        self.report.routed += decided.routed
        self.report.spend += decided.spend
        self.report.parts += 1
        start = time.perf_counter()
        about = {"p2l.unit": self.router.catalog.unit, "p2l.models": "\n".join(self.router.engine.models)}
        about |= {} if policies is None else {f"p2l.price.{row}": repr(price) for row, price in policies.prices.items()}
        buffer = io.BytesIO()
        pq.write_table(decided.table.replace_schema_metadata(about), buffer, compression="zstd")
        self.bytes[name] = len(buffer.getbuffer())
        if self.written.get(name) != self.bytes[name]:
            if name in self.written:
                logger.warning("%s is not what it was, and is written again", (self.output / name).shown)
            (self.output / name).write(buffer.getbuffer())
        self.report.took("writing", start)

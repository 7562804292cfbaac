"""Starts, resumes and finishes batch runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from p2l_engine.batch.begin import Begun, begin, check_unclaimed
from p2l_engine.batch.config import KEPT_BYTES, BatchConfig
from p2l_engine.batch.identity import compute_signature
from p2l_engine.batch.job import Job, Reading
from p2l_engine.batch.manifest import read_manifest, write_manifest
from p2l_engine.batch.parts import check_no_other_parts, mark, parts
from p2l_engine.batch.pipeline import Pipeline, Workers
from p2l_engine.batch.report import Report
from p2l_engine.batch.run_folder import (
    check_writable,
    coefficient_bytes,
    has_coefficients,
    make_run_folder,
    remove_coefficients,
    remove_temporary_files,
    state_folder,
)
from p2l_engine.batch.spill import Spill
from p2l_engine.router import Router
from p2l_engine.tables.storage import Location


def run(
    router: Router,
    config: BatchConfig,
    restart: bool = False,
    progress: Callable[[Report], object] | None = None,
    workers: Workers | None = None,
    reading: Reading | None = None,
) -> Report:
    """Routes all rows of the inputs into the output folder OUT: parts in the order of the rows, and at last the file
    ``_SUCCESS``. The run's own files, its manifest and coefficients, are in the folder OUT.run beside it.

    An unfinished run of the same inputs, checkpoint, catalog and options is resumed; a finished one is left unchanged. Where
    other decisions are asked for (catalog, budget, kept columns ...), or inputs have been added at the end, coefficients that
    an earlier run left are used again, and its decisions are replaced. The output is byte-identical to that of a new run.
    restart: remove the run in the output folder first. progress: called after each block, from any thread. workers: compute
    the coefficients instead of the router's engine (``ray.Cluster``). reading: called, from any thread, with what is
    read before the first block, and how much of it, 0 to 1.

    Raises ValueError for inputs that cannot be read, and where the output folder holds anything else or a run of other inputs
    or another checkpoint; InfeasibleBudget or Infeasible for bounds that cannot be met; RuntimeError while another run writes
    to the folder; OSError where the disk is full or permissions are missing. After any error, written parts are whole and the
    run can be resumed.
    """
    engine = router.engine
    if config.draw is not None and router.explore is None:
        raise ValueError(f"draw: expected a router that explores, by what {config.draw!r} says, got one that does not")
    if workers is None:
        compute = compute_signature(engine.device.type, engine.dtype, engine.tokens_per_batch)
    else:
        compute = workers.compute
    job = Job.of(config, router, compute, reading or (lambda _what, _share: None))
    if not job.run.exists():
        check_unclaimed(job.output, job.run)  # before a folder is made beside what is not ours
    make_run_folder(job.output, job.run)
    with job.run.alone(), _state_alone(job):
        job.output.make_folder()
        if restart or job.schema is not None:  # else it is finished, and only read
            check_writable(job.run, job.output)
        return _run(router, job, restart, progress or (lambda _: None), workers)


@contextmanager
def _state_alone(job: Job) -> Iterator[None]:
    """Locks the folder of the coefficients, where the output is in a store, which has no locks: against other runs of this
    output and state on this machine."""
    if job.output.is_local:
        yield
        return
    state = state_folder(job.config.state, job.run, job.coefficients)
    state.mkdir(parents=True, exist_ok=True)
    with Location(str(state), str(state)).alone():
        yield


def _run(router: Router, job: Job, restart: bool, progress: Callable[[Report], object], workers: Workers | None) -> Report:
    begun = begin(job, restart)
    if begun.manifest.report is not None:
        return _finished(job, begun, begun.manifest.report)
    begun.state.mkdir(parents=True, exist_ok=True)
    remove_temporary_files(begun.state, job.run)
    spill = Spill(begun.state, router.engine.width)
    pipeline = Pipeline(router, job, spill, partial(begun.parts_to_keep, job), progress, workers)
    with pipeline.recorder.timed("all"):
        _stages(job, begun, pipeline)
        pipeline.finish()
        check_no_other_parts(job.output, pipeline.written)
        _check_no_other_run(job, pipeline)
    keep, size = begun.manifest.keep_coefficients, coefficient_bytes(begun.state)
    kept = size if keep or (keep is None and size <= KEPT_BYTES) else 0
    report = replace(pipeline.recorder.report, changed=begun.changed, kept=kept)
    write_manifest(job.run, replace(begun.manifest, report=report, parts=pipeline.written))
    mark(job.output, job.run)
    remove_temporary_files(begun.state, job.run)
    if not kept:
        remove_coefficients(begun.state, job.run)
    return report


def _check_no_other_run(job: Job, pipeline: Pipeline) -> None:
    """Raises ValueError where another run wrote to the output meanwhile, as another machine's may in a store, which has no
    locks. One of the same inputs and options writes the same bytes."""
    now, found = read_manifest(job.output, job.run), parts(job.output)
    if now is None or not now.is_of(job.coefficients, job.decisions) or found != pipeline.written:
        raise ValueError(
            f"{job.output.shown}: another run, of other inputs or options, wrote here meanwhile, so that parts of both may be "
            "mixed: when it has ended, --restart one of them, or name another folder"
        )


def _finished(job: Job, begun: Begun, report: Report) -> Report:
    """A run that is complete is left as it is, but for what a crash left undone, and coefficients that shall not be kept."""
    mark(job.output, job.run)
    if job.config.keep_coefficients is False and has_coefficients(begun.state):
        remove_coefficients(begun.state, job.run)
    if job.config.strict and report.routed < report.rows:
        first = f"{report.reasons[0].where}: {report.reasons[0].why}"
        raise ValueError(
            f"{job.output.shown}: {report.rows - report.routed:,} of its {report.rows:,} rows have an error: {first}"
        )
    return replace(report, kept=coefficient_bytes(begun.state))


def _stages(job: Job, begun: Begun, pipeline: Pipeline) -> None:
    """Computes, decides and writes. Raises ValueError where an input changed while it was read: what was written is then of no
    one input, and is marked as to be replaced."""
    why = ""
    try:
        pipeline.compute()
        changed = job.changed_inputs() if job.config.over_batch else []
        if job.config.over_batch and not changed:
            pipeline.decide_over_batch()
    except (ValueError, OSError, RuntimeError) as error:  # such as half a line at the end of a file that grows
        why, changed = f"{error}; ", job.changed_inputs()
        if not changed:
            raise
    changed = changed or job.changed_inputs()
    if not changed:
        return
    if begun.replaces and not pipeline.written:
        remedy = f"{job.output.shown} still holds the run before: name another folder, or --restart"
    else:
        unknown = begun.manifest.coefficients | {"inputs": None}
        write_manifest(job.run, replace(begun.manifest, coefficients=unknown, inputs=(), decisions=None))
        remedy = "the same command reads it again, and computes only prompts that are new"
    raise ValueError(f"{why}{'; '.join(changed)} during the run: {remedy}")

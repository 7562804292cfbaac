"""Starts, resumes and finishes batch runs."""

from __future__ import annotations

import logging
from collections.abc import Callable

from p2l_engine.batch.config import BatchConfig
from p2l_engine.batch.identity import compute_signature
from p2l_engine.batch.job import Job
from p2l_engine.batch.manifest import begin, write_manifest
from p2l_engine.batch.parts import check_no_other_parts, mark
from p2l_engine.batch.pipeline import Pipeline, Workers
from p2l_engine.batch.report import Report
from p2l_engine.batch.run_folder import make_run_folder, remove_coefficients
from p2l_engine.batch.spill import Spill
from p2l_engine.router import Router

logger = logging.getLogger(__name__)

RECORDED = ("rows", "routed", "repeated", "parts", "spend", "prices")  # of a finished run's report, in its manifest


def run(
    router: Router,
    config: BatchConfig,
    restart: bool = False,
    progress: Callable[[Report], object] | None = None,
    workers: Workers | None = None,
) -> Report:
    """Routes all rows of the inputs into the output folder OUT: parquet parts in the order of the rows, and at last the file
    ``_SUCCESS``. The run's own files, its manifest and coefficients, are in the folder OUT.run beside it.

    An unfinished run of the same inputs, checkpoint, catalog and options is resumed; a finished one is left unchanged. A
    resumed run produces byte-identical output. restart: remove the run in the output folder first. progress: called after each
    block, from any thread. workers: compute the coefficients instead of the router's engine (``ray.Cluster``).

    Raises ValueError for inputs that cannot be read, and where the output folder holds anything else or a run of other inputs
    or options; InfeasibleBudget or Infeasible for bounds that cannot be met; RuntimeError while another run writes to the
    folder; OSError where the disk is full or permissions are missing. After any error, written parts are whole and the run can
    be resumed.
    """
    engine = router.engine
    if config.draw is not None and router.explore is None:
        raise ValueError(f"draw: expected a router that explores, by what {config.draw!r} says, got one that does not")
    if workers is None:
        compute = compute_signature(engine.device.type, engine.dtype, engine.tokens_per_batch)
    else:
        compute = workers.compute
    job = Job.of(config, router, compute)
    make_run_folder(job.run)
    with job.run.alone():
        job.output.make_folder()
        return _run(router, job, restart, progress or (lambda _: None), workers)


def _run(router: Router, job: Job, restart: bool, progress: Callable[[Report], object], workers: Workers | None) -> Report:
    manifest, state = begin(job, restart)
    if manifest["complete"]:
        logger.info("%s: already complete", job.output.shown)
        mark(job.output)
        remove_coefficients(state, job.run)
        report = Report(**manifest["report"])
        if job.config.strict and report.routed < report.rows:
            raise ValueError(f"{job.output.shown}: {report.rows - report.routed:,} of its {report.rows:,} rows have an error")
        return report
    pipeline = Pipeline(router, job, Spill(state, router.engine.width), progress, workers)
    with pipeline.recorder.timed("all"):
        pipeline.compute()
        if job.config.over_batch:
            job.check_inputs_unchanged()
            pipeline.decide_over_batch()
        job.check_inputs_unchanged()
        check_no_other_parts(job.output, pipeline.written)
    report = pipeline.recorder.report
    recorded = {name: getattr(report, name) for name in RECORDED}
    write_manifest(job.run, {"config": manifest["config"], "complete": True, "report": recorded, "bytes": pipeline.written})
    mark(job.output)
    remove_coefficients(state, job.run)
    return report

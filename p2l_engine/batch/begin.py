"""How a run begins: it starts anew, resumes an earlier one, or decides again from the coefficients of an earlier one."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

from p2l_engine.batch.contents import differences_of
from p2l_engine.batch.identity import continues, differences
from p2l_engine.batch.job import Job
from p2l_engine.batch.manifest import MANIFEST, Manifest, read_manifest, write_manifest
from p2l_engine.batch.parts import check_no_other_parts, other_names, parts, remove_parts, remove_temporary, unmark
from p2l_engine.batch.run_folder import COSTS, ENDING, adopt_coefficients, has_coefficients, remove_coefficients, state_folder
from p2l_engine.tables.storage import Location

logger = logging.getLogger(__name__)

# What is not told where inputs, or these options, have changed.
FOLLOWS = {"sources": ("source", "write_as"), "partitions_of_files": ("partitions",), "provider_names": ("write_as",)}
EARLIER = "_manifest.json"  # of versions that kept it within the output


@dataclass(frozen=True, slots=True)
class Begun:
    """manifest: of this run, or of the finished one that it is the same as. state: the folder of its coefficients. replaces:
    whether the parts in the output, until this run writes its first, are of other decisions, and changed: which, one line for
    each difference."""

    manifest: Manifest
    state: Path
    replaces: bool = False
    changed: tuple[str, ...] = ()

    def parts_to_keep(self, job: Job) -> dict[str, int]:
        """Names and sizes of the parts that need not be written again. Removes those of other decisions; after a crash at any
        moment, the manifest says whether all were removed. Called before the first part is written."""
        for folder in (job.output, job.run):
            remove_temporary(folder)
        if not self.replaces:
            return parts(job.output)
        write_manifest(job.run, replace(self.manifest, decisions=None))
        remove_parts(job.output)
        write_manifest(job.run, self.manifest)
        return {}


def begin(job: Job, restart: bool) -> Begun:
    """Resumes the run in the output folder; or decides again from its coefficients; or starts a new one.

    restart: remove an earlier run first. Raises ValueError where the folder holds anything but a run, or without restart, a run
    that cannot be continued.
    """
    output, run, config = job.output, job.run, job.config
    state, before = state_folder(config.state, run, job.coefficients), read_manifest(output, run)
    if before is None:
        check_unclaimed(output, run)
        if restart or config.state is None:  # else the folder's name says what its coefficients depend on
            remove_coefficients(state, run)
        return _anew(job, state)
    left = state_folder(None, run, before.coefficients, before.state)
    found = next((folder for folder in (left, state) if has_coefficients(folder)), None)
    copied = None if found else _state_of_copied(before, job)
    if restart or not (
        before.complete or parts(output) or found or copied
    ):  # it computed nothing, such as one with a wrong column
        # Marked first, so that a crash cannot mix the parts of two runs.
        write_manifest(run, replace(before, decisions=None, report=None, parts=None))
        for folder in (left, state):
            remove_coefficients(folder, run)
        remove_parts(output)
        return _anew(job, state)
    if found == left != state:
        logger.warning("%s: continued with its coefficients in %s", output.shown, left)
    state = found or state
    keep = before.keep_coefficients if config.keep_coefficients is None else config.keep_coefficients
    manifest = _manifest(job, state, keep)
    same = before.is_of(job.coefficients, job.decisions)
    if same and before.complete and _is_whole(before, output):
        return Begun(before, state)
    if copied is not None:
        adopt_coefficients(state, copied)
        found = state
    if same:
        unmark(output)
        return Begun(manifest, state)
    changed = _changed(before, job)
    if not continues(before.coefficients, job.coefficients):
        raise ValueError(
            f"{output.shown}: holds a run with other inputs or options: {'; '.join(changed)}; use the same ones, name another "
            "folder, or --restart"
        )
    if found is None and before.report is not None and before.report.resumed:  # else it needed none, or did not end
        raise ValueError(
            f"{output.shown}: holds a run with other options: {'; '.join(changed)}; its coefficients, from which it could be "
            f"decided again, are not in {before.state or left} (--keep-coefficients keeps them): use the same options, name "
            "another folder, or --restart"
        )
    return Begun(manifest, state, True, tuple(changed))


def _state_of_copied(before: Manifest, job: Job) -> Path | None:
    """The folder of the coefficients of the run that this one was renamed or copied from, if they serve this one."""
    state = None if before.state is None else Path(before.state)
    serves = state is not None and has_coefficients(state) and continues(before.coefficients, job.coefficients)
    return state if serves else None


def _anew(job: Job, state: Path) -> Begun:
    manifest = _manifest(job, state, job.config.keep_coefficients)
    write_manifest(job.run, manifest)
    return Begun(manifest, state)


def _manifest(job: Job, state: Path, keep: bool | None) -> Manifest:
    recorded = None if str(state) == job.run.path else str(state)
    return Manifest(job.coefficients, job.decisions, tuple(job.inputs), recorded, keep)


def _changed(before: Manifest, job: Job) -> list[str]:
    """One line for each difference, none for decisions that were only partly removed."""
    lines = differences_of(before.inputs, job.inputs)
    was, now = ({}, {}) if before.decisions is None else (dict(before.decisions), dict(job.decisions))
    for name, options in FOLLOWS.items():
        if (lines and name != "provider_names") or any(was.get(option) != now.get(option) for option in options):
            was[name] = now[name] = None
    return lines + differences(before.coefficients, job.coefficients) + differences(was, now)


def check_unclaimed(output: Location, run: Location) -> None:
    """Raises ValueError where a new run would write over what is no run's or another's, or into another's folders."""
    if output.is_local and os.path.exists(output.path) and not os.path.isdir(output.path):
        raise ValueError(f"output: expected a folder, got the file {output.shown}; name another one")
    around = next((path for path in Path(run.path).parents if _is_of_a_run(path)), None) if output.is_local else None
    if around is not None:
        raise ValueError(
            f"output: {output.shown} is within {around}, which is another run's, so that readers would find both outputs in "
            "one; name another folder"
        )
    strange = [name for name in run.names() if not name.startswith((".", "coefficients-")) and name != COSTS]
    if strange:
        raise ValueError(
            f"{run.shown}: expected the folder of {output.shown}'s run, found {', '.join(strange[:3])}; name another output"
        )
    others = other_names(output)
    if EARLIER in others:
        raise ValueError(
            f"{output.shown}: holds a run of an earlier version of p2l-engine, which cannot be resumed; name another folder, "
            "or remove this one"
        )
    if others:
        raise ValueError(
            f"{output.shown}: expected an empty folder or the output of an earlier batch run, found {', '.join(others[:3])}; "
            "name another folder"
        )
    if parts(output):
        raise ValueError(
            f"{output.shown}: holds the parts of a run whose own folder is not beside it: if it was renamed or copied, rename "
            f"or copy its folder NAME{ENDING} to {run.shown} too{_without_output(run)}; otherwise name another folder"
        )


def _is_of_a_run(folder: Path) -> bool:
    """Whether a folder is a run's output or its own folder."""
    own = folder if folder.suffix == ENDING else Path(f"{folder}{ENDING}")
    return (own / MANIFEST).is_file()


def _without_output(run: Location) -> str:
    """The folders of runs whose outputs are not beside them: one may be of an output that was renamed."""
    if not run.is_local:
        return ""
    folders = sorted(Path(run.path).parent.glob(f"*{ENDING}"))
    left = [each.name for each in folders if not each.with_name(each.name.removesuffix(ENDING)).exists()]
    return f" (without an output there: {', '.join(left[:3])})" if left else ""


def _is_whole(finished: Manifest, output: Location) -> bool:
    """Whether a finished run has all its parts, of the same sizes."""
    expected, found = finished.parts or {}, parts(output)
    check_no_other_parts(output, expected)
    changed = [name for name, size in expected.items() if found.get(name) != size]
    if changed:
        logger.warning(
            "%s: %d parts of the finished run are missing or changed, and are written again: %s", output.shown, len(changed),
            ", ".join(changed[:3]),
        )  # fmt: skip
    return not changed

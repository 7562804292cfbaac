"""The manifest of a run, in the folder beside its output: the run's identity, whether it is complete, and where its
coefficients are."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from p2l_engine.batch.identity import differences
from p2l_engine.batch.job import Job
from p2l_engine.batch.parts import check_no_other_parts, is_temporary, other_names, parts, remove_parts, unmark
from p2l_engine.batch.report import Report
from p2l_engine.batch.run_folder import ENDING, has_coefficients, remove_coefficients, state_folder
from p2l_engine.tables.storage import Location

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
EARLIER = "_manifest.json"  # of versions that kept it within the output


def read_manifest(output: Location, run: Location) -> dict[str, Any] | None:
    """The manifest of an earlier run: config (its identity), complete, and state or report and bytes; None if there is none.

    Raises ValueError where the output holds anything else, or parts whose run's own folder is not beside it.
    """
    if not (run / MANIFEST).exists():
        _check_unclaimed(output, run)
        return None
    manifest = _parsed((run / MANIFEST).read())
    if manifest is None:
        raise ValueError(
            f"{(run / MANIFEST).shown}: expected the manifest of a batch run; remove {run.shown} and {output.shown}, or name "
            "another folder"
        )
    return manifest


def _check_unclaimed(output: Location, run: Location) -> None:
    """Raises ValueError where a new run would write over what is no run's, or another's."""
    strange = [name for name in run.names() if not name.startswith((".", "coefficients-"))]
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
            f"or copy its folder NAME{ENDING} to {run.shown} too; otherwise name another folder"
        )


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        manifest = json.loads(text)
    except ValueError:
        return None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("complete"), bool):
        return None
    if not isinstance(manifest.get("config"), dict):
        return None
    if manifest["complete"]:
        try:
            if Report(**manifest["report"]).parts != len(dict(manifest["bytes"])):
                return None
        except (KeyError, TypeError, ValueError):
            return None
    return manifest


def write_manifest(run: Location, manifest: Mapping[str, Any]) -> None:
    (run / MANIFEST).write((json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())


def begin(job: Job, restart: bool) -> tuple[dict[str, Any], Path]:
    """Resumes the run in the output folder, or starts a new one: its manifest and the folder of its coefficients.

    restart: remove an earlier run. Raises ValueError where the folder holds anything but runs, or a run of another identity
    and not restart.
    """
    output, run = job.output, job.run
    state = state_folder(job.config.state, run, job.identity)
    before = read_manifest(output, run)
    old = None if before is None else before["config"]
    left = None if before is None or old is None else state_folder(None, run, old, before.get("state"))
    if before is not None and old != job.identity:
        computed_nothing = not (
            before["complete"] or parts(output) or has_coefficients(left)
        )  # such as one with a wrong column
        if not (restart or computed_nothing):
            raise ValueError(f"{output.shown}: {_why_not_resumed(before, job)}")
        restart = True
    if before is not None and not restart:
        if before["complete"] and _is_whole(before, output):
            return before, state
        before["complete"] = False
        unmark(output)
        if left is not None and left != state and has_coefficients(left):
            logger.warning("%s: resumed with its state in %s", output.shown, left)
            state = left
        state.mkdir(parents=True, exist_ok=True)
        _remove_temporary(output)
        return before, state
    _remove_temporary(output)
    if before is not None:
        write_manifest(run, {"config": {}, "complete": False})  # first, so that a crash cannot mix the parts of two runs
        remove_parts(output)
    for folder in (left, state):
        if folder is not None:
            remove_coefficients(folder, run)
    manifest = {"config": job.identity, "complete": False, "state": None if job.config.state is None else str(state)}
    run.make_folder()
    write_manifest(run, manifest)
    state.mkdir(parents=True, exist_ok=True)
    return manifest, state


def _why_not_resumed(before: Mapping[str, Any], job: Job) -> str:
    if not before["config"]:
        return "holds an earlier run that was only partly removed; name another folder, or --restart"
    changed = "; ".join(differences(before["config"], job.identity))
    return f"holds a run with other inputs or options: {changed}; use the same ones, name another folder, or --restart"


def _remove_temporary(output: Location) -> None:
    """Removes what interrupted writes left."""
    if output.is_local:
        for temporary in Path(output.path).glob(".*.tmp"):
            if is_temporary(temporary.name):
                temporary.unlink()


def _is_whole(finished: dict[str, Any], output: Location) -> bool:
    """Whether a finished run has all its parts, of the same sizes."""
    expected, found = finished["bytes"], parts(output)
    check_no_other_parts(output, expected)
    changed = [name for name, size in expected.items() if found.get(name) != size]
    if changed:
        logger.warning(
            "%s: %d parts of the finished run are missing or changed, and are written again: %s", output.shown, len(changed),
            ", ".join(changed[:3]),
        )  # fmt: skip
    return not changed

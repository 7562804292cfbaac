"""The output folder's manifest, which remembers what its run was asked for: a run goes on only where all of it is the same."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from p2l_engine.batch.blocks import BYTES
from p2l_engine.batch.config import Asked
from p2l_engine.batch.report import Report
from p2l_engine.engine import Engine
from p2l_engine.router import Router
from p2l_engine.tables.storage import File, Place, find

logger = logging.getLogger(__name__)

MANIFEST = "_manifest.json"
STATE = "_state"
SAMPLES, SAMPLE = 64, 1 << 16  # of a large file: so many pieces of so many bytes, evenly spread


def identity(asked: Asked, router: Router, files: Sequence[File], computed: str) -> dict[str, Any]:
    """Everything that the output depends on, as JSON has it. computed: ``how``."""
    elsewhere = ("inputs", "output", "state", "strict", "max_share", "min_share")
    options = {name: value for name, value in asdict(asked).items() if name not in elsewhere}
    shares = {"max_share": asked.max_share, "min_share": asked.min_share}
    engine = router.engine
    found = {
        "version": version("p2l-engine"),
        "inputs": seen(files),
        **options,
        **{name: {str(models): share for models, share in given.items()} for name, given in shares.items()},
        "bytes_per_part": BYTES,
        "checkpoint": _checkpoint(engine),
        "computed": computed,
        "catalog": {model.name: model.cost for model in router.catalog.models},
        "unit": router.catalog.unit,
        "opponents": router.q.tolist(),
        "objective": router.objective,
        "seed": router.seed,
    }
    parsed: dict[str, Any] = json.loads(json.dumps(found))
    return parsed


def seen(files: Sequence[File]) -> list[list[Any]]:
    """Path, size and time of each input file."""
    return [[file.place.shown, file.size, file.modified] for file in files]


def how(device: str, dtype: torch.dtype, tokens_per_batch: int) -> str:
    """In what coefficients are computed; device: cpu, cuda."""
    return f"{device} {dtype}, {tokens_per_batch} tokens a batch".replace("torch.", "")


def contents(engine: Engine) -> dict[str, str]:
    """A digest of each of the checkpoint's files: of small ones whole, of weights their size and a sample, since hashing
    gigabytes would take as long as a small batch."""
    files = [file for file in sorted(engine.folder.iterdir()) if file.is_file()]
    return {file.name: _digest(file) for file in files if file.name not in ("README.md", "evaluation.json")}


def _digest(file: Path) -> str:
    size = file.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with file.open("rb") as opened:
        for piece in range(SAMPLES):
            opened.seek(max(0, size - SAMPLE) * piece // (SAMPLES - 1))
            found.update(opened.read(SAMPLE))
    return found.hexdigest()


def _checkpoint(engine: Engine) -> dict[str, list[str | int]]:
    """Weights by their time too: on one machine it says that they were written again."""
    found = contents(engine)
    weights = {name: (engine.folder / name).stat().st_mtime_ns for name in found if name.endswith(".safetensors")}
    return {name: [digest, weights.get(name, 0)] for name, digest in found.items()}


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each thing that is not what it was."""
    lines = []
    for name in {**before, **now}:
        was, is_now = before.get(name), now.get(name)
        if was == is_now:
            continue
        if name == "inputs":  # [path, size, time] each
            was, is_now = ({file[0]: file[1:] for file in files or ()} for files in (was, is_now))
        if isinstance(was, dict) and isinstance(is_now, dict):
            names = [key for key in {**was, **is_now} if was.get(key) != is_now.get(key)]
            lines.append(f"{name}: {', '.join(names) or 'their order'}")
        else:
            lines.append(f"{name}: was {was!r:.60}, is {is_now!r:.60}")
    return lines


def read_manifest(output: Place) -> dict[str, Any] | None:
    """What an earlier run left in the output folder. Raises ValueError where the folder holds something else."""
    names = [name for name in output.names() if not _is_stray(name)]
    if MANIFEST in names:
        manifest = _parsed((output / MANIFEST).read())
        if manifest is None:
            raise ValueError(
                f"{(output / MANIFEST).shown}: expected the manifest of a batch run; remove it, or name another folder"
            )
        return manifest
    if names:
        raise ValueError(
            f"{output.shown}: expected an empty folder or the output of an earlier batch run, found {', '.join(names[:3])}; "
            "name another folder"
        )
    return None


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        manifest = json.loads(text)
    except ValueError:
        return None
    sound = (
        isinstance(manifest, dict) and isinstance(manifest.get("asked"), dict) and isinstance(manifest.get("complete"), bool)
    )
    if sound and manifest["complete"]:
        try:
            sound = Report(**manifest["report"]).parts == len(dict(manifest["bytes"]))
        except (KeyError, TypeError, ValueError):
            return None
    return manifest if sound else None


def write_manifest(output: Place, manifest: Mapping[str, Any]) -> None:
    (output / MANIFEST).write((json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())


def state_folder(given: str | None, output: Place, now: dict[str, Any], known: str | None = None) -> Path:
    """A folder of a run's own: whatever else is kept beside it is never read, and never removed. given: what it is to lie in
    (None: the output); known: where an unfinished run's manifest says that it is."""
    # A folder that is moved takes its own state along; elsewhere, two outputs' states are two.
    elsewhere = output.path if given or known else None
    name = f"run-{hashlib.sha256(json.dumps([elsewhere, now]).encode()).hexdigest()[:16]}"
    if known is not None and Path(known).name == name:  # else it is a copy's, and not this output's to remove
        return Path(known)
    return (Path(output.path) / STATE if given is None else Path(given).expanduser().absolute()) / name


def remove_state(state: Path) -> None:
    """Its run's folder, and the one for states where that is in the output and nothing else is in it."""
    if state.is_dir():
        shutil.rmtree(state)
    if state.parent.name == STATE and state.parent.is_dir() and not any(state.parent.iterdir()):
        state.parent.rmdir()


def begin(asked: Asked, now: dict[str, Any], output: Place, restart: bool) -> tuple[dict[str, Any], Path]:
    """The manifest of the run that is there and goes on, or of a new one; and its state's folder. Raises ValueError where the
    folder holds something else, or a run of something else that is not to be thrown away (restart)."""
    state = state_folder(asked.state, output, now)
    before = read_manifest(output)
    left = None if before is None else state_folder(None, output, before["asked"], before.get("state"))
    if before is not None and before["asked"] != now and not (before["complete"] or parts(output) or _any_in(left)):
        restart = True  # it came to nothing, such as one with a wrong name of a column: nothing is lost
    if before is not None and before["asked"] != now and not restart:
        said = "; ".join(changes(before["asked"], now)) if before["asked"] else "its clearing was cut short"
        raise ValueError(
            f"{output.shown}: holds a run that was asked for something else: {said}; undo that, name another folder, or "
            "--restart"
        )
    if output.is_local:
        for stray in Path(output.path).glob(".*.tmp"):
            if _is_stray(stray.name):
                stray.unlink()
    if before is not None and not restart:
        if before["complete"]:
            _check_parts(before, output)
        if left is not None and left != state and _any_in(left):
            logger.warning("%s goes on with its state in %s", output.shown, left)
            state = left
        state.mkdir(parents=True, exist_ok=True)
        return before, state
    if before is not None:
        # Cut short from here on, it is nobody's run: what is left of the old one must not pass for parts of the new one.
        write_manifest(output, {"asked": {}, "complete": False})
        for name in parts(output):
            (output / name).remove()
    for folder in (left, state):
        if folder is not None:
            remove_state(folder)
    manifest = {"asked": now, "complete": False, "state": asked.state and str(state)}
    write_manifest(output, manifest)
    state.mkdir(parents=True, exist_ok=True)
    return manifest, state


def _any_in(folder: Path | None) -> bool:
    return folder is not None and folder.is_dir() and any(folder.iterdir())


def _is_stray(name: str) -> bool:
    """Whether it is what a write that was killed leaves."""
    return name.startswith((".part-", f".{MANIFEST}.")) and name.endswith(".tmp")


def _check_parts(finished: dict[str, Any], output: Place) -> None:
    """Parts that are gone, or are longer or shorter than they were, make a finished run an unfinished one."""
    expected, found = finished["bytes"], parts(output)
    check_alone(output, expected)
    changed = [name for name, size in expected.items() if found.get(name) != size]
    if changed:
        logger.warning(
            "%s: %d parts of the finished run are gone or changed, and made again: %s", output.shown, len(changed),
            ", ".join(changed[:3]),
        )  # fmt: skip
        finished["complete"] = False


def check_alone(output: Place, expected: Mapping[str, int]) -> None:
    """Raises ValueError where there are parts of no run of ours, which readers of the folder would read too."""
    others = [name for name in parts(output) if name not in expected]
    if others:
        raise ValueError(f"{output.shown}: {', '.join(others[:3])}: expected parts of this run alone; remove them")


def part_name(number: int) -> str:
    return f"part-{number:06d}.parquet"


def check_unchanged(asked: Asked, now: dict[str, Any]) -> None:
    """Raises ValueError where an input is not what it was when the run began."""
    changed = changes({"inputs": now["inputs"]}, {"inputs": seen(find(asked.inputs, logger.debug))})
    if changed:
        raise ValueError(f"{'; '.join(changed)}: changed while it was read; run again with --restart")


def parts(output: Place) -> dict[str, int]:
    """Names of the parts that are written, and their bytes."""
    return {name: size for name, size in output.sizes().items() if name.startswith("part-") and name.endswith(".parquet")}

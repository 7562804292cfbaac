"""The output folder: the parts of a run, and ``_SUCCESS``, a file of no bytes, once it is complete. Nothing else, so that
readers of tables open the folder as it is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import get_args
from urllib.parse import quote

from p2l_engine.batch.config import FormatName
from p2l_engine.tables.storage import Location

SUCCESS = "_SUCCESS"
STEMS = ("part-", "errors-")


def part_name(number: int, format_name: FormatName) -> str:
    """The name of a block's part."""
    return f"part-{number:06d}.{format_name}"


def part_of(model: str | None, number: int, format_name: FormatName) -> str:
    """The name of a model's part, of letters and digits that every store and shell takes; None: of rows without a model."""
    stem = "errors" if model is None else f"part-{quote(model, safe='')}"
    return f"{stem}-{number:06d}.{format_name}"


def parts(output: Location) -> dict[str, int]:
    """Names and sizes in bytes of the written parts."""
    endings = tuple(f".{name}" for name in get_args(FormatName))
    return {name: size for name, size in output.sizes().items() if name.startswith(STEMS) and name.endswith(endings)}


def other_names(output: Location) -> list[str]:
    """Names of what is in the folder beside parts, ``_SUCCESS`` and what interrupted writes left."""
    written = parts(output)
    return [name for name in output.names() if name not in written and name != SUCCESS and not is_temporary(name)]


def is_temporary(name: str) -> bool:
    """Whether an interrupted write of the output left this file."""
    return name.startswith((*(f".{stem}" for stem in STEMS), f".{SUCCESS}.")) and name.endswith(".tmp")


def check_no_other_parts(output: Location, expected: Mapping[str, int]) -> None:
    """Raises ValueError where there are parts that this run did not write, since readers of the folder would read them too."""
    others = [name for name in parts(output) if name not in expected]
    if others:
        raise ValueError(f"{output.shown}: {', '.join(others[:3])}: expected only parts of this run; remove these files")


def remove_temporary(folder: Location) -> None:
    """Removes what interrupted writes of the output left: in the run's own folder, or where that is on another disk, in the
    output."""
    if folder.is_local:
        for temporary in Path(folder.path).glob(".*.tmp"):
            if is_temporary(temporary.name):
                temporary.unlink()


def remove_parts(output: Location) -> None:
    """Removes all parts; first ``_SUCCESS``, so that no reader takes what is left for the whole. They stay removed when the
    power fails, so that the manifest may say so."""
    unmark(output)
    for name in parts(output):
        (output / name).remove()
    if output.is_local:
        folder = os.open(output.path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def mark(output: Location, run: Location) -> None:
    """Says that the run is complete. Removes what a kill during this write left. run: its own folder."""
    if SUCCESS not in output.names():
        for folder in (output, run):
            remove_temporary(folder)
        (output / SUCCESS).write(b"", run)


def unmark(output: Location) -> None:
    """Says that the run is not complete."""
    if SUCCESS in output.names():
        (output / SUCCESS).remove()

"""Where rows come from: the names that the output gives input files, and the columns that hold them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from p2l_engine.batch.blocks import Span
from p2l_engine.tables.storage import File

SOURCE_COLUMNS = ("source_file", "source_row")


def source_names(files: Sequence[File]) -> dict[str, str]:
    """The name of each file in the output, by its location: its path within the input that names it, which is a folder, the
    folder of a file, or the folder below which a glob chooses. Where that gives two files one name, it is the path of each
    within the folder that holds all of them, and for files of several stores their whole URIs. A copied or renamed folder gives
    the same names.
    """
    found = {file.shown: file.within for file in files}
    if len(set(found.values())) == len(found):
        return found
    if len({path.partition("://")[0] if "://" in path else "" for path in found}) > 1:
        return {path: path for path in found}
    folder = os.path.commonpath([os.path.dirname(path) for path in found])
    return {path: os.path.relpath(path, folder) for path in found}


def source_columns(spans: Sequence[Span], names: Mapping[str, str]) -> dict[str, pa.Array]:
    """The columns ``source_file`` and ``source_row`` of these rows. names: see ``source_names``."""
    counts = [span.rows for span in spans]
    files = pa.array([names[span.file.shown] for span in spans], pa.string())
    rows = [np.arange(span.first, span.first + span.rows) for span in spans]
    return {
        "source_file": files.take(pa.array(np.repeat(np.arange(len(spans)), counts))),
        "source_row": pa.array(np.concatenate([np.zeros(0, np.int64), *rows])),
    }

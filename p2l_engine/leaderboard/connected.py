"""Connected components of small graphs, in numpy: ranking models needs no scipy."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt


def components(edges: npt.NDArray[np.bool_], connection: Literal["weak", "strong"] = "weak") -> npt.NDArray[np.integer[Any]]:
    """The component [M] of each node, numbered from 0 by first node. edges [M, M]: from each row's node to the column's.

    weak: there is a path whatever the edges' directions; strong: there is one in both directions.
    """
    reaches = _closure(edges | edges.T if connection == "weak" else edges)
    first = (reaches & reaches.T).argmax(1)
    return np.unique(first, return_inverse=True)[1]


def reachable(edges: npt.NDArray[np.bool_], start: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Whether there is a path along the edges [M, M] from some node of ``start`` [M] to each node [M]."""
    return np.asarray(_closure(edges)[start].any(axis=0), np.bool_)


def _closure(edges: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """[M, M]: whether there is a path from the row's node to the column's, of any length, or of none."""
    reaches = edges | np.eye(len(edges), dtype=bool)
    while True:  # paths of twice the length each time
        further = reaches.astype(np.float32) @ reaches.astype(np.float32) > 0
        if (further == reaches).all():
            return reaches
        reaches = further

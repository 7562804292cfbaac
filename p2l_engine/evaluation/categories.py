"""Which prompts belong to which category."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def rows_by_category(
    categories: Sequence[str], n: int, weights: npt.ArrayLike | None = None
) -> dict[str, npt.NDArray[np.int64]]:
    """The rows of each category, in alphabetical order of the categories' names. categories [N]: each prompt's; n: the number
    of prompts; weights [N]: each prompt's. Raises ValueError for another number of categories than n, and for a category whose
    prompts have no weight."""
    if len(categories) != n:
        raise ValueError(f"categories: expected one for each of the {n} prompts, got {len(categories)}")
    names, of = np.unique(np.array(categories, object), return_inverse=True)
    rows_of = np.split(np.argsort(of, kind="stable"), np.cumsum(np.bincount(of))[:-1]) if n else []
    found = dict(zip(names.tolist(), rows_of, strict=True))
    weight = np.ones(n) if weights is None else np.asarray(weights, np.float64)
    for name, rows in found.items():
        if not weight[rows].sum() > 0:
            raise ValueError(
                f"weights: expected a prompt of a weight above 0 in the category {name!r}, got none: leave its prompts out"
            )
    return found

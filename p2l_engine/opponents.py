"""What win rates are measured against: a weight for each of a checkpoint's models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from p2l_engine.arguments import finite_number
from p2l_engine.routing import arrays

Opponents = Literal["uniform"] | Mapping[str, float] | Sequence[float] | npt.NDArray[np.floating[Any]]


def weights_of(opponents: Opponents, models: tuple[str, ...]) -> npt.NDArray[np.float64]:
    """[M], summing to 1: "uniform", {name: weight} (0 for the others) or an array [M]. Raises ValueError."""
    if isinstance(opponents, str):
        if opponents != "uniform":
            raise ValueError(f"opponents: expected 'uniform', a mapping or weights, got {opponents!r}")
        return np.full(len(models), 1.0 / len(models))
    if isinstance(opponents, Mapping):
        unknown = sorted(set(opponents) - set(models), key=str)
        if unknown:
            raise ValueError(
                f"opponents: the checkpoint does not know {', '.join(map(str, unknown))}; it knows {', '.join(models)}"
            )
        opponents = [finite_number(f"opponents of {name}", opponents.get(name, 0.0), "a weight >= 0") for name in models]
    return arrays.opponents(opponents, (1, len(models)), "opponents").reshape(len(models))

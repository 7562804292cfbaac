"""The native core's loss of votes: checked arrays in and out. Formulas: csrc/votes.c."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from p2l_engine.native import binding
from p2l_engine.native.binding import array, lib

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

PROMPTS_PER_THREAD = 64
WIDEST = 300.0  # between coefficients of a prompt, and of log lambda: their products are far from overflow and underflow


class VoteArrays(NamedTuple):
    """V votes by prompt: prompt n has the votes bounds[n] to bounds[n + 1]. bounds [N + 1]; a, b, outcome, weight [V]."""

    bounds: Int64
    a: Int64
    b: Int64
    outcome: Int64
    weight: Float64


def votes_loss(
    theta: Float64, excess: Float64 | None, grounded: bool, votes: VoteArrays, outcomes: int, half_ties: bool
) -> tuple[Float64, Float64, Float64]:
    """The weighted loss of each prompt's votes [N], and its derivatives by theta [N, M] and by lambda [N].

    theta [N, M], no two of a prompt (nor one and the ground, 0) further apart than ``WIDEST``; excess = lambda - 1 [N], None
    without ties; outcomes: how many the feedback model has; half_ties: whether ties count as half a win and half a loss.
    """
    n, m = theta.shape
    shift = theta.max(1) if m else np.zeros(n)
    shift = np.maximum(shift, 0.0) if grounded else shift
    t = np.ascontiguousarray(theta - shift[:, None])
    found = np.empty(n), np.zeros((n, m)), np.empty(n)
    lib.p2l_votes_loss(
        _in(t), _in(np.exp(t)), _in(np.exp(-shift) if grounded else None), _in(excess),
        *(array("int64_t", each) for each in votes[:4]), _in(votes.weight), outcomes, half_ties,
        n, m, binding.threads(n, PROMPTS_PER_THREAD), *(array("double", each, writable=True) for each in found),
    )  # fmt: skip
    return found


def _in(values: Any) -> object:
    return array("double", values)

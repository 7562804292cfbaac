"""What a voter says; loads no torch."""

from __future__ import annotations

from enum import IntEnum

RK_LEAST_LOG_LAMBDA = 0.02  # of rk's ties: the published code clamps log lambda to at least this


class Outcome(IntEnum):
    """What a voter says of the answers of models A and B; the last axis of every outcome tensor."""

    A = 0
    B = 1
    TIE = 2
    BOTH_BAD = 3

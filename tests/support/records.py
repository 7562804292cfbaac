"""Records of decisions for tests of the log, and a process that logs until it is killed.

    python -m tests.support.records STORE

prints the number of records that were written, again and again.
"""

from __future__ import annotations

import sys
import uuid
from typing import Any

from p2l_engine.decision_log.log import DecisionLog
from p2l_engine.decision_log.record import Attempt, Record

START = 1_800_000_000.0


def new_id(number: int | None = None) -> str:
    """A decision's id, by its number or at random."""
    return f"dec_{uuid.uuid4().hex if number is None else f'{number:032x}'}"


def record(number: int | None = None, **changes: Any) -> Record:
    """A decision that was answered, ``number`` seconds after START."""
    values: dict[str, Any] = {
        "id": new_id(number),
        "time": START + (number or 0),
        "key": None,
        "session": "5e55",
        "turns_hash": "7a54",
        "turns": None,
        "api": "chat",
        "asked": "auto",
        "chosen": "alpha",
        "model": "alpha",
        "policy": {"alpha": 0.75, "beta": 0.25},
        "propensity": 0.75,
        "propensity_error": 0.0,
        "candidates": ("alpha", "beta"),
        "win_rate": 0.6,
        "score": 0.4,
        "budget": None,
        "expected_cost": 0.002,
        "cost": 0.0015,
        "estimated": False,
        "tokens_in": 20,
        "tokens_cached": 0,
        "tokens_out": 300,
        "streamed": False,
        "status": 200,
        "outcome": "answered",
        "attempts": (Attempt("alpha", "first", 200, None, 1.25),),
        "latency": {"parse": 0.1, "total": 1250.0},
    }
    return Record(**{**values, **changes})


def main(store: str) -> None:
    log, number = DecisionLog(store), 0
    while True:
        for _ in range(7):
            log.add(record(number))
            number += 1
        if log.flush():
            print(number, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

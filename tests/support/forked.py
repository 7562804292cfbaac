"""A process that forks while its threads wait, and while they are at work: every child must get the parent's answers, and none
may hang.

Arguments: which functions to call (``arrays`` or ``engine``), and ``torch`` where torch alone has started threads before the
fork. A child that hangs ends with its threads' tracebacks.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from p2l_engine import routing

PATIENCE = 300.0  # seconds: a child needs about one

Answers = Callable[[], list[Any]]


def of_arrays() -> Answers:
    rng = np.random.default_rng(0)
    theta, q, costs = rng.normal(size=(1000, 20)), np.full(20, 0.05), np.arange(1.0, 21.0)
    seconds = routing.Resource("seconds", costs[::-1].copy(), 18.0)

    def answers() -> list[Any]:
        v = routing.win_rates(theta, q)
        each = routing.solve_budget(v, costs, 3.0)
        return [
            v,
            each.value,
            routing.bt_score(theta, q, each.value),
            routing.solve_batch_budget(v, costs, 3.0).value,
            routing.solve_batch_budget(v, costs, 3.0, max_share=np.full(20, 0.3)).value,
            routing.solve_batch_budget(v[:50], costs, 3.0, max_share=np.full(20, 0.3), solver="highs").value,
            routing.solve_budget(v, costs, 3.0, solver="highs").value,
            routing.solve(routing.Problem(v, costs, 3.0, resources=[seconds])).value,
            routing.frontier(v, costs).value,
        ]

    return answers


def of_engine(folder: Path) -> Answers:
    import torch

    from p2l_engine import Engine, Leaderboard
    from tests.support import tiny

    engine = Engine.from_pretrained(tiny.write(folder / "checkpoint"), device="cpu", dtype=torch.float32)
    q, eta = np.full(5, 0.2), np.ones(12)

    def answers() -> list[Any]:
        found = engine.coefficients(["hello", "x" * 900, "y" * 500] * 4)
        ties = routing.win_rates(found.theta, q, "half-ties", eta, "rk-reparam")
        return [found.theta, ties, np.array(Leaderboard.over(found).coefficients(found.models))]

    return answers


def child(answers: Answers, expected: list[Any] | None) -> int:
    """Forks; the child's exit status: 0 where it gets the expected answers (None: any), 1 where others."""
    pid = os.fork()
    if pid == 0:
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        found = answers()
        same = zip(found, found if expected is None else expected, strict=True)
        os._exit(0 if all(np.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in same) else 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(what: str, *how: str) -> None:
    with TemporaryDirectory() as folder:
        answers = of_engine(Path(folder)) if what == "engine" else of_arrays()
        if "torch" in how:  # the arrays' own threads have not run
            import torch

            torch.randn(1000, 1000).exp() @ torch.randn(1000, 1000)
            raise SystemExit(child(answers, None))
        right, over = answers(), threading.Event()
        if child(answers, right):
            raise SystemExit("the child failed whose parent's threads waited")

        def work() -> None:
            while not over.is_set():
                answers()

        threads = [threading.Thread(target=work, daemon=True) for _ in range(2)]
        for thread in threads:
            thread.start()
        for attempt in range(5):
            time.sleep(0.02 * attempt)
            if child(answers, right):
                raise SystemExit(f"the child of fork {attempt} failed")
        over.set()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main(*sys.argv[1:])

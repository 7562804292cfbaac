"""A budget and shares over millions of rows, solved from coefficients on disk. Part of python -m bench.batch.

The coefficients, the budget and the caps on shares are those of ``batch_budgets``, for ten models; all rows differ.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from bench import batch_budgets, subjects
from bench.measure import Peak, nameless_files, own
from p2l_engine import Catalog, Engine, Router
from p2l_engine.batch.config import ROWS_PER_PART
from p2l_engine.batch.decide import Decider
from p2l_engine.batch.deduplicator import BLOCK_STRIDE
from p2l_engine.batch.first_pass import SpilledWinRates
from p2l_engine.batch.spill import Spill
from p2l_engine.catalog import CatalogModel
from p2l_engine.constraints import Constraints
from p2l_engine.routing.scratch import Scratch, parts

MODELS = 10


def solve_spilled(rows: int, shares: bool) -> dict[str, float]:
    """Seconds, CPU seconds and memory of one solution, in this process. shares: whether it has caps beside the budget."""
    with tempfile.TemporaryDirectory() as folder:
        return _solve(rows, shares, Path(folder))


def _solve(rows: int, shares: bool, folder: Path) -> dict[str, float]:
    device = torch.device("cpu")
    engine = Engine(subjects.checkpoint("tiny", MODELS, device, torch.float32), device)
    costs = batch_budgets.model_costs(MODELS)
    router = Router(engine, Catalog(tuple(CatalogModel(n, float(c)) for n, c in zip(engine.models, costs, strict=True))))
    spill = Spill(folder, engine.width)
    _, budget, caps = batch_budgets.rows_of(MODELS)
    capped = [(int(i), cap.at_most) for cap in caps for i in np.atleast_1d(cap.models)] if shares else []
    most: dict[str | tuple[str, ...], float] = {engine.models[i]: at_most for i, at_most in capped}
    scratch, sizes = Scratch(folder), []
    column = scratch.column(np.int64)
    for block, first in enumerate(range(0, rows, ROWS_PER_PART)):
        n = min(ROWS_PER_PART, rows - first)
        outputs = np.zeros((n, engine.width), np.float32)
        outputs[:, :MODELS] = batch_budgets.coefficients(n, MODELS, seed=block)
        spill.write(block, "", outputs)
        column.add(block * BLOCK_STRIDE + np.arange(n))
        sizes.append(n)
    rates = SpilledWinRates(Decider(router, spill.take), column.array(), sizes, scratch)
    start, cpu = time.perf_counter(), time.process_time()
    with Peak(own) as memory, Peak(nameless_files) as files:
        solved = router.solve(rates, Constraints(budget, "batch", most))
        spent = sum(float(solved.of(some).cost.sum()) for some in parts(rows))  # read as the writer does
    seconds, used = time.perf_counter() - start, time.process_time() - cpu
    return {
        "seconds": seconds,
        "CPU seconds": used,
        "MiB of memory beyond the model": 1024 * (memory.most - memory.first),
        "GiB of temporary files": files.most,
        "GiB of coefficients on disk": rows * engine.width * 4 / 2**30,
        "mean cost / budget": spent / rows / budget,
        "gap": float(solved.gap),
    }

"""Attention on a CPU by length: the native core beside torch's scaled_dot_product_attention: python -m bench.attention.

Heads as SmolLM2-135M's: 9 of 64 columns, which share 3 key heads. One prompt of each length, and as many as 4,096 tokens hold.
torch gets one call for each run of prompts of one length, as on GPUs (``p2l_engine.backbone.attention``). The two take turns;
CPU seconds of all threads, minima. float32 rounded: as int8 has it (``decoder.attention``), beside torch's in float32.
gflop_s: of the products that a query needs with the keys up to its own, over its time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bench.setting import positive, write_rows
from p2l_engine.backbone.attention import over_runs
from p2l_engine.backbone.packing import Packed
from p2l_engine.native import binding, decoder

HEADS, KV_HEADS, SIZE, TOKENS = 9, 3, 64, 4096
LENGTHS = (8, 16, 24, 32, 64, 128, 256, 512, 1024, 4096)
SECONDS = 0.5  # of turns for each row, at least three


@dataclass(frozen=True)
class Row:
    """CPU milliseconds of one call; wall_times_faster: of time on the clock, with all threads."""

    dtype: str
    threads: int
    prompts: int
    length: int
    milliseconds: float
    torch_milliseconds: float
    times_faster: float
    wall_times_faster: float
    gflop_s: float
    instruction_set: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=positive, nargs="+", default=[1, 2])
    parser.add_argument("--lengths", type=positive, nargs="+", default=LENGTHS)
    parser.add_argument("--csv", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    console, rows = Console(), []
    instruction_set = f"{binding.isa()}; torch {torch.backends.cpu.get_cpu_capability()}"
    table = Table(title=instruction_set, title_justify="left", box=None)
    for column in ("type", "threads", "prompts", "length", "ms", "torch ms", "faster", "clock", "GFLOP/s"):
        table.add_column(column, justify="right")
    for dtype, rounded in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, False)):
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            for length in arguments.lengths:
                for prompts in sorted({1, max(1, TOKENS // length)}):
                    row = measure(dtype, rounded, threads, prompts, length, instruction_set)
                    rows.append(row)
                    table.add_row(
                        row.dtype, str(threads), str(prompts), str(length), f"{row.milliseconds:.3f}",
                        f"{row.torch_milliseconds:.3f}", f"{row.times_faster:.2f}", f"{row.wall_times_faster:.2f}",
                        f"{row.gflop_s:.0f}",
                    )  # fmt: skip
    console.print(table)
    if arguments.csv:
        write_rows(arguments.csv, rows, torch.device("cpu"))


def measure(dtype: torch.dtype, rounded: bool, threads: int, prompts: int, length: int, instruction_set: str) -> Row:
    packed, tokens = Packed.of([np.zeros(length, np.int32)] * prompts), prompts * length
    # Queries, keys and values, as a product leaves them.
    projected = torch.randn(tokens, (HEADS + 2 * KV_HEADS) * SIZE).to(dtype)
    q = projected[:, : HEADS * SIZE].view(tokens, HEADS, SIZE)
    kv, out = torch.randn(tokens, 2, KV_HEADS, SIZE).to(dtype), torch.empty(tokens, HEADS * SIZE, dtype=dtype)
    ours = partial(decoder.attention, q, kv, packed.starts, packed.key_starts, False, out, rounded)
    (cpu, wall), (torch_cpu, torch_wall) = turns(ours, partial(over_runs, q, kv, packed, False, out))
    products = 4 * prompts * HEADS * SIZE * length * (length + 1) / 2
    name = str(dtype).removeprefix("torch.") + " rounded" * rounded
    return Row(
        name, threads, prompts, length, 1e3 * cpu, 1e3 * torch_cpu, torch_cpu / cpu, torch_wall / wall, products / cpu / 1e9,
        instruction_set,
    )  # fmt: skip


def turns(*runs: Callable[[], object]) -> list[tuple[float, float]]:
    """The least CPU and clock seconds of a call of each; short ones are timed many at a time."""
    calls = []
    for run in runs:
        run()
        begin = time.perf_counter()
        run()
        calls.append(max(1, int(0.01 / (time.perf_counter() - begin))))
    best, end = [(float("inf"), float("inf"))] * len(runs), time.perf_counter() + SECONDS
    turn = 0
    while turn < 3 or time.perf_counter() < end:
        turn += 1
        for i, (run, n) in enumerate(zip(runs, calls, strict=True)):
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in range(n):
                run()
            cpu, wall = (time.process_time() - cpu) / n, (time.perf_counter() - wall) / n
            best[i] = (min(best[i][0], cpu), min(best[i][1], wall))
    return best


if __name__ == "__main__":
    main()

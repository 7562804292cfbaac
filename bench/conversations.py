"""A long chat, turn by turn, with and without the prefix cache, on a CPU.

    python -m bench.conversations --checkpoint builtin/llmrouter-9

One user's chat grows to --turns turns and --tokens tokens of made-up words. ``cached`` remembers the turns before, ``whole``
computes all tokens. At the last turn (or those of --at) both compute --rounds other wordings of that turn, alternately: seconds
and CPU seconds are medians over these, ``difference`` is the largest of theta, beside the standard deviation of theta.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bench import subjects
from bench.setting import add_subjects, positive, run, write_rows
from p2l_engine import Engine, checkpoint
from p2l_engine.checkpoint import Checkpoint
from p2l_engine.engine.device import as_dtype


@dataclass(frozen=True)
class Row:
    """One turn. tokens: of the chat; computed: of these, by ``cached``; mib: that the cache has then."""

    model: str
    dtype: str
    turn: int
    tokens: int
    computed: int
    cached_s: float
    whole_s: float
    times_faster: float
    cached_cpu_s: float
    whole_cpu_s: float
    difference: float
    spread: float
    mib: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_subjects(parser)
    parser.add_argument("--turns", type=positive, default=40)
    parser.add_argument("--tokens", type=positive, default=6000)
    parser.add_argument("--at", type=positive, nargs="+", help="turns that are timed, instead of the last")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--dtype", help="float32 or bfloat16; left out: the CPU's natural one")
    parser.add_argument("--cache-mib", type=positive, default=512)
    arguments = parser.parse_args()
    console, device = Console(width=None if sys.stdout.isatty() else 120), torch.device("cpu")
    if arguments.device not in (None, "cpu"):
        raise ValueError(f"--device: expected cpu, got {arguments.device}: there is no prefix cache elsewhere")
    names = arguments.model or ([] if arguments.checkpoint else ["smollm2-135m"])
    rows: list[Row] = []
    for name in [*names, *([arguments.checkpoint] if arguments.checkpoint else [])]:
        loaded = _loaded(name, arguments.models, as_dtype(arguments.dtype, device))
        whole = Engine(loaded, device, arguments.dtype)
        cached = Engine(loaded, device, arguments.dtype, prefix_cache_bytes=arguments.cache_mib * 2**20)
        console.print(f"{name}: warm-up {whole.warmup() + cached.warmup():.1f} s")
        found = conversation(name, cached, whole, arguments.turns, arguments.tokens, arguments.rounds, arguments.at)
        console.print(table(f"{name}, {found[0].dtype}, seconds of a turn", found))
        rows += found
        if arguments.csv:
            write_rows(arguments.csv, rows, device)


def _loaded(name: str, n_models: int, dtype: torch.dtype) -> Checkpoint:
    if name in subjects.ARCHITECTURES:
        return subjects.checkpoint(name, n_models, torch.device("cpu"), dtype)
    return checkpoint.load(name)


def conversation(
    name: str, cached: Engine, whole: Engine, turns: int, tokens: int, rounds: int, at: list[int] | None = None
) -> list[Row]:
    """The rows of one chat; ``cached`` remembers it. at: the turns that are timed; None: the last."""
    cache, rng = cached.prefix_cache, np.random.default_rng(0)
    if cache is None:
        raise ValueError(f"{name}: has no prefix cache; the log says why")
    chat, rows = list[str](), list[Row]()
    for turn in range(1, turns + 1):
        until = tokens * turn // turns
        if turn not in (at or [turns]):
            chat.append(_turn(whole, chat, until, rng))
            cached.coefficients([chat])
            continue
        wordings = [[*chat, _turn(whole, chat, until, rng)] for _ in range(rounds)]
        taken: dict[str, list[tuple[float, float]]] = {"cached": [], "whole": []}  # seconds, and CPU seconds
        thetas: dict[str, list[np.ndarray]] = {"cached": [], "whole": []}
        saved = cache.saved
        for i, wording in enumerate(wordings):
            for what, engine in [("cached", cached), ("whole", whole)][:: -1 if i % 2 else 1]:
                wall, cpu = time.perf_counter(), time.process_time()
                thetas[what].append(engine.coefficients([wording]).theta)
                taken[what].append((time.perf_counter() - wall, time.process_time() - cpu))
        chat = wordings[-1]
        length = len(whole.encoder.encode([chat])[0])
        known = (0 if cached.backbone.prefix is None else len(cached.backbone.prefix)) + (cache.saved - saved) // rounds
        ours, theirs = (np.median(taken[what], 0) for what in ("cached", "whole"))
        one, other = (np.concatenate(thetas[what]) for what in ("cached", "whole"))
        rows.append(
            Row(
                name, str(cached.dtype).removeprefix("torch."), turn, length, length - known,
                float(ours[0]), float(theirs[0]), float(theirs[0] / ours[0]), float(ours[1]), float(theirs[1]),
                float(np.abs(one - other).max()), float(other.std()), cache.bytes / 2**20,
            )
        )  # fmt: skip
    return rows


def _turn(engine: Engine, before: list[str], until: int, rng: np.random.Generator) -> str:
    """A turn of made-up words with which the chat has some ``until`` tokens, its template's among them."""
    words, some = subjects.words(), list[str]()
    left = max(1, until - len(engine.encoder.encode([[*before, ""]])[0]))
    while not some or (found := len(engine.encoder.encode([" ".join(some)])[0]) - len(engine.encoder.encode([""])[0])) < left:
        some += rng.choice(words, max(1, (left - (found if some else 0)) // 4)).tolist()
    return " ".join(some)


def table(title: str, rows: list[Row]) -> Table:
    shown = Table(title=title, title_justify="left")
    for column in ("turn", "tokens", "computed", "cached", "whole", "times faster", "theta differs by", "cache, MiB"):
        shown.add_column(column, justify="right")
    for r in rows:
        shown.add_row(
            str(r.turn), str(r.tokens), str(r.computed), f"{r.cached_s:.3f}", f"{r.whole_s:.3f}", f"{r.times_faster:.1f}",
            f"{r.difference:.1e} of {r.spread:.2g}", f"{r.mib:.0f}",
        )  # fmt: skip
    return shown


if __name__ == "__main__":
    run(main)

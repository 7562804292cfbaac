"""One prompt, text to decision: p50, p95 and p99, split by stage, and under concurrent callers: python -m bench.latency.

Every path routes prompts of --tokens tokens (64) under a budget. Stages, timed separately: ``tokenise``; ``forward``, tokens to
coefficients; ``decide``, coefficients to decision; ``whole`` is Router.route. ``reference`` is transformers, one prompt at a
time, to coefficients only. ``N callers``: N threads, each sending its next prompt when it has its decision; calls per second
and the latency of each call. ``weights``: a lower bound for ``forward``, the time to read all weights but the embedding table
once, at the rate of a large copy. On a CPU, ``products`` and ``attention``: what a forward pass spends there, measured step by
step; the rest of ``forward`` is norms, rotary embedding, SwiGLU, head and Python.

With --lengths instead: the forward pass of one prompt, token ids to theta, by its number of tokens and by threads; of the
engine in float32 and each --dtype, of transformers, and of --peers in each precision that they have (bench/peers says how each
is set). All are checked to give the same theta within their precision, and run in turns; wall and CPU time, ratios to the
engine. --busy: beside so many processes that compute without pause, as on a machine that others share. --rest: seconds before
each call.

Everything at once, in a quarter of an hour:

    python -m bench.latency --checkpoint builtin/llmrouter-9 --lengths --threads 1 2 --peers openvino onnxruntime llama.cpp
"""

from __future__ import annotations

import argparse
import math
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bench import latency_by_length, peers, products, subjects
from bench.latency_by_length import LENGTHS, REST
from bench.peers.transformers import Transformers
from bench.setting import add_engines, add_subjects, dtypes, float_dtype, positive, run, write_rows
from p2l_engine import Catalog, Engine, Router
from p2l_engine.backbone import PackedDecoder
from p2l_engine.catalog import CatalogModel
from p2l_engine.checkpoint import Checkpoint
from p2l_engine.constraints import Constraints
from p2l_engine.native import cpus


@dataclass(frozen=True)
class Row:
    """Milliseconds at three percentiles."""

    model: str
    dtype: str
    what: str
    calls: int
    p50: float
    p95: float
    p99: float
    calls_per_s: float | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_subjects(parser)
    add_engines(parser)
    parser.add_argument("--tokens", type=positive, help="of each prompt (64)")
    parser.add_argument("--calls", type=positive, help="of each kind (100 on a CPU, 500 on a GPU; with --lengths 5 to 15)")
    parser.add_argument("--callers", type=positive, nargs="*", help="numbers of concurrent callers (1 2 4 8 16 32 64)")
    parser.add_argument("--lengths", type=positive, nargs="*", help=f"tokens of single prompts ({' '.join(map(str, LENGTHS))})")
    parser.add_argument("--threads", type=positive, nargs="+", help="with --lengths: numbers of threads, one after the other")
    parser.add_argument("--busy", type=int, nargs="+", help="with --lengths: numbers of processes that compute meanwhile (0)")
    parser.add_argument("--rest", type=float, help=f"with --lengths: seconds before each call ({REST})")
    arguments = parser.parse_args()
    if arguments.lengths is None and (arguments.threads or arguments.peers or arguments.busy or arguments.rest is not None):
        parser.error("--threads, --peers, --busy and --rest: expected --lengths beside them, which may be without numbers")
    rest = REST if arguments.rest is None else arguments.rest
    if not 0 <= rest < math.inf:
        parser.error(f"--rest: expected a number of seconds >= 0, got {rest}")
    if min(arguments.busy or [0]) < 0:
        parser.error(f"--busy: expected numbers of processes from 0 on, got {min(arguments.busy)}")
    if arguments.lengths is not None and (arguments.tokens or arguments.callers is not None):
        parser.error("--tokens and --callers: expected no --lengths beside them, which measures single prompts alone")
    console = Console(width=None if sys.stdout.isatty() else 140)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cpu" and not torch.cuda.is_available():
        console.print("no GPU here: the rows of the CPU alone")
    peers.check(arguments.peers, device)
    names = arguments.model or ([] if arguments.checkpoint else ["smollm2-135m"])
    rows: list[Any] = []
    for name in [*names, *([arguments.checkpoint] if arguments.checkpoint else [])]:
        loaded = subjects.load(name, device, arguments.models)
        if arguments.lengths is None:
            rows += of_stages(name, loaded, device, arguments, console)
        else:
            rows += by_length(name, loaded, device, arguments, rest, console)
        if arguments.csv:
            write_rows(arguments.csv, rows, device)


def by_length(
    name: str, loaded: Checkpoint, device: torch.device, arguments: argparse.Namespace, rest: float, console: Console
) -> list[latency_by_length.Row]:
    if device.type != "cpu":
        raise ValueError(f"--lengths: expected --device cpu, since threads are compared, got {device}")
    threads = arguments.threads or [torch.get_num_threads()]
    if max(threads) > cpus.available():
        raise ValueError(f"--threads: expected at most {cpus.available()}, the CPUs of this process, got {max(threads)}")
    lengths = arguments.lengths or LENGTHS
    return latency_by_length.measured(
        name, loaded, dtypes(arguments, device), lengths, threads, arguments.peers, arguments.calls, arguments.busy or [0],
        rest, console,
    )  # fmt: skip


def of_stages(
    name: str, loaded: Checkpoint, device: torch.device, arguments: argparse.Namespace, console: Console
) -> list[Row]:
    calls = arguments.calls or (500 if device.type == "cuda" else 100)
    tokens = arguments.tokens or 64
    rows = []
    for dtype in dtypes(arguments, device):
        engine = Engine(loaded, device, dtype)
        console.print(f"{name} {dtype}: warm-up {engine.warmup():.1f} s")
        texts = prompts_of(engine, tokens, calls)
        peer = Transformers(loaded, device, float_dtype(dtype))
        found = stages(name, dtype, loaded, engine, texts, peer)
        for callers in (1, 2, 4, 8, 16, 32, 64) if arguments.callers is None else arguments.callers:
            found.append(under_load(name, dtype, engine, texts, callers))
        console.print(table(f"{name} {dtype}, {tokens} tokens, milliseconds", found))
        rows += found
    return rows


def prompts_of(engine: Engine, tokens: int, count: int) -> list[str]:
    """Different prompts of exactly ``tokens`` tokens, including those of the chat template."""
    words, rng = subjects.words(), np.random.default_rng(0)
    found: list[str] = []
    around = len(engine.encoder.encode(["a"])[0]) + 2
    if tokens < around:
        raise ValueError(f"--tokens: expected {around} at least, the chat template's and some text, got {tokens}")
    while len(found) < count:
        text = " ".join(rng.choice(words, max(1, tokens - around)))
        while len(engine.encoder.encode([text])[0]) < tokens:
            text += " " + str(rng.choice(words))
        while len(engine.encoder.encode([text])[0]) > tokens:
            text = text[:-1]
        if len(engine.encoder.encode([text])[0]) == tokens:
            found.append(text)
    return found


def catalog_of(engine: Engine) -> Catalog:
    """Exponential costs for every model of the checkpoint."""
    costs = np.random.default_rng(0).exponential(size=len(engine.models))
    return Catalog(tuple(CatalogModel(name, float(cost)) for name, cost in zip(engine.models, costs, strict=True)))


def stages(name: str, dtype: str, loaded: Checkpoint, engine: Engine, texts: list[str], peer: Transformers) -> list[Row]:
    with Router(engine, catalog_of(engine)) as router:
        budget = float(np.mean(router.costs))
        coefficients = [engine.coefficients([text]) for text in texts]
        tokens = [engine.encoder.encode([text])[0] for text in texts]
        runs: dict[str, Callable[[int], object]] = {
            "whole": lambda i: router.route(texts[i], budget),
            "tokenise": lambda i: engine.encoder.encode([texts[i]]),
            "forward": lambda i: engine.forward([tokens[i]]),
            "decide": lambda i: router.decide(coefficients[i], [texts[i]], Constraints(budget)),
            "reference": lambda i: peer.one_by_one([texts[i]]),
        }
        for _ in range(2):  # warm-up
            for call in runs.values():
                call(0)
        taken: dict[str, list[float]] = {what: [] for what in runs}
        spent = []
        for i in range(len(texts)):  # in turns, so that other load on the machine slows all stages alike
            for what, call in runs.items():
                start = time.perf_counter()
                call(i)
                taken[what].append(time.perf_counter() - start)
            spent.append(products.measured(loaded, engine, partial(runs["forward"], i)))
    parts = [each for each in spent if each is not None]
    if parts:
        taken |= {"products": [each.products for each in parts], "attention": [each.attention for each in parts]}
    rows = [row(name, dtype, what, seconds) for what, seconds in taken.items()]
    least = 1e3 * _seconds_to_read(engine)
    return [*rows, Row(name, dtype, "weights", 1, least, least, least)]


def under_load(name: str, dtype: str, engine: Engine, texts: list[str], callers: int) -> Row:
    taken: list[list[float]] = [[] for _ in range(callers)]
    with Router(engine, catalog_of(engine)) as router:
        budget = float(np.mean(router.costs))

        def call(who: int) -> None:
            for text in texts[who::callers] or texts[:1]:
                start = time.perf_counter()
                router.route(text, budget)
                taken[who].append(time.perf_counter() - start)

        threads = [threading.Thread(target=call, args=(who,)) for who in range(callers)]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        whole = time.perf_counter() - start
    seconds = [each for some in taken for each in some]
    return row(name, dtype, f"{callers} callers", seconds, len(seconds) / whole)


def _seconds_to_read(engine: Engine) -> float:
    """The bytes of all weights but the embedding over the rate of a large copy, which reads and writes: of 1 GiB on a GPU, of
    256 MiB on a CPU."""
    on_gpu = engine.device.type == "cuda"
    a = torch.ones(2**30 if on_gpu else 2**28, dtype=torch.uint8, device=engine.device)
    b, best = torch.empty_like(a), np.inf
    for _ in range(8):
        start = time.perf_counter()
        b.copy_(a)
        if on_gpu:
            torch.cuda.synchronize(engine.device)
        best = min(best, time.perf_counter() - start)
    embedding = engine.backbone.embedding.numel() if isinstance(engine.backbone, PackedDecoder) else 0
    read = (engine.n_parameters - embedding) * engine.dtype.itemsize
    return float(read / (2 * len(a) / best))


def row(name: str, dtype: str, what: str, seconds: list[float], calls_per_s: float | None = None) -> Row:
    p50, p95, p99 = (float(1e3 * x) for x in np.percentile(seconds, [50, 95, 99]))
    return Row(name, dtype, what, len(seconds), p50, p95, p99, calls_per_s)


def table(title: str, rows: list[Row]) -> Table:
    shown = Table(title=title, title_justify="left")
    for column in ("", "calls", "p50", "p95", "p99", "calls/s"):
        shown.add_column(column, justify="left" if not column else "right")
    for r in rows:
        rate = "" if r.calls_per_s is None else f"{r.calls_per_s:,.1f}"
        shown.add_row(r.what, str(r.calls), f"{r.p50:.3f}", f"{r.p95:.3f}", f"{r.p99:.3f}", rate)
    return shown


if __name__ == "__main__":
    run(main)

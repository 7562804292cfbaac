"""Prompts and tokens per second, text to coefficients, compared with transformers in the same run: python -m bench.throughput.

``engine``: Engine.coefficients on all prompts. ``reference``: transformers, one prompt at a time, as P2L is served today.
``hf-batched``: transformers as fast as it goes: sorted by length, padded batches of the size that was fastest here, SDPA, and
compiled too with --compile. All three tokenise; they run in turns, and medians count. Tokens are those that were computed:
those of a shared prefix are not counted for the engine, nor padding for the others. Utilisation: the FLOPs that the model
needs for these tokens, over the rate of a large matrix product in the same type, measured in the same run. ``after theta``:
win rates, one budget per prompt and score for all prompts, as a share of the engine's time. ``elsewhere``: its time outside
matrix products and attention. Lengths: bench/subjects.py, or --prompts FILE.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import PretrainedConfig

from bench import subjects
from bench.peers import Transformers
from bench.setting import add_subjects, matrix_rate, positive, run, write_rows
from p2l_engine import Engine, checkpoint, routing
from p2l_engine.backbone.families import DecoderConfig
from p2l_engine.backbone.packing import Packed
from p2l_engine.checkpoint import Checkpoint
from p2l_engine.engine import natural_dtype
from p2l_engine.engine.compile_watch import CompileWatch

BUDGETS = {"cpu": (512, 1024, 2048, 4096), "cuda": (8192, 16384, 32768, 65536)}


@dataclass(frozen=True)
class Row:
    """One line of the table.

    lengths: 5%, 25%, 50%, 75%, 95% and mean of the prompts' tokens, the template's among them; seconds: median of the rounds,
    and the fastest and slowest; after_theta: seconds of routing as a share of the engine's; gib: peak of the device's memory;
    largest_difference: of theta to the reference's, with theta's standard deviation.
    """

    model: str
    path: str
    prompts: int
    tokens: int
    lengths: str
    seconds: float
    fastest: float
    slowest: float
    prompts_per_s: float
    tokens_per_s: float
    times_reference: float | None
    utilisation: float | None
    after_theta: float | None = None
    elsewhere: float | None = None
    gib: float | None = None
    largest_difference: float | None = None
    deviation: float | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_subjects(parser)
    parser.add_argument("--prompts", type=Path, help="parquet or jsonl with a column 'prompt', instead of random ones")
    parser.add_argument("--count", type=positive, help="prompts for the engine (300 on a CPU, seconds' worth on a GPU)")
    parser.add_argument("--peer-count", type=positive, help="of these, prompts for hf-batched (all on a CPU, half)")
    parser.add_argument("--reference-count", type=positive, help="of these, prompts for the reference (100)")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--compile", action="store_true", help="hf-batched also through torch.compile")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cpu" and not torch.cuda.is_available():
        console.print("no GPU here: the rows of the CPU alone")
    names = arguments.model or ([] if arguments.checkpoint else ["smollm2-135m"])
    rows: list[Row] = []
    for name in [*names, *([arguments.checkpoint] if arguments.checkpoint else [])]:
        found = bench(name, device, arguments, console)
        rows += found
        console.print(table(name, found))
        if arguments.csv:
            write_rows(arguments.csv, rows, device)


def bench(name: str, device: torch.device, arguments: argparse.Namespace, console: Console) -> list[Row]:
    on_gpu = device.type == "cuda"
    loaded, engine = subject(name, device, arguments.models)
    count = arguments.count or (_worth_seconds(loaded.config) if on_gpu else 300)
    texts = subjects.read_prompts(arguments.prompts, count) if arguments.prompts else subjects.prompts(count)
    counts = {
        "engine": len(texts),
        "hf-batched": min(len(texts), arguments.peer_count or (count // 2 if on_gpu else count)),
        "reference": min(len(texts), arguments.reference_count or 100),
    }
    console.print(f"{name}: warm-up {engine.warmup():.1f} s")
    rate = matrix_rate(device, engine.dtype)
    peer = Transformers(loaded, device, engine.dtype)
    loaded.weights.clear()  # engine and peer hold them now; a third copy only takes memory
    budget = _fastest_budget(peer, texts[: counts["hf-batched"] // 4 or 1], device, console)
    paths: dict[str, Callable[[list[str]], object]] = {
        "engine": lambda some: engine.coefficients(some).theta,
        "hf-batched": lambda some: peer.batched(some, budget),
        "reference": peer.one_by_one,
    }
    seconds: dict[str, list[float]] = {path: [] for path in paths}
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    peak = None
    for _ in range(arguments.rounds):
        for path, compute in paths.items():
            start = time.perf_counter()
            compute(texts[: counts[path]])
            seconds[path].append(time.perf_counter() - start)
            if path == "engine" and on_gpu and peak is None:
                held = sum(p.numel() * p.element_size() for p in peer.model.parameters())
                peak = (torch.cuda.max_memory_allocated(device) - held) / 2**30
    if arguments.compile:
        peer.model = torch.compile(peer.model, dynamic=True)
        counts["hf-batched compiled"] = counts["hf-batched"]
        some = texts[: counts["hf-batched"]]
        peer.batched(some, budget)
        start = time.perf_counter()
        peer.batched(some, budget)
        seconds["hf-batched compiled"] = [time.perf_counter() - start]
    tokens = engine.encoder.encode(texts)
    packed = Packed.of(tokens, engine.backbone.prefix)
    checked = texts[: counts["reference"]]
    theirs = peer.one_by_one(checked)[:, : len(engine.models)]
    difference = float(np.abs(engine.coefficients(checked).theta - theirs).max())
    whole = [len(ids) for ids in tokens]
    percentiles = " ".join(f"{x:.0f}" for x in (*np.percentile(whole, [5, 25, 50, 75, 95]), np.mean(whole)))
    per_prompt = {path: float(np.median(runs)) / counts[path] for path, runs in seconds.items()}
    rows = []
    for path, each in per_prompt.items():
        n = counts[path]
        lengths = packed.lengths[:n] if path == "engine" else tuple(len(ids) for ids in tokens[:n])
        shared = packed.shared[:n] if path == "engine" else (0,) * n
        ours = path == "engine"
        rows.append(
            Row(
                name, path, n, sum(lengths), percentiles, each * n, min(seconds[path]), max(seconds[path]), 1 / each,
                sum(lengths) / (each * n),
                per_prompt["reference"] / each, subjects.flops(loaded.config, lengths, shared) / (each * n) / rate,
                _after_theta(engine, texts) / (each * n) if ours else None,
                _elsewhere(engine, texts[:200]) if ours and not on_gpu else None,
                peak if ours else None, difference if ours else None, float(theirs.std()) if ours else None,
            )
        )  # fmt: skip
    return rows


def _worth_seconds(config: DecoderConfig | PretrainedConfig) -> int:
    """Random prompts that take a GPU a few seconds: 1e15 operations, at most 20,000 prompts."""
    sample = [len(text.split()) for text in subjects.prompts(1000)]
    return min(20_000, int(1e15 / subjects.flops(config, sample, [0] * len(sample)) * len(sample)))


def subject(name: str, device: torch.device, n_models: int) -> tuple[Checkpoint, Engine]:
    """An architecture with random weights, or a checkpoint, and the engine over it."""
    if name in subjects.ARCHITECTURES:
        loaded = subjects.checkpoint(name, n_models, device, natural_dtype(device))
    else:
        loaded = checkpoint.load(name)
    return loaded, Engine(loaded, device)


def _fastest_budget(peer: Transformers, texts: list[str], device: torch.device, console: Console) -> int:
    """The tokens of a padded batch at which hf-batched is fastest on some of the prompts."""
    seconds = {}
    for budget in BUDGETS[device.type]:
        peer.batched(texts, budget)  # all shapes: cuDNN plans each new one
        start = time.perf_counter()
        peer.batched(texts, budget)
        seconds[budget] = time.perf_counter() - start
    best = min(seconds, key=lambda budget: seconds[budget])
    console.print(f"hf-batched: {best} tokens to a batch, the fastest of {', '.join(map(str, seconds))}")
    return best


def _after_theta(engine: Engine, texts: list[str]) -> float:
    """Seconds of win rates, one budget per prompt and the score for all prompts, on the engine's device."""
    m = len(engine.models)
    theta = torch.randn(len(texts), m, device=engine.device)
    given = theta if engine.device.type == "cuda" else theta.numpy()
    q, costs = np.full(m, 1 / m), np.random.default_rng(0).exponential(size=m)

    def route() -> None:
        v = routing.win_rates(given, q)
        policies = routing.solve_budget(v, costs, float(costs.mean()))
        score = routing.bt_score(given, q, policies.value)
        _ = score.cpu() if isinstance(score, torch.Tensor) else score

    with CompileWatch.paused():
        route()
    start = time.perf_counter()
    route()
    return time.perf_counter() - start


def _elsewhere(engine: Engine, texts: list[str]) -> float:
    """The share of the engine's time that is not in matrix products and attention (torch's profiler, one round)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        start = time.perf_counter()
        engine.coefficients(texts)
        seconds = time.perf_counter() - start
    inside = ("aten::mm", "aten::addmm", "mkldnn::_linear_pointwise", "aten::_scaled_dot_product_flash_attention_for_cpu")
    microseconds = sum(float(e.self_cpu_time_total) for e in profiled.key_averages() if e.key in inside)
    return 1 - microseconds / 1e6 / seconds


def table(name: str, rows: list[Row]) -> Table:
    shown = Table(title=name, title_justify="left")
    for column in ("", "prompts", "prompts/s", "tokens/s", "x ref.", "utilised", "after theta", "elsewhere", "GiB"):
        shown.add_column(column, justify="left" if not column else "right")
    for r in rows:
        percent = [None if x is None else f"{100 * x:.1f}%" for x in (r.utilisation, r.after_theta, r.elsewhere)]
        shown.add_row(
            r.path, f"{r.prompts:,}", f"{r.prompts_per_s:,.1f}", f"{r.tokens_per_s:,.0f}",
            f"{r.times_reference:.2f}", *percent, None if r.gib is None else f"{r.gib:.1f}",
        )  # fmt: skip
    return shown


if __name__ == "__main__":
    run(main)

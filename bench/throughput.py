"""Prompts and tokens per second, text to coefficients, compared with transformers in the same run: python -m bench.throughput.

``engine``: Engine.coefficients on all prompts. ``reference``: transformers, one prompt at a time, as P2L is served today.
``hf-batched``: transformers as fast as it goes: sorted by length, padded batches of the size that was fastest here, SDPA, and
compiled too with --compile. All three tokenise; they run in turns, and medians count. Tokens are those that were computed:
those of a shared prefix are not counted for the engine, nor padding for the others. Utilisation: the FLOPs that the model
needs for these tokens, over the rate of a large matrix product in the same type, measured in the same run. ``after theta``:
win rates, one budget per prompt and score for all prompts, as a share of the engine's time. ``elsewhere``: its time outside
matrix products and attention. Lengths: bench/subjects.py, or --prompts FILE.

--dtype: the engine in each; transformers in the first one. --peers: other runtimes too, in each precision that they have, set
for throughput (bench/peers says how), with the engine's token ids, in padded batches like hf-batched's. Their theta is checked
to be the engine's in float32 within their precision.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.table import Table
from transformers import PretrainedConfig

from bench import peers, subjects
from bench.peers.batches import Run, in_batches
from bench.peers.decoder import Decoder
from bench.peers.expected import Expected
from bench.peers.transformers import Transformers
from bench.setting import add_engines, add_subjects, dtypes, float_dtype, matrix_rate, positive, run, write_rows
from p2l_engine import Engine, routing
from p2l_engine.backbone.families import DecoderConfig
from p2l_engine.backbone.packing import Packed
from p2l_engine.checkpoint import Checkpoint
from p2l_engine.engine.compile_watch import CompileWatch
from p2l_engine.engine.device import DTYPES

BUDGETS = {"cpu": (512, 1024, 2048, 4096), "cuda": (8192, 16384, 32768, 65536)}


@dataclass(frozen=True)
class Row:
    """One line of the table.

    precision: the engine's dtype, or the other's; lengths: 5%, 25%, 50%, 75%, 95% and mean of the prompts' tokens, the
    template's among them; seconds: median of the rounds, and the fastest and slowest; cpu_seconds: the median of CPU time, of
    all threads; times_engine: prompts per second over those of the engine in its first dtype; after_theta: seconds of routing
    as a share of the engine's; gib: peak of the device's memory; largest_difference: of theta to the reference's, with theta's
    standard deviation; off: of a peer's theta, as in ``peers.expected``.
    """

    model: str
    path: str
    precision: str
    prompts: int
    tokens: int
    lengths: str
    seconds: float
    fastest: float
    slowest: float
    cpu_seconds: float
    prompts_per_s: float
    tokens_per_s: float
    times_reference: float
    times_engine: float
    utilisation: float | None
    after_theta: float | None = None
    elsewhere: float | None = None
    gib: float | None = None
    largest_difference: float | None = None
    deviation: float | None = None
    off: float | None = None


@dataclass
class Timed:
    """A path, what it computes of so many prompts, and the wall and CPU seconds that each round took."""

    path: str
    precision: str
    prompts: int
    compute: Callable[[list[str]], npt.NDArray[np.float32]]
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    off: float | None = None

    def round(self, texts: list[str]) -> None:
        start, used = time.perf_counter(), time.process_time()
        self.compute(texts[: self.prompts])
        self.seconds.append(time.perf_counter() - start)
        self.cpu.append(time.process_time() - used)

    @property
    def per_prompt(self) -> float:
        return float(np.median(self.seconds)) / self.prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_subjects(parser)
    add_engines(parser)
    parser.add_argument("--prompts", type=Path, help="parquet or jsonl with a column 'prompt', instead of random ones")
    parser.add_argument("--count", type=positive, help="prompts for the engine (300 on a CPU, seconds' worth on a GPU)")
    parser.add_argument("--peer-count", type=positive, help="of these, prompts for hf-batched and --peers (all on a CPU, half)")
    parser.add_argument("--reference-count", type=positive, help="of these, prompts for the reference (100)")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--compile", action="store_true", help="hf-batched also through torch.compile")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cpu" and not torch.cuda.is_available():
        console.print("no GPU here: the rows of the CPU alone")
    peers.check(arguments.peers, device)
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
    loaded, names = subjects.load(name, device, arguments.models), dtypes(arguments, device)
    engines = {dtype: Engine(loaded, device, dtype) for dtype in names}
    engine = engines[names[0]]
    count = arguments.count or (_worth_seconds(loaded.config) if on_gpu else 300)
    texts = subjects.read_prompts(arguments.prompts, count) if arguments.prompts else subjects.prompts(count)
    some = min(len(texts), arguments.peer_count or (count // 2 if on_gpu else count))
    few, checked = texts[: some // 4 or 1], texts[: min(len(texts), arguments.reference_count or 100)]
    for dtype, each in engines.items():
        console.print(f"{name} {dtype}: warm-up {each.warmup():.1f} s")
    rates = {dtype: matrix_rate(device, DTYPES[dtype]) for dtype in {*names, "float32"} if dtype in DTYPES}
    peer = Transformers(loaded, device, float_dtype(names[0]))
    others = others_of(loaded, engines, arguments.peers, texts[:some], console) if arguments.peers else []
    budget = _fastest_budget("hf-batched", lambda size: peer.batched(few, size), device, console)
    paths = [
        *(Timed("engine", dtype, len(texts), partial(_theta, each)) for dtype, each in engines.items()),
        Timed("hf-batched", peer.precision, some, lambda prompts: peer.batched(prompts, budget)),
        Timed("reference", peer.precision, len(checked), peer.one_by_one),
        *others,
    ]
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    peak = None
    for _ in range(arguments.rounds):
        for path in paths:
            path.round(texts)
            if path.path == "engine" and on_gpu and peak is None:
                held = sum(p.numel() * p.element_size() for p in peer.model.parameters())
                peak = (torch.cuda.max_memory_allocated(device) - held) / 2**30
    if arguments.compile:
        peer.model = torch.compile(peer.model, dynamic=True)
        paths.append(Timed("hf-batched compiled", peer.precision, some, lambda prompts: peer.batched(prompts, budget)))
        peer.batched(texts[:some], budget)
        paths[-1].round(texts)
    tokens = engine.encoder.encode(texts)
    packed = Packed.of(tokens, engine.backbone.prefix)
    theirs = peer.one_by_one(checked)[:, : len(engine.models)]
    whole = [len(ids) for ids in tokens]
    percentiles = " ".join(f"{x:.0f}" for x in (*np.percentile(whole, [5, 25, 50, 75, 95]), np.mean(whole)))
    per_prompt = {path.path: path.per_prompt for path in reversed(paths)}  # of the engine's, the first one
    rows = []
    for path in paths:
        n, taken, ours = path.prompts, path.per_prompt, engines.get(path.precision) if path.path == "engine" else None
        lengths = tuple(whole[:n]) if ours is None else packed.lengths[:n]
        shared = (0,) * n if ours is None else packed.shared[:n]
        rate = rates.get(path.precision)
        rows.append(
            Row(
                name, path.path, path.precision, n, sum(lengths), percentiles, taken * n, min(path.seconds), max(path.seconds),
                float(np.median(path.cpu)), 1 / taken, sum(lengths) / (taken * n),
                per_prompt["reference"] / taken, per_prompt["engine"] / taken,
                None if rate is None else subjects.flops(loaded.config, lengths, shared) / (taken * n) / rate,
                None if ours is None else _after_theta(ours, texts) / (taken * n),
                None if ours is None or on_gpu else _elsewhere(ours, texts[:200]),
                None if ours is None else peak, None if ours is None else float(np.abs(_theta(ours, checked) - theirs).max()),
                None if ours is None else float(theirs.std()), path.off,
            )
        )  # fmt: skip
    return rows


def others_of(
    loaded: Checkpoint, engines: dict[str, Engine], names: Sequence[str], texts: list[str], console: Console
) -> list[Timed]:
    """The peers' paths over ``texts``, after a check of theta."""
    single = engines.get("float32") or Engine(loaded, "cpu", "float32")
    expected, encode, found = Expected.of(single), single.encoder.encode, []
    with tempfile.TemporaryDirectory() as folder:
        for each in peers.start(names, Decoder.of(loaded), torch.get_num_threads(), True, Path(folder)):
            off, what, run = expected.off(each), f"{each.name} {each.precision}", each.run
            size = _fastest_budget(
                what, partial(in_batches, run, encode(texts[: len(texts) // 4 or 1])), single.device, console
            )

            def compute(
                prompts: list[str], run: Run = run, size: int = size, width: int = len(loaded.models)
            ) -> npt.NDArray[np.float32]:
                return in_batches(run, encode(prompts), size)[:, :width]

            found.append(Timed(each.name, each.precision, len(texts), compute, off=off))
    return found


def _theta(engine: Engine, texts: list[str]) -> npt.NDArray[np.float32]:
    return engine.coefficients(texts).theta


def _worth_seconds(config: DecoderConfig | PretrainedConfig) -> int:
    """Random prompts that take a GPU a few seconds: 1e15 operations, at most 20,000 prompts."""
    sample = [len(text.split()) for text in subjects.prompts(1000)]
    return min(20_000, int(1e15 / subjects.flops(config, sample, [0] * len(sample)) * len(sample)))


def _fastest_budget(what: str, compute: Callable[[int], object], device: torch.device, console: Console) -> int:
    """The tokens of a padded batch at which a path is fastest on some of the prompts."""
    seconds = {}
    for budget in BUDGETS[device.type]:
        compute(budget)  # all shapes: cuDNN plans each new one
        start = time.perf_counter()
        compute(budget)
        seconds[budget] = time.perf_counter() - start
    best = min(seconds, key=lambda budget: seconds[budget])
    console.print(f"{what}: {best} tokens to a batch, the fastest of {', '.join(map(str, seconds))}")
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
    for column in ("", "prompts", "prompts/s", "tokens/s", "x ref.", "x engine", "utilised", "after theta", "elsewhere", "GiB"):
        shown.add_column(column, justify="left" if not column else "right")
    for r in rows:
        percent = [None if x is None else f"{100 * x:.1f}%" for x in (r.utilisation, r.after_theta, r.elsewhere)]
        shown.add_row(
            f"{r.path} {r.precision}", f"{r.prompts:,}", f"{r.prompts_per_s:,.1f}", f"{r.tokens_per_s:,.0f}",
            f"{r.times_reference:.2f}", f"{r.times_engine:.2f}", *percent, None if r.gib is None else f"{r.gib:.1f}",
        )  # fmt: skip
    return shown


if __name__ == "__main__":
    run(main)

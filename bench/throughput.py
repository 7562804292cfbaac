"""Prompts and tokens per second, text to coefficients, compared with transformers in the same run: python -m bench.throughput.

``engine``: Engine.coefficients on all prompts. ``reference``: transformers, one prompt at a time, as P2L is served today.
``hf-batched``: transformers as fast as it goes: sorted by length, padded batches of the size that was fastest here, SDPA, and
compiled too with --compile. All three tokenise; they run in turns, and medians count. Tokens are those that were computed:
those of a shared prefix are not counted for the engine, nor padding for the others. Utilisation: the operations that the model
needs for these tokens, over the rate of a large matrix product in the same type, measured in the same run (on a CPU the faster
of torch's and the engine's own). ``after theta``: win rates, one budget per prompt and score for all prompts, as a share of the
engine's time. ``elsewhere``: the share of its time outside matrix products and attention. Lengths:
bench/subjects.py, or --prompts FILE. Paths with fewer prompts than the engine get prompts spread over all lengths, so that
prompts per second can be compared.

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
from transformers import PretrainedConfig

from bench import peers, products, subjects
from bench.peers.batches import Run, in_batches
from bench.peers.decoder import Decoder
from bench.peers.expected import Expected
from bench.peers.transformers import Transformers
from bench.setting import add_engines, add_subjects, dtypes, float_dtype, matrix_rate, positive, run, write_rows
from bench.throughput_rows import Row, table
from p2l_engine import Engine, routing
from p2l_engine.backbone.families import DecoderConfig
from p2l_engine.backbone.packing import Packed
from p2l_engine.checkpoint import Checkpoint
from p2l_engine.engine.compile_watch import CompileWatch
from p2l_engine.engine.device import DTYPES, WHOLE_NUMBERS

BUDGETS = {"cpu": (512, 1024, 2048, 4096), "cuda": (8192, 16384, 32768, 65536)}


@dataclass
class Timed:
    """A path, its prompts, what it computes of them, and the wall and CPU seconds that each round took."""

    path: str
    precision: str
    texts: list[str]
    compute: Callable[[list[str]], npt.NDArray[np.float32]]
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    off: float | None = None

    def round(self) -> None:
        start, used = time.perf_counter(), time.process_time()
        self.compute(self.texts)
        self.seconds.append(time.perf_counter() - start)
        self.cpu.append(time.process_time() - used)

    @property
    def per_prompt(self) -> float:
        return float(np.median(self.seconds)) / len(self.texts)


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
    some = of_all_lengths(texts, engine, arguments.peer_count or (count // 2 if on_gpu else count))
    few, checked = (
        of_all_lengths(some, engine, len(some) // 4 or 1),
        of_all_lengths(texts, engine, arguments.reference_count or 100),
    )
    for dtype, each in engines.items():
        console.print(f"{name} {dtype}: warm-up {each.warmup():.1f} s")
    known = DTYPES | WHOLE_NUMBERS
    rates = {dtype: matrix_rate(device, known[dtype]) for dtype in {*names, "float32"} if dtype in known}
    peer = Transformers(loaded, device, float_dtype(names[0]))
    others = others_of(loaded, engines, arguments.peers, some, few, console) if arguments.peers else []
    budget = _fastest_budget("hf-batched", lambda size: peer.batched(few, size), device, console)
    paths = [
        *(Timed("engine", dtype, texts, partial(_theta, each)) for dtype, each in engines.items()),
        Timed("hf-batched", peer.precision, some, lambda prompts: peer.batched(prompts, budget)),
        Timed("reference", peer.precision, checked, peer.one_by_one),
        *others,
    ]
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    peak = None
    for _ in range(arguments.rounds):
        for path in paths:
            path.round()
            if path.path == "engine" and on_gpu and peak is None:
                held = sum(p.numel() * p.element_size() for p in peer.model.parameters())
                peak = (torch.cuda.max_memory_allocated(device) - held) / 2**30
    if arguments.compile:
        peer.model = torch.compile(peer.model, dynamic=True)
        paths.append(Timed("hf-batched compiled", peer.precision, some, lambda prompts: peer.batched(prompts, budget)))
        peer.batched(some, budget)
        paths[-1].round()
    theirs = peer.one_by_one(checked)[:, : len(engine.models)]
    whole = _lengths(engine, texts)
    percentiles = " ".join(f"{x:.0f}" for x in (*np.percentile(whole, [5, 25, 50, 75, 95]), np.mean(whole)))
    per_prompt = {path.path: path.per_prompt for path in reversed(paths)}  # of the engine's, the first one
    rows = []
    for path in paths:
        n, taken, ours = len(path.texts), path.per_prompt, engines.get(path.precision) if path.path == "engine" else None
        packed = Packed.of(engine.encoder.encode(path.texts), None if ours is None else ours.backbone.prefix)
        lengths, shared, rate = packed.lengths, packed.shared, rates.get(path.precision)
        rows.append(
            Row(
                name, path.path, path.precision, n, sum(lengths), percentiles, taken * n, min(path.seconds), max(path.seconds),
                float(np.median(path.cpu)), 1 / taken, sum(lengths) / (taken * n),
                per_prompt["reference"] / taken, per_prompt["engine"] / taken,
                None if rate is None else subjects.flops(loaded.config, lengths, shared) / (taken * n) / rate,
                None if ours is None else _after_theta(ours, texts) / (taken * n),
                None if ours is None else _elsewhere(loaded, ours, texts[:200]),
                None if ours is None else peak, None if ours is None else float(np.abs(_theta(ours, checked) - theirs).max()),
                None if ours is None else float(theirs.std()), path.off,
            )
        )  # fmt: skip
    return rows


def others_of(
    loaded: Checkpoint,
    engines: dict[str, Engine],
    names: Sequence[str],
    texts: list[str],
    few: list[str],
    console: Console,
) -> list[Timed]:
    """The peers' paths over ``texts``, after a check of theta. few: of these, to choose the size of batches."""
    single = engines.get("float32") or Engine(loaded, "cpu", "float32")
    expected, encode, found = Expected.of(single), single.encoder.encode, []
    with tempfile.TemporaryDirectory() as folder:
        for each in peers.start(names, Decoder.of(loaded), torch.get_num_threads(), True, Path(folder)):
            off, what, run = expected.off(each), f"{each.name} {each.precision}", each.run
            size = _fastest_budget(what, partial(in_batches, run, encode(few)), single.device, console)

            def compute(
                prompts: list[str], run: Run = run, size: int = size, width: int = len(loaded.models)
            ) -> npt.NDArray[np.float32]:
                return in_batches(run, encode(prompts), size)[:, :width]

            found.append(Timed(each.name, each.precision, texts, compute, off=off))
    return found


def of_all_lengths(texts: list[str], engine: Engine, count: int) -> list[str]:
    """``count`` of the prompts (all if there are fewer), evenly spaced by their number of tokens, in the order of ``texts``."""
    order = np.argsort(_lengths(engine, texts), kind="stable")
    spaced = (np.arange(min(count, len(texts))) + 0.5) * max(1.0, len(texts) / count)
    return [texts[i] for i in np.sort(order[spaced.astype(int)])]


def _lengths(engine: Engine, texts: list[str]) -> list[int]:
    return [len(ids) for ids in engine.encoder.encode(texts)]


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


def _elsewhere(loaded: Checkpoint, engine: Engine, texts: list[str]) -> float | None:
    """See ``products.measured``."""
    spent = products.measured(loaded, engine, lambda: engine.coefficients(texts))
    return None if spent is None else spent.elsewhere


if __name__ == "__main__":
    run(main)

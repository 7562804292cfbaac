"""Shared by the speed benchmarks: arguments, the machine, its rate of matrix products, and rows as CSV."""

from __future__ import annotations

import argparse
import csv
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.machine import cpu, instructions

if TYPE_CHECKING:
    import torch

PEERS = ("openvino", "onnxruntime", "llama.cpp")


def add_subjects(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments for the model, the device and the output."""
    from bench.subjects import ARCHITECTURES

    parser.add_argument("--model", nargs="+", choices=ARCHITECTURES, help="architectures with random weights")
    parser.add_argument("--checkpoint", help="a checkpoint instead: folder or name")
    parser.add_argument("--models", type=positive, default=130, help="models that random heads rank")
    parser.add_argument("--device", help="cpu or cuda; CUDA where there is one")
    parser.add_argument("--csv", type=Path, help="also write the rows here")


def add_engines(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments for the engine's dtypes and its peers."""
    parser.add_argument("--dtype", nargs="+", help="of the engine, one after the other (the device's natural one)")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=[], help="runtimes besides transformers, on a CPU")


def dtypes(arguments: argparse.Namespace, device: torch.device) -> list[str]:
    """The names of --dtype, each once and in full."""
    from p2l_engine.engine.device import DTYPES, natural_dtype

    given = arguments.dtype or [str(natural_dtype(device))]
    names = [name.lower().removeprefix("torch.") for name in given]
    return list(dict.fromkeys(str(DTYPES.get(name, name)).removeprefix("torch.") for name in names))


def float_dtype(dtype: str) -> torch.dtype:
    """What transformers is compared in: the engine's dtype, float32 where that is none of torch's floating-point ones."""
    import torch

    from p2l_engine.engine.device import DTYPES

    return DTYPES.get(dtype, torch.float32)


def positive(text: str) -> int:
    """A whole number >= 1, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected one at least, got {number}")
    return number


def share(text: str) -> float:
    """A share above 0, as a command line gives it. Raises argparse.ArgumentTypeError."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0, at most 1, got {text!r}")
    return value


def run(main: Callable[[], None]) -> None:
    """Runs ``main``; prints the user's mistakes as one line instead of a traceback."""
    try:
        main()
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def write_rows(path: Path, rows: Sequence[Any], device: torch.device) -> None:
    """Dataclass instances of one kind as CSV, with the setting in a last column."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*asdict(rows[0]), "setting"])
        writer.writeheader()
        for row in rows:
            values = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(row).items()}
            writer.writerow(values | {"setting": setting(device)})


def setting(device: torch.device) -> str:
    """The device's name, a CPU's instructions and threads, and the versions that matter, of loaded peers too."""
    import torch
    import transformers

    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    versions += "".join(f", {name} {version(name)}" for name in ("openvino", "onnxruntime", "xllamacpp") if name in sys.modules)
    if device.type == "cuda":
        import triton

        return f"{torch.cuda.get_device_name(device)}; {versions}, triton {triton.__version__}"
    return f"{cpu()}, {instructions()}, {torch.get_num_threads()} threads; {versions}"


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a square matrix product, the best of ten: 8,192 wide on a GPU; on a CPU 2,048, by torch or by this
    engine, whichever is faster."""
    import torch

    from p2l_engine.native import panels

    n = 8192 if device.type == "cuda" else 2048
    weight, int8 = torch.randn(n, n, device=device), dtype == torch.int8
    x = torch.randn(n, n, device=device).to(torch.float32 if int8 else dtype)
    out, products = torch.empty_like(x), []
    if not int8:
        products.append(partial(torch.mm, x, weight.to(dtype), out=out))
    if device.type == "cpu" and panels.level(dtype) >= 0:
        packed = panels.Panels.of(weight, None, dtype)
        products.append(partial(panels.multiply, x, packed, out, torch.empty(packed.scratch(n), dtype=torch.uint8)))
    seconds = []
    for product in products:
        for i in range(13):
            start = time.perf_counter()
            product()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds += [time.perf_counter() - start] if i > 2 else []
    return 2 * n**3 / min(seconds)

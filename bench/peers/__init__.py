"""The engine's peers: the same checkpoint on other runtimes, fed the same token ids."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from bench.peers.decoder import Decoder
from bench.peers.peer import Peer

# Names as on the command line: the package that has to be installed, and the module that runs it.
PACKAGES = {"openvino": "openvino", "onnxruntime": "onnxruntime", "llama.cpp": "xllamacpp"}
MODULES = {"openvino": "bench.peers.openvino", "onnxruntime": "bench.peers.onnxruntime", "llama.cpp": "bench.peers.llama_cpp"}


def check(names: Sequence[str], device: torch.device) -> None:
    """Raises ValueError for a peer that is not installed, and says what to install, and for any on a GPU."""
    if names and device.type != "cpu":
        raise ValueError(f"--peers: expected --device cpu, which they are set for, got {device}")
    missing = [name for name in names if importlib.util.find_spec(PACKAGES[name]) is None]
    if missing:
        packages = ", ".join(PACKAGES[name] for name in missing)
        raise ValueError(f"--peers: {packages} is not installed; install it with: pip install -e '.[peers]' -c constraints.txt")


def start(names: Sequence[str], decoder: Decoder, threads: int, throughput: bool, folder: Path) -> Iterator[Peer]:
    """Each peer in each of its precisions. throughput: set for batches, else for the latency of one prompt.

    folder: for the files that they read, which are written on first use.
    """
    for name in names:
        module = importlib.import_module(MODULES[name])
        for precision in module.precisions():
            yield module.start(decoder, precision, threads, throughput, folder)

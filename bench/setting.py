"""The machine that a speed was measured on, and how fast it multiplies matrices."""

from __future__ import annotations

import platform
import time
from pathlib import Path

import numpy as np
import torch
import transformers


def setting(device: torch.device) -> str:
    """The device's name, its cores, and the versions that matter."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    if device.type == "cuda":
        import triton

        return f"{torch.cuda.get_device_name(device)}; {versions}, triton {triton.__version__}"
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").is_file() else []
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())
    return f"{cpu}, {torch.get_num_threads()} threads; {versions}"


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a square matrix product: 8,192 wide on a GPU, 2,048 on a CPU; the best of ten."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty(n, n, device=device, dtype=dtype)
    seconds = []
    for _ in range(13):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / float(np.min(seconds[3:]))

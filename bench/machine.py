"""The machine that a benchmark runs on, in one line."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from p2l_engine.native import binding

PACKAGES = ("numpy", "scipy", "cvxpy", "highspy")
# By the kernel's names: int8 dot products (x86, Arm), bfloat16 dot products, and tiles of both.
EXTENSIONS = {
    "VNNI": {"avx512_vnni", "avx_vnni"}, "AVX512-BF16": {"avx512_bf16"}, "AMX": {"amx_tile"},
    "dotprod": {"asimddp"}, "i8mm": {"i8mm"}, "bf16": {"bf16"},
}  # fmt: skip


def cpu() -> str:
    """The CPU's name."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())


def extensions() -> tuple[str, ...]:
    """Those of the CPU's instructions that multiply in low precision."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").is_file() else []
    flags = next((line.split(":")[1].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return tuple(name for name, some in EXTENSIONS.items() if some & set(flags))


def instructions() -> str:
    """The instruction set of the native core, and the CPU's ``extensions``."""
    return f"{binding.isa()}, {' '.join(extensions()) or 'no VNNI, AVX512-BF16 or AMX'}"


def machine() -> str:
    """CPU, instruction set of the native core, and versions of the packages that are installed."""
    versions = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return f"{cpu()}, {binding.isa()}; {', '.join(versions)}"

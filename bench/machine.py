"""The machine that a benchmark runs on, in one line."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from p2l_engine.native import binding

PACKAGES = ("numpy", "scipy", "cvxpy", "highspy")


def cpu() -> str:
    """The CPU's name."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())


def machine() -> str:
    """CPU, instruction set of the native core, and versions of the packages that are installed."""
    versions = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return f"{cpu()}, {binding.isa()}; {', '.join(versions)}"

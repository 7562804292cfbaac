"""Pointers, casts, thread counts and fork safety of all calls into the native core. Loads neither torch nor Triton.

``lib`` holds the functions of csrc/p2l_native.h. They validate nothing: a caller passes contiguous memory of the declared type.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from typing import Any

from p2l_engine._native import ffi, lib
from p2l_engine.native import cpus

__all__ = ["array", "check", "ffi", "isa", "lib", "max_threads", "new", "tensor", "threads"]

_ISA = {
    5: "x86-64-v4 (AVX-512) with bfloat16", 4: "x86-64-v4 (AVX-512)", 3: "x86-64-v3 (AVX2)", 2: "x86-64-v2 (SSE4.2)",
    0: "the compiler's baseline",
}  # fmt: skip

# Parsed once: a name takes as long as the cast.
_POINTERS = {kind: ffi.typeof(f"{kind} *") for kind in ("void", "float", "double", "int8_t", "uint8_t", "int32_t", "int64_t")}


def _after_fork() -> None:
    torch = sys.modules.get("torch")
    if torch is not None:  # its threads do not survive a fork: a parallel region would wait for them forever
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def isa() -> str:
    """The instruction set that the native core uses on this machine."""
    return _ISA[lib.p2l_isa_level()]


@cache
def _from_environment() -> int:
    """OMP_NUM_THREADS, of whose list the first number counts; without it the CPUs of this process."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) > 0 else cpus.available()


def max_threads() -> int:
    """OMP_NUM_THREADS, or the CPUs available; where torch is loaded at most its own number (``torch.set_num_threads``)."""
    count = getattr(sys.modules.get("torch"), "get_num_threads", None)  # None, too, while torch is being loaded
    return _from_environment() if count is None else min(_from_environment(), int(count()))


def threads(work: int, per_thread: int, most: int | None = None) -> int:
    """Threads for ``work`` units: one per ``per_thread`` of them, at most ``most`` (None: ``max_threads``), at least 1.

    In a forked child of a process that had loaded torch it is 1, as torch's own number of threads.
    """
    if work < 2 * per_thread:
        return 1
    return max(1, min(work // per_thread, max_threads() if most is None else most))


def array(kind: str, values: Any, writable: bool = False) -> object:
    """A numpy array (None: NULL) as a ``kind *``. Raises ValueError unless C-contiguous (and writable, where required)."""
    return ffi.NULL if values is None else ffi.from_buffer(f"{kind}[]", values, require_writable=writable)


def tensor(kind: str, values: Any) -> object:
    """A torch tensor's data (None: NULL) as a ``kind *``; the caller has checked dtype, device and strides."""
    return ffi.NULL if values is None else ffi.cast(_POINTERS[kind], values.data_ptr())


def new(kind: str) -> Any:
    """A zeroed ``kind`` for a result; read it as ``[0]``."""
    return ffi.new(f"{kind} *")


def check(status: int, what: str) -> int:
    """The status of a call; MemoryError where it is negative."""
    if status < 0:
        raise MemoryError(f"{what}: not enough memory")
    return status

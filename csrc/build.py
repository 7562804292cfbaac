"""cffi's description of the native core: compiled into ``p2l_engine._native`` when the package is built."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
SOURCES = [
    "win_rates", "budget", "hulls", "pricing", "bt_score", "outcomes", "votes", "decoder", "linear", "int8", "attention",
    "embedding", "layer", "pool", "machine",
]  # fmt: skip
HEADERS = ["p2l_native", "hull", "sigmoid_mixture", "bfloat16", "panels", "attention_task", "attention_items", "pool"]


def declarations() -> str:
    """The structs and prototypes of p2l_native.h, the only place that spells them."""
    header = re.sub(r"/\*.*?\*/", "", (HERE / "p2l_native.h").read_text(), flags=re.S)
    structs = re.findall(r"^typedef struct \{.*?^\} p2l_\w+;", header, flags=re.M | re.S)
    return "\n".join([*structs, *re.findall(r"^(?:int|int64_t|void) p2l_\w+\([^;]*\);", header, flags=re.M)])


COMPILER_FLAGS = ["-O3", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-pthread", "-fopenmp-simd"]

ffi = FFI()
ffi.cdef(declarations())
ffi.set_source(
    "p2l_engine._native",
    '#include "p2l_native.h"',
    sources=[f"csrc/{name}.c" for name in SOURCES],
    include_dirs=["csrc"],
    depends=[f"csrc/{name}.h" for name in HEADERS],
    extra_compile_args=COMPILER_FLAGS,
    extra_link_args=["-pthread", "-fopenmp-simd"],
    libraries=[] if sys.platform == "win32" else ["m"],
)

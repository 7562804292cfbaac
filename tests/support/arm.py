"""The native core compiled for Arm (armv8.2-a), in a process of qemu's: its functions are called as ``binding.lib``'s are.

The program reads calls from its standard input: the function's number, then each argument, a pointer as the number of its bytes
(-1: NULL) and these bytes, anything else as 8 bytes; it writes the result and the bytes behind each pointer.
"""

from __future__ import annotations

import re
import runpy
import shutil
import struct
import subprocess
from pathlib import Path

from p2l_engine._native import ffi
from p2l_engine.native import binding, decoder, embedding, panels, routing, votes

ROOT = Path(__file__).resolve().parents[2]
COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
MISSING = [program for program in (COMPILER, EMULATOR) if shutil.which(program) is None]
HEAD = """
#include <stdio.h>
#include <stdlib.h>
#include "p2l_native.h"

static void take(void *to, size_t bytes) {
    if (bytes && fread(to, bytes, 1, stdin) != 1) exit(0);
}

static void *taken(int64_t *bytes) {
    take(bytes, 8);
    if (*bytes < 0) return NULL;
    void *memory = malloc(*bytes + 1);
    take(memory, *bytes);
    return memory;
}

static void give(void *memory, int64_t bytes) {
    if (bytes > 0) fwrite(memory, bytes, 1, stdout);
    free(memory);
}

int main(void) {
    for (;;) {
        int64_t number, result = 0;
        take(&number, 8);
        switch (number) {
"""
TAIL = """
        }
        fflush(stdout);
    }
}
"""


def prototypes() -> dict[str, list[str]]:
    """The types of each function's arguments, pointers without const."""
    found = {}
    for name, arguments in re.findall(r"(p2l_\w+)\(([^;]*)\);", _description()["declarations"]()):
        parts = [] if arguments == "void" else [part.replace("const ", "").strip() for part in arguments.split(",")]
        found[name] = [re.sub(r"\s*\w+$", "", part) for part in parts]
    return found


def build(folder: Path) -> Path:
    """Compiles the core, with the flags of csrc/build.py, and the program around it."""
    cases = []
    for number, (name, kinds) in enumerate(prototypes().items()):
        lines, given, back = [], [], []
        for i, kind in enumerate(kinds):
            if kind.endswith("*"):
                lines.append(f"int64_t b{i}; void *a{i} = taken(&b{i});")
                back.append(f"give(a{i}, b{i});")
            else:
                lines.append(f"{'double' if kind == 'double' else 'int64_t'} a{i}; take(&a{i}, 8);")
            given.append(f"a{i}")
        returns = "void" not in re.search(rf"(\w+) {name}\(", _description()["declarations"]())[1]
        call = f"{'result = ' if returns else ''}{name}({', '.join(given)}); fwrite(&result, 8, 1, stdout);"
        cases.append(f"case {number}: {{ {' '.join([*lines, call, *back])} break; }}")
    source, program = folder / "calls.c", folder / "calls"
    source.write_text(HEAD + "\n".join(cases) + TAIL)
    description = _description()
    sources = [ROOT / "csrc" / f"{name}.c" for name in description["SOURCES"]]
    flags = [*description["COMPILER_FLAGS"], "-Werror", "-march=armv8.2-a", "-static", f"-I{ROOT / 'csrc'}"]
    subprocess.run([COMPILER, *flags, *sources, source, "-o", program, "-lm"], check=True)
    return program


def _description() -> dict[str, object]:
    return runpy.run_path(str(ROOT / "csrc" / "build.py"))


class Core:
    """Stands for ``binding.lib``."""

    def __init__(self, program: Path) -> None:
        self.kinds = prototypes()
        self.called: set[str] = set()
        self._process = subprocess.Popen([EMULATOR, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __getattr__(self, name):
        number, kinds = list(self.kinds).index(name), self.kinds[name]

        def call(*arguments):
            assert len(arguments) == len(kinds)
            self.called.add(name)
            memory, message = [], [struct.pack("q", number)]
            for kind, given in zip(kinds, arguments, strict=True):
                if not kind.endswith("*"):
                    message.append(struct.pack("d" if kind == "double" else "q", given))
                elif given == ffi.NULL:
                    message.append(struct.pack("q", -1))
                else:
                    memory.append(ffi.buffer(given))
                    message += [struct.pack("q", len(memory[-1])), bytes(memory[-1])]
            self._process.stdin.write(b"".join(message))
            self._process.stdin.flush()
            (result,) = struct.unpack("q", self._read(8))
            for part in memory:
                part[:] = self._read(len(part))
            return result

        return call

    def _read(self, size: int) -> bytes:
        found = self._process.stdout.read(size)
        if len(found) != size:
            raise RuntimeError(f"the Arm program ended with {self._process.wait()}")
        return found

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait(timeout=10)
        self._process.stdout.close()


def tensor(kind: str, values):
    """``binding.tensor`` that knows its size."""
    if values is None or not values.numel():
        return binding.tensor(kind, values)
    return ffi.from_buffer("char[]", ffi.buffer(ffi.cast("char *", values.data_ptr()), values.nbytes))


def use(core: Core, monkeypatch) -> None:
    """The package's modules call ``core`` instead of the core that was compiled for this machine."""
    for module in (routing, votes, decoder, embedding, panels):
        monkeypatch.setattr(module, "lib", core)
    for module in (decoder, embedding, panels):
        monkeypatch.setattr(module, "tensor", tensor)

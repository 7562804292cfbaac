"""The native core's threads (csrc/pool.c): a program of their own, also under ThreadSanitizer and AddressSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc not installed")]


@pytest.mark.parametrize(
    ("sanitizer", "arguments"),
    [
        pytest.param(None, (3, 400, 4, 20), id="plain"),
        pytest.param(None, (1, 400, 64, 3), id="many threads"),
        pytest.param("thread", (3, 150, 4, 0), id="data races"),
        pytest.param("address,undefined", (2, 150, 4, 3), id="memory"),
    ],
)
def test_every_task_runs_once(sanitizer, arguments, tmp_path):
    flags = [] if sanitizer is None else [f"-fsanitize={sanitizer}"]
    source, program = ROOT / "tests/support/pool_stress.c", tmp_path / "stress"
    command = [
        "gcc",
        "-std=gnu11",
        "-O1",
        "-g",
        "-pthread",
        *flags,
        f"-I{ROOT / 'csrc'}",
        str(source),
        str(ROOT / "csrc/pool.c"),
    ]
    subprocess.run([*command, "-o", str(program)], check=True)
    done = subprocess.run([str(program), *map(str, arguments)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "0 wrong\n"), done.stdout + done.stderr


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs, on Linux")
def test_threads_that_are_woken_keep_off_the_callers_cpu_until_they_are_awake(tmp_path):
    program, sources = tmp_path / "cpus", ["tests/support/pool_cpus.c", "csrc/pool.c"]
    for source in sources:
        renamed = ["-Dpthread_setaffinity_np=recorded"] if source == "csrc/pool.c" else []
        command = ["gcc", "-std=gnu11", "-O1", "-c", "-pthread", "-Wno-implicit-function-declaration", *renamed]
        subprocess.run(
            [*command, f"-I{ROOT / 'csrc'}", str(ROOT / source), "-o", str(tmp_path / Path(source).name) + ".o"], check=True
        )
    subprocess.run(
        ["gcc", "-pthread", *(f"{tmp_path / Path(source).name}.o" for source in sources), "-o", str(program)], check=True
    )
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "1 kept off, 1 restored\n0 kept off, 1 restored\n"), done.stdout + done.stderr

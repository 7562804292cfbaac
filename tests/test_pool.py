"""The native core's threads (csrc/pool.c): a program of their own, also under ThreadSanitizer and AddressSanitizer."""

from __future__ import annotations

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

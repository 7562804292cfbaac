"""The Triton kernels against their twins in float64, on odd shapes: in Triton's interpreter, compiled, and on a GPU.

Triton reads TRITON_INTERPRET when it is imported, so the interpreter runs in a process of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

INTERPRETED = """
import torch
from p2l_engine.kernels.win_rates import win_rates, win_rates_reference
for n, m in ((1, 1), (5, 3), (17, 34), (5, 130), (1, 257)):
    for per_prompt in (False, True):
        theta = torch.randn(n, m) * 5
        q = torch.rand((n, m) if per_prompt else (m,))
        q /= q.sum(-1, keepdim=True)
        expected = win_rates_reference(theta.double(), q.double())
        torch.testing.assert_close(win_rates(theta, q).double(), expected, atol=1e-6, rtol=1e-5)
assert win_rates(torch.zeros(0, 4), torch.full((4,), 0.25)).shape == (0, 4)
print("same")
"""


def test_win_rates_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "same", done.stderr


@pytest.mark.parametrize("capability", [80, 90])
def test_win_rates_compile_without_spills(capability, tmp_path):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from p2l_engine.kernels.win_rates import BLOCK_A, BLOCK_B, _win_rates_kernel

    signature = {
        "theta_ptr": "*fp32", "theta_row_stride": "i32", "q_ptr": "*fp64", "q_row_stride": "i32", "v_ptr": "*fp32",
        "v_row_stride": "i32", "n_models": "i32", "BLOCK_B": "constexpr", "BLOCK_A": "constexpr",
    }  # fmt: skip
    source = ASTSource(_win_rates_kernel, signature, constexprs={"BLOCK_B": BLOCK_B, "BLOCK_A": BLOCK_A})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert "cubin" in compiled.asm
    local = [line for line in compiled.asm["ptx"].splitlines() if ".local" in line]
    assert not local, local
    # PTX has registers without end: only the cubin tells what ptxas spilled (to the stack or to local memory).
    (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(tool), "--dump-resource-usage", str(tmp_path / "kernel.cubin")]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    print(usage)
    used = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    assert used["REG"] > 0
    assert used["STACK"] == used["LOCAL"] == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_win_rates_on_the_gpu():
    from p2l_engine.kernels.win_rates import win_rates, win_rates_reference

    for n, m in ((1, 1), (17, 34), (1000, 130)):
        theta, q = torch.randn(n, m, device="cuda") * 5, torch.full((m,), 1 / m, device="cuda")
        torch.testing.assert_close(
            win_rates(theta, q).double(), win_rates_reference(theta.double(), q.double()), atol=1e-6, rtol=1e-5
        )

"""The Triton kernels: in Triton's interpreter, compiled for two generations of GPU, and on a GPU where there is one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from p2l_engine.kernels import (
    attention,
    bt_score,
    budget_lp,
    pool_head,
    pool_head_win_rates,
    rms_norm,
    rotary,
    swiglu,
    win_rates,
)
from tests.support import kernel_cases

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def interpreted():
    """The result of each case of tests/support/kernel_cases.py in Triton's interpreter, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.support.kernel_cases"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(line.split(": ", 1) for line in done.stdout.splitlines())


@pytest.mark.slow
@pytest.mark.xdist_group("interpreter")  # of which each worker would start one
@pytest.mark.parametrize("name", kernel_cases.CASES)
def test_in_the_interpreter(name, interpreted):
    assert interpreted[name] == "same", interpreted[name]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("name", kernel_cases.CASES)
def test_on_the_gpu(name):
    kernel_cases.CASES[name]("cuda")


FP, BF = "*fp32", "*bf16"
# kernel, types of its arguments in order (constants by value), warps. Sizes are those of the largest backbone: 7B.
COMPILED = {
    "rms_norm": (
        rms_norm._rms_norm_kernel,
        [BF, "i64", BF, "i64", BF, BF, "i64", "fp32"],
        {"N_COLUMNS": 3584, "BLOCK": 4096, "HAS_DELTA": True},
        8,
    ),
    "swiglu": (swiglu._swiglu_kernel, [BF, "i64", BF, "i64"], {"N_COLUMNS": 18944, "BLOCK": swiglu.BLOCK}, 4),
    "rotary": (
        rotary._rotary_kernel,
        [BF, "i64", FP, FP, "*i32", "*i32", BF, BF],
        {
            "QUERIES": 28, "KEYS": 4, "HALF": 64, "BLOCK_HEADS": 32, "BLOCK_VALUES": 512, "BLOCK_HALF": 64,
            "HAS_PREFIX": True,
        },
        4,
    ),
    "attention": (
        attention._attention_kernel,
        [BF, "i64", BF, "*i32", "*i32", BF, "fp32", "i32"],
        {
            "KEYS": 4, "GROUP": 7, "SIZE": 128, "LAST": False, "BLOCK_Q": attention.ROWS // 8, "BLOCK_GROUP": 8,
            "BLOCK_SIZE": 128, "BLOCK_KEYS": 32,
        },
        4,
    ),
    "pool_head": (
        pool_head._pool_head_kernel,
        [BF, "i64", BF, FP, FP, FP, "i32", "fp32"],
        {"N_COLUMNS": 3584, "HAS_NORM": True, "BLOCK_K": pool_head.BLOCK_K, "BLOCK_D": pool_head.BLOCK_D},
        4,
    ),
    "pool_head, many": (
        pool_head._pool_head_tiles_kernel,
        [BF, "i64", BF, FP, FP, FP, "i32", "i32", "fp32"],
        {
            "N_COLUMNS": 3584, "HAS_NORM": True,
            "BLOCK_N": pool_head.BLOCK_N_MANY, "BLOCK_K": pool_head.BLOCK_K_MANY, "BLOCK_D": pool_head.BLOCK_D_MANY,
        },
        4,
    ),
    "win_rates": (
        win_rates._win_rates_kernel,
        [FP, "i64", "*fp64", "i64", FP, "i64", "i32"],
        {"BLOCK_B": win_rates.BLOCK_B, "BLOCK_A": win_rates.BLOCK_A},
        4,
    ),
    "pool_head_win_rates": (
        pool_head_win_rates._pool_head_win_rates_kernel,
        [BF, "i64", BF, FP, FP, FP, "i64", FP, FP, "i32", "i32", "fp32"],
        {
            "N_COLUMNS": 3584, "HAS_NORM": True, "BLOCK_K": pool_head_win_rates.BLOCK_K,
            "BLOCK_D": pool_head_win_rates.BLOCK_D, "BLOCK_B": win_rates.BLOCK_B, "BLOCK_A": win_rates.BLOCK_A,
        },
        8,
    ),
    "budget_lp": (
        budget_lp._budget_lp_kernel,
        [FP, "i64", "*fp64", "i64", "*fp64", "*i32", "*fp64", "*fp64", "*fp64", "i32"],
        {"BLOCK": 512},
        4,
    ),
    "bt_score": (
        bt_score._bt_score_kernel,
        [FP, "i64", "*fp64", "i64", "*fp64", "*fp64", "i32"],
        {"BLOCK": 512, "MAX_STEPS": bt_score.MAX_STEPS, "TOLERANCE": bt_score.TOLERANCE},
        4,
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_without_spills(name, capability, tmp_path):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, types, constants, warps = COMPILED[name]
    runtime = [argument for argument in kernel.arg_names if argument not in constants]
    assert len(runtime) == len(types)
    signature = dict(zip(runtime, types, strict=True)) | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    local = [line for line in compiled.asm["ptx"].splitlines() if ".local" in line]
    assert not local, local
    # PTX has unlimited registers: only the cubin shows what ptxas spilled (to the stack or to local memory).
    (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(tool), "--dump-resource-usage", str(tmp_path / "kernel.cubin")]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    print(f"{name} sm_{capability}: {used['REG']} registers, {used['STACK'] + used['LOCAL']} bytes spilled, "
          f"{compiled.metadata.shared} bytes of shared memory")  # fmt: skip
    assert used["REG"] > 0
    assert used["STACK"] == used["LOCAL"] == 0

"""Each Triton kernel compared with its torch reference implementation on a GPU, with its bandwidth: python -m bench.kernels.

Shapes are those of a batch of 32,768 tokens and 330 prompts at the smallest backbone (135M) and the largest (7B), 130 models.
The reference of attention is torch's varlen_attn, on 330 prompts of 99 tokens, and on 16 of 2,048.
Bytes: what has to be read and written once. Medians of Triton's own do_bench, which empties the L2 cache between runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.setting import write_rows
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

TOKENS, PROMPTS, MODELS = 32768, 330, 130


@dataclass(frozen=True)
class Row:
    """Microseconds of the kernel and of its reference implementation; gb_s: the kernel's bytes over its time."""

    kernel: str
    shape: str
    microseconds: float
    reference: float | None
    gb_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    console = Console()
    if not torch.cuda.is_available():
        console.print("no GPU here: nothing to measure")
        return
    console.print(torch.cuda.get_device_name())
    rows: list[Row] = []
    for name, measure in GROUPS.items():
        found = measure()
        rows += found
        console.print(table(name, found))
        if arguments.csv:
            write_rows(arguments.csv, rows, torch.device("cuda"))


def table(title: str, rows: list[Row]) -> Table:
    shown = Table(title=title, title_justify="left")
    for column in ("kernel", "shape", "us", "reference us", "GB/s"):
        shown.add_column(column, justify="left" if column in ("kernel", "shape") else "right")
    for row in rows:
        reference = "" if row.reference is None else f"{row.reference:.1f}"
        shown.add_row(row.kernel, row.shape, f"{row.microseconds:.1f}", reference, f"{row.gb_s:.0f}")
    return shown


def decoder(d: int, inner: int, heads: int, kv_heads: int, size: int) -> list[Row]:
    """The steps between the matrix products of one layer."""
    x, delta, weight = _half(TOKENS, d), _half(TOKENS, d) * 1e-3, _half(d)
    gate_up, qkv = _half(TOKENS, 2 * inner), _half(TOKENS, (heads + 2 * kv_heads) * size)
    angles = torch.rand(8192, size // 2, device="cuda")
    cos, sin = angles.cos(), angles.sin()
    own = torch.arange(TOKENS, dtype=torch.int32, device="cuda")
    positions = own % 100
    q, kv = qkv[:, : heads * size].view(TOKENS, heads, size), _half(TOKENS, 2, kv_heads, size)
    return [
        _row("rms_norm", f"{TOKENS} x {d}", 4 * _bytes(x),
             lambda: rms_norm.rms_norm(x, weight, 1e-5, delta), lambda: rms_norm.rms_norm_reference(x, weight, 1e-5, delta)),
        _row("swiglu", f"{TOKENS} x {inner}", _bytes(gate_up) * 3 // 2,
             lambda: swiglu.swiglu(gate_up), lambda: swiglu.swiglu_reference(gate_up)),
        _row("rotary", f"{TOKENS} x ({heads} + 2 x {kv_heads}) x {size}", 2 * _bytes(qkv),
             lambda: rotary.rotary(qkv, heads, kv_heads, cos, sin, positions, own),
             lambda: rotary.rotary_reference(qkv, heads, kv_heads, cos, sin, positions, own)),
        *(attend(q, kv, prompts, length) for prompts, length in ((PROMPTS, TOKENS // PROMPTS), (TOKENS // 2048, 2048))),
    ]  # fmt: skip


def attend(q: Tensor, kv: Tensor, prompts: int, length: int) -> Row:
    """Attention of equal prompts, whose tokens are the first of q [T, heads, size] and kv [T, 2, kv heads, size]."""
    from torch.nn.attention.varlen import varlen_attn

    tokens, (_, heads, size), kv_heads = prompts * length, q.shape, kv.shape[2]
    q, kv = q[:tokens], kv[:tokens]
    starts = torch.arange(0, tokens + 1, length, dtype=torch.int32, device="cuda")
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
    return _row(
        "attention", f"{prompts} x {length} x ({heads} + 2 x {kv_heads}) x {size}", 2 * _bytes(q) + _bytes(kv),
        lambda: attention.attention(q, kv, starts, starts, length),
        lambda: varlen_attn(q, kv[:, 0], kv[:, 1], starts, starts, length, length, window_size=(-1, 0), **grouped),
    )  # fmt: skip


def after(d: int) -> list[Row]:
    """What comes after the decoder, for a batch and for one prompt."""
    rows = []
    weight, bias = torch.randn(MODELS, d, device="cuda"), torch.randn(MODELS, device="cuda")
    norm, q = _half(d), torch.full((MODELS,), 1 / MODELS, device="cuda")
    costs = torch.rand(MODELS, device="cuda", dtype=torch.float64)
    for n in (1, PROMPTS, 16 * PROMPTS):
        hidden, theta = _half(n, d), torch.randn(n, MODELS, device="cuda")
        v = win_rates.win_rates(theta, q)
        limits = torch.full((n,), 0.3, device="cuda", dtype=torch.float64)
        rate = torch.rand(n, device="cuda", dtype=torch.float64)
        head, out = _bytes(hidden) + _bytes(weight) + _bytes(theta), f"{n} x {d} -> {MODELS}"
        square = f"{n} x {MODELS}"
        given = (hidden, weight, bias, norm, 1e-5)
        fused = (hidden, weight, bias, q, norm, 1e-5)
        rows += [
            _row("pool_head", out, head, partial(pool_head.pool_head, *given), partial(pool_head.pool_head_reference, *given)),
            _row(
                "pool_head_win_rates",
                out,
                head + _bytes(v),
                partial(pool_head_win_rates.pool_head_win_rates, *fused),
                partial(pool_head_win_rates.pool_head_win_rates_reference, *fused),
            ),
            _row(
                "win_rates",
                square,
                2 * _bytes(theta),
                partial(win_rates.win_rates, theta, q),
                partial(win_rates.win_rates_reference, theta, q),
            ),
            _row("budget_lp", square, _bytes(v), partial(budget_lp.budget_lp, v, costs, limits), None),
            _row("bt_score", square, _bytes(theta), partial(bt_score.bt_score, theta, q, rate), None),
        ]
    return rows


def _half(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda").bfloat16()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _row(kernel: str, shape: str, moved: int, ours: Callable[[], object], reference: Callable[[], object] | None) -> Row:
    from triton.testing import do_bench

    milliseconds = float(do_bench(ours, return_mode="median"))
    theirs = None if reference is None else 1e3 * float(do_bench(reference, return_mode="median"))
    return Row(kernel, shape, 1e3 * milliseconds, theirs, moved / milliseconds / 1e6)


GROUPS: dict[str, Callable[[], list[Row]]] = {
    "decoder, 135M": partial(decoder, 576, 1536, 9, 3, 64),
    "decoder, 7B": partial(decoder, 3584, 18944, 28, 4, 128),
    "after it, 135M": partial(after, 576),
    "after it, 7B": partial(after, 3584),
}


if __name__ == "__main__":
    main()

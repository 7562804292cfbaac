"""Input embeddings of tokens on a CPU, by the native core's threads.

torch's own threads would be started for them alone, and in the way of those that compute the layers for the next milliseconds:
on two CPUs a prompt of 64 tokens took 19.6 ms, and takes 14.1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from p2l_engine.native.binding import check, lib, tensor, threads
from p2l_engine.native.decoder import DTYPES, ELEMENTS_PER_THREAD


def embed(tokens: Tensor, table: Tensor, out: Tensor) -> Tensor:
    """out [T, D] = the rows of table [V, D] that tokens [T] int32 name, exactly.

    out: float32, or of the table's dtype. Raises ValueError for other dtypes, devices, strides and shapes, and for tokens that
    are not in the table. Reference implementation: torch.nn.functional.embedding, which reads float16 tables here too.
    """
    if tokens.dtype != torch.int32 or tokens.ndim != 1 or table.ndim != 2 or out.shape != (len(tokens), table.shape[1]):
        raise ValueError(
            f"tokens, table, out: expected [T] int32, [V, D] and [T, D], got {tokens.dtype} {list(tokens.shape)}, "
            f"{list(table.shape)} and {list(out.shape)}"
        )
    for name, given in {"tokens": tokens, "table": table, "out": out}.items():
        if not given.is_contiguous() or not given.is_cpu:
            raise ValueError(f"{name}: expected contiguous on the CPU, got strides {given.stride()} on {given.device}")
    if out.dtype not in (torch.float32, table.dtype) or table.dtype not in (*DTYPES, torch.float16):
        raise ValueError(f"table, out: expected floats, and out float32 or like the table, got {table.dtype} and {out.dtype}")
    if table.dtype == torch.float16:
        return out.copy_(F.embedding(tokens, table))
    count = min(threads(out.numel(), ELEMENTS_PER_THREAD), max(1, len(tokens)))
    status = lib.p2l_embed(
        tensor("void", table), *table.shape, tensor("int32_t", tokens), len(tokens), tensor("void", out),
        table.dtype == torch.bfloat16, out.dtype == torch.bfloat16, count,
    )  # fmt: skip
    if check(status, "embed"):
        raise ValueError(f"tokens: expected numbers from 0 to {len(table) - 1}, got {int(tokens.min())} to {int(tokens.max())}")
    return out

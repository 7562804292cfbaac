"""Batches of token ids, right-padded: attention is causal, so that no prompt's last token sees what comes after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Batch = Sequence[npt.NDArray[np.int32]]
Run = Callable[[Sequence[Batch]], list[npt.NDArray[np.float32]]]  # the head's outputs of each batch


def padded(batch: Batch) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Token ids [n, longest], zeros after each prompt's end, and the index [n] of each prompt's last token."""
    last = np.array([len(ids) - 1 for ids in batch], np.int64)
    tokens = np.zeros((len(batch), int(last.max()) + 1), np.int64)
    for row, ids in zip(tokens, batch, strict=True):
        row[: len(ids)] = ids
    return tokens, last


def in_batches(run: Run, tokens: Batch, token_budget: int) -> npt.NDArray[np.float32]:
    """The outputs [n, K] of prompts, in order; they run longest first, in batches of ``token_budget`` tokens with padding."""
    order = np.argsort([len(ids) for ids in tokens], kind="stable")[::-1]
    rows: list[npt.NDArray[np.intp]] = []
    place = 0
    while place < len(order):
        rows.append(order[place : place + max(1, token_budget // len(tokens[order[place]]))])
        place += len(rows[-1])
    found = np.concatenate(run([[tokens[i] for i in some] for some in rows]))
    out = np.empty_like(found)
    out[np.concatenate(rows)] = found
    return out

"""Prompts with their votes, and packed batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from p2l_engine.packing import Packed
from p2l_engine.prompts import PromptEncoder
from p2l_engine.votes import Votes

ALWAYS_KEPT = 3  # tokens at the end: what closes the turn, and CLS


class PromptVotes(Dataset[dict[str, Any]]):
    """One item a prompt: its index, its token ids and all of its votes.

    token_dropout: each token but the last few goes with this probability, anew in each epoch: by epoch, prompt and seed alone.
    """

    def __init__(self, votes: Votes, encoder: PromptEncoder, token_dropout: float = 0.0, seed: int = 0) -> None:
        self.votes, self.bounds = votes, votes.bounds
        self.ids = encoder.encode(votes.prompts)
        self.token_dropout, self.seed, self.epoch = token_dropout, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        rows, votes, ids = slice(self.bounds[index], self.bounds[index + 1]), self.votes, self.ids[index]
        columns = (votes.a[rows], votes.b[rows], votes.outcome[rows], votes.weight[rows])
        if self.token_dropout:
            kept = np.random.default_rng([self.seed, self.epoch, index]).random(len(ids)) >= self.token_dropout
            kept[-ALWAYS_KEPT:] = True
            ids = ids[kept]
        return {"index": index, "ids": ids, "votes": columns}


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the model takes; nothing is padded, prompts of one length stand together.

    packed: the prompts; pairs [V, 3]: row of the batch, model a, model b (or -1); outcome and weight [V]; prompts [N]: their
    indices in the data.
    """
    ordered = sorted(items, key=lambda item: len(item["ids"]))
    row = np.repeat(np.arange(len(ordered)), [len(item["votes"][0]) for item in ordered])
    a, b, outcome, weight = (np.concatenate(column) for column in zip(*(item["votes"] for item in ordered), strict=True))
    return {
        "packed": Packed.of([item["ids"] for item in ordered]),
        "pairs": torch.from_numpy(np.stack([row, a, b], 1)),
        "outcome": torch.from_numpy(outcome),
        "weight": torch.from_numpy(weight),
        "prompts": torch.tensor([item["index"] for item in ordered]),
    }

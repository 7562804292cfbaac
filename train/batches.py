"""Prompts with their votes, and packed batches of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from p2l_engine.backbone.packing import Packed
from p2l_engine.prompts.encode import PromptEncoder
from p2l_engine.votes import Votes

ALWAYS_KEPT = 3  # tokens at the end: what closes the turn, and CLS

NOTHING = -1  # the index of an item without votes


class PromptVotes(Dataset[dict[str, Any]]):
    """One item a prompt: its index, its token ids and all of its votes.

    token_dropout: each token but the last few goes with this probability, anew in each epoch: by epoch, prompt and seed alone.
    """

    def __init__(self, votes: Votes, encoder: PromptEncoder, token_dropout: float = 0.0, seed: int = 0) -> None:
        self.votes, self.bounds = votes, votes.bounds
        self.ids = encoder.encode(votes.prompts)
        self.token_dropout, self.seed, self.epoch = token_dropout, seed, 0

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == NOTHING:
            none = tuple(column[:0] for column in (self.votes.a, self.votes.b, self.votes.outcome, self.votes.weight))
            return {"index": 0, "ids": self.ids[0][-1:], "votes": none}
        rows, votes, ids = slice(self.bounds[index], self.bounds[index + 1]), self.votes, self.ids[index]
        columns = (votes.a[rows], votes.b[rows], votes.outcome[rows], votes.weight[rows])
        if self.token_dropout:
            kept = np.random.default_rng([self.seed, self.epoch, index]).random(len(ids)) >= self.token_dropout
            kept[-ALWAYS_KEPT:] = True
            ids = ids[kept]
        return {"index": index, "ids": ids, "votes": columns}


class Order(Sampler[int]):
    """Indices of an epoch: as they are, or shuffled by seed and epoch alone; filled up with NOTHING to whole batches of all
    processes, since these would otherwise begin again with the first prompts and count them twice."""

    def __init__(self, dataset: PromptVotes, multiple: int, shuffle: bool, seed: int) -> None:
        self.dataset, self.multiple, self.shuffle, self.seed = dataset, multiple, shuffle, seed

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.multiple) * self.multiple

    def __iter__(self) -> Iterator[int]:
        n = len(self.dataset)
        order = np.random.default_rng([self.seed, self.dataset.epoch]).permutation(n) if self.shuffle else np.arange(n)
        yield from order.tolist()
        yield from [NOTHING] * (len(self) - n)


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

"""The training data set: one item per prompt with all its votes; its sampling order; packed batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from p2l_engine.backbone.packing import Packed
from p2l_engine.prompts.encode import PromptEncoder
from p2l_engine.votes import Votes

KEPT_AT_END = 3  # tokens that token dropout never removes: the end of the turn, and CLS

PADDING = -1  # the index of an item without votes


class PromptVotes(Dataset[dict[str, Any]]):
    """One item per prompt: its index, its token ids [L] and the columns a, b, outcome and weight of its votes.

    token_dropout: the probability with which a token is left out (never the last few). Which ones depends only on seed,
    ``epoch`` (set by ``EpochSetter``) and prompt.
    """

    def __init__(self, votes: Votes, encoder: PromptEncoder, token_dropout: float = 0.0, seed: int = 0) -> None:
        self.votes, self.bounds = votes, votes.bounds
        self.ids = encoder.encode(votes.prompts)
        self.token_dropout, self.seed, self.epoch = token_dropout, seed, 0

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == PADDING:
            none = tuple(column[:0] for column in (self.votes.a, self.votes.b, self.votes.outcome, self.votes.weight))
            return {"index": 0, "ids": self.ids[0][-1:], "votes": none}
        rows, votes, ids = slice(self.bounds[index], self.bounds[index + 1]), self.votes, self.ids[index]
        columns = (votes.a[rows], votes.b[rows], votes.outcome[rows], votes.weight[rows])
        if self.token_dropout:
            kept = np.random.default_rng([self.seed, self.epoch, index]).random(len(ids)) >= self.token_dropout
            kept[-KEPT_AT_END:] = True
            ids = ids[kept]
        return {"index": index, "ids": ids, "votes": columns}


class Order(Sampler[int]):
    """The indices of one epoch, in data order or shuffled by seed and epoch.

    Padded with PADDING to a multiple of ``multiple`` (the prompts in one batch of all processes); otherwise accelerate would
    repeat the first prompts to fill the last batch, and count their votes twice.
    """

    def __init__(self, dataset: PromptVotes, multiple: int, shuffle: bool, seed: int) -> None:
        self.dataset, self.multiple, self.shuffle, self.seed = dataset, multiple, shuffle, seed

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.multiple) * self.multiple

    def __iter__(self) -> Iterator[int]:
        n = len(self.dataset)
        order = np.random.default_rng([self.seed, self.dataset.epoch]).permutation(n) if self.shuffle else np.arange(n)
        yield from order.tolist()
        yield from [PADDING] * (len(self) - n)


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The model's inputs for these items, sorted by prompt length; tokens are packed, not padded.

    packed: the N prompts. pairs [V, 3]: the row in the batch, model a, and model b (or -1) of each vote. outcome, weight [V].
    prompts [N]: the prompts' indices in the data set.
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

"""Votes grouped by prompt, and batches of prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from p2l_engine.prompts import PromptEncoder
from p2l_engine.train.votes import Votes


class PromptVotes(Dataset[dict[str, Any]]):
    """One item a prompt: its token ids and all of its votes [V, 3] (model a, model b, outcome)."""

    def __init__(self, votes: Votes, encoder: PromptEncoder) -> None:
        self.ids = encoder.encode(votes.prompts)
        bounds = np.searchsorted(votes.prompt, np.arange(1, len(votes.prompts)))
        self.votes = np.split(np.stack([votes.a, votes.b, votes.outcome], 1), bounds)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.ids[index], "votes": self.votes[index]}


class LengthGroupedBatches(Sampler[int]):
    """Prompts in an order whose runs of ``batch_size`` have similar lengths, the runs themselves shuffled.

    transformers' ``group_by_length`` walks from the longest prompts to the shortest over and over, and lengths go with kinds
    of prompts: the training loss swings with it. Here every stretch of training sees all lengths.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, pool: int = 50) -> None:
        self.lengths, self.batch_size, self.seed, self.pool = np.asarray(lengths), batch_size, seed, pool
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.lengths))
        # Prompts are sorted within pools of many batches, so that batches differ from epoch to epoch.
        size = self.pool * self.batch_size
        pools = [order[start : start + size] for start in range(0, len(order), size)]
        order = np.concatenate([pool[np.argsort(self.lengths[pool], kind="stable")] for pool in pools])
        whole = len(order) // self.batch_size * self.batch_size
        batches = order[:whole].reshape(-1, self.batch_size)
        yield from rng.permutation(batches).reshape(-1).tolist()
        yield from order[whole:].tolist()


class Collator:
    """Prompts padded on the right; their votes in one list [V, 4], each with its row of the batch."""

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        width = max(len(item["input_ids"]) for item in items)
        ids = torch.full((len(items), width), self.pad)
        mask = torch.zeros((len(items), width), dtype=torch.long)
        votes = []
        for row, item in enumerate(items):
            length = len(item["input_ids"])
            ids[row, :length] = torch.from_numpy(item["input_ids"].astype(np.int64))
            mask[row, :length] = 1
            votes.append(np.insert(item["votes"], 0, row, axis=1))
        return {"input_ids": ids, "attention_mask": mask, "votes": torch.from_numpy(np.concatenate(votes))}

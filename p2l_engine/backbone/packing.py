"""Prompts packed into one sequence of tokens, with the offsets of the prompts: nothing is padded.

Prompts whose first tokens have known keys and values (the constant text of a chat template, the earlier turns of a chat) are
packed without those tokens: their own take the positions after them, and attention reads the known keys and values, computed
once, before each prompt's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Tokens = npt.NDArray[np.int32]
Rows = npt.NDArray[np.intp]

_Sizes = tuple[int, int, int, int, int, int]


class Run(NamedTuple):
    """Adjacent prompts of one shape: index of the first, number of prompts, own tokens of each and known ones before it."""

    first: int
    prompts: int
    length: int
    shared: int


@dataclass(frozen=True, slots=True)
class Packed:
    """N prompts with T tokens and R keys in total: those of the prompts' own tokens and the known ones before them.

    All tensors are int32 on one device. tokens and positions [T]; sources [R]: the token of each key, or -1 - its index among
    the known ones; last [N]: the index of each prompt's last (CLS) token; starts and key_starts [N + 1]: the offsets of the
    prompts in tokens and keys. lengths and shared [N], on the host: own tokens of each prompt, and known ones before it;
    longest_own: the maximum of lengths; longest: the maximum of lengths + shared.
    """

    tokens: Tensor
    positions: Tensor
    sources: Tensor
    last: Tensor
    starts: Tensor
    key_starts: Tensor
    lengths: tuple[int, ...]
    shared: tuple[int, ...]
    longest_own: int
    longest: int

    @classmethod
    def of(
        cls, prompts: Sequence[Tokens], prefix: Tokens | None = None, fill: tuple[int, int] | None = None, pin: bool = False
    ) -> Packed:
        """Packs prompts of at least one token each, without the prefix where a prompt starts with it and continues.

        fill: pads the batch to this many tokens and prompts, with one more prompt at least, so that all such batches have the
        same sizes if all prompts share the prefix. pin: use page-locked memory, from which ``to`` copies asynchronously.
        """
        p = 0 if prefix is None else len(prefix)
        shares = [shared_with(ids, prefix) for ids in prompts]
        own = [ids[s:] for ids, s in zip(prompts, shares, strict=True)]
        if fill:
            own += np.array_split(np.zeros(fill[0] - sum(map(len, own)), np.int32), fill[1] - len(own))
            shares += [p] * (fill[1] - len(shares))
        rows = np.arange(p)
        return cls.behind(own, [rows[:s] for s in shares], pin)

    @classmethod
    def behind(cls, own: Sequence[Tokens], known: Sequence[Rows], pin: bool = False) -> Packed:
        """Packs the own tokens of prompts, one at least each. known: the rows of each one's keys and values that are known, in
        the tensors that the decoder is given with the batch. pin: as in ``of``."""
        lengths, shared = np.array([len(ids) for ids in own]), np.array([len(rows) for rows in known])
        starts, before = np.concatenate([[0], lengths.cumsum()]), np.concatenate([[0], shared.cumsum()])
        total, keys = int(starts[-1]), int(starts[-1] + before[-1])
        sizes = (total, total, keys, len(own), len(own) + 1, len(own) + 1)
        parts = _split(torch.zeros(sum(map(_aligned, sizes)), dtype=torch.int32, pin_memory=pin), sizes)
        tokens, positions, sources, last, all_starts, key_starts = (part.numpy() for part in parts)
        index = np.arange(total)
        np.concatenate(own, out=tokens)
        positions[:] = index - np.repeat(starts[:-1] - shared, lengths)
        of_own = np.zeros(keys, bool)
        of_own[index + np.repeat(before[1:], lengths)] = True
        sources[of_own] = index
        sources[~of_own] = -1 - np.concatenate(known)
        last[:] = np.maximum(starts[1:] - 1, 0)
        all_starts[:], key_starts[:] = starts, starts + before
        longest_own, longest = (int(sizes.max(initial=0)) for sizes in (lengths, lengths + shared))
        return cls(*parts, tuple(lengths.tolist()), tuple(shared.tolist()), longest_own, longest)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def buffer(self) -> Tensor:
        """The one array that holds all tensors."""
        return self.tokens.as_strided((sum(_aligned(size) for size in self._sizes()),), (1,))

    def to(self, device: torch.device) -> Packed:
        """The same on another device, in one copy, which is asynchronous from page-locked memory."""
        if device == self.tokens.device:
            return self
        return self.within(self.buffer.to(device, non_blocking=True))

    def within(self, buffer: Tensor) -> Packed:
        """The same batch in another buffer, which holds a copy of ``buffer``."""
        return Packed(*_split(buffer, self._sizes()), self.lengths, self.shared, self.longest_own, self.longest)

    def runs(self) -> list[Run]:
        """The runs of adjacent prompts with equally many own tokens behind equally many known ones."""
        runs, first = [], 0
        for (length, shared), group in groupby(zip(self.lengths, self.shared, strict=True)):
            runs.append(Run(first, sum(1 for _ in group), length, shared))
            first += runs[-1].prompts
        return runs

    def _sizes(self) -> _Sizes:
        total, n = len(self.tokens), len(self.last)
        return total, total, len(self.sources), n, n + 1, n + 1


def _aligned(size: int) -> int:
    """The size rounded up to 16 bytes: Triton compiles another kernel for pointers that are not aligned so."""
    return (size + 3) // 4 * 4


def _split(buffer: Tensor, sizes: _Sizes) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    a, b, c, d, e, f = (part[:size] for part, size in zip(buffer.split([_aligned(size) for size in sizes]), sizes, strict=True))
    return a, b, c, d, e, f


def shared_with(ids: Tokens, prefix: Tokens | None) -> int:
    """The tokens that a prompt shares with the prefix: all of them if it starts with the prefix and continues, else 0."""
    if prefix is None or len(ids) <= len(prefix) or not np.array_equal(ids[: len(prefix)], prefix):
        return 0
    return len(prefix)


def weight_of(ids: Tokens, prefix: Tokens | None) -> int:
    """A prompt's weight in a token budget: its own tokens, and an eighth of the prefix's, whose keys are only copied."""
    shared = shared_with(ids, prefix)
    return len(ids) - shared + shared // 8


def batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Indices of prompts in order of length, in batches of at most ``token_budget`` tokens, or of one longer prompt."""
    found: list[list[int]] = []
    left = 0
    for i in np.argsort(lengths, kind="stable").tolist():
        if not found or lengths[i] > left:
            found.append([])
            left = token_budget
        found[-1].append(i)
        left -= lengths[i]
    return found

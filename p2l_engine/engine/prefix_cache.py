"""Chats that grow: the keys and values of the turns that were computed before, so that a new turn computes its own tokens only.

A prompt is the chat template over the user's turns, then the CLS token: all but the end of a chat begins the same chat with one
more turn. Tokens that begin a prompt have the same keys and values whatever follows them, so that a hit is right for any two
prompts that begin alike, and equal to computing all tokens, to rounding.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from p2l_engine.arguments import whole_number
from p2l_engine.backbone import Backbone, PackedDecoder
from p2l_engine.backbone.packing import Packed, Rows, Tokens, shared_with, weight_of
from p2l_engine.engine.prefix_tree import NOTHING, Match, PrefixTree
from p2l_engine.prompts.encode import PromptEncoder

logger = logging.getLogger(__name__)

NATURAL_BYTES = 2**29  # what "auto" keeps: some 11,000 tokens of SmolLM2-135M in float32, 23,000 in bfloat16
WHERE = (
    "keys and values are kept on a CPU alone, for the families that are computed over packed tokens (llama, qwen2); leave it "
    "out, as a server's prefix_cache_mb"
)
LEAST_REUSED = 16  # tokens: computing fewer costs less than it does that prompts of a batch differ in what is known of them

PrefixBytes = int | Literal["auto"]


class PrefixCache:
    """A packed decoder on a CPU that remembers the keys and values of prompts' tokens. Safe to call from several threads.

    most: bytes that are kept. A pass under way has up to as many of what it adds beside them, and what it reads until it ends,
    evicted or not. longest: tokens of prompts that may be truncated, which are not kept: the next turn moves what is left.

    hits, misses: prompts of which some tokens were known, and none; saved: tokens that were not computed therefore.
    """

    def __init__(self, decoder: PackedDecoder, most: int, longest: int) -> None:
        self._decoder, self._longest = decoder, longest
        self._prefix, self._prefix_kv = decoder.prefix, list(decoder.prefix_kv)
        self._tree = PrefixTree(most)
        self._counting = threading.Lock()
        self.hits = self.misses = self.saved = 0

    @property
    def bytes(self) -> int:
        """That are kept now."""
        return self._tree.bytes

    @property
    def evictions(self) -> int:
        """Parts of prompts that had to go, since others came."""
        return self._tree.evictions

    def clear(self) -> None:
        """Forgets everything, and counts anew. Not while other threads use the cache."""
        self._tree.clear()
        self.hits = self.misses = self.saved = 0

    def weight(self, ids: Tokens) -> int:
        """A prompt's weight in a token budget, as ``packing.weight_of``: keys that are known are only copied."""
        start = shared_with(ids, self._prefix)
        known = self._tree.known(ids[start:-1]) if self._begins(start) else 0
        return weight_of(ids, self._prefix) - (known - known // 8 if known >= LEAST_REUSED else 0)

    def hidden(self, prompts: Sequence[Tokens]) -> tuple[Tensor, int]:
        """The hidden states [N, D] of prompts, in one batch, and the number of tokens that were computed for them."""
        starts = [shared_with(ids, self._prefix) for ids in prompts]
        found = [self._find(ids, start) for ids, start in zip(prompts, starts, strict=True)]
        known = _Known(self._prefix_kv, found)
        own = [ids[start + match.tokens :] for ids, start, match in zip(prompts, starts, found, strict=True)]
        packed = Packed.behind(own, [known.rows(start, match) for start, match in zip(starts, found, strict=True)])
        kept = [i for i, ids in enumerate(prompts) if self._begins(starts[i]) and len(ids) < self._longest]
        new = _New(packed, kept, len(self._prefix_kv), self._tree.most)
        hidden = self._decoder.behind(packed, known.layers(), new.keep)
        for i, kv in new.kv.items():
            self._tree.add(prompts[i][starts[i] : -1], found[i].tokens, kv)
        return hidden, sum(packed.lengths)

    def _begins(self, shared: int) -> bool:
        """Whether a prompt that shares so many tokens with the template's prefix begins as the kept ones do."""
        return shared == (0 if self._prefix is None else len(self._prefix))

    def _find(self, ids: Tokens, start: int) -> Match:
        match = self._tree.find(ids[start:-1]) if self._begins(start) else NOTHING
        match = match if match.tokens >= LEAST_REUSED else NOTHING
        with self._counting:
            self.hits += match.tokens > 0
            self.misses += not match.tokens
            self.saved += match.tokens
        return match


class _Known:
    """The keys and values that a batch reads: the template's, then each part that some of its prompts begin with, once."""

    def __init__(self, template: Sequence[Tensor | None], matches: Sequence[Match]) -> None:
        used: dict[int, tuple[Tensor, int]] = {}
        for kv, n in (part for match in matches for part in match.parts):
            used[id(kv)] = kv, max(n, used[id(kv)][1] if id(kv) in used else 0)
        self._template, self._parts = template, list(used.values())
        first = 0 if template[0] is None else len(template[0])
        self._at = dict(zip(used, accumulate((n for _, n in self._parts), initial=first), strict=False))

    def rows(self, shared: int, match: Match) -> Rows:
        """Those of a prompt that shares so many tokens with the template, and then has these."""
        return np.concatenate([np.arange(shared), *(np.arange(n) + self._at[id(kv)] for kv, n in match.parts)])

    def layers(self) -> Iterator[Tensor | None]:
        """[P, 2, kv heads, size] of each layer, put together when it is asked for."""
        for layer, template in enumerate(self._template):
            parts = [kv[layer, :n] for kv, n in self._parts]
            if template is not None:
                parts.insert(0, template)
            yield torch.cat(parts) if len(parts) > 1 else next(iter(parts), None)


class _New:
    """What a pass computes, to be kept: ``kv`` has [layers, n, 2, kv heads, size] of prompts by their index in the batch.

    kept: these prompts, but for their CLS tokens. most: bytes of all; prompts beyond are left out.
    """

    def __init__(self, packed: Packed, kept: Sequence[int], layers: int, most: int) -> None:
        self.kv: dict[int, Tensor] = {}
        self._rows = {i: int(packed.key_starts[i]) + packed.shared[i] for i in kept}
        self._lengths, self._layers, self._most, self._layer = packed.lengths, layers, most, 0

    def keep(self, kv: Tensor) -> None:
        """Copies what is kept of the next layer's keys and values [R, 2, kv heads, size]."""
        if self._layer == 0:
            self._make(kv)
        for i, part in self.kv.items():
            part[self._layer].copy_(kv[self._rows[i] : self._rows[i] + part.shape[1]])
        self._layer += 1

    def _make(self, kv: Tensor) -> None:
        left = self._most
        for i in self._rows:
            n = self._lengths[i] - 1
            size = n * self._layers * kv[0].nbytes
            if 0 < size <= left:
                self.kv[i] = kv.new_empty((self._layers, n, *kv.shape[1:]))
                left -= size


def open_prefix_cache(
    most: PrefixBytes, backbone: Backbone, device: torch.device, encoder: PromptEncoder
) -> PrefixCache | None:
    """The cache of an engine; None for 0 bytes, and for a template that rewrites history, which is logged.

    most: see ``Engine.from_pretrained``. Raises ValueError where the engine can have none and ``most`` is not "auto".
    """
    if checked_bytes(most, device) == 0:
        return None
    if device.type != "cpu" or not isinstance(backbone, PackedDecoder):
        if most != "auto":
            raise ValueError(f"prefix_cache_bytes: expected 0 for the backbone {backbone.name!r}, got {most}: {WHERE}")
        logger.info("no prefix cache on %s for the backbone %r", device.type, backbone.name)
        return None
    if not encoder.appends():
        logger.warning(
            "no prefix cache: the tokenizer's chat template rewrites earlier turns when one is added, so that nothing that was "
            "computed of them can be used again"
        )
        return None
    return PrefixCache(backbone, NATURAL_BYTES if isinstance(most, str) else most, encoder.max_tokens)


def checked_bytes(most: object, device: torch.device) -> PrefixBytes:
    """``most``, if it can be right on this device. Raises ValueError."""
    if most == "auto":
        return "auto"
    if isinstance(most, str):
        raise ValueError(f"prefix_cache_bytes: expected a whole number of bytes, or 'auto', got {most!r}")
    found = whole_number("prefix_cache_bytes", most, 0)
    if found and device.type != "cpu":
        raise ValueError(f"prefix_cache_bytes: expected 0 on {device.type}, got {found}: {WHERE}")
    return found

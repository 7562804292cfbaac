"""A radix tree over tokens that holds their keys and values, within a number of bytes: the least recently used go first.

Importing this module registers one fork hook: a lock that another thread held, or a tree that it was changing, would stay so in
a child process, so every tree begins empty there.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from p2l_engine.backbone.packing import Tokens

_all: weakref.WeakSet[PrefixTree] = weakref.WeakSet()


class Match(NamedTuple):
    """The first ``tokens`` of a prompt are known: the keys and values [layers, n, 2, kv heads, size] of one part after the
    other, and how many tokens of each count."""

    tokens: int
    parts: tuple[tuple[Tensor, int], ...]


NOTHING = Match(0, ())


@dataclass(eq=False, slots=True)
class _Node:
    """Tokens [n] after those of the parent, and keys and values [layers, n, 2, kv heads, size], in memory of their own."""

    tokens: Tokens
    kv: Tensor
    parent: _Node | None = None
    children: dict[int, _Node] = field(default_factory=dict)  # by their first token

    @property
    def bytes(self) -> int:
        return self.kv.nbytes + self.tokens.nbytes


class PrefixTree:
    """most: bytes of keys, values and tokens that it holds, at least 1. bytes: that it holds now; evictions: nodes that had to
    go. Safe to call from several threads; what ``find`` returned stays whole, also when its nodes have gone.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.clear()
        _all.add(self)

    def clear(self) -> None:
        """Begins anew, empty. Not while other threads use the tree."""
        self._lock = threading.Lock()
        self._root = _Node(np.zeros(0, np.int32), torch.empty(0))
        # The least recently used first. Whoever uses a node uses those above it, which are then put behind it: the first is
        # always a leaf.
        self._order: OrderedDict[_Node, None] = OrderedDict()
        self.bytes = self.evictions = 0

    def find(self, tokens: Tokens) -> Match:
        """What is known of the longest prefix of these tokens that the tree holds, which counts as used."""
        with self._lock:
            path, known = self._walk(tokens)
            self._use(path)
            return Match(known, tuple((node.kv, n) for node, n in path))

    def known(self, tokens: Tokens) -> int:
        """The length of the longest prefix of these tokens that the tree holds."""
        with self._lock:
            return self._walk(tokens)[1]

    def add(self, tokens: Tokens, start: int, kv: Tensor) -> None:
        """Adds tokens [n], of which kv [layers, n - start, 2, kv heads, size] has the keys and values from ``start`` on.

        What the tree has already stays as it is. Nothing is added where the tokens before ``start`` have gone meanwhile, or
        where these tokens alone are more than ``most``. The tree keeps ``kv``, or a copy of a part of it.
        """
        each = kv.nbytes // (len(tokens) - start) + tokens.itemsize  # bytes of a token
        with self._lock:
            path, known = self._walk(tokens)
            if known < start or len(tokens) * each > self.most:
                return
            if known < len(tokens):
                above = self._root
                if path:
                    above, n = path.pop()
                    above = self._split(above, n) if n < len(above.tokens) else above
                    path.append((above, len(above.tokens)))
                # Views would keep all of the memory that they are a part of.
                part = kv if known == start else _copied(kv[:, known - start :])
                node = _Node(tokens[known:].copy(), part, above)
                above.children[int(node.tokens[0])] = node
                path.append((node, len(node.tokens)))
                self._order[node] = None
                self.bytes += node.bytes
            self._use(path)
            while self.bytes > self.most:
                self._evict()

    def _walk(self, tokens: Tokens) -> tuple[list[tuple[_Node, int]], int]:
        """The nodes of the longest prefix that is known, each with how many of its tokens match, and the prefix's length."""
        path, node, known = list[tuple[_Node, int]](), self._root, 0
        while known < len(tokens) and (child := node.children.get(int(tokens[known]))) is not None:
            length = min(len(child.tokens), len(tokens) - known)
            different = child.tokens[:length] != tokens[known : known + length]
            same = int(different.argmax()) if different.any() else length
            path.append((child, same))
            known += same
            if same < len(child.tokens):
                break
            node = child
        return path, known

    def _use(self, path: list[tuple[_Node, int]]) -> None:
        for node, _ in reversed(path):
            self._order.move_to_end(node)

    def _split(self, node: _Node, n: int) -> _Node:
        """Divides a node behind its first ``n`` tokens; returns the new node, which has these."""
        upper = _Node(node.tokens[:n].copy(), _copied(node.kv[:, :n]), node.parent, {int(node.tokens[n]): node})
        assert node.parent is not None
        node.parent.children[int(node.tokens[0])] = upper
        node.tokens, node.kv, node.parent = node.tokens[n:].copy(), _copied(node.kv[:, n:]), upper
        self._order[upper] = None
        return upper

    def _evict(self) -> None:
        node, _ = self._order.popitem(last=False)
        assert node.parent is not None
        del node.parent.children[int(node.tokens[0])]
        self.bytes -= node.bytes
        self.evictions += 1


def _copied(kv: Tensor) -> Tensor:
    return kv.clone(memory_format=torch.contiguous_format)


def _start_anew() -> None:
    for tree in list(_all):
        tree.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)

"""How many tokens a request has by a tokenizer: counted once for each message, since conversations repeat them."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from p2l_engine.prompts.tokenizer import ChatTokenizer

KEPT = 50_000  # messages whose counts are remembered
AT_ONCE = 4_000  # bytes that are tokenised in the event loop: less than half a millisecond
PER_MESSAGE = 4  # tokens that a chat template adds


@dataclass(frozen=True, slots=True)
class Counted:
    """ends[i]: the tokens up to and including message i; chain[i]: a hash of these messages."""

    ends: tuple[int, ...]
    chain: tuple[bytes, ...]

    @property
    def total(self) -> int:
        """Of all messages."""
        return self.ends[-1] if self.ends else 0


def as_text(tokenizer: ChatTokenizer) -> Callable[[str], int]:
    """Counts the tokens of a text by the P2L tokenizer. Its special tokens are text to a provider: each counts as its bytes, of
    which a token has one at least."""
    tokens = sorted(tokenizer.added_tokens, key=len, reverse=True)  # of two that begin alike, the longer one
    special, begins = re.compile("|".join(map(re.escape, tokens))), {token[:1] for token in tokens}

    def count(text: str) -> int:
        found = len(tokenizer.ids([text])[0])
        if any(begin in text for begin in begins):
            found += sum(len(token.encode()) - 1 for token in special.findall(text))
        return found

    return count


class TokenCounter:
    """count: the number of tokens of a text; it may be called from other threads."""

    def __init__(self, count: Callable[[str], int]) -> None:
        self._count = count
        self._known: OrderedDict[bytes, int] = OrderedDict()

    async def counted(self, texts: Sequence[bytes]) -> Counted:
        """Counts the messages of a request. Long texts are tokenised in a thread."""
        own = [hashlib.blake2b(text, digest_size=16).digest() for text in texts]
        new = {key: text for key, text in zip(own, texts, strict=True) if key not in self._known}
        if new:
            if sum(map(len, new.values())) <= AT_ONCE:
                found = self._counts(list(new.values()))
            else:
                found = await asyncio.to_thread(self._counts, list(new.values()))
            self._known.update(zip(new, found, strict=True))
        total, ends, chain, before = 0, [], [], b""
        for key in own:
            total += self._known[key]
            self._known.move_to_end(key)
            before = hashlib.blake2b(before + key, digest_size=16).digest()
            ends.append(total)
            chain.append(before)
        while len(self._known) > KEPT:
            self._known.popitem(last=False)
        return Counted(tuple(ends), tuple(chain))

    def _counts(self, texts: Sequence[bytes]) -> list[int]:
        return [self._count(text.decode("utf-8", "replace")) + PER_MESSAGE for text in texts]

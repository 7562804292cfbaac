"""A provider's prompt cache: which leading messages of a request it has lately seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile


class PromptCache:
    """Holds prefixes by their keys, each for so many seconds after it was last used."""

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self.seconds, self._clock = seconds, clock
        self._used: dict[tuple[str, int], float] = {}  # oldest first

    def use(self, model: str, keys: Sequence[int]) -> int:
        """How many leading messages are held, given the keys of the first, the first two, ...; from now on all are."""
        now = self._clock()
        used = self._used
        for key in list(takewhile(lambda key: now - used[key] > self.seconds, used)):
            del used[key]
        held = next((count for count in range(len(keys), 0, -1) if (model, keys[count - 1]) in used), 0)
        for prefix in keys:
            used.pop((model, prefix), None)
            used[model, prefix] = now
        return held

    def clear(self) -> None:
        self._used.clear()

"""Prompts with the lengths of Chatbot Arena's that differ from all before."""

from __future__ import annotations

from bench import subjects


class New:
    """Called with a count, makes so many prompts. words: of each, at most; None for no limit."""

    def __init__(self, words: int | None = None) -> None:
        self._words, self._seed = words, 0

    def __call__(self, count: int) -> tuple[str, ...]:
        self._seed += 1
        texts = (" ".join(text.split(" ")[: self._words]) for text in subjects.prompts(count, self._seed))
        return tuple(f"{self._seed}.{i} {text}" for i, text in enumerate(texts))

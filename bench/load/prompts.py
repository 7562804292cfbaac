"""Prompts with the lengths of Chatbot Arena's that differ from all before."""

from __future__ import annotations

from bench import subjects


class New:
    """Called with a count, makes so many prompts."""

    def __init__(self) -> None:
        self._seed = 0

    def __call__(self, count: int) -> tuple[str, ...]:
        self._seed += 1
        return tuple(f"{self._seed}.{i} {text}" for i, text in enumerate(subjects.prompts(count, self._seed)))

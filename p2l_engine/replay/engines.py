"""Checkpoints whose engines are loaded on first use, and whose coefficients are computed once for all policies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from p2l_engine.catalog import Catalog
from p2l_engine.coefficients import Coefficients
from p2l_engine.replay.logged import Turns

if TYPE_CHECKING:
    from p2l_engine.engine import Engine

Compute = Callable[["Engine", Sequence[Turns]], Coefficients]


class Engines:
    """See ``compare.Checkpoints``. load: makes a checkpoint's engine; compute: its coefficients, with progress; catalog: of all
    policies that name none; None: each checkpoint's own."""

    def __init__(self, load: Callable[[str | None], Engine], compute: Compute, catalog: Catalog | None = None) -> None:
        self._load, self._compute, self._catalog = load, compute, catalog
        self._found: dict[str | None, Coefficients] = {}
        self._own: dict[str | None, Catalog | None] = {}

    def coefficients(self, checkpoint: str | None, prompts: Sequence[Turns]) -> Coefficients:
        """Of the same prompts each time. Raises CheckpointError and PromptError."""
        if checkpoint not in self._found:
            engine = self._load(checkpoint)
            file = engine.folder / "catalog.yaml"
            self._own[checkpoint] = Catalog.from_yaml(file) if file.is_file() else None
            self._found[checkpoint] = self._compute(engine, prompts)
        return self._found[checkpoint]

    def catalog(self, checkpoint: str | None) -> Catalog | None:
        """The one for all, or that of a checkpoint which was loaded."""
        return self._catalog or self._own.get(checkpoint)

"""How many models tables and plots show: ``--top``, ``--all``."""

from __future__ import annotations

from typing import Annotated

import typer

Top = Annotated[int, typer.Option("--top", min=1, help="Models to show in tables and plots, best first.")]
All = Annotated[bool, typer.Option("--all", help="Show all models.")]


def limit(top: int, every: bool) -> int | None:
    """Models to show; None: all."""
    return None if every else top


def cut(shown: int, total: int, what: str = "models") -> str:
    """A few words for a title, where not all are shown."""
    return "" if shown >= total else f"; {shown} of {total} {what}, --all shows all"

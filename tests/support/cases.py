"""Cases of parametrised tests, of which ``make test-fast`` runs some."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(fast: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """All ``cases``; those that are not among ``fast`` are marked slow."""
    cases = list(cases)
    assert all(case in cases for case in fast), f"expected all of {fast} among {cases}"
    return [case if case in fast else pytest.param(case, marks=pytest.mark.slow) for case in cases]

"""Checked single arguments. Errors name the argument, what was expected and what came. (Arrays: ``routing.arrays``.)"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from decimal import Decimal
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def whole_number(name: str, value: object, least: int, most: int | None = None) -> int:
    """``value`` as an int. Raises ValueError unless it is a whole number, not a bool, from least to most."""
    expected = f"a whole number of at least {least}" if most is None else f"a whole number from {least} to {most}"
    found = None if isinstance(value, bool) or not isinstance(value, Integral) else int(value)
    if found is None or found < least or (most is not None and found > most):
        raise ValueError(f"{name}: expected {expected}, got {_shown(value)}")
    return found


def finite_number(name: str, value: object, expected: str, within: Callable[[float], bool] = lambda _: True) -> float:
    """``value`` (also a Decimal, or an array of no dimensions) as a float. Raises ValueError unless it is a real number, not a
    bool, finite and ``within``. expected: what the error says."""
    number: Any = value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value
    try:
        found = math.nan if isinstance(number, bool) or not isinstance(number, Real | Decimal) else float(number)
    except (OverflowError, ValueError):  # an int beyond all floats; a signalling NaN
        found = math.nan
    if not math.isfinite(found) or not within(found):
        raise ValueError(f"{name}: expected {expected}, got {_shown(value)}")
    return found


def probability(name: str, value: object) -> float:
    """A probability above 0 and below 1, as a float. Raises as ``finite_number``."""
    return finite_number(name, value, "a probability between 0 and 1", lambda p: 0 < p < 1)


def instance(name: str, value: object, kind: type[T]) -> T:
    """``value``, if it is of that class, else TypeError."""
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected a {kind.__name__}, got {value!r:.80}")
    return value


def several(name: str, value: Iterable[T], of: str) -> Iterable[T]:
    """``value``, unless it cannot be iterated, or is text: TypeError."""
    if isinstance(value, str | bytes) or not isinstance(value, Iterable) or getattr(value, "ndim", 1) == 0:
        raise TypeError(f"{name}: expected a sequence of {of}, got {value!r:.80}")
    return value


def callback(name: str, value: object) -> None:
    """Raises TypeError unless ``value`` is None or can be called."""
    if value is not None and not callable(value):
        raise TypeError(f"{name}: expected a function of one number, or None, got {value!r:.80}")


def path(name: str, value: str | os.PathLike[str]) -> Path:
    """``value`` as a Path. Raises TypeError unless it is text or a path of text."""
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str):
        raise TypeError(f"{name}: expected a path, got {value!r:.80}")
    return Path(value)


def _shown(value: object) -> str:
    try:
        return f"{value!r:.80}"
    except ValueError:  # an int of more digits than Python shows
        return f"a number of more than {10**3} digits"

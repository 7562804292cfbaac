"""Values as JSON, which has no numbers that are not finite."""

from __future__ import annotations

import json
import math
from typing import Any


def json_text(value: Any) -> str:
    """A value as JSON: numbers that are not finite as null, and halves of characters (lone surrogates), which UTF-8 has not, as
    they are escaped in JSON."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json_text(_finite(value))
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value)
    return text


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

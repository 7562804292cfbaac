"""The folder of everything that is computed once and kept for later runs: backbones, ready weights, hidden states."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """P2L_ENGINE_CACHE, else p2l-engine in XDG_CACHE_HOME, else ~/.cache/p2l-engine. Raises OSError where this user, such as
    a container's that has only a number, has no home."""
    own = os.environ.get("P2L_ENGINE_CACHE")
    if own:
        return Path(own)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "p2l-engine"
    except RuntimeError as error:
        raise OSError("this user has no home directory; P2L_ENGINE_CACHE names a folder for what is kept") from error

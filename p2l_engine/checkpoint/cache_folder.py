"""The folder of everything that is computed once and kept for later runs: backbones, ready weights, hidden states."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """P2L_ENGINE_CACHE, else p2l-engine in XDG_CACHE_HOME, else ~/.cache/p2l-engine."""
    own = os.environ.get("P2L_ENGINE_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "p2l-engine"

"""Prompt-to-Leaderboard: prompts in, a leaderboard of chat models for each prompt out, and the best choice under a budget.

The public face is small: Engine (prompts to coefficients), Router and Catalog (coefficients to decisions), Leaderboard,
``routing`` (the same stages, arrays in and out), InfeasibleBudget.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from p2l_engine import routing
    from p2l_engine.catalog import Catalog
    from p2l_engine.engine import Engine
    from p2l_engine.errors import InfeasibleBudget
    from p2l_engine.leaderboard import Leaderboard
    from p2l_engine.router import Router

__version__ = "0.1.0"
__all__ = ["Catalog", "Engine", "InfeasibleBudget", "Leaderboard", "Router", "routing"]

_homes = {
    "Catalog": "catalog",
    "Engine": "engine",
    "InfeasibleBudget": "errors",
    "Leaderboard": "leaderboard",
    "Router": "router",
}


def _hide_kernels_folder() -> None:
    """``kernels`` is also a Hugging Face package, which transformers imports when it finds that name.

    From the repository's root it would find this project's folder instead. A None in sys.modules makes it "not installed";
    a real ``kernels`` package elsewhere on the path is left alone.
    """
    if "kernels" in sys.modules:
        return
    spec = importlib.util.find_spec("kernels")
    places = list(spec.submodule_search_locations or ()) if spec else []
    own = Path(__file__).resolve().parent.parent / "kernels"
    if own in (Path(place).resolve() for place in places):
        sys.modules["kernels"] = None  # type: ignore[assignment]


_hide_kernels_folder()


def __getattr__(name: str) -> Any:
    # Lazily: `p2l_engine.routing` alone does not pay for transformers.
    if name == "routing":
        return import_module("p2l_engine.routing")
    if name in _homes:
        return getattr(import_module(f"p2l_engine.{_homes[name]}"), name)
    raise AttributeError(f"module 'p2l_engine' has no attribute {name!r}")

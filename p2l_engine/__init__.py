"""Prompt-to-Leaderboard: from prompts to a leaderboard of chat models for each prompt, and to the best model under a budget.

Engine turns prompts into coefficients; Router and Catalog turn coefficients into decisions; ``routing`` has the same stages on
arrays. Everything is loaded on first use: importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from p2l_engine import routing
    from p2l_engine.catalog import Catalog, CatalogModel
    from p2l_engine.chooser import Chooser
    from p2l_engine.coefficients import Coefficients
    from p2l_engine.constraints import Constraints
    from p2l_engine.decision import Decision
    from p2l_engine.engine import Engine
    from p2l_engine.errors import (
        CatalogError,
        CheckpointError,
        Infeasible,
        InfeasibleBudget,
        PromptError,
        SpendLimitReached,
        UnknownReservation,
    )
    from p2l_engine.feedback import FeedbackModel
    from p2l_engine.leaderboard import Leaderboard
    from p2l_engine.prompts.parse import Prompt
    from p2l_engine.router import Router
    from p2l_engine.routing import BudgetPacer, Limit, Policies, Problem, Resource, Share, SolverError, SpendLimit

__version__ = "0.1.0"
__all__ = [
    "BudgetPacer",
    "Catalog",
    "CatalogError",
    "CatalogModel",
    "CheckpointError",
    "Chooser",
    "Coefficients",
    "Constraints",
    "Decision",
    "Engine",
    "FeedbackModel",
    "Infeasible",
    "InfeasibleBudget",
    "Leaderboard",
    "Limit",
    "Policies",
    "Problem",
    "Prompt",
    "PromptError",
    "Resource",
    "Router",
    "Share",
    "SolverError",
    "SpendLimit",
    "SpendLimitReached",
    "UnknownReservation",
    "routing",
]

_MODULES = {
    "catalog": ("Catalog", "CatalogModel"),
    "chooser": ("Chooser",),
    "coefficients": ("Coefficients",),
    "constraints": ("Constraints",),
    "decision": ("Decision",),
    "engine": ("Engine",),
    "errors": (
        "CatalogError",
        "CheckpointError",
        "Infeasible",
        "InfeasibleBudget",
        "PromptError",
        "SpendLimitReached",
        "UnknownReservation",
    ),
    "feedback": ("FeedbackModel",),
    "leaderboard": ("Leaderboard",),
    "prompts.parse": ("Prompt",),
    "router": ("Router",),
    "routing": ("BudgetPacer", "Limit", "Policies", "Problem", "Resource", "Share", "SolverError", "SpendLimit"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def _hide_kernels_folder() -> None:
    """Hides this repository's kernels/ from transformers, which imports a Hugging Face package of that name if it finds one.

    When Python starts in the repository's root, transformers would find this project's folder instead. None in sys.modules
    makes it "not installed"; a real ``kernels`` package elsewhere on the path stays importable.
    """
    if "kernels" in sys.modules:
        return
    spec = importlib.util.find_spec("kernels")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    own = Path(__file__).resolve().parent.parent / "kernels"
    if own in (Path(folder).resolve() for folder in folders):
        sys.modules["kernels"] = None  # type: ignore[assignment]


_hide_kernels_folder()


def __getattr__(name: str) -> Any:
    if name == "routing":
        return import_module("p2l_engine.routing")
    if name in _MODULE_OF:
        return getattr(import_module(f"p2l_engine.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module 'p2l_engine' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Files of prompts to files of decisions: resumable runs over any number of rows in bounded memory."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from p2l_engine.batch.config import BatchConfig
    from p2l_engine.batch.report import Report
    from p2l_engine.batch.runner import run
    from p2l_engine.batch.worker import Route

__all__ = ["BatchConfig", "Report", "Route", "run"]

# Imported on first use: ``batch.config`` is also read by commands that need neither pyarrow nor torch.
_MODULES = {"BatchConfig": "config", "Report": "report", "Route": "worker", "run": "runner"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)

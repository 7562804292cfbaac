"""Prompts to coefficients: one engine for a checkpoint on a device, and many callers on it."""

from p2l_engine.engine.device import as_device, as_dtype, described, natural_dtype
from p2l_engine.engine.engine import Engine
from p2l_engine.engine.pipeline import Outputs

__all__ = ["Engine", "Outputs", "as_device", "as_dtype", "described", "natural_dtype"]

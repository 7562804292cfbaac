"""Prompts to coefficients: one engine for a checkpoint on a device, and many callers on it."""

from p2l_engine.engine.engine import Engine, Outputs, natural_dtype

__all__ = ["Engine", "Outputs", "natural_dtype"]

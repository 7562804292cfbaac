"""Rows of expected output tokens and seconds with random weights."""

from __future__ import annotations

import torch

from p2l_engine.backbone.lengths import LengthHead, LengthRows
from tests.support import tiny

OBSERVED = ("delta", "alpha")  # in another order than the checkpoint's


def length_rows(hidden: int = 48, models: tuple[str, ...] = OBSERVED, seed: int = 0) -> LengthRows:
    """About e^3, from 1 to 1,000."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(len(models) + 1, hidden, generator=generator) / hidden**0.5
    bias = torch.randn(len(models) + 1, generator=generator) + 3
    return LengthRows(models, weight, bias, torch.ones(len(bias)), torch.full((len(bias),), 1000.0))


def length_head(hidden: int = 48) -> LengthHead:
    """Of the tiny checkpoint's models, of which two were observed."""
    return LengthHead(tuple(tiny.MODELS), length_rows(hidden), length_rows(hidden, seed=1))

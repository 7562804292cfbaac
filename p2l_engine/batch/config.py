"""What a batch run is asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from p2l_engine.batch.blocks import ROWS
from p2l_engine.router import Shares
from p2l_engine.routing.problem import Scope


@dataclass(frozen=True, slots=True)
class Asked:
    """One batch run.

    inputs: paths, URIs, folders and globs of parquet, csv and jsonl (.gz, .zst) files. output: a folder or its URI. column: the
    prompts'; plain_text: text is text, even where it is a list as JSON. keep: the columns that the output repeats (None: all
    others). budget, budget_scope, max_share and min_share: as in ``Router.route_batch``; the batch is all rows that can be
    routed. price: instead of a budget, what one unit of cost must bring in win rate: that of an earlier run's budget over its
    batch (in its manifest and its parts' metadata). coefficients: write theta (and eta) too, in this type. strict: stop at the
    first row that cannot be routed. rows_per_part: of a part of the output, which is computed and resumed together; long
    prompts make smaller ones. state: where coefficients are kept until the end (a local folder; None: within the output, which
    must then be local).
    """

    inputs: Sequence[str]
    output: str
    column: str = "prompt"
    plain_text: bool = False
    keep: Sequence[str] | None = None
    budget: float | None = None
    budget_scope: Scope = "prompt"
    price: float | None = None
    max_share: Shares = field(default_factory=dict)
    min_share: Shares = field(default_factory=dict)
    coefficients: Literal["float16", "float32"] | None = None
    strict: bool = False
    state: str | None = None
    rows_per_part: int = ROWS

    def __post_init__(self) -> None:
        if not self.inputs or isinstance(self.inputs, str):
            raise ValueError(f"inputs: expected a list of at least one path, got {self.inputs!r}")
        keep = list(self.keep or ())
        if not all(keep) or len(set(keep)) < len(keep):
            raise ValueError(f"keep: expected names of columns, each once, got {keep!r}")
        check(self.budget, self.price, self.coefficients)
        if self.price is not None and (self.max_share or self.min_share):
            raise ValueError("price: expected no shares beside it")
        if self.budget_scope not in ("prompt", "batch"):
            raise ValueError(f"budget_scope: expected 'prompt' or 'batch', got {self.budget_scope!r}")
        if not 1 <= self.rows_per_part < 1 << 20:
            raise ValueError(f"rows_per_part: expected 1 to {(1 << 20) - 1:,}, got {self.rows_per_part!r}")

    @property
    def over_batch(self) -> bool:
        """Whether a decision depends on the other rows."""
        return bool((self.budget is not None and self.budget_scope == "batch") or self.max_share or self.min_share)


def check(budget: float | None, price: float | None, coefficients: str | None) -> None:
    """Raises ValueError."""
    if budget is not None and not (math.isfinite(budget) and budget >= 0):
        raise ValueError(f"budget: expected a finite number >= 0, got {budget!r}")
    if price is not None and not (math.isfinite(price) and price >= 0):
        raise ValueError(f"price: expected a finite number >= 0, got {price!r}")
    if price is not None and budget is not None:
        raise ValueError(f"price: expected no budget beside it, got {budget!r}")
    if coefficients not in (None, "float16", "float32"):
        raise ValueError(f"coefficients: expected float16 or float32, got {coefficients!r}")

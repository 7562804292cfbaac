"""What a batch run has done."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass(slots=True)
class Report:
    """What a run has done so far. rows read and written; routed: those without an error; computed and resumed: prompts whose
    coefficients this run computed, or found there; repeated: rows whose prompt came before; tokens computed; read: the share of
    the input's bytes, 0 to 1; spend: the sum of expected costs of what was written; price: what one more unit of the mean cost
    would have been worth (a budget over the batch); seconds by stage (stages overlap)."""

    rows: int = 0
    routed: int = 0
    computed: int = 0
    resumed: int = 0
    repeated: int = 0
    tokens: int = 0
    parts: int = 0
    read: float = 0.0
    spend: float = 0.0
    prices: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def took(self, stage: str, since: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - since

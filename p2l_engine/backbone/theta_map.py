"""A monotone map of theta behind the head, which no linear head can hold: what calibration may find."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from p2l_engine.errors import CheckpointError

FILE = "calibration.json"  # in a checkpoint's folder


@dataclass(frozen=True)
class MonotoneStep:
    """theta -> g(theta) + the model's offset, g rising and linear between its knots, and beyond them as next to them.

    knots, values: at least two each, rising. offsets: by model's name, 0 where there is none.
    """

    knots: tuple[float, ...]
    values: tuple[float, ...]
    offsets: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def rises(numbers: tuple[float, ...]) -> bool:
            wide = torch.tensor(numbers, dtype=torch.float64)
            return len(wide) > 1 and bool(wide.isfinite().all() and (wide.diff() > 0).all())

        if len(self.knots) != len(self.values) or not rises(self.knots) or not rises(self.values):
            raise ValueError(
                f"knots, values: expected as many of each, at least two, finite and rising, got {list(self.knots)!r:.80} and "
                f"{list(self.values)!r:.80}"
            )
        if not all(math.isfinite(offset) for offset in self.offsets.values()):
            raise ValueError(f"offsets: expected finite numbers, got {self.offsets!r:.80}")

    def scaled(self, scale: float, offsets: dict[str, float]) -> MonotoneStep:
        """This step, then theta -> scale theta + offset; ``scale`` above 0."""
        names = {*self.offsets, *offsets}
        moved = {name: scale * self.offsets.get(name, 0.0) + offsets.get(name, 0.0) for name in sorted(names)}
        return MonotoneStep(self.knots, tuple(scale * value for value in self.values), moved)


@dataclass(frozen=True)
class ThetaMap:
    """Steps that an engine applies one after the other to the theta [N, M] of these models, on ``device`` (None: the CPU)."""

    models: tuple[str, ...]
    steps: tuple[MonotoneStep, ...]
    device: torch.device | None = None

    def __call__(self, theta: Tensor) -> Tensor:
        """theta [N, M] float32 or float64 -> the same shape and type; NaN stays NaN."""
        return self.with_slope(theta)[0]

    def to(self, device: torch.device) -> ThetaMap:
        """The same map on another device."""
        return ThetaMap(self.models, self.steps, device)

    def with_slope(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """The mapped theta [N, M], and the derivative [N, M] there: what a small deviation is multiplied by."""
        found, derivative = theta.contiguous(), torch.ones_like(theta)
        for knots, values, slopes, offsets in self._tensors:
            segment = torch.bucketize(found, knots[1:-1], right=True)
            slope = slopes[segment]
            # Of a segment from its lower knot, so that nothing is lost between large numbers.
            found = (values[segment] + slope * (found.double() - knots[segment]) + offsets).to(theta.dtype)
            derivative = derivative * slope.to(theta.dtype)
        return found, derivative

    @cached_property
    def _tensors(self) -> list[tuple[Tensor, ...]]:
        found = []
        for step in self.steps:
            knots, values = (torch.tensor(row, dtype=torch.float64) for row in (step.knots, step.values))
            offsets = torch.tensor([step.offsets.get(name, 0.0) for name in self.models], dtype=torch.float64)
            found.append(tuple(x.to(self.device) for x in (knots, values, values.diff() / knots.diff(), offsets)))
        return found

    def contents(self) -> bytes:
        """Of ``calibration.json``: {"steps": [{"knots": [...], "values": [...], "offsets": {NAME: offset}}]}."""
        steps = [{"knots": [*s.knots], "values": [*s.values], "offsets": s.offsets} for s in self.steps]
        return (json.dumps({"steps": steps}, indent=1, ensure_ascii=False) + "\n").encode()

    @classmethod
    def read(cls, path: Path, models: tuple[str, ...]) -> ThetaMap:
        """The reverse of ``contents``, for a checkpoint of these models; offsets of others, which were dropped since, are
        ignored. Raises CheckpointError."""
        try:
            given = json.loads(path.read_text(encoding="utf-8"))["steps"]
            steps = tuple(
                MonotoneStep(
                    tuple(map(float, step["knots"])),
                    tuple(map(float, step["values"])),
                    {str(name): float(offset) for name, offset in step["offsets"].items()},
                )
                for step in given
            )
            if not steps:
                raise ValueError("no step")
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{path}: expected JSON with steps of knots, values and offsets, all numbers finite: {error!r}"
            ) from None
        return cls(models, steps)

"""A head at one moment of its learning: from hidden states to coefficients."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from p2l_engine.backbone.head import Head
from p2l_engine.backbone.uncertainty import Uncertainty
from p2l_engine.coefficients import Coefficients
from p2l_engine.feedback import FeedbackModel

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class LearnedHead:
    """head over the M ``models``, on a CPU. uncertainty: of its rows; None: all are certain."""

    head: Head
    uncertainty: Uncertainty | None
    models: tuple[str, ...]
    feedback: FeedbackModel

    def coefficients(self, hidden: Float32, kept: Float32 | None = None) -> LearnedCoefficients:
        """Of hidden states [N, D] as the head reads them, and the share [N] that a shrinkage kept of them. Raises
        FloatingPointError where coefficients are not finite."""
        with torch.inference_mode():
            states = torch.from_numpy(hidden)
            theta, eta = self.head.split(F.linear(states, self.head.weight, self.head.bias).numpy())
            deviation = np.zeros_like(theta) if self.uncertainty is None else self.uncertainty.deviation(states).numpy()
        if not np.isfinite(theta).all():
            raise FloatingPointError("the backbone gave coefficients that are not finite; are the checkpoint's weights sound?")
        ties = None if eta is None else eta.copy()
        return LearnedCoefficients(
            np.ascontiguousarray(theta), ties, self.models, self.feedback, deviation, None, kept, hidden, self
        )


@dataclass(frozen=True, slots=True)
class LearnedCoefficients(Coefficients):
    """Coefficients, with the hidden states [N, D] and the head that they were computed from."""

    hidden: Float32 = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    by: LearnedHead | None = None

    def rows(self, some: slice | npt.NDArray[np.integer[Any]]) -> LearnedCoefficients:
        """The coefficients of these prompts."""
        plain = Coefficients.rows(self, some)
        return LearnedCoefficients(
            plain.theta, plain.eta, self.models, self.feedback, plain.deviation, plain.usage, plain.kept, self.hidden[some],
            self.by,
        )  # fmt: skip

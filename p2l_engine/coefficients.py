"""The coefficients of prompts, as an engine returns them. Importing this module loads neither torch nor transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from p2l_engine.feedback import FeedbackModel


@dataclass(frozen=True, slots=True)
class Coefficients:
    """theta [N, M] float32; eta [N] float32, or None for feedback models without ties; the M models' names.

    deviation [N, M] float32 >= 0: the posterior standard deviation of theta; None where the checkpoint has no uncertainty.
    """

    theta: npt.NDArray[np.float32]
    eta: npt.NDArray[np.float32] | None
    models: tuple[str, ...]
    feedback: FeedbackModel
    deviation: npt.NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.theta)

    def row(self, i: int) -> Coefficients:
        """The coefficients of one prompt."""
        return self.rows(slice(i, i + 1))

    def rows(self, some: slice | npt.NDArray[np.integer[Any]]) -> Coefficients:
        """The coefficients of these prompts."""
        eta, deviation = (None if part is None else part[some] for part in (self.eta, self.deviation))
        return Coefficients(self.theta[some], eta, self.models, self.feedback, deviation)

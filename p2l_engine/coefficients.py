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
    """theta [N, M] float32; eta [N] float32, or None for feedback models without ties; the M models' names."""

    theta: npt.NDArray[np.float32]
    eta: npt.NDArray[np.float32] | None
    models: tuple[str, ...]
    feedback: FeedbackModel

    def __len__(self) -> int:
        return len(self.theta)

    def row(self, i: int) -> Coefficients:
        """The coefficients of one prompt."""
        return self.rows(slice(i, i + 1))

    def rows(self, some: slice | npt.NDArray[np.integer[Any]]) -> Coefficients:
        """The coefficients of these prompts."""
        return Coefficients(self.theta[some], None if self.eta is None else self.eta[some], self.models, self.feedback)

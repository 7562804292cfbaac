"""The coefficients of prompts, as an engine returns them. Importing this module loads neither torch nor transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from p2l_engine.feedback import FeedbackModel


@dataclass(frozen=True, slots=True)
class ExpectedUsage:
    """What answers to prompts are expected to take, by a checkpoint that has learned it (``backbone.lengths``).

    tokens_in [N] float32: tokens of the user turns, by the checkpoint's tokenizer, where a prompt is truncated of what is left.
    tokens_out [N, M] float32 > 0: output tokens at each model; seconds [N, M] float32 > 0, None where no latency was observed.
    observed [M]: models whose output tokens were observed; the others get what these have in common.
    """

    tokens_in: npt.NDArray[np.float32]
    tokens_out: npt.NDArray[np.float32]
    seconds: npt.NDArray[np.float32] | None
    observed: npt.NDArray[np.bool_]

    def rows(self, some: slice | npt.NDArray[np.integer[Any]]) -> ExpectedUsage:
        """Of these prompts."""
        seconds = None if self.seconds is None else self.seconds[some]
        return ExpectedUsage(self.tokens_in[some], self.tokens_out[some], seconds, self.observed)

    def of_first(self, count: int) -> ExpectedUsage:
        """Of the first ``count`` models alone."""
        seconds = None if self.seconds is None else self.seconds[:, :count]
        return ExpectedUsage(self.tokens_in, self.tokens_out[:, :count], seconds, self.observed[:count])


@dataclass(frozen=True, slots=True)
class Coefficients:
    """theta [N, M] float32; eta [N] float32, or None for feedback models without ties; the M models' names.

    deviation [N, M] float32 >= 0: the posterior standard deviation of theta; None where the checkpoint has no uncertainty.
    usage: what answers are expected to take; None where the checkpoint has not learned it.
    kept [N] float32 in [0, 1]: the share of the differences between models that was kept; the rest of the way, theta was moved
    to one leaderboard for all prompts, since the prompt is far from those of training. None where the checkpoint shrinks none.
    """

    theta: npt.NDArray[np.float32]
    eta: npt.NDArray[np.float32] | None
    models: tuple[str, ...]
    feedback: FeedbackModel
    deviation: npt.NDArray[np.float32] | None = None
    usage: ExpectedUsage | None = None
    kept: npt.NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.theta)

    def row(self, i: int) -> Coefficients:
        """The coefficients of one prompt."""
        return self.rows(slice(i, i + 1))

    def of_first(self, count: int) -> Coefficients:
        """The same prompts' coefficients of the first ``count`` models alone."""
        if count == len(self.models):
            return self
        deviation = None if self.deviation is None else self.deviation[:, :count]
        usage = None if self.usage is None else self.usage.of_first(count)
        return Coefficients(self.theta[:, :count], self.eta, self.models[:count], self.feedback, deviation, usage, self.kept)

    def rows(self, some: slice | npt.NDArray[np.integer[Any]]) -> Coefficients:
        """The coefficients of these prompts."""
        eta, deviation, kept = (None if part is None else part[some] for part in (self.eta, self.deviation, self.kept))
        usage = None if self.usage is None else self.usage.rows(some)
        return Coefficients(self.theta[some], eta, self.models, self.feedback, deviation, usage, kept)

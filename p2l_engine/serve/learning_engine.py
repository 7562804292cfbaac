"""An engine whose head keeps learning: the backbone computes hidden states, the current head coefficients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from p2l_engine.coefficients import Coefficients
from p2l_engine.engine import Engine
from p2l_engine.feedback import FeedbackModel
from p2l_engine.learning.hidden import states_and_kept
from p2l_engine.learning.learned import LearnedCoefficients, LearnedHead
from p2l_engine.prompts.parse import Turns
from p2l_engine.serve.scorer import key_of

Float32 = npt.NDArray[np.float32]


class LearningEngine:
    """Stands in for an engine in ``Runtime``. current: the head that counts now, which may be replaced at any time. remember:
    is given the hash of each prompt that is computed, and its hidden state [D]."""

    def __init__(self, engine: Engine, current: LearnedHead, remember: Callable[[str, Float32], object]) -> None:
        self.current, self.remember = current, remember
        self.engine = engine

    @property
    def models(self) -> tuple[str, ...]:
        """Of the current head."""
        return self.current.models

    @property
    def feedback(self) -> FeedbackModel:
        """The checkpoint's feedback model."""
        return self.engine.feedback

    @property
    def uncertainty(self) -> bool:
        """Whether coefficients have a deviation: they do."""
        return True

    @property
    def encoder(self) -> Any:
        """The engine's."""
        return self.engine.encoder

    def coefficients(self, prompts: Sequence[Turns]) -> Coefficients:
        """As ``Engine.coefficients``; rows keep their hidden states."""
        hidden, kept = states_and_kept(self.engine, prompts)
        for turns, state in zip(prompts, hidden, strict=True):
            self.remember(key_of(turns), state)
        return self.current.coefficients(hidden, kept)

    def renewed(self, found: Coefficients) -> Coefficients:
        """The same prompt's coefficients by the current head."""
        current = self.current
        if not isinstance(found, LearnedCoefficients) or found.by is current:
            return found
        return current.coefficients(found.hidden, found.kept)

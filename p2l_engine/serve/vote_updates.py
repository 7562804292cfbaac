"""A learner updated by votes from the log: one that cannot be learned from leaves the others."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from p2l_engine.learning.learner import Learner
from p2l_engine.serve.lessons import Lesson, as_votes

Float32 = npt.NDArray[np.float32]

logger = logging.getLogger(__name__)


def updated(learner: Learner, found: Sequence[Lesson], states: Mapping[str, Float32]) -> int:
    """Updates the learner by these votes, whose prompts have these hidden states [D] by their hashes. Returns how many were
    learned from; each of the others is logged."""
    try:
        _update(learner, found, states)
        return len(found)
    except (ValueError, ArithmeticError, np.linalg.LinAlgError):  # one by one, so that only the vote at fault fails
        return sum(_learned(learner, lesson, states) for lesson in found)


def _learned(learner: Learner, lesson: Lesson, states: Mapping[str, Float32]) -> bool:
    try:
        _update(learner, [lesson], states)
        return True
    except (ValueError, ArithmeticError, np.linalg.LinAlgError) as error:
        logger.error("a vote on %s and %s cannot be learned from: %s", lesson.a, lesson.b, error)
        return False


def _update(learner: Learner, found: Sequence[Lesson], states: Mapping[str, Float32]) -> None:
    votes, prompts = as_votes(found, learner.models)
    learner.update(votes, np.stack([states[each] for each in prompts]))

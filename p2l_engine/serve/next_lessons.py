"""What a learning server learns from next: feedback from the log, and the hidden states of its prompts."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import numpy.typing as npt

from p2l_engine.decision_log.log import DecisionLog
from p2l_engine.decision_log.store import Said
from p2l_engine.engine import Engine
from p2l_engine.errors import PromptError
from p2l_engine.feedback import FeedbackModel
from p2l_engine.learning.hidden import hidden_states
from p2l_engine.serve.lessons import Lesson, lessons
from p2l_engine.serve.prompt_states import PromptStates
from p2l_engine.serve.settings import ConfigError
from p2l_engine.tables.turns import cell_turns
from p2l_engine.tables.whole import read_table

PATIENCE = 5.0  # seconds that feedback waits for the hidden state of its prompt
BATCH = 256  # pieces of feedback that are learned from at a time
NO_STATE = "the prompt's hidden state is not kept any more, and its text was not logged"
UNREADABLE = "the prompt cannot be read"


def next_lessons(
    log: DecisionLog, number: int, states: PromptStates, models: tuple[str, ...], feedback: FeedbackModel
) -> tuple[Said | None, list[Lesson], Counter[str]]:
    """The last feedback after ``number`` that is learned from next (None: there is none), the votes up to it on these models,
    and what gives none, by reason: nothing whose prompt may be computed just now, as that of a model that was named."""
    said = log.feedback_after(number, BATCH)
    found, skipped = lessons(log, said, models, feedback)
    new = [lesson for lesson in found if lesson.turns is None and lesson.since > time.time() - PATIENCE]
    known = states.get({lesson.prompt for lesson in new}) if new else {}
    first = min((lesson.number for lesson in new if lesson.prompt not in known), default=None)
    if first is not None:
        said = [each for each in said if each.number < first]
        found, skipped = lessons(log, said, models, feedback)
    return said[-1] if said else None, found, skipped


def is_log_of(log: DecisionLog, number: int, decision: str | None) -> bool:
    """Whether the feedback of this number, the last that was read, is in this log and on this decision, as far as that is
    known: it may have been deleted, or there was none (0, None)."""
    found = log.feedback_after(number - 1, 1) if number and decision else []
    return not found or found[0].number != number or found[0].feedback.decision == decision


def states_of(
    found: list[Lesson], kept: PromptStates, engine: Engine, skipped: Counter[str]
) -> dict[str, npt.NDArray[np.float32]]:
    """The hidden states of the votes' prompts: kept ones, or computed again from logged texts. Votes that have none are counted
    in ``skipped``."""
    states = kept.get({lesson.prompt for lesson in found})
    for lesson in found:
        if lesson.prompt in states:
            continue
        if lesson.turns is None:
            skipped[NO_STATE] += 1
            continue
        try:
            states[lesson.prompt] = hidden_states(engine, [list(lesson.turns)])[0]
        except PromptError:
            skipped[UNREADABLE] += 1
    return states


def reference_prompts(path: str) -> list[list[str]]:
    """The column prompt of a table. Raises ConfigError."""
    try:
        table = read_table(path, ("prompt",))
        if "prompt" not in table.columns or not len(table):
            raise ValueError("expected a table with a column 'prompt'")
        return [list(cell_turns(cell)) for cell in table.columns["prompt"]]
    except (ValueError, OSError) as error:
        raise ConfigError(f"serve.learn.prompts: {path}: {error}") from None

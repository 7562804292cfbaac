"""What people said of decisions, as votes between two models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from p2l_engine.decision_log.comparison import REPEATED, answering, content, no_answer, no_vote
from p2l_engine.decision_log.log import DecisionLog
from p2l_engine.decision_log.record import Preference, Record
from p2l_engine.decision_log.store import Said
from p2l_engine.feedback import FeedbackModel, Outcome
from p2l_engine.votes import Votes
from p2l_engine.votes.scores import ANSWER, outcomes

SCORES = 200  # of one prompt, the newest, that a new one is compared with
LABEL = "a label"
ALONE = "a score without one of another model on the same prompt"
NO_TIES = "a tie, which the checkpoint's feedback model does not know"
UNKNOWN = "on a model that is not learned: name it under serve.learn.models"
GONE = "its decision is not in the log"
OUTCOMES: dict[Preference, Outcome] = {
    "this": Outcome.A, "other": Outcome.B, "tie": Outcome.TIE, "both_bad": Outcome.BOTH_BAD,
}  # fmt: skip


class Lesson(NamedTuple):
    """One vote. number, since: of the feedback that gives it, and when that came, seconds since 1970. prompt: the hash of its
    turns; turns: themselves, where they were logged. weight: less than 1 where an answer is in several votes."""

    number: int
    prompt: str
    turns: tuple[str, ...] | None
    a: str
    b: str
    outcome: Outcome
    since: float
    weight: float = 1.0


def lessons(
    log: DecisionLog, said: Sequence[Said], models: Collection[str], feedback: FeedbackModel
) -> tuple[list[Lesson], Counter[str]]:
    """The votes that follow from what was said, in its order, and how much of it is none, by reason.

    A preference is a vote. A score is one against the newest score of each other model on the same prompt, as in a table of
    scores; k answers weigh k / 2 votes together, as there: each brings half a vote, shared by the votes that it makes, and the
    first one's half comes with the second. What repeats something that was said of the same decision, or of the same two, is
    none. models: that votes may be on.
    """
    ids = {each.feedback.decision for each in said} | {each.feedback.against for each in said if each.feedback.against}
    records = log.decisions(sorted(ids))
    first = dict[tuple[object, ...], int]()
    for each in log.said_of(sorted(ids)):
        first.setdefault(content(each.feedback), each.number)
    found, skipped = list[Lesson](), Counter[str]()
    for each in said:
        if first.get(content(each.feedback), each.number) < each.number:
            skipped[REPEATED] += 1
            continue
        votes = _votes(each, records, log, models)
        if isinstance(votes, str):
            skipped[votes] += 1
            continue
        for vote in votes:
            why = _unusable(vote, models, feedback)
            skipped.update([] if why is None else [why])
            found += [vote] if why is None else []
    return found, skipped


def _votes(said: Said, records: Mapping[str, Record], log: DecisionLog, models: Collection[str]) -> list[Lesson] | str:
    """The votes of one feedback, or why there is none."""
    each, record = said.feedback, records.get(said.feedback.decision)
    if each.label is not None:
        return LABEL
    if record is None:
        return GONE
    if each.preference is not None:
        other = records.get(each.against or "")
        if other is None or (why := no_vote(record, other)) is not None:
            return str(no_vote(record, other) if other is None else why)
        return [_lesson(said, record, answering(record), answering(other), OUTCOMES[each.preference])]
    if (why := no_answer(record)) is not None:
        return why
    own, newest = answering(record), _scores(log, record, said.number)
    others = {model: score for model, score in newest.items() if model != own}
    learned = [model for model in newest if model in models]
    weight = ANSWER / max(len([model for model in learned if model != own]), 1) + (ANSWER if len(learned) == 1 else 0.0)
    found = [
        _lesson(said, record, own, model, Outcome(int(outcomes(each.score or 0.0, score))), weight)
        for model, score in others.items()
    ]
    return found or ALONE


def _scores(log: DecisionLog, record: Record, number: int) -> dict[str, float]:
    """The newest score of each model on the record's prompt, before this number."""
    found = dict[str, float]()
    if record.turns_hash:
        for said, of in log.scores_on(record.turns_hash, number, SCORES):
            if said.score is not None and no_answer(of) is None:
                found.setdefault(answering(of), said.score)
    return found


def _lesson(said: Said, record: Record, a: str, b: str, outcome: Outcome, weight: float = 1.0) -> Lesson:
    return Lesson(said.number, record.turns_hash, record.turns, a, b, outcome, said.feedback.time, weight)


def _unusable(vote: Lesson, models: Collection[str], feedback: FeedbackModel) -> str | None:
    if vote.a not in models or vote.b not in models:
        return UNKNOWN
    return NO_TIES if vote.outcome >= Outcome.TIE and not feedback.has_ties else None


def as_votes(found: Sequence[Lesson], models: Sequence[str]) -> tuple[Votes, list[str]]:
    """The votes on these models, and the hashes of their prompts, one for each of ``Votes.prompts``."""
    prompts = list(dict.fromkeys(lesson.prompt for lesson in found))
    place, index = ({name: i for i, name in enumerate(names)} for names in (prompts, models))
    rows = [(place[each.prompt], index[each.a], index[each.b], int(each.outcome)) for each in found]
    prompt, a, b, outcome = np.array(rows, np.int64).reshape(-1, 4).T
    weight = np.array([each.weight for each in found], np.float64)
    return Votes.make([(prompt,) for prompt in prompts], models, prompt, a, b, outcome, weight), prompts

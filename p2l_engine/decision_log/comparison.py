"""What was said of two answers: is it a vote between two models?"""

from __future__ import annotations

from p2l_engine.decision_log.record import Feedback, Preference, Record

REPEATED = "the same was said before"
UNANSWERED = ("refused", "failed")
SWAPPED: dict[Preference, Preference] = {"this": "other", "other": "this"}  # said of the other decision


def answering(record: Record) -> str:
    """The model whose answer was judged: the one that answered; of a decision alone, the chosen one, which others asked."""
    return record.model or (record.chosen if record.outcome == "decision" else "")


def content(said: Feedback) -> tuple[object, ...]:
    """What was said, whenever it was: said again of the same decision, or of the same two in either order, it is no news."""
    if said.against is not None and said.preference is not None and said.against < said.decision:
        return said.against, None, said.decision, SWAPPED.get(said.preference, said.preference), None
    return said.decision, said.score, said.against, said.preference, said.label


def no_answer(record: Record) -> str | None:
    """Why nothing can be learnt from what was said of a decision's answer; None where something can."""
    return "there was no answer" if record.outcome in UNANSWERED or not answering(record) else None


def no_vote(a: Record, b: Record | None) -> str | None:
    """Why a preference between the answers to two decisions is no vote; None where it is one."""
    if b is None:
        return "the other decision is not in the log"
    if (why := no_answer(a) or no_answer(b)) is not None:
        return why
    if a.turns_hash != b.turns_hash or (a.turns != b.turns and None not in (a.turns, b.turns)):
        return "the two decisions have different prompts"
    if answering(a) == answering(b):
        return "both answers are of the same model"
    return None

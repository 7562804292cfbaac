"""What the log keeps of a decision, and what people said about it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

ID = re.compile(r"dec_[0-9a-f]{32}")
LABEL = 200  # characters of a label at most
Preference = Literal["this", "other", "tie", "both_bad"]
PREFERENCES: tuple[Preference, ...] = get_args(Preference)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One call of a provider."""

    model: str
    deployment: str  # its name in the configuration, never a URL with secrets
    status: int | None  # HTTP status; None: no answer
    error: str | None  # "connect", "first_byte", "idle", "deadline", "http", "body", "cut", ...; None: it answered
    seconds: float


@dataclass(frozen=True, slots=True)
class Record:
    """One decision and what became of it."""

    id: str  # "dec_" and 32 hex digits
    time: float  # seconds since 1970, UTC
    key: str | None  # id of the caller's key, not a secret
    session: str  # hash
    turns_hash: str  # hex digest of the user turns
    turns: tuple[str, ...] | None  # only where prompts are logged
    api: str  # "chat", "responses", "messages", "route" (the decision alone)
    asked: str  # "auto" or the pinned model
    chosen: str  # what the policy drew
    model: str  # what answered; equals chosen unless a fallback did
    policy: dict[str, float]
    propensity: float  # of chosen, in (0, 1]
    propensity_error: float  # an upper bound on its standard error; 0: it is exact
    candidates: tuple[str, ...]  # models that could take the request
    win_rate: float | None  # of the policy; None: a named model, for which nothing was computed
    score: float | None  # of the policy; may be infinite
    budget: float | None  # of this request, USD; None: none of its own
    expected_cost: float  # USD
    cost: float | None  # USD, really spent; None: nothing known to be spent
    estimated: bool  # whether cost is an estimate
    tokens_in: int | None  # the provider's usage
    tokens_cached: int | None
    tokens_out: int | None
    streamed: bool
    status: int  # HTTP status that the client got
    outcome: str  # "answered", "cached", "refused", "failed", "cut", "left", "decision"
    attempts: tuple[Attempt, ...]
    latency: dict[str, float]  # milliseconds by stage: "parse", "coefficients", "choose", "reserve", "first_byte", "total"


@dataclass(frozen=True, slots=True)
class Feedback:
    """Feedback on a decision: a score, a preference against another decision, or a label.

    Raises ValueError for anything else; its message repeats nothing of a text.
    """

    decision: str  # the decision's id
    time: float  # seconds since 1970, UTC
    score: float | None = None  # in [0, 1]
    against: str | None = None  # id of another decision; with preference
    preference: Preference | None = None
    label: str | None = None  # up to 200 characters

    def __post_init__(self) -> None:
        check_id(self.decision, "id")
        given = [self.score is not None, self.preference is not None or self.against is not None, self.label is not None]
        if sum(given) != 1:
            raise ValueError("feedback: expected one of score, label, or preference with against")
        if self.score is not None:
            number = isinstance(self.score, int | float) and not isinstance(self.score, bool)
            if not (number and 0 <= self.score <= 1):
                raise ValueError("score: expected a number in [0, 1]")
        elif self.label is not None:
            if not (isinstance(self.label, str) and 0 < len(self.label) <= LABEL):
                raise ValueError(f"label: expected a text of 1 to {LABEL} characters")
        else:
            if self.preference not in PREFERENCES:
                raise ValueError(f"preference: expected one of {', '.join(PREFERENCES)}")
            check_id(self.against, "against")
            if self.against == self.decision:
                raise ValueError("against: expected the id of another decision, got the same")


def check_id(id: object, name: str) -> None:
    """Raises ValueError unless it has the form of a decision's id."""
    if not (isinstance(id, str) and ID.fullmatch(id)):
        raise ValueError(f"{name}: expected the id of a decision, 'dec_' and 32 hex digits")

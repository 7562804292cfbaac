"""Which requests go wrong, and how: rules, each of which names one of the faults."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, fields
from typing import get_type_hints

from bench.mock_provider.faults import FAULTS
from bench.mock_provider.reply import Reply

_NUMBERS = ("probability", "seconds", "retry_after")  # JSON may have them without a point


@dataclass(slots=True)
class Rule:
    """Which requests a fault meets, and the fault's settings.

    model, api ("chat", "responses", "messages"): None for any. probability: of each request that matches. skip: so many of them
    pass first. times: no more than so many are met, None for no limit.

    tokens: sent before it happens. seconds: how long. status: HTTP status. code: OpenAI's code of the error, instead of the
    usual one. retry_after: seconds, for the header of that name; retry_date: as an HTTP date. half: the cut leaves half an
    event. size: bytes. location: a URL. Settings that a fault does not use have no effect.
    """

    fault: str
    model: str | None = None
    api: str | None = None
    probability: float = 1.0
    skip: int = 0
    times: int | None = None
    tokens: int = 3
    seconds: float = 1.0
    status: int | None = None
    code: str | None = None
    retry_after: float | None = None
    retry_date: bool = False
    half: bool = False
    size: int | None = None
    location: str | None = None

    def __post_init__(self) -> None:
        if self.fault not in FAULTS and self.fault != "refuse":
            raise ValueError(f"fault: expected one of {', '.join(sorted([*FAULTS, 'refuse']))}, got {self.fault!r}")
        if self.fault == "refuse" and (self.model is not None or self.api is not None):
            raise ValueError("model and api: expected None for the fault refuse, since no request has come yet")

    @classmethod
    def read(cls, settings: object) -> Rule:
        """Raises ValueError."""
        names = {entry.name for entry in fields(cls)}
        if not isinstance(settings, dict) or "fault" not in settings or not settings.keys() <= names:
            raise ValueError(f"rule: expected an object with a fault and any of {', '.join(sorted(names))}, got {settings!r}")
        kinds = get_type_hints(cls)
        for name, value in settings.items():
            if not isinstance(float(value) if type(value) is int and name in _NUMBERS else value, kinds[name]):
                raise ValueError(f"{name}: expected {kinds[name]}, got {value!r}")
        return cls(**settings)


@dataclass(slots=True)
class Rules:
    """Rules in order; the first one that meets a request counts. seed: of those with a probability."""

    seed: int = 0
    rules: list[Rule] = field(default_factory=list)
    _random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def refuses(self) -> bool:
        """Whether a new connection is refused."""
        return any(self._meets(rule) for rule in self.rules if rule.fault == "refuse")

    def match(self, model: str, api: str) -> Rule | None:
        """The rule that meets a request."""
        for rule in self.rules:
            if rule.fault != "refuse" and rule.model in (None, model) and rule.api in (None, api) and self._meets(rule):
                return rule
        return None

    def _meets(self, rule: Rule) -> bool:
        if rule.times == 0 or (rule.probability < 1 and self._random.random() >= rule.probability):
            return False
        if rule.skip:
            rule.skip -= 1
            return False
        if rule.times is not None:
            rule.times -= 1
        return True


def harm(reply: Reply, rule: Rule) -> None:
    """Does a rule's fault to a usual reply."""
    assert reply.call is not None
    reply.fault = rule.fault
    FAULTS[rule.fault](reply, reply.call, rule)

"""Which models still hold the beginning of a conversation in their prompt cache."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from p2l_engine.serve.tokens import Counted


@dataclass(frozen=True, slots=True)
class Held:
    """What a model read last of a session: the hashes of its messages, and when."""

    chain: tuple[bytes, ...]
    at: float


@dataclass(frozen=True, slots=True)
class KeptAnswer:
    """An answer, or a part of one, that its deployment keeps for later requests. tokens: of the conversation up to it."""

    deployment: str
    tokens: int


BRANCHES = 8  # of a session at each model: an agent's own conversation and those of its helpers, a chat and its title


class SessionMemory:
    """The last requests of each session to each model, one for each branch of the conversation.

    seconds: how long providers keep a prefix. most: sessions kept.
    """

    def __init__(self, seconds: float, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.most, self._clock = seconds, most, clock
        self._held: OrderedDict[str, dict[str, list[Held]]] = OrderedDict()
        self._of_answers: OrderedDict[str, KeptAnswer] = OrderedDict()

    def open(self) -> None:
        """Begins what needs the running loop."""

    async def close(self) -> None:
        """Ends it."""

    def cached(self, session: str, counted: Counted, models: Sequence[str]) -> list[int]:
        """The tokens of this request that each model has in its cache."""
        held = self._held.get(session)
        if not held:
            return [0] * len(models)
        oldest = self._clock() - self.seconds
        return [
            max((_shared(branch.chain, counted) for branch in held.get(name, ()) if branch.at >= oldest), default=0)
            for name in models
        ]

    def remember(self, session: str, model: str, counted: Counted) -> None:
        """The model has read this request."""
        self.learn(session, model, Held(counted.chain, self._clock()))

    def learn(self, session: str, model: str, held: Held) -> None:
        """What a model has read. It replaces what it continues; a request that a later one continues changes nothing."""
        models = self._held.setdefault(session, {})
        branches = models.get(model, [])
        if not any(branch.at > held.at and _continues(branch.chain, held.chain) for branch in branches):
            others = [branch for branch in branches if not _continues(held.chain, branch.chain)]
            models[model] = sorted([held, *others], key=lambda branch: -branch.at)[:BRANCHES]
        self._held.move_to_end(session)
        while len(self._held) > self.most:
            self._held.popitem(last=False)

    def last(self, session: str) -> str | None:
        """The model that has read this session's latest request; None where it is not known."""
        held = self._held.get(session, {})
        return max(held, key=lambda name: held[name][0].at, default=None)

    def remember_answer(self, answer_id: str, kept: KeptAnswer) -> None:
        """A deployment keeps the answer of this id, a hash that is its caller's own."""
        self._of_answers[answer_id] = kept
        while len(self._of_answers) > self.most:
            self._of_answers.popitem(last=False)

    async def find_answers(self, ids: Sequence[str]) -> None:
        """Looks for answers where others may have noted them; ``of_answer`` knows them then."""

    def of_answer(self, answer_id: str) -> KeptAnswer | None:
        """Where an answer is kept; None where it is not known."""
        return self._of_answers.get(answer_id)


def _continues(chain: Sequence[bytes], earlier: Sequence[bytes]) -> bool:
    """Whether a request begins with all messages of an earlier one."""
    return not earlier or (len(chain) >= len(earlier) and chain[len(earlier) - 1] == earlier[-1])


def _shared(chain: Sequence[bytes], counted: Counted) -> int:
    """The tokens of the messages that both begin with."""
    n = min(len(chain), len(counted.chain))
    while n and chain[n - 1] != counted.chain[n - 1]:
        n -= 1
    return counted.ends[n - 1] if n else 0

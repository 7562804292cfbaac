"""What the router decides for one prompt, and the draw from its policy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Decision:
    """What the router decided for one prompt.

    model: the chosen one, drawn from policy {name: probability}. expected_cost (the catalog's unit), win_rate (against the
    opponents, in [0, 1]) and score (Bradley-Terry coefficient on the leaderboard's scale) are the policy's, before the draw.
    """

    model: str
    policy: dict[str, float]
    expected_cost: float
    win_rate: float
    score: float
    why: str


class Draws:
    """Draws from mixed policies over ``names``: the same seed and user turns give the same draw in every batch."""

    def __init__(self, seed: int, names: Sequence[str]) -> None:
        self.names = names
        self._salt = hashlib.blake2b(str(seed).encode(), digest_size=16).digest()

    def decide(
        self,
        turns: Sequence[str],
        bound: str,
        indices: Sequence[int],
        probabilities: Sequence[float],
        cost: float,
        value: float,
        score: float,
    ) -> Decision:
        """The decision for a prompt whose policy mixes names[indices]; ``bound``: the budget's description, for its ``why``."""
        chosen = self.names[self.draw(turns, indices, probabilities)]
        policy = {self.names[i]: p for i, p in zip(indices, probabilities, strict=True) if p > 0}
        if len(policy) == 1:
            why = f"highest win rate ({bound})"
        else:
            mix = ", ".join(f"{name} {p:.3f}" for name, p in policy.items())
            why = f"highest win rate within the {bound}: a mix of {mix}; drawn by prompt and seed"
        return Decision(chosen, policy, cost, value, score, why)

    def draw(self, turns: Sequence[str], indices: Sequence[int], probabilities: Sequence[float]) -> int:
        """The drawn index: the one whose interval of [0, 1), in the policy's order, contains this prompt's number."""
        policy = [(i, p) for i, p in zip(indices, probabilities, strict=True) if p > 0]
        if len(policy) > 1:
            uniform = self._uniform(turns)
            for i, probability in policy:
                if uniform < probability:
                    return i
                uniform -= probability
        return policy[-1][0]  # a single model; or rounding leaves the sum of the probabilities below 1

    def _uniform(self, turns: Sequence[str]) -> float:
        """A number in [0, 1), a hash of the seed and the user turns."""
        digest = hashlib.blake2b(json.dumps(turns).encode(), digest_size=8, key=self._salt).digest()
        return (int.from_bytes(digest, "little") >> 11) / 2.0**53

"""What the router decides for one prompt, and the draw from its policy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

FAR = 0.5  # a prompt that keeps less is farther away than most of training: see ``backbone.shrinkage``


@dataclass(frozen=True, slots=True)
class Decision:
    """What the router decided for one prompt.

    model: the chosen one, drawn from policy {name: probability}. expected_cost (the catalog's unit), win_rate (against the
    opponents, in [0, 1]) and score (Bradley-Terry coefficient on the leaderboard's scale) are the policy's, before the draw.

    propensity: the probability with which the model was chosen, in (0, 1]. A router that explores chose the policy for a draw
    of the coefficients: the propensity is over both draws, with an upper bound on its standard error, 0 where it is exact
    (``routing.thompson``); win_rate and score are the policy's at the mean coefficients.

    expected_tokens, expected_seconds: the policy's output tokens and how long they take, None where the checkpoint has not
    learned it.

    kept: the share of the prompt's own differences between models that was kept, see ``Coefficients``; None where the
    checkpoint shrinks none.
    """

    model: str
    policy: dict[str, float]
    expected_cost: float
    win_rate: float
    score: float
    why: str
    propensity: float
    propensity_error: float = 0.0
    expected_tokens: float | None = None
    expected_seconds: float | None = None
    kept: float | None = None

    @property
    def far(self) -> bool:
        """Whether less than half of the prompt's own differences between models was kept."""
        return self.kept is not None and self.kept < FAR

    def with_kept(self, kept: float) -> Decision:
        """This decision from coefficients of which so much was kept."""
        return replace(self, why=why_with(self.why, kept), kept=kept)


def why_with(why: str, kept: float | None) -> str:
    """``why``, and how much of a prompt's own coefficients is kept, where that is less than half."""
    if kept is None or kept >= FAR:
        return why
    return f"{why}; far from the training prompts: {kept:.0%} of the differences between models are kept"


class Draws:
    """Draws from mixed policies over ``names``: the same seed, user turns and token give the same draw in every batch.

    token: text of the caller's that makes draws for equal prompts independent, such as a request's id; None: all are alike.
    """

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
        token: str | None = None,
    ) -> Decision:
        """The decision for a prompt whose policy mixes names[indices]; ``bound``: the budget's description, for its ``why``."""
        chosen = self.names[self.draw(turns, indices, probabilities, token)]
        policy = {self.names[i]: p for i, p in zip(indices, probabilities, strict=True) if p > 0}
        if len(policy) == 1:
            why = f"highest win rate ({bound})"
        else:
            mix = ", ".join(f"{name} {p:.3f}" for name, p in policy.items())
            why = f"highest win rate within the {bound}: a mix of {mix}; drawn by prompt and seed"
        return Decision(chosen, policy, cost, value, score, why, policy[chosen])

    def draw(
        self, turns: Sequence[str], indices: Sequence[int], probabilities: Sequence[float], token: str | None = None
    ) -> int:
        """The drawn index: the one whose interval of [0, 1), in the policy's order, contains this prompt's number."""
        policy = [(i, p) for i, p in zip(indices, probabilities, strict=True) if p > 0]
        if len(policy) > 1:
            uniform = (int.from_bytes(self._digest(turns, token), "little") >> 11) / 2.0**53  # in [0, 1)
            for i, probability in policy:
                if uniform < probability:
                    return i
                uniform -= probability
        return policy[-1][0]  # a single model; or rounding leaves the sum of the probabilities below 1

    def generator(self, turns: Sequence[str], token: str | None = None) -> np.random.Generator:
        """A generator for this prompt's draws of coefficients, independent of ``draw``."""
        return generator_of(self.key(turns, token))

    def key(self, turns: Sequence[str], token: str | None = None) -> bytes:
        """16 bytes from which ``generator_of`` makes this prompt's generator."""
        return self._digest(turns, token, 16)

    def _digest(self, turns: Sequence[str], token: str | None, size: int = 8) -> bytes:
        """A hash of the seed, the user turns and the token. Hashes of different sizes are independent."""
        text = json.dumps(turns if token is None else [token, turns])
        return hashlib.blake2b(text.encode(), digest_size=size, key=self._salt).digest()


def generator_of(key: bytes) -> np.random.Generator:
    """The generator of a ``Draws.key``."""
    return np.random.Generator(np.random.PCG64(int.from_bytes(key, "little")))

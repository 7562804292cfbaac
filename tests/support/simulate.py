"""Simulated votes with known coefficients: prompts are words, and each word has an effect on every model's coefficient.

theta*(z) = base + the sum of the effects of the words of z, and eta*(z) likewise. Votes, values and battles are drawn from the
feedback model at theta*, so that training, leaderboards and routing can be compared with the truth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from p2l_engine.backbone.head import Head
from p2l_engine.coefficients import Coefficients
from p2l_engine.feedback import FeedbackModel, feedback_model
from p2l_engine.leaderboard.outcomes import OutcomeSums
from p2l_engine.votes import Votes

Float64 = npt.NDArray[np.float64]

WORDS = ["sum", "poem", "code", "proof", "city", "joke", "river", "taxes", "chess", "salad", "orbit", "violin"]
RK_ETA = 5.0  # rk's softplus(eta - 22.5, 0.1) is then about 1.6; the tie parameters of the other models start at 0


@dataclass(slots=True)
class Simulator:
    """M models under one feedback model. words: how many of WORDS a prompt has; spread: the standard deviation of base
    coefficients and of words' effects."""

    feedback: FeedbackModel
    n_models: int
    seed: int = 0
    words: int = 2
    spread: float = 1.0
    base: Float64 = field(init=False)
    effects: Float64 = field(init=False)
    ties: Float64 = field(init=False)

    def __post_init__(self) -> None:
        if self.n_models < 2 or not 1 <= self.words <= len(WORDS):
            raise ValueError(
                f"n_models, words: expected at least 2 and 1 to {len(WORDS)}, got {self.n_models} and {self.words}"
            )
        rng = np.random.default_rng(self.seed)
        self.base = rng.normal(0, self.spread, self.n_models)
        self.effects = rng.normal(0, self.spread, (len(WORDS), self.n_models))
        self.ties = rng.normal(0, 0.5, len(WORDS))

    @classmethod
    def of(cls, name: str, n_models: int, seed: int = 0) -> Simulator:
        """From the feedback model's name."""
        return cls(feedback_model(name), n_models, seed)

    @property
    def models(self) -> tuple[str, ...]:
        """M names, in the order of columns."""
        return tuple(f"model-{i:03d}" for i in range(self.n_models))

    def prompts(self, n: int, seed: int = 1) -> list[str]:
        """n different prompts: words, and a number without effect."""
        rng = np.random.default_rng([self.seed, seed])
        chosen = np.argsort(rng.random((n, len(WORDS))), axis=1)[:, : self.words]
        return [f"{' '.join(WORDS[w] for w in row)} {seed}{i}" for i, row in enumerate(chosen)]

    def truth(self, prompts: Sequence[str]) -> Coefficients:
        """theta*(z) and eta*(z)."""
        index = {word: i for i, word in enumerate(WORDS)}
        rows = [[index[word] for word in prompt.split() if word in index] for prompt in prompts]
        theta = np.stack([self.base + self.effects[row].sum(0) for row in rows]).astype(np.float32)
        if not self.feedback.has_eta:
            return Coefficients(theta, None, self.models, self.feedback)
        level = RK_ETA if self.feedback.least_eta > -np.inf else 0.0
        eta = np.array([level + self.ties[row].sum() for row in rows], np.float32)
        return Coefficients(theta, eta, self.models, self.feedback)

    def votes(self, prompts: Sequence[str], each: int, seed: int = 2) -> Votes:
        """``each`` votes (or, for ols and poisson, values of one model) for each prompt, on random models."""
        rng, truth, n = np.random.default_rng([self.seed, seed]), self.truth(prompts), len(prompts)
        prompt = np.repeat(np.arange(n), each)
        a = rng.integers(0, self.n_models, n * each)
        turns = [(text,) for text in prompts]
        theta = truth.theta.astype(np.float64)[prompt]
        rows = np.arange(len(prompt))
        if self.feedback.of_values:
            mean = theta[rows, a]
            value = rng.poisson(np.exp(mean)).astype(np.float64) if self.feedback.counts else rng.normal(mean)
            return Votes.make(turns, self.models, prompt, a, np.full_like(a, -1), value)
        b = (a + rng.integers(1, self.n_models, n * each)) % self.n_models
        eta = None if truth.eta is None else torch.from_numpy(truth.eta.astype(np.float64)[prompt])
        p = self.feedback.probabilities(torch.from_numpy(theta[rows, a]), torch.from_numpy(theta[rows, b]), eta).numpy()
        outcome = np.minimum((rng.random(len(p))[:, None] > p.cumsum(1)).sum(1), len(self.feedback.outcomes) - 1)
        return Votes.make(turns, self.models, prompt, a, b, outcome)

    def bayes_loss(self, prompts: Sequence[str]) -> float:
        """The expected loss of a vote on these prompts at theta*: the mean entropy of the outcome over all pairs."""
        truth = self.truth(prompts)
        if self.feedback.of_values and not self.feedback.counts:
            return 0.5 + 0.5 * float(np.log(2 * np.pi))
        if self.feedback.of_values:
            raise ValueError("feedback: the Bayes loss of counts has no closed form; compare with truth's own loss on votes")
        sums = []
        for i in range(len(truth)):
            one = OutcomeSums(self.feedback, self.models)
            one.add(truth.row(i))
            p = one.sums[0]
            sums.append(-(p * np.log(np.maximum(p, 1e-300))).sum(0).mean())
        return float(np.mean(sums))

    def battles(
        self, prompt: str, policy: npt.ArrayLike, opponents: npt.ArrayLike, n: int, seed: int = 3
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """n Bradley-Terry battles of a router with ``policy`` [M] against ``opponents`` [M] on one prompt: the opponents [n],
        and whether the router won [n]."""
        rng, theta = np.random.default_rng([self.seed, seed]), self.truth([prompt]).theta[0].astype(np.float64)
        mine, theirs = (rng.choice(self.n_models, n, p=np.asarray(p, np.float64)) for p in (policy, opponents))
        return theirs, rng.random(n) < 1 / (1 + np.exp(theta[theirs] - theta[mine]))


def words_in(prompts: Sequence[str]) -> npt.NDArray[np.float32]:
    """[N, 12]: hidden states in which the simulator's coefficients are linear."""
    return np.array([[word in prompt.split() for word in WORDS] for prompt in prompts], np.float32)


def head_of(world: Simulator, models: int) -> Head:
    """The true head of the simulator over ``words_in``, for its first ``models`` models."""
    weight, bias = [world.effects[:, :models].T], [world.base[:models]]
    if world.feedback.has_eta:
        weight, bias = [*weight, world.ties[None]], [*bias, np.zeros(1)]
    return Head(*(torch.from_numpy(np.concatenate(of)).float() for of in (weight, bias)), models)

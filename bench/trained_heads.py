"""Heads that training makes of some of a pool's prompts, to compare on others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from bench.pooled import Pooled
from bench.simple_routers import Float64
from p2l_engine.backbone.topics import Topics
from p2l_engine.feedback import FeedbackModel, feedback_model
from p2l_engine.learning import shrinkage
from p2l_engine.learning.votes_loss import votes_loss
from p2l_engine.train import data, frozen
from p2l_engine.train.config import HeadOptimum, TrainConfig
from p2l_engine.train.frozen import Known
from p2l_engine.train.optimum import FittedLayers
from p2l_engine.votes import Votes

Rows = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
CONFIGURED = "configured"  # the way to fall back that a config's shrinkage is


@dataclass(frozen=True, slots=True, eq=False)
class PoolVotes:
    """The votes on a pool's prompts, and what is known of these: hidden [N, D], words [N, E]. of_row [N]: each prompt's number
    in the votes, -1 where it has none; column [M]: of the pool's models in the votes."""

    feedback: FeedbackModel
    wanted: HeadOptimum
    votes: Votes
    of_row: Rows
    column: Rows
    hidden: Float32
    words: Float32

    @classmethod
    def read(cls, config: TrainConfig, wanted: HeadOptimum, pool: Pooled, hidden: Float64, words: Float64) -> PoolVotes:
        """The votes of the config, whose data is the pool; of all prompts. Raises what ``data.load`` raises."""
        votes = data.load(config.model_copy(update={"held_out": 0.0, "validation": 0.0})).training
        number = {prompt: p for p, prompt in enumerate(votes.prompts)}
        of_row = np.array([number.get(prompt, -1) for prompt in pool.prompts], np.int64)
        column = np.array([votes.models.index(model) for model in pool.models], np.int64)
        known = (each.astype(np.float32) for each in (hidden, words))
        return cls(feedback_model(config.loss_type), wanted, votes, of_row, column, *known)

    def among(self, models: Rows) -> PoolVotes:
        """With the votes on these of the pool's models alone: others weigh nothing."""
        counts = np.isin(np.arange(len(self.votes.models)), self.column[models])
        both = counts[self.votes.a] & (counts[self.votes.b] | (self.votes.b < 0))
        return replace(self, votes=replace(self.votes, weight=self.votes.weight * both))

    def fit(self, training: Rows, chosen_on: Rows) -> LearnedHead:
        """What training makes of the prompts ``training`` of the pool; the deviation is chosen on the others. Models without
        votes there have a coefficient all the same. Raises ArithmeticError where an optimum is not reached."""
        learned = self._known(training)
        return LearnedHead(self, learned, frozen.fitted(self.feedback, self.wanted, learned, self._known(chosen_on)))

    def votes_on(self, rows: Rows) -> tuple[Votes, Rows]:
        """The votes on these prompts, each prompt once, and where it is among the rows."""
        prompt, first = np.unique(self.of_row[rows], return_index=True)
        return self.votes.of(prompt[prompt >= 0].tolist()), first[prompt >= 0]

    def _known(self, rows: Rows) -> Known:
        votes, first = self.votes_on(rows)
        return Known(votes, self.hidden[rows[first]], self.words_of(rows[first]))

    def words_of(self, rows: Rows) -> Float32 | None:
        """[n, E]: of these prompts, where topics read words."""
        reads = self.wanted.topics is not None and self.wanted.topics.words
        return self.words[rows] if reads else None


@dataclass(frozen=True, slots=True, eq=False)
class LearnedHead:
    """A head, with its topics and shrinkage where it has some, and the prompts that it was fitted to."""

    pool: PoolVotes
    learned: Known
    fitted: FittedLayers

    @property
    def topics(self) -> Topics | None:
        return self.fitted.topics

    def reads(self, rows: Rows) -> Float32:
        """[n, D + T]: what the head reads of these prompts of the pool."""
        return self._reads(self.pool.hidden[rows], self.pool.words_of(rows))

    def _reads(self, hidden: Float32, words: Float32 | None) -> Float32:
        states = torch.from_numpy(hidden)
        if self.topics is None:
            return hidden
        return self.topics(states, None if words is None else torch.from_numpy(words)).numpy()

    def theta(self, rows: Rows) -> Float64:
        """[n, M]: of the pool's models."""
        return self.outputs(rows)[:, self.pool.column]

    def outputs(self, rows: Rows) -> Float64:
        """[n, K]."""
        read = torch.from_numpy(self.reads(rows))
        if self.fitted.shrinkage is not None:
            read, _ = self.fitted.shrinkage(read)
        return np.asarray(self.fitted.best.head(read, None, 0.0).double().numpy())

    def kept(self, rows: Rows) -> Float64:
        """[n]: the share of their own coefficients that is kept of these prompts, 1 without a shrinkage."""
        if self.fitted.shrinkage is None:
            return np.ones(len(rows))
        return np.asarray(self.fitted.shrinkage(torch.from_numpy(self.reads(rows)))[1].double().numpy())

    def log_losses(self, rows: Rows) -> dict[str, float]:
        """The log-loss of a vote on these prompts: by the head, and by the one leaderboard of the prompts that it was fitted
        to."""
        votes, first = self.pool.votes_on(rows)
        own = self.outputs(rows[first])
        marginal = shrinkage.marginal_outputs(self.pool.feedback, self.learned.votes)
        total = float(votes.weight.sum())
        return {
            name: votes_loss(self.pool.feedback, votes, outputs)[0] / total
            for name, outputs in (("head", own), ("leaderboard", np.tile(marginal, (len(own), 1))))
        }

    def shrunk(self, rows: Rows) -> Iterator[Shrunk]:
        """Coefficients of these prompts, as the head has them alone, by what is kept of them: first all, then what the config's
        shrinkage keeps, if it has one, and what each middle and width that ``shrinkage.fit`` compares does; last nothing but
        the leaderboard of the training prompts."""
        head = self.fitted.best.head
        start, away = shrinkage.of_training(
            head,
            shrinkage.marginal_outputs(self.pool.feedback, self.learned.votes),
            self._reads(self.learned.hidden, self.learned.words),
            self.pool.hidden.shape[1],
            self.learned.votes.category,
        )
        read = torch.from_numpy(self.reads(rows))
        distances = start.distance(read).double().numpy()
        ways = {"all is kept": np.ones(len(rows))}
        if (given := self.pool.wanted.shrinkage) is not None:
            of = shrinkage.at_quantile(start, away, given.quantile, given.width)
            ways[CONFIGURED] = shrinkage.share(of, distances)
        for (quantile, width), of in zip(shrinkage.GRID, shrinkage.candidates(start, away), strict=True):
            ways[f"quantile {quantile:g}, width {width:g}"] = shrinkage.share(of, distances)
        ways["leaderboard"] = np.zeros(len(rows))
        own, at = (head(of, None, 0.0).double().numpy()[:, self.pool.column] for of in (read, start.anchor[None]))
        votes, first = self.pool.votes_on(rows)
        for way, kept in ways.items():
            losses = shrinkage.losses_of(start, head, self.pool.feedback, votes, read[first], kept[first])
            theta = at + kept[:, None] * (own - at)
            yield Shrunk(way, theta, float(kept.mean()), float(votes.weight @ losses / votes.weight.sum()))


@dataclass(frozen=True, slots=True)
class Shrunk:
    """By one way to fall back: theta [n, M] of prompts; kept: the mean share of their own coefficients; log_loss: of a vote on
    them."""

    way: str
    theta: Float64
    kept: float
    log_loss: float

"""Votes as a learner keeps them: each with what its prompt says of every row, so that no hidden state is needed again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from p2l_engine.feedback import FeedbackModel
from p2l_engine.learning import likelihood
from p2l_engine.learning.objective import Objective
from p2l_engine.learning.rows import HeadRows
from p2l_engine.votes import Votes

Float64 = npt.NDArray[np.float64]

STORED = ("features", "base", "eta", "prompt", "a", "b", "outcome", "weight")


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """features [P, r] and base [P, M], eta [P] (empty without a tie parameter): of the votes' prompts, float32; prompt, a, b,
    outcome, weight [V]."""

    features: npt.NDArray[np.float32]
    base: npt.NDArray[np.float32]
    eta: npt.NDArray[np.float32]
    prompt: npt.NDArray[np.int32]
    a: npt.NDArray[np.int16]
    b: npt.NDArray[np.int16]
    outcome: npt.NDArray[np.int64] | npt.NDArray[np.float64]
    weight: npt.NDArray[np.float32]

    @classmethod
    def of(cls, votes: Votes, hidden: npt.NDArray[np.float32], rows: HeadRows, feedback: FeedbackModel) -> Seen:
        """Votes on prompts of these hidden states [P, D]. Raises ValueError for models that are no rows, for votes that name no
        model or prompt, for what the feedback model does not know, and for other shapes."""
        rows.check(votes, hidden, feedback)
        likelihood.check(feedback, votes.outcome, votes.weight)
        column = np.array([rows.names.index(name) for name in votes.models] + [-1])
        base, eta = rows.coefficients(hidden)
        return cls(
            rows.basis.features(hidden).astype(np.float32), base.astype(np.float32),
            np.zeros(0, np.float32) if eta is None else eta.astype(np.float32), votes.prompt.astype(np.int32),
            column[votes.a].astype(np.int16), column[votes.b].astype(np.int16), votes.outcome, votes.weight.astype(np.float32),
        )  # fmt: skip

    @classmethod
    def joined(cls, parts: Sequence[Seen]) -> Seen:
        """All of them, in order."""
        first = np.cumsum([0, *(len(part.features) for part in parts)])
        moved = [replace(part, prompt=(part.prompt + at).astype(np.int32)) for part, at in zip(parts, first, strict=False)]
        return cls(*(np.concatenate([getattr(part, name) for part in moved]) for name in STORED))

    def __len__(self) -> int:
        return len(self.prompt)

    def some(self, votes: npt.NDArray[np.intp]) -> Seen:
        """The votes of these indices, with their prompts alone."""
        prompts, place = np.unique(self.prompt[votes], return_inverse=True)
        eta = self.eta[prompts] if len(self.eta) else self.eta
        return Seen(
            self.features[prompts], self.base[prompts], eta, place.astype(np.int32), self.a[votes], self.b[votes],
            self.outcome[votes], self.weight[votes],
        )  # fmt: skip

    def objective(
        self, feedback: FeedbackModel, names: tuple[str, ...], moved: Float64, factor: Callable[[int], Float64]
    ) -> Objective:
        """From coordinates ``moved`` [M, r], for the rows that these votes touch. names: M; factor: [r, r] of a row's prior."""
        used = self.weight > 0
        touched = {*self.a[used].tolist(), *self.b[used].tolist()} - {-1}
        features = self.features.astype(np.float64)
        base = self.base + features @ moved.T
        votes = Votes(
            ((),) * len(features), names, self.prompt.astype(np.int64), self.a.astype(np.int64), self.b.astype(np.int64),
            self.outcome, self.weight.astype(np.float64),
        )  # fmt: skip
        eta = self.eta.astype(np.float64) if feedback.has_eta else None
        return Objective(feedback, votes, eta, base, features, {i: factor(i) for i in sorted(touched)})

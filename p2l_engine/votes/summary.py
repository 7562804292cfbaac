"""A summary of votes, and whether they allow their models to be compared."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from p2l_engine.feedback import Outcome
from p2l_engine.leaderboard.connected import components
from p2l_engine.votes.votes import Votes


@dataclass(frozen=True, slots=True)
class Summary:
    """votes, prompts, models: how many. outcomes: votes by outcome. duplicates: votes that equal an earlier one (prompt, pair,
    outcome, weight, time). disconnected: the connected components of models except the one with the most votes; votes do not
    compare their models with its. undecided: models that win against all others of their component, or lose, or only tie, so
    that their coefficients have no finite estimate from votes alone.
    """

    votes: int
    prompts: int
    models: int
    outcomes: dict[str, int]
    duplicates: int
    disconnected: tuple[tuple[str, ...], ...]
    undecided: tuple[str, ...]

    @classmethod
    def of(cls, votes: Votes) -> Summary:
        """The summary of these votes."""
        kinds = Counter() if votes.are_values else Counter(votes.outcome.tolist())
        outcomes = {outcome.name.lower().replace("_", " "): kinds[outcome] for outcome in Outcome if kinds[outcome]}
        columns = [votes.prompt, votes.a, votes.b, votes.outcome]
        columns += [votes.weight]
        columns += [] if votes.timestamp is None else [votes.timestamp]
        different = len(np.unique(np.stack([column.astype(np.float64) for column in columns], 1), axis=0))
        return cls(
            len(votes),
            len(votes.prompts),
            len(votes.models),
            outcomes,
            len(votes) - different,
            disconnected(votes),
            undecided(votes),
        )

    def lines(self) -> list[str]:
        """As text, a line for each finding."""
        counts = ", ".join(f"{name} {count / self.votes:.0%}" for name, count in self.outcomes.items())
        found = [f"{self.votes:,} votes on {self.prompts:,} prompts, {self.models} models" + (f": {counts}" if counts else "")]
        if self.duplicates:
            found.append(f"{self.duplicates:,} votes equal an earlier one; they are kept")
        found += [
            f"no chain of votes connects {_names(component)} to the other models: their coefficients cannot be compared"
            for component in self.disconnected
        ]
        if self.undecided:
            found.append(f"{_names(self.undecided)} never lost, never won or only tied: votes alone leave them unbounded")
        return found


def disconnected(votes: Votes) -> tuple[tuple[str, ...], ...]:
    """The connected components of the graph of models and votes, without the one with the most votes; none for feedback on
    single models."""
    pairs = (votes.b >= 0) & (votes.weight > 0)
    if not pairs.any():
        return ()
    label = components(_edges(votes, votes.a[pairs], votes.b[pairs]))
    most = np.bincount(label[votes.a[pairs]], votes.weight[pairs]).argmax()
    groups = (np.flatnonzero(label == group) for group in range(label.max() + 1) if group != most)
    return tuple(tuple(votes.models[i] for i in group) for group in groups)


def undecided(votes: Votes) -> tuple[str, ...]:
    """Models outside the largest strongly connected component (of "has beaten") of their component (Ford, 1957)."""
    if votes.are_values:
        return ()
    votes = votes.where(votes.weight > 0)
    tie = votes.outcome >= Outcome.TIE
    won, lost = (votes.outcome == Outcome.A) | tie, (votes.outcome == Outcome.B) | tie
    edges = _edges(votes, np.concatenate([votes.a[won], votes.b[lost]]), np.concatenate([votes.b[won], votes.a[lost]]))
    label, component = components(edges, "strong"), components(edges)
    sizes = np.bincount(label)[label]
    largest = np.zeros(len(votes.models), np.int64)
    for of in range(component.max() + 1):
        within = np.flatnonzero(component == of)
        largest[within] = label[within[sizes[within].argmax()]]
    return tuple(votes.models[i] for i in np.flatnonzero(label != largest))


def _edges(votes: Votes, start: npt.NDArray[np.int64], end: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """[M, M]: whether any vote leads from the row's model to the column's."""
    edges = np.zeros((len(votes.models), len(votes.models)), bool)
    edges[start, end] = True
    return edges


def _names(models: tuple[str, ...]) -> str:
    shown = ", ".join(models[:8])
    return shown if len(models) <= 8 else f"{shown} and {len(models) - 8} more"

"""What is in a set of votes, and whether its models can be compared at all."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from p2l_engine.feedback import Outcome
from p2l_engine.votes.votes import Votes


@dataclass(frozen=True, slots=True)
class Summary:
    """votes, prompts, models; outcomes: how many votes of each; duplicates: votes that repeat an earlier one in everything
    (prompt, pair, outcome, time); islands: groups of models that no chain of votes ties to the largest group; undecided: models
    that win against all others of their group, or lose, or only tie (their coefficient has no finite estimate from votes
    alone).
    """

    votes: int
    prompts: int
    models: int
    outcomes: dict[str, int]
    duplicates: int
    islands: tuple[tuple[str, ...], ...]
    undecided: tuple[str, ...]

    @classmethod
    def of(cls, votes: Votes) -> Summary:
        """Of these votes."""
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
            islands(votes),
            undecided(votes),
        )

    def lines(self) -> list[str]:
        """For people."""
        counts = ", ".join(f"{name} {count / self.votes:.0%}" for name, count in self.outcomes.items())
        found = [f"{self.votes:,} votes on {self.prompts:,} prompts, {self.models} models" + (f": {counts}" if counts else "")]
        if self.duplicates:
            found.append(f"{self.duplicates:,} votes repeat an earlier one in everything; they are kept")
        found += [
            f"no chain of votes ties {_names(island)} to the other models: their coefficients mean nothing beside them"
            for island in self.islands
        ]
        if self.undecided:
            found.append(f"{_names(self.undecided)} never lost, never won or only tied: votes alone put no bound on them")
        return found


def islands(votes: Votes) -> tuple[tuple[str, ...], ...]:
    """Connected groups of models in the graph of votes, all but the one with the most votes; feedback on one model alone needs
    no chain."""
    pairs = (votes.b >= 0) & (votes.weight > 0)
    if not pairs.any():
        return ()
    m = len(votes.models)
    graph = coo_array((np.ones(int(pairs.sum())), (votes.a[pairs], votes.b[pairs])), (m, m))
    count, label = connected_components(graph, directed=False)
    most = np.bincount(label[votes.a[pairs]], votes.weight[pairs], count).argmax()
    return tuple(tuple(votes.models[i] for i in np.flatnonzero(label == group)) for group in range(count) if group != most)


def undecided(votes: Votes) -> tuple[str, ...]:
    """Models outside the largest group of their island in which everyone has beaten everyone, by some chain (Ford, 1957)."""
    if votes.are_values:
        return ()
    votes = votes.where(votes.weight > 0)
    m, tie = len(votes.models), votes.outcome >= Outcome.TIE
    won, lost = (votes.outcome == Outcome.A) | tie, (votes.outcome == Outcome.B) | tie
    graph = coo_array(
        (np.ones(int(won.sum() + lost.sum())),
         (np.concatenate([votes.a[won], votes.b[lost]]), np.concatenate([votes.b[won], votes.a[lost]]))), (m, m),
    )  # fmt: skip
    _, label = connected_components(graph, directed=True, connection="strong")
    _, island = connected_components(graph, directed=False)
    sizes = np.bincount(label)[label]
    largest = np.zeros(m, np.int64)
    for of in range(island.max() + 1):
        within = np.flatnonzero(island == of)
        largest[within] = label[within[sizes[within].argmax()]]
    return tuple(votes.models[i] for i in np.flatnonzero(label != largest))


def _names(models: tuple[str, ...]) -> str:
    shown = ", ".join(models[:8])
    return shown if len(models) <= 8 else f"{shown} and {len(models) - 8} more"

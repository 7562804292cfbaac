"""What is replayed: logged decisions, of which one answer each is known, or matrices, where every answer is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from zlib import crc32

import numpy as np
import numpy.typing as npt

from p2l_engine.replay.estimators import Int64
from p2l_engine.replay.expected_score import FOLDS, Rates
from p2l_engine.replay.mixture import Float64, Mixture

Turns = tuple[str, ...]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Choices:
    """What could have been chosen on each of N rows, over the U models that the log names.

    chosen [N]: the drawn model; propensity [N]: with which probability, in (0, 1]; error [N]: an upper bound on its standard
    error, 0 where it is exact. logged: the logging policy; None: not known; known [N]: whether it says the same as the
    propensity. allowed [N, U]: which models could take the request; None: all.
    """

    models: tuple[str, ...]
    chosen: npt.NDArray[np.int32]
    propensity: Float64
    error: Float64
    logged: Mixture | None
    known: Bools
    allowed: Bools | None

    def __len__(self) -> int:
        return len(self.chosen)


@dataclass(frozen=True, slots=True, eq=False)
class LoggedDecisions(Choices):
    """N decisions, and what became of them.

    reward [N]: NaN without feedback. cost [N]: NaN unknown; real [N]: whether it was really spent. prompt [N]: number of the
    row's prompt; keys [P] and texts [P] (None: not logged) of prompts. session [N]: number of the row's session; None: no
    sessions. rates [P, U]: the models' win rates by the log's own coefficients, NaN unknown; None: it has none. left_out: rows
    and feedback that were not used, by reason.
    """

    reward: Float64
    cost: Float64
    real: Bools
    prompt: Int64
    keys: Sequence[str]
    texts: Sequence[Turns | None]
    session: Int64 | None = None
    of: str = "score"
    rates: Rates | None = None
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def clusters(self) -> list[Int64]:
        """Labels [N] of rows that may depend on each other: of equal prompts, and of sessions, where several rows share one."""
        kinds = [self.prompt] if self.session is None else [self.prompt, self.session]
        shared = [labels for labels in kinds if int(labels.max(initial=-1)) + 1 < len(self)]
        return [np.unique(labels, return_inverse=True)[1] for labels in shared]

    @property
    def fold(self) -> Int64:
        """The part of the log [N] that a row belongs to, by its prompt's key: 0 to FOLDS - 1, in any order of rows."""
        parts = np.fromiter((crc32(key.encode("utf-8", "replace")) % FOLDS for key in self.keys), np.int64, len(self.keys))
        return parts[self.prompt]


@dataclass(frozen=True, slots=True, eq=False)
class ScoreMatrix:
    """P prompts and U models whose answers are all known: scores [P, U]; costs [P, U], or None where the file has none."""

    models: tuple[str, ...]
    texts: Sequence[Turns]
    scores: Float64
    costs: Float64 | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.scores)

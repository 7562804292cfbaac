"""Rows of a head that keep learning in a service: votes batch after batch, and from time to time all of them again."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from p2l_engine.backbone.head import Head
from p2l_engine.backbone.uncertainty import Uncertainty
from p2l_engine.checkpoint import fingerprint
from p2l_engine.feedback import FeedbackModel
from p2l_engine.learning.adapt import posterior
from p2l_engine.learning.objective import minimise
from p2l_engine.learning.prior import Basis, Scales, of_rows
from p2l_engine.learning.rows import KNOWN_VOTES, HeadRows, NewModel
from p2l_engine.learning.seen import STORED, Seen
from p2l_engine.tables.atomic import write_file
from p2l_engine.votes import Votes

Float64 = npt.NDArray[np.float64]

VERSION = 1  # of the saved state
FILE = "learner.safetensors"  # its name in a server's folder
TOGETHER = 256  # votes that are learned from at a time
ONLINE_RANK = 64  # of the basis: half of what adapt takes, in a quarter of the time and half of the memory for each vote
LARGEST = 1024  # free parameters up to which an update sees how rows depend on each other
TOLERANCE = 1e-6  # of an update's step, in posterior deviations


@dataclass(slots=True, eq=False)
class State:
    """moved [M, r]: the rows' coordinates, from their means. factors: [r, r] of the posterior of rows that votes have touched,
    by index. parts: the votes; refined: how many of these parts the last refinement saw."""

    moved: Float64
    factors: dict[int, Float64] = field(default_factory=dict)
    parts: list[Seen] = field(default_factory=list)
    refined: int = 0


class Learner:
    """The posterior of a head's rows, given all votes so far. Safe to call from many threads.

    ``update`` takes what was learned before as the prior of the next votes (Laplace's approximation, one batch of up to 256
    after the other): its time depends on the number of new votes alone. ``refine`` finds the maximum over all votes from the
    first prior, as ``adapt`` with the same reference, scales and rank does, to 1e-5 of theta; run it in a thread of its own.

    head, models, feedback: of the checkpoint. reference [N, D]: hidden states that say how prompts vary. new: models to add.
    uncertainty, known_votes, rank: as for ``adapt``. scales: of the new rows' prior; None: what the head's rows say of each
    other. Votes are kept: 4 (r + M + 1) bytes for each prompt and about 20 for each vote.
    """

    def __init__(
        self,
        head: Head,
        models: Sequence[str],
        feedback: FeedbackModel,
        reference: npt.NDArray[np.float32],
        new: Sequence[NewModel] = (),
        uncertainty: Uncertainty | None = None,
        known_votes: float = KNOWN_VOTES,
        rank: int = ONLINE_RANK,
        scales: Scales | None = None,
    ) -> None:
        rows = HeadRows.of(head, models, new, reference, uncertainty, known_votes, rank)
        self._begin(head, feedback, rows, of_rows(rows.basis) if scales is None else scales)

    def _begin(self, head: Head, feedback: FeedbackModel, rows: HeadRows, scales: Scales) -> None:
        self._head, self._rows = head, rows
        self.feedback, self.scales = feedback, scales
        self._new = rows.new_factors(scales)
        self.notes: Mapping[str, Any] = {}
        self._state = State(np.zeros((len(rows.names), rows.basis.matrix.shape[1])))
        self._lock, self._refining = threading.Lock(), threading.Lock()

    @property
    def models(self) -> tuple[str, ...]:
        """The head's models, then the new ones."""
        return self._rows.names

    @property
    def mean_theta(self) -> Float64:
        """[M]: of the head's own models over the reference prompts, as the head had them."""
        return self._rows.mean_theta

    def join(self, new: Sequence[NewModel]) -> None:
        """Adds models, after the others, as if they had been there from the beginning. Waits for a running ``refine``. Raises
        ValueError for names that are there."""
        if there := [model.name for model in new if model.name in self._rows.names]:
            raise ValueError(f"new: expected names that are not there yet, got {', '.join(there)}")
        with self._refining, self._lock:
            state, rows = self._state, self._rows.joined(new)
            state.moved = np.concatenate([state.moved, np.zeros((len(new), state.moved.shape[1]))])
            nothing = np.zeros((1, len(new)), np.float32)  # no vote so far is on them
            parts = [(part, np.repeat(nothing, len(part.base), 0)) for part in state.parts]
            state.parts = [replace(part, base=np.concatenate([part.base, more], 1)) for part, more in parts]
            self._rows, self._new = rows, rows.new_factors(self.scales)

    @property
    def votes(self) -> int:
        """How many were learned from."""
        return sum(map(len, self._state.parts))

    @property
    def pending(self) -> int:
        """How many of them came since the last ``refine``."""
        return sum(map(len, self._state.parts[self._state.refined :]))

    def update(self, votes: Votes, hidden: npt.NDArray[np.float32]) -> None:
        """Learns from votes on prompts of these hidden states [P, D]. Raises ValueError for unknown models, for votes that the
        feedback model does not know, and for other shapes; ArithmeticError for values beyond float64. Nothing is learned then.
        """
        with self._lock:
            seen = Seen.of(votes, hidden, self._rows, self.feedback)
            order = np.argsort(seen.prompt, kind="stable")
            parts = [seen.some(order[start : start + TOGETHER]) for start in range(0, len(order), TOGETHER)]
            state = replace(self._state, moved=self._state.moved.copy(), factors=dict(self._state.factors), parts=[])
            for part in parts:
                self._learn(state, part)
            state.parts = [*self._state.parts, *state.parts]
            self._state = state

    def refine(self) -> float:
        """Finds the maximum over all votes so far; those that come meanwhile are learned from afterwards. Returns how far the
        updates were from it: the largest distance of a row, in its posterior deviations (the root mean square over its
        coordinates)."""
        with self._refining:
            with self._lock:
                parts, moved = list(self._state.parts), self._state.moved.copy()
            if not parts:
                return 0.0
            seen = Seen.joined(parts)
            objective = seen.objective(self.feedback, self._rows.names, np.zeros_like(moved), self._prior)
            inverse = [np.linalg.inv(factor) for factor in objective.factors]
            start = np.stack([each @ moved[i] for each, i in zip(inverse, objective.free, strict=True)])
            minimum = minimise(objective, start)
            found = State(np.zeros_like(moved), parts=parts, refined=len(parts))
            distance = 0.0
            covariances = posterior(objective, minimum)
            for f, i in enumerate(objective.free):
                found.moved[i] = objective.factors[f] @ minimum.u[f]
                found.factors[i] = covariances[f]
                away = np.linalg.solve(covariances[f], found.moved[i] - moved[i])
                distance = max(distance, float(np.sqrt((away**2).mean())))
            with self._lock:
                for part in self._state.parts[len(parts) :]:
                    self._learn(found, part)
                self._state = found
        return distance

    def head(self) -> tuple[Head, Uncertainty | None]:
        """The head as it is now, over ``models``, and the posterior of the rows that votes have touched."""
        with self._lock:
            moved, factors = self._state.moved.copy(), dict(self._state.factors)
        changed = sorted(factors)
        rows = self._rows.means + moved @ self._rows.basis.matrix.T
        for i in self._new:
            factors.setdefault(i, self._new[i])
        return self._rows.head(self._head, rows, changed), self._rows.merged(self.scales, list(factors), list(factors.values()))

    def save(self, path: Path, notes: Mapping[str, Any] | None = None) -> None:
        """Writes the state, atomically; ``load`` continues from it. notes: JSON that ``load`` gives back as the attribute
        ``notes``. Raises OSError."""
        with self._lock:
            state, rows = self._state, self._rows
            arrays = {"moved": state.moved.copy(), "means": rows.means, "matrix": rows.basis.matrix, "middle": rows.middle}
            arrays |= {"coordinates": rows.basis.coordinates, "ridge": rows.basis.ridge}
            arrays |= {f"factor {i}": factor for i, factor in state.factors.items()}
            parts, refined = list(state.parts), state.refined
        if parts:
            arrays |= {name: np.ascontiguousarray(getattr(Seen.joined(parts), name)) for name in STORED}
        facts = {
            "version": VERSION, "names": rows.names, "known": rows.known, "head": fingerprint.of_head(self._head),
            "narrow": {str(i): each for i, each in rows.narrow.items()}, "known_votes": rows.known_votes,
            "scales": [self.scales.rows, self.scales.free, self.scales.level], "feedback": self.feedback.name,
            "refined": sum(map(len, parts[:refined])), "notes": dict(notes or {}),
        }  # fmt: skip
        write_file(path, save(arrays, {"learner": json.dumps(facts)}))

    @classmethod
    def load(cls, path: Path, head: Head, feedback: FeedbackModel, uncertainty: Uncertainty | None = None) -> Self:
        """Continues from a saved state, with the head, feedback model and uncertainty that it began with. Raises ValueError for
        another head or feedback model and for damaged files, OSError for missing ones."""
        expected = f"{path}: expected the state of a Learner, version {VERSION}"
        try:
            with safe_open(path, framework="np") as file:
                facts = json.loads((file.metadata() or {})["learner"])
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            own = {"version": VERSION, "head": fingerprint.of_head(head), "feedback": feedback.name}
            if other := [key for key, value in own.items() if facts[key] != value]:
                raise ValueError(f"another {' and another '.join(other)}")
            basis = Basis(arrays["matrix"], arrays["coordinates"], arrays["ridge"])
            narrow = {int(i): float(each) for i, each in facts["narrow"].items()}
            eta_row = None
            if head.has_eta:
                last = head.n_models
                eta_row = np.append(head.weight[last].double().cpu().numpy(), float(head.bias[last]))
            rows = HeadRows(
                tuple(facts["names"]),
                facts["known"],
                arrays["means"],
                eta_row,
                arrays["middle"],
                basis,
                narrow,
                uncertainty,
                facts["known_votes"],
            )
            learner = cls.__new__(cls)
            learner._begin(head, feedback, rows, Scales(*facts["scales"]))
            factors = {int(name.split()[1]): each for name, each in arrays.items() if name.startswith("factor ")}
            learner._state = State(arrays["moved"], factors)
            learner.notes = facts["notes"]
            if "prompt" in arrays:
                seen = Seen(*(arrays[name] for name in STORED))
                both = np.split(np.arange(len(seen)), [int(facts["refined"])])
                learner._state.parts = [seen.some(votes) for votes in both if len(votes)]
                learner._state.refined = int(len(both[0]) > 0)
        except (SafetensorError, KeyError, TypeError, ValueError, IndexError) as error:
            raise ValueError(f"{expected}, got {error!r}") from None
        return learner

    def _prior(self, i: int) -> Float64:
        return self._new[i] if i in self._new else self._rows.known_factor(i, self.scales)

    def _learn(self, state: State, part: Seen) -> None:
        """Changes the state's coordinates and factors, once all of it is learned."""
        objective = part.objective(
            self.feedback, self._rows.names, state.moved, lambda i: state.factors[i] if i in state.factors else self._prior(i)
        )
        if objective.free:
            minimum = minimise(objective, tolerance=TOLERANCE)
            for f, (i, factor) in enumerate(zip(objective.free, posterior(objective, minimum, LARGEST), strict=True)):
                state.moved[i] += objective.factors[f] @ minimum.u[f]
                state.factors[i] = factor
        state.parts.append(part)

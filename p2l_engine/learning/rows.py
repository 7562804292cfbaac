"""The rows of a head before the votes: known ones as they are, new ones at their prior's mean, each with its covariance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from p2l_engine.backbone.head import Head
from p2l_engine.backbone.uncertainty import Uncertainty
from p2l_engine.feedback import FeedbackModel
from p2l_engine.learning.prior import RANK, Basis, Scales, covariance
from p2l_engine.votes import Votes

Float64 = npt.NDArray[np.float64]

KNOWN_VOTES = 36_000  # what a row of a trained head counts for, unless its posterior is known
INFORMATION = 0.2  # of a vote about theta: between a Bradley-Terry vote's 1/4 at equal strength and less elsewhere
NARROWER = 0.5  # deviation of a model that is like another, relative to one that is not


@dataclass(frozen=True, slots=True)
class NewModel:
    """A model to be added. like: the known model that it resembles, whose row is then its prior mean; None: the mean of the
    rows. level: its mean theta over the reference prompts, before any vote; None: as its prior mean has it."""

    name: str
    like: str | None = None
    level: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class HeadRows:
    """names: M known models, then the new ones. means [M + new, D + 1]: weights and bias. eta_row [D + 1], where the head has a
    tie parameter. middle [D]: the mean of the reference hidden states. narrow: by index of a new row, its deviation relative to
    that of the prior. uncertainty: of known rows, where it is known; others are as precise as ``known_votes`` votes make them,
    in independent coordinates of the basis."""

    names: tuple[str, ...]
    known: int
    means: Float64
    eta_row: Float64 | None
    middle: Float64
    basis: Basis
    narrow: dict[int, float]
    uncertainty: Uncertainty | None
    known_votes: float

    @classmethod
    def of(
        cls,
        head: Head,
        models: Sequence[str],
        new: Sequence[NewModel],
        reference: npt.NDArray[np.float32],
        uncertainty: Uncertainty | None = None,
        known_votes: float = KNOWN_VOTES,
        rank: int = RANK,
    ) -> HeadRows:
        """reference [N, D]: hidden states that say how prompts vary. rank: of the basis, unless the uncertainty has one. Raises
        ValueError for a new model that is known or given twice, or like one that is not known."""
        m, d = len(models), head.weight.shape[1]
        old = torch.cat([head.weight, head.bias[:, None]], 1).double().cpu().numpy()
        rows = old[:m]
        given = None if uncertainty is None else uncertainty.basis.double().cpu().numpy()
        basis = Basis.of(reference, rows, rank, given)
        middle = reference.mean(0, dtype=np.float64) if len(reference) else np.zeros(d)
        found = cls(tuple(models), m, rows, old[m] if head.has_eta else None, middle, basis, {}, uncertainty, known_votes)
        return found.joined(new)

    def joined(self, new: Sequence[NewModel]) -> HeadRows:
        """With the rows of new models after the others. Raises ValueError for a new model that is there or given twice, or like
        one that is not known."""
        names, models = (*self.names, *(model.name for model in new)), self.names[: self.known]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"new: expected names that the head and each other lack, got {', '.join(twice)}")
        if unknown := [model.like for model in new if model.like is not None and model.like not in models]:
            raise ValueError(f"new: like: expected some of {', '.join(models)}, got {', '.join(unknown)}")
        known, first = self.means[: self.known], len(self.means)
        more = np.empty((len(new), known.shape[1]))
        for i, model in enumerate(new):
            more[i] = known[models.index(model.like)] if model.like is not None else known.mean(0)
            if model.level is not None:
                more[i, -1] += model.level - (self.middle @ more[i, :-1] + more[i, -1])
        narrow = {first + i: NARROWER if model.like is not None else 1.0 for i, model in enumerate(new)}
        return replace(self, names=names, means=np.concatenate([self.means, more]), narrow=self.narrow | narrow)

    @property
    def mean_theta(self) -> Float64:
        """[M] of the known models, over the reference prompts."""
        found: Float64 = self.means[: self.known, :-1] @ self.middle + self.means[: self.known, -1]
        return found

    def check(self, votes: Votes, hidden: npt.NDArray[np.float32], feedback: FeedbackModel) -> None:
        """Raises ValueError for votes on models that are no rows, for votes that name no model or prompt, and for hidden states
        that are not finite or not [P, D], of the votes' prompts."""
        if unknown := sorted(set(votes.models) - set(self.names)):
            raise ValueError(f"votes: expected votes on {', '.join(self.names)}, got {', '.join(unknown)}")
        width = len(self.basis.matrix) - 1
        if hidden.shape != (len(votes.prompts), width):
            raise ValueError(f"hidden: expected {[len(votes.prompts), width]}, got {list(hidden.shape)}")
        if not np.isfinite(hidden).all():
            raise ValueError("hidden: expected finite numbers")
        least_b = -1 if feedback.of_values else 0
        for what, index, least, count in (
            ("prompt", votes.prompt, 0, len(votes.prompts)),
            ("a", votes.a, 0, len(votes.models)),
            ("b", votes.b, least_b, len(votes.models)),
        ):
            if len(index) and not least <= index.min() <= index.max() < count:
                raise ValueError(f"votes: {what}: expected {least} to {count - 1}, got {index.min()} to {index.max()}")

    def coefficients(self, hidden: npt.NDArray[np.float32]) -> tuple[Float64, Float64 | None]:
        """theta [P, M + new] at the means, and eta [P] where there is one."""
        wide = hidden.astype(np.float64)
        eta = None if self.eta_row is None else wide @ self.eta_row[:-1] + self.eta_row[-1]
        found: Float64 = wide @ self.means[:, :-1].T + self.means[:, -1]
        return found, eta

    def deviations(self, scales: Scales) -> Float64:
        """[r]: of the coordinates of a new row."""
        found: Float64 = np.sqrt(np.diag(covariance(self.basis, scales)))
        return found

    def new_factors(self, scales: Scales) -> dict[int, Float64]:
        """The factor [r, r] of each new row's covariance."""
        factor = cholesky(covariance(self.basis, scales))
        return {i: each * factor for i, each in self.narrow.items()}

    def known_factor(self, i: int, scales: Scales) -> Float64:
        """[r, r]: of known row i. In directions that the basis lacked when its posterior was computed, a row that training had
        fixed is as certain as ``known_votes`` make it, another one as the prior of a new row has it."""
        if self.uncertainty is None or self.names[i] not in self.uncertainty.models:
            return np.diag(self._trained())
        own = self.uncertainty.factors[self.uncertainty.models.index(self.names[i])].double().cpu().numpy()
        return grown(own, self._trained() if self.names[i] in self.uncertainty.trained else self.deviations(scales))

    def _trained(self) -> Float64:
        """[r]: the deviations of the coordinates of a row that training fixed."""
        return np.full(self.basis.matrix.shape[1], 1 / np.sqrt(INFORMATION * self.known_votes))

    def head(self, head: Head, moved: Float64, changed: Sequence[int]) -> Head:
        """``head`` with the rows ``moved`` [M + new, D + 1]; known ones that did not change keep their bits."""
        learned = torch.from_numpy(moved).float()
        weight, bias = learned[:, :-1].clone(), learned[:, -1].clone()
        same = [i for i in range(self.known) if i not in set(changed)]
        weight[same], bias[same] = head.weight.cpu()[same], head.bias.cpu()[same]
        tail = slice(self.known, self.known + head.has_eta)
        return Head(torch.cat([weight, head.weight.cpu()[tail]]), torch.cat([bias, head.bias.cpu()[tail]]), len(moved))

    def merged(self, scales: Scales, free: Sequence[int], posterior: Sequence[Float64]) -> Uncertainty | None:
        """The posterior of all rows that have one: factors [r, r] of the ``free`` ones, and what was known of others."""
        learned, old = {self.names[i]: factor for i, factor in zip(free, posterior, strict=True)}, self.uncertainty
        before = () if old is None else old.models
        kept = tuple(name for name in self.names if name in learned or name in before)
        if not kept:
            return None
        found = [learned[name] if name in learned else self.known_factor(self.names.index(name), scales) for name in kept]
        fixed = (name for name in self.names[: self.known] if name in learned and name not in before)
        trained = (*(() if old is None else old.trained), *fixed)
        matrix, factors = torch.from_numpy(self.basis.matrix).float(), torch.from_numpy(np.stack(found)).float()
        return Uncertainty(matrix, factors, kept, self.names, trained)


def grown(factor: Float64, prior: Float64) -> Float64:
    """A factor [r, r] with more directions, of deviations ``prior`` [r]."""
    found: Float64 = np.diag(prior)
    found[: len(factor), : len(factor)] = factor
    return found


def cholesky(matrix: Float64) -> Float64:
    """Cholesky's factor of a covariance, of which rounding may have left a direction without variance."""
    least = 1e-10 * max(float(np.trace(matrix)) / len(matrix), 1e-12)
    return np.asarray(np.linalg.cholesky(matrix + least * np.eye(len(matrix))), np.float64)

"""What is said of new models before their votes: a small YAML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from p2l_engine.arguments import finite_number
from p2l_engine.learning.rows import NewModel
from p2l_engine.unique_keys import parsed

KEYS = ("like", "prior_rating", "cost")
LOGITS_PER_POINT = float(np.log(10) / 400)  # of Elo's scale


@dataclass(frozen=True, slots=True)
class Described:
    """One new model of the file. like: the known model that it resembles. prior_rating: on the scale of the file's ratings, or
    without them a mean theta. cost: for the checkpoint's catalog, in its unit. Each may be missing."""

    name: str
    like: str | None = None
    prior_rating: float | None = None
    cost: float | None = None


@dataclass(frozen=True, slots=True)
class Descriptions:
    """The new models of a file, and ratings of known ones, which say what a rating means."""

    models: tuple[Described, ...] = ()
    ratings: Mapping[str, float] | None = None

    @classmethod
    def read(cls, path: Path) -> Descriptions:
        """Reads ``models: {name: {like?, prior_rating?, cost?}}`` and optionally ``ratings: {known model: rating}``. Raises
        ValueError, which names the key, for anything else, and OSError."""
        try:
            values = parsed(path.read_text(encoding="utf-8"))
        except ValueError as error:  # also where it is no UTF-8
            raise ValueError(f"{path}: {error}") from None
        top = _mapping(f"{path}", values, ("models", "ratings"))
        if not top.get("models"):
            raise ValueError(f"{path}: models: expected a mapping from names of new models, got {top.get('models')!r:.80}")
        models = []
        for name, entry in _mapping(f"{path}: models", top["models"]).items():
            where = f"{path}: models.{name}"
            given = _mapping(where, {} if entry is None else entry, KEYS)
            like, cost = given.get("like"), given.get("cost")
            if like is not None and not isinstance(like, str):
                raise ValueError(f"{where}.like: expected the name of a known model, got {like!r:.80}")
            if cost is not None:
                cost = finite_number(f"{where}.cost", cost, "a number of at least 0", lambda c: c >= 0)
            models.append(Described(name, like, _rating(f"{where}.prior_rating", given.get("prior_rating")), cost))
        ratings = None
        if "ratings" in top:
            entries = _mapping(f"{path}: ratings", top["ratings"])
            ratings = {name: finite_number(f"{path}: ratings.{name}", each, "a number") for name, each in entries.items()}
        return cls(tuple(models), ratings)

    def as_new_models(self, known: Sequence[str], mean_theta: npt.NDArray[np.float64]) -> list[NewModel]:
        """The models with their ratings as mean theta. known, mean_theta [M]: the checkpoint's models, and their mean theta
        over the reference prompts.

        A rating r becomes a + b r, by least squares over the known models that have a rating; with one of them, or where they
        are all equal, b is ln(10) / 400, as Elo's scale has it. Without ratings it is taken as it is. Raises ValueError for a
        ``like`` that is not known, for ratings of unknown models, and for none at all.
        """
        slope, start = 1.0, 0.0
        if self.ratings is not None:
            _check_known("ratings", self.ratings, known)
            if not self.ratings:
                raise ValueError("ratings: expected the rating of at least one known model, got none")
            rating = np.array(list(self.ratings.values()))
            theta = mean_theta[[list(known).index(name) for name in self.ratings]]
            spread = rating - rating.mean()
            slope = float(spread @ theta / (spread @ spread)) if spread.any() else LOGITS_PER_POINT
            start = float(theta.mean() - slope * rating.mean())
        _check_known("like", [model.like for model in self.models if model.like is not None], known)
        return [
            NewModel(model.name, model.like, None if model.prior_rating is None else start + slope * model.prior_rating)
            for model in self.models
        ]


def _check_known(what: str, names: Mapping[str, Any] | Sequence[str], known: Sequence[str]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{what}: expected models of the checkpoint ({', '.join(known)}), got {', '.join(unknown)}")


def _rating(where: str, value: object) -> float | None:
    return None if value is None else finite_number(where, value, "a number")


def _mapping(where: str, value: Any, keys: Sequence[str] | None = None) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{where}: expected a mapping from text, got {value!r:.80}")
    unknown = [] if keys is None else sorted(set(value) - set(keys))
    if unknown:
        raise ValueError(f"{where}: expected the keys {', '.join(keys or ())}, got {', '.join(unknown)}")
    return value

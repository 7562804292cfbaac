"""What is said of new models before their votes: a small YAML file."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from p2l_engine.arguments import finite_number
from p2l_engine.learning.rows import NewModel
from p2l_engine.unique_keys import parsed

logger = logging.getLogger(__name__)

KEYS = ("like", "prior_rating", "cost")
LOGITS_PER_POINT = float(np.log(10) / 400)  # of Elo's scale
LARGEST = 1e100  # rating: squares of ratings are finite
FARTHEST = 100.0  # that a new model's mean theta may be from 0, in units of the known models' largest plus 1


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
            like, rating, cost = given.get("like"), given.get("prior_rating"), given.get("cost")
            if like is not None and not isinstance(like, str):
                raise ValueError(f"{where}.like: expected the name of a known model, got {like!r:.80}")
            if cost is not None:
                cost = finite_number(f"{where}.cost", cost, "a number of at least 0", lambda c: c >= 0)
            models.append(Described(name, like, None if rating is None else _rating(f"{where}.prior_rating", rating), cost))
        ratings = None
        if "ratings" in top:
            entries = _mapping(f"{path}: ratings", top["ratings"])
            ratings = {name: _rating(f"{path}: ratings.{name}", each) for name, each in entries.items()}
        return cls(tuple(models), ratings)

    def as_new_models(self, known: Sequence[str], mean_theta: npt.NDArray[np.float64]) -> list[NewModel]:
        """The models with their ratings as mean theta. known, mean_theta [M]: the checkpoint's models, and their mean theta
        over the reference prompts.

        A rating r becomes a + b r, by least squares over the known models that have a rating; with one of them, or where they
        are all equal, b is ln(10) / 400, as Elo's scale has it. b is 0, with a warning, where it would be negative: these
        ratings are of other prompts. Without ratings it is taken as it is. Raises ValueError for a ``like`` that is not known,
        for ratings of unknown models and for none at all, and for a rating that is a mean theta far beyond those of the known
        models.
        """
        slope, start = 1.0, 0.0
        if self.ratings is not None:
            _check_known("ratings", self.ratings, known)
            if not self.ratings:
                raise ValueError("ratings: expected the rating of at least one known model, got none")
            rating = np.array(list(self.ratings.values()))
            theta = mean_theta[[list(known).index(name) for name in self.ratings]]
            spread = rating - rating.mean()
            size = float(np.abs(spread).max())  # squares of tiny spreads would be 0
            slope = float((spread / size) @ theta / ((spread / size) @ spread)) if size > 0 else LOGITS_PER_POINT
            if slope < 0:
                logger.warning(
                    "ratings: models that are rated higher have a lower mean theta on these prompts: ratings are not used, and "
                    "a model with prior_rating gets the mean of the rated ones"
                )
                slope = 0.0
            start = float(theta.mean() - slope * rating.mean())
        _check_known("like", [model.like for model in self.models if model.like is not None], known)
        farthest = FARTHEST * (1 + float(np.abs(mean_theta).max(initial=0.0)))
        found = []
        for model in self.models:
            level = None if model.prior_rating is None else start + slope * model.prior_rating
            if level is not None and not abs(level) <= farthest:  # NaN is none either
                raise ValueError(
                    f"models.{model.name}.prior_rating: expected a rating on the scale of 'ratings', or without them a mean "
                    f"theta, which is {mean_theta.min():.3g} to {mean_theta.max():.3g} for the known models; "
                    f"{model.prior_rating:g} would be {level:.3g}"
                )
            found.append(NewModel(model.name, model.like, level))
        return found


def _check_known(what: str, names: Mapping[str, Any] | Sequence[str], known: Sequence[str]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{what}: expected models of the checkpoint ({', '.join(known)}), got {', '.join(unknown)}")


def _rating(where: str, value: object) -> float:
    return finite_number(where, value, f"a number of at most {LARGEST:g}", lambda rating: abs(rating) <= LARGEST)


def _mapping(where: str, value: Any, keys: Sequence[str] | None = None) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{where}: expected a mapping from text, got {value!r:.80}")
    unknown = [] if keys is None else sorted(set(value) - set(keys))
    if unknown:
        raise ValueError(f"{where}: expected the keys {', '.join(keys or ())}, got {', '.join(unknown)}")
    return value

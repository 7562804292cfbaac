"""A pool's prompts, with the scores of all models, by part: training, validation, held out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bench.simple_routers import Float64, Scored
from p2l_engine.tables.turns import cell_turns
from p2l_engine.tables.whole import read_table
from p2l_engine.votes.splits import hashed


@dataclass(frozen=True, slots=True)
class Pooled:
    """N prompts of a table of ``p2l_engine.train.sources``; a prompt of two sources is there twice. scores [N, M], NaN where
    there is none; source, task [N]; parts: the prompts' numbers, split by hash as in training."""

    prompts: list[tuple[str, ...]]
    models: tuple[str, ...]
    scores: Float64
    source: npt.NDArray[np.str_]
    task: npt.NDArray[np.str_]
    parts: tuple[list[int], list[int], list[int]]

    def scored(self, features: Float64) -> Scored:
        """All prompts, with these features [N, D]."""
        return Scored(features, self.scores, self.source, self.task)

    def part(self, number: int) -> npt.NDArray[np.int64]:
        """The numbers of the prompts of one part: 0 training, 1 validation, 2 held out."""
        return np.array(self.parts[number], np.int64)


def read_pool(path: Path, held_out: float = 0.1, validation: float = 0.1) -> Pooled:
    """The pool of a table with the columns prompt, task, model, score and source. Raises what ``read_table`` and ``hashed``
    raise."""
    table = read_table(path, ("prompt", "task", "model", "score", "source"))
    models = tuple(sorted(set(table.columns["model"])))
    column = {model: m for m, model in enumerate(models)}
    place: dict[tuple[str, str], int] = {}
    task: list[str] = []
    found: list[tuple[int, int, float]] = []
    for prompt, kind, model, score, source in zip(
        *(table.columns[c] for c in ("prompt", "task", "model", "score", "source")), strict=True
    ):
        row = place.setdefault((prompt, source), len(place))
        if row == len(task):
            task.append(kind)
        found.append((row, column[model], score))
    scores = np.full((len(place), len(models)), np.nan)
    rows, columns, values = zip(*found, strict=True)
    scores[list(rows), list(columns)] = values
    prompts = [cell_turns(prompt) for prompt, _ in place]
    sources = np.array([source for _, source in place])
    return Pooled(prompts, models, scores, sources, np.array(task), hashed(prompts, held_out, validation))

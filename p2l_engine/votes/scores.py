"""Scores of every model on every prompt, and the votes that follow from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from p2l_engine.feedback import Outcome
from p2l_engine.tables.rows import listed
from p2l_engine.tables.turns import cell_turns
from p2l_engine.tables.whole import Table, read_table
from p2l_engine.votes.cells import number
from p2l_engine.votes.votes import Votes

SCORES = ("prompt", "model", "score")
ANSWER = 0.5  # votes that a scored answer brings, whatever the number of answers that it is compared with


def score_matrix(
    source: str | Path | Sequence[str | Path] | Table,
    complete: bool = True,
) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...], npt.NDArray[np.float64]]:
    """Prompts (sorted), models (sorted) and scores [P, M] of a table with the columns prompt, model, score, or of the files
    that ``source`` names.

    complete: whether every model must have a score on every prompt; where not, missing scores are NaN. Raises ValueError where
    a row is invalid, a model has no score (if complete), or two, on a prompt, or a prompt is empty.
    """
    table = (source if isinstance(source, Table) else read_table(source, SCORES)).with_numbers_as_text(("prompt",))
    path = table.shown
    rows: dict[tuple[str, ...], dict[str, float]] = {}
    if missing := [name for name in SCORES if name not in table.columns]:
        raise ValueError(f"{path}: expected the columns {', '.join(missing)}; it has {listed(table.names)}")
    for i, row in sorted(table.invalid.items()):
        raise ValueError(f"{table.located(i)}: {row.why}: {row.text}")
    columns = [table.columns[name] for name in SCORES]
    for i, (prompt, model, score) in enumerate(zip(*columns, strict=True)):
        if not isinstance(model, str):
            raise ValueError(f"{table.located(i)}: model: expected a name, got {model!r}")
        try:
            parsed = cell_turns(prompt)
        except ValueError as error:
            raise ValueError(f"{table.located(i)}: {error}") from None
        if not any(turn.strip() for turn in parsed):
            raise ValueError(f"{table.located(i)}: prompt: empty")
        of_prompt = rows.setdefault(parsed, {})
        if model in of_prompt:
            raise ValueError(
                f"{table.located(i)}: a second score of {model!r} on the same prompt: expected one; where "
                "there are several sources of scores, name the column that says which"
            )
        value = number(score)
        if value is None:
            raise ValueError(f"{table.located(i)}: score: expected a finite number, got {score!r}")
        of_prompt[model] = value
    prompts, models = tuple(sorted(rows)), tuple(sorted({m for row in rows.values() for m in row}))
    for prompt in prompts:
        if complete and len(rows[prompt]) != len(models):
            lacking = sorted(set(models) - set(rows[prompt]))
            raise ValueError(f"{path}: the prompt {prompt[0][:60]!r} has no score of {', '.join(lacking)}")
    if len(models) < 2:
        raise ValueError(f"{path}: expected scores of at least two models, got {', '.join(models) or 'none'}")
    return prompts, models, np.array([[rows[p].get(m, np.nan) for m in models] for p in prompts])


def outcomes(a: npt.ArrayLike, b: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """The votes that scores a and b of two answers make: the higher one wins; equal ones are a tie if at least 0.5, else both
    bad."""
    equal = np.where(np.greater_equal(a, 0.5), Outcome.TIE, Outcome.BOTH_BAD)
    return np.where(np.greater(a, b), Outcome.A, np.where(np.less(a, b), Outcome.B, equal)).astype(np.int64)


def from_scores(
    prompts: tuple[tuple[str, ...], ...],
    models: tuple[str, ...],
    scores: npt.NDArray[np.float64],
    wanted: tuple[str, ...] | None = None,
    answers_once: bool = False,
) -> Votes:
    """One vote for every pair of models with scores on a prompt, see ``outcomes``. scores [P, M], NaN where there is none.

    wanted: the models' order. answers_once: the votes on a prompt with k scores weigh 1 / (k - 1), so that each answer, which
    is in k - 1 of them, counts once, and all together weigh k / 2; else each vote weighs 1."""
    if wanted is not None:
        if set(wanted) != set(models):
            raise ValueError(f"models: expected {sorted(wanted)}, got {sorted(models)}")
        scores, models = scores[:, [models.index(model) for model in wanted]], tuple(wanted)
    i, j = np.triu_indices(len(models), 1)
    a, b = scores[:, i], scores[:, j]
    outcome = outcomes(a, b)
    n = len(prompts)
    pairs = (np.tile(i, n).astype(np.int64), np.tile(j, n).astype(np.int64))
    weight = None
    if answers_once:
        count = np.isfinite(scores).sum(1)
        weight = np.repeat(2 * ANSWER / np.maximum(count - 1, 1), len(i))
    votes = Votes.make(prompts, models, np.repeat(np.arange(n), len(i)), *pairs, outcome.ravel(), weight)
    return votes if np.isfinite(scores).all() else votes.where(np.isfinite(a + b).ravel())

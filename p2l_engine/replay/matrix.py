"""Reads matrices of scores, where the answers of all models are known: long tables and RouterBench's wide ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from p2l_engine.replay.columns import MOST, comparable, first, numbers, read_columns, required, texts
from p2l_engine.replay.logged import ScoreMatrix, Turns
from p2l_engine.replay.mixture import Float64
from p2l_engine.tables.turns import cell_turns

COST = "|total_cost"  # the ending of RouterBench's columns of costs: MODEL|total_cost beside MODEL, the score


def wide_models(names: list[str]) -> list[str]:
    """The models of a wide table with these columns."""
    return [name for name in names if f"{name}{COST}" in names]


def read_matrix(path: str | Path, names: list[str], csv_escape: str | None = None, column: str | None = None) -> ScoreMatrix:
    """names: the file's columns: prompt, model, score (and cost, per answer), a row for each answer; or a row for each prompt,
    with the columns MODEL and MODEL|total_cost. column: of the prompts, None: prompt. Raises ValueError where an answer is
    missing, twice, or no number."""
    models = wide_models(names)
    if not models:
        return _long(path, csv_escape, column)
    table = read_columns(path, ["prompt", *models, *(f"{model}{COST}" for model in models)], csv_escape, column)
    required(table, path, "prompt")
    scores = np.stack([numbers(table, model, path) for model in models], 1)
    costs = np.stack([numbers(table, f"{model}{COST}", path) for model in models], 1)
    _check(path, scores, costs)
    return ScoreMatrix(tuple(models), _turns(table.column("prompt").to_pylist(), path), scores, costs)


def _long(path: str | Path, csv_escape: str | None, column: str | None) -> ScoreMatrix:
    table = read_columns(path, ("prompt", "model", "score", "cost"), csv_escape, column)
    required(table, path, "prompt", "model", "score")
    score = numbers(table, "score", path)
    cost = numbers(table, "cost", path) if "cost" in table.column_names else None
    model = texts(table, "model", path)
    if model.null_count:
        raise ValueError(f"{path}: row {first(model.is_null().to_numpy(zero_copy_only=False))}: model: expected a name")
    models = tuple(sorted(model.unique().to_pylist()))
    of_model = pc.index_in(model, value_set=pa.array(models)).to_numpy(zero_copy_only=False)
    prompts = comparable(table.column("prompt").combine_chunks()).dictionary_encode()
    if prompts.null_count:
        raise ValueError(f"{path}: row {first(prompts.is_null().to_numpy(zero_copy_only=False))}: prompt: expected one")
    row = np.asarray(prompts.indices.to_numpy(zero_copy_only=False), np.int64)
    where = np.unique(row, return_index=True)[1]
    turns = _turns(table.column("prompt").take(pa.array(where)).to_pylist(), path)
    times = np.bincount(row * len(models) + of_model, minlength=len(where) * len(models)).reshape(len(where), len(models))
    if (times > 1).any():
        p, m = np.argwhere(times > 1)[0]
        what = f"{times[p, m]} of {models[m]} on {turns[p][0][:60]!r}"
        raise ValueError(f"{path}: expected one score of each model on each prompt, got {what}")
    if (times == 0).any():
        p, m = np.argwhere(times == 0)[0]
        raise ValueError(
            f"{path}: expected a score of each model on each prompt: {int((times == 0).sum()):,} are missing, such as that of "
            f"{models[m]} on {turns[p][0][:60]!r}, and the table has no propensities (columns propensity or policy) by which "
            "single answers could be judged"
        )
    scores, costs = np.zeros(times.shape), None
    scores[row, of_model] = score
    if cost is not None and not np.isnan(cost).all():
        costs = np.zeros(times.shape)
        costs[row, of_model] = cost
    _check(path, scores, costs)
    return ScoreMatrix(models, turns, scores, costs)


def _turns(cells: list[object], path: str | Path) -> list[Turns]:
    found = []
    for row, cell in enumerate(cells):
        try:
            found.append(cell_turns(cell))
        except ValueError as error:
            raise ValueError(f"{path}: row {row}: {error}") from None
    return found


def _check(path: str | Path, scores: Float64, costs: Float64 | None) -> None:
    for name, of, expected in (("score", scores, "a finite number"), ("cost", costs, "a finite number >= 0")):
        if of is None:
            continue
        wrong = np.asarray(~((np.abs(of) <= MOST) & ((name == "score") | (of >= 0))).all(1))
        if wrong.any():
            raise ValueError(f"{path}: prompt {first(wrong)}: {name}: expected {expected} for each model")

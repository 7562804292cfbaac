"""Votes: read, checked, and grouped by prompt."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.json
import pyarrow.parquet

from p2l_engine.errors import PromptError
from p2l_engine.prompts import user_turns
from p2l_engine.regression import Outcome

WINNERS = {
    "model_a": Outcome.A,
    "model_b": Outcome.B,
    "tie": Outcome.TIE,
    "tie (bothbad)": Outcome.BOTH_BAD,
}


@dataclass(frozen=True, slots=True)
class Votes:
    """prompts: the P different prompts as tuples of user turns; models: the M names, sorted.

    prompt, a, b, outcome [V] int64: the prompt of each vote, the two models' columns, and the Outcome, sorted by prompt.
    """

    prompts: tuple[tuple[str, ...], ...]
    models: tuple[str, ...]
    prompt: npt.NDArray[np.int64]
    a: npt.NDArray[np.int64]
    b: npt.NDArray[np.int64]
    outcome: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.prompt)

    def of(self, prompts: Iterable[int]) -> Votes:
        """Only these prompts, in this order; the models stay all."""
        chosen = list(prompts)
        bounds = np.searchsorted(self.prompt, np.arange(len(self.prompts) + 1))
        rows = [np.arange(bounds[p], bounds[p + 1]) for p in chosen]
        index = np.concatenate(rows) if rows else np.zeros(0, np.int64)
        renumbered = np.repeat(np.arange(len(chosen)), [len(r) for r in rows]).astype(np.int64)
        kept = tuple(self.prompts[p] for p in chosen)
        return Votes(kept, self.models, renumbered, self.a[index], self.b[index], self.outcome[index])


def read(path: str, models: tuple[str, ...] | None = None) -> Votes:
    """Votes from a parquet or jsonl file, a folder of them, or a Hugging Face dataset's name (its split ``train``).

    Columns: prompt, model_a, model_b and winner (model_a, model_b, tie, tie (bothbad)); or prompt, model and score, which
    ``from_scores`` turns into votes. A prompt is text, a list of user turns, a list of messages, or one of these lists as
    JSON. ``models`` fixes the columns (for validation data); else they are the sorted names found. Raises ValueError with
    the row of a vote that cannot be read.
    """
    table = _table(path)
    columns = set(table.column_names)
    if {"prompt", "model_a", "model_b", "winner"} <= columns:
        return _from_votes(table, path, models)
    if {"prompt", "model", "score"} <= columns:
        return from_scores(*score_matrix(path, table), wanted=models)
    raise ValueError(
        f"{path}: expected the columns prompt, model_a, model_b, winner, or prompt, model, score; got {sorted(columns)}"
    )


def score_matrix(
    path: str, table: pa.Table | None = None
) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...], npt.NDArray[np.float64]]:
    """Prompts (sorted), models (sorted) and scores [P, M] of a table with the columns prompt, model, score.

    Raises ValueError where a model has no score, or two, on a prompt.
    """
    table = _table(path) if table is None else table
    rows: dict[tuple[str, ...], dict[str, float]] = {}
    columns = [table.column(name).to_pylist() for name in ("prompt", "model", "score")]
    for i, (prompt, model, score) in enumerate(zip(*columns, strict=True)):
        if not isinstance(model, str):
            raise ValueError(f"{path}: row {i}: model: expected a name, got {model!r}")
        of_prompt = rows.setdefault(turns(prompt, path, i), {})
        if model in of_prompt:
            raise ValueError(f"{path}: row {i}: a second score of {model!r} on the same prompt")
        if not isinstance(score, int | float) or not np.isfinite(score):
            raise ValueError(f"{path}: row {i}: score: expected a finite number, got {score!r}")
        of_prompt[model] = float(score)
    prompts, models = tuple(sorted(rows)), tuple(sorted({m for row in rows.values() for m in row}))
    for prompt in prompts:
        if len(rows[prompt]) != len(models):
            lacking = sorted(set(models) - set(rows[prompt]))
            raise ValueError(f"{path}: the prompt {prompt[0][:60]!r} has no score of {', '.join(lacking)}")
    if len(models) < 2:
        raise ValueError(f"{path}: expected scores of at least two models, got {', '.join(models) or 'none'}")
    return prompts, models, np.array([[rows[p][m] for m in models] for p in prompts])


def from_scores(
    prompts: tuple[tuple[str, ...], ...],
    models: tuple[str, ...],
    scores: npt.NDArray[np.float64],
    wanted: tuple[str, ...] | None = None,
) -> Votes:
    """Every pair of models on every prompt as one vote: the higher score wins; equal scores are a tie from 0.5 up, both bad
    below it. scores [P, M]."""
    if wanted is not None and tuple(wanted) != tuple(models):
        raise ValueError(f"models: expected {list(wanted)}, got {list(models)}")
    i, j = np.triu_indices(len(models), 1)
    a, b = scores[:, i], scores[:, j]
    equal = np.where(a >= 0.5, Outcome.TIE, Outcome.BOTH_BAD)
    outcome = np.where(a > b, Outcome.A, np.where(a < b, Outcome.B, equal)).astype(np.int64)
    n = len(prompts)
    return Votes(
        prompts, models, np.repeat(np.arange(n), len(i)), np.tile(i, n).astype(np.int64), np.tile(j, n).astype(np.int64),
        outcome.ravel(),
    )  # fmt: skip


def split_by_prompt(n_prompts: int, held_out: float, seed: int) -> tuple[list[int], list[int]]:
    """(training, held-out) prompts: a random ``held_out`` share, the same for the same seed. No prompt is in both."""
    order = np.random.default_rng(seed).permutation(n_prompts)
    cut = int(n_prompts * held_out)
    return sorted(order[cut:].tolist()), sorted(order[:cut].tolist())


def _table(path: str) -> pa.Table:
    file = Path(path).expanduser()
    if file.suffix == ".parquet" and file.is_file():
        return pa.parquet.read_table(file)
    if file.suffix == ".jsonl" and file.is_file():
        return pa.json.read_json(file)
    if file.is_file() or (file.suffix and not file.exists()):
        found = "another kind of file" if file.exists() else "no such file"
        raise ValueError(f"{path}: expected a parquet or jsonl file, a folder of such files or a dataset's name; found {found}")
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        return load_dataset(path, split="train").data.table
    except (DatasetNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"{path}: no file or folder here, and no data set could be had from the hub: {first}") from error


def turns(prompt: Any, path: str, row: int) -> tuple[str, ...]:
    """The user's turns of a table's prompt; a JSON list in text is read as the list. Raises ValueError with file and row."""
    if isinstance(prompt, str) and prompt.startswith("["):
        try:
            parsed = json.loads(prompt)
        except json.JSONDecodeError:
            parsed = None
        if isinstance(parsed, list) and all(isinstance(turn, str | dict) for turn in parsed):
            prompt = parsed
    try:
        return tuple(user_turns(prompt))
    except PromptError as error:
        raise ValueError(f"{path}: row {row}: prompt: {error.problem}") from None


def _from_votes(table: pa.Table, path: str, models: tuple[str, ...] | None) -> Votes:
    columns = [table.column(name).to_pylist() for name in ("prompt", "model_a", "model_b", "winner")]
    names = models or tuple(sorted({name for name in (*columns[1], *columns[2]) if isinstance(name, str)}))
    column = {name: i for i, name in enumerate(names)}
    prompts: dict[tuple[str, ...], int] = {}
    rows = []
    for i, (prompt, a, b, winner) in enumerate(zip(*columns, strict=True)):
        for key, value, known in (("model_a", a, column), ("model_b", b, column), ("winner", winner, WINNERS)):
            if not isinstance(value, str) or value not in known:
                raise ValueError(f"{path}: row {i}: {key}: expected one of {', '.join(known)}, got {value!r}")
        if a == b:
            raise ValueError(f"{path}: row {i}: {a!r} against itself")
        place = prompts.setdefault(turns(prompt, path, i), len(prompts))
        rows.append((place, column[a], column[b], int(WINNERS[winner])))
    if not rows:
        raise ValueError(f"{path}: expected at least one vote, got none")
    votes = np.array(rows, np.int64)
    votes = votes[np.argsort(votes[:, 0], kind="stable")]
    return Votes(tuple(prompts), names, *(np.ascontiguousarray(votes[:, k]) for k in range(4)))

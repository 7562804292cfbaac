"""The reward of each logged decision: from the log's feedback, or from a file of scores."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from p2l_engine.replay.columns import MOST, bounded, column_names, comparable, first, numbers, read_columns, required, texts
from p2l_engine.replay.logged import LoggedDecisions
from p2l_engine.replay.mixture import Float64
from p2l_engine.tables.turns import cell_turns
from p2l_engine.votes.cells import Unusable, seconds_of

Int64 = npt.NDArray[np.int64]
Reward = Literal["score", "preference"]
OUTCOMES = {"this": 1.0, "other": 0.0, "tie": 0.5, "both_bad": 0.5}
FEEDBACK = ("decision", "time", "score", "against", "preference", "label")
UNKNOWN = "feedback on decisions that the log does not have"
UNUSED = "feedback on decisions that were left out"


@dataclass(frozen=True, slots=True, eq=False)
class Rewarded:
    """reward [N]: NaN without feedback; of: what it is; left_out: feedback that was not used, by reason."""

    reward: Float64
    of: Reward
    left_out: Counter[str] = field(default_factory=Counter)


def from_feedback(
    path: str | Path, ids: pa.Array, used: Int64, log: LoggedDecisions, wanted: Reward | None, csv_escape: str | None = None
) -> Rewarded:
    """ids: of all rows of the log; used: the number in ``log`` of each, or -1. wanted: None for scores where there are any,
    else preferences. Raises ValueError where a score is none or a preference is unknown, or all feedback is on other decisions.

    Score: the newest of a decision counts. Preference: against another decision on the same prompt; the reward is 1 for the
    better answer, 0 for the other, 1/2 each for ties and where both were bad, and their mean where a decision was compared
    several times. A policy's value is then its win rate against the log's choices, and the log's own is 1/2 where every
    decision was compared equally often.
    """
    table = read_columns(path, FEEDBACK, csv_escape)
    required(table, path, "decision")
    table = _by_time(table, path)
    left_out = Counter[str]()
    row = _rows_of(table, "decision", path, ids)
    if (row < 0).all():
        raise ValueError(f"{path}: none of its {len(row):,} rows is feedback on a decision of the log: is it of another log?")
    left_out[UNKNOWN] += int((row < 0).sum())
    row = np.where(row < 0, -1, used[row])
    given = {name: _given(table, name) for name in ("score", "preference", "label")}
    left_out["labels"] += int((given["label"] & (row >= 0)).sum())
    of: Reward = wanted or ("score" if given["score"].any() or not given["preference"].any() else "preference")
    other: Reward = "preference" if of == "score" else "score"
    left_out[f"feedback of the kind {other}"] += int((given[other] & (row >= 0)).sum())
    mine = given[of]
    left_out[UNUSED] += int((mine & (row < 0)).sum()) - int((mine & (_rows_of(table, "decision", path, ids) < 0)).sum())
    mine &= row >= 0
    if of == "score":
        reward = _scores(table, path, mine, row, len(log), left_out)
    else:
        reward = _preferences(table, path, mine, row, ids, used, log, left_out)
    return Rewarded(reward, of, +left_out)


def from_scores(
    path: str | Path,
    ids: pa.Array | None,
    used: Int64,
    log: LoggedDecisions,
    csv_escape: str | None = None,
    column: str | None = None,
) -> Rewarded:
    """From a table of scores: (decision or id, score), or (prompt, model, score), joined on prompt and model. column: of the
    prompts, None: prompt.

    Raises ValueError where it has two scores of one answer, or none of any answer in the log.
    """
    if column is not None and ids is not None and {"decision", "id"} & set(column_names(path, csv_escape)):
        column = None  # joined on the decision's id
    table = read_columns(path, ("decision", "id", "prompt", "model", "score"), csv_escape, column)
    required(table, path, "score")
    score = bounded(numbers(table, "score", path), "score", path)
    if (wrong := np.isnan(score)).any():
        raise ValueError(f"{path}: row {first(wrong)}: score: expected a finite number")
    key = next((name for name in ("decision", "id") if name in table.column_names), None)
    left_out = Counter[str]()
    if key is not None and ids is not None:
        row = _rows_of(table, key, path, ids)
        left_out["scores of decisions that the log does not have"] += int((row < 0).sum())
        row = np.where(row < 0, -1, used[row])
        if (twice := _repeated(row)) is not None:
            raise ValueError(f"{path}: row {twice}: a second score of the same decision")
        reward = np.full(len(log), np.nan)
        reward[row[row >= 0]] = score[row >= 0]
    else:
        required(table, path, "prompt", "model")
        if all(text is None for text in log.texts):
            raise ValueError(
                f"{path}: its scores have no decision's id, and the log has no column 'prompt' to join them on: route with "
                "`batch --keep prompt`, or give an id to both"
            )
        reward = _joined(table, path, score, log, left_out)
    if np.isnan(reward).all():
        raise ValueError(f"{path}: none of its {len(score):,} scores is of an answer in the log")
    return Rewarded(reward, "score", +left_out)


def _by_time(table: pa.Table, path: str | Path) -> pa.Table:
    """The rows from old to new: those without a time first, and in the file's order where their times are the same."""
    if "time" not in table.column_names:
        return table
    time = table.column("time").combine_chunks()
    if pa.types.is_timestamp(time.type) or pa.types.is_null(time.type):
        since = np.asarray(pc.cast(time, pa.int64()).fill_null(np.iinfo(np.int64).min).to_numpy(zero_copy_only=False))
        return table.take(pa.array(np.argsort(since, kind="stable")))
    seconds = np.full(len(time), -np.inf)
    for row, value in enumerate(time.to_pylist()):
        try:
            seconds[row] = -np.inf if value in (None, "") else seconds_of(value)
        except Unusable as error:
            raise ValueError(f"{path}: row {row}: time: {str(error).removeprefix('timestamp: ')}, got {value!r:.60}") from None
    return table.take(pa.array(np.argsort(seconds, kind="stable")))


def _joined(table: pa.Table, path: str | Path, score: Float64, log: LoggedDecisions, left_out: Counter[str]) -> Float64:
    number = {text: i for i, text in enumerate(log.texts) if text is not None}
    cells = table.column("prompt").combine_chunks()
    prompts = comparable(cells).dictionary_encode()
    prompt = np.asarray(prompts.indices.fill_null(-1).to_numpy(zero_copy_only=False), np.int64)
    of_each = np.full(len(prompts.dictionary) + 1, -1)
    firsts = np.unique(prompt[prompt >= 0], return_index=True)[1]
    rows = np.flatnonzero(prompt >= 0)[firsts]
    for i, cell in enumerate(cells.take(pa.array(rows)).to_pylist()):
        try:
            of_each[i] = number.get(cell_turns(cell), -1)
        except ValueError as error:
            raise ValueError(f"{path}: row {rows[i]}: {error}") from None
    prompt = of_each[prompt]
    model = _indices(texts(table, "model", path), log.models)
    known = (prompt >= 0) & (model >= 0)
    left_out["scores of answers that the log does not have"] += int((~known).sum())
    cell = prompt * len(log.models) + model
    if (twice := _repeated(np.where(known, cell, -1))) is not None:
        raise ValueError(f"{path}: row {twice}: a second score of the same model on the same prompt")
    order = np.argsort(cell[known])
    sorted_cells, wanted = cell[known][order], log.prompt * len(log.models) + log.chosen
    place = np.minimum(np.searchsorted(sorted_cells, wanted), max(len(sorted_cells) - 1, 0))
    if not len(sorted_cells):
        return np.full(len(log), np.nan)
    return np.where(sorted_cells[place] == wanted, score[known][order][place], np.nan)


def _scores(
    table: pa.Table, path: str | Path, mine: npt.NDArray[np.bool_], row: Int64, n: int, left_out: Counter[str]
) -> Float64:
    reward = np.full(n, np.nan)
    if not mine.any():
        return reward
    score = numbers(table, "score", path)
    if (wrong := mine & ~(np.abs(score) <= MOST)).any():
        raise ValueError(f"{path}: score of {table.column('decision')[first(wrong)].as_py()}: expected a finite number")
    last, place = np.unique(row[mine][::-1], return_index=True)
    reward[last] = score[mine][::-1][place]
    left_out["scores that a newer one of the same decision replaces"] += int(mine.sum()) - len(last)
    return reward


def _preferences(
    table: pa.Table,
    path: str | Path,
    mine: npt.NDArray[np.bool_],
    row: Int64,
    ids: pa.Array,
    used: Int64,
    log: LoggedDecisions,
    left_out: Counter[str],
) -> Float64:
    if not mine.any():
        return np.full(len(log), np.nan)
    said = texts(table, "preference", path)
    outcome = np.array([*OUTCOMES.values(), np.nan])[_indices(said, tuple(OUTCOMES))]
    if (wrong := mine & np.isnan(outcome)).any():
        found = said[first(wrong)].as_py()
        raise ValueError(f"{path}: preference: expected one of {', '.join(OUTCOMES)}, got {found!r}")
    against = _rows_of(table, "against", path, ids) if "against" in table.column_names else np.full(len(row), -1)
    against = np.where(against < 0, -1, used[against])
    left_out["preferences against decisions that are not in the log, or were left out"] += int((mine & (against < 0)).sum())
    mine &= against >= 0
    same = log.prompt[row] == log.prompt[against]
    left_out["preferences between answers to different prompts"] += int((mine & ~same).sum())
    left_out["preferences of a decision against itself"] += int((mine & (row == against)).sum())
    mine &= same & (row != against)
    a, b, y = row[mine], against[mine], outcome[mine]
    n = len(log)
    times = np.bincount(a, minlength=n) + np.bincount(b, minlength=n)
    sums = np.bincount(a, y, n) + np.bincount(b, 1 - y, n)
    return np.where(times > 0, sums / np.maximum(times, 1), np.nan)


def _rows_of(table: pa.Table, name: str, path: str | Path, ids: pa.Array) -> Int64:
    """Where each id is among ``ids``; -1 nowhere."""
    return np.asarray(pc.index_in(texts(table, name, path), value_set=ids).fill_null(-1).to_numpy(), np.int64)


def _indices(names: pa.Array, known: tuple[str, ...]) -> Int64:
    return np.asarray(pc.index_in(names, value_set=pa.array(known, pa.string())).fill_null(-1).to_numpy(), np.int64)


def _given(table: pa.Table, name: str) -> npt.NDArray[np.bool_]:
    if name not in table.column_names:
        return np.zeros(len(table), bool)
    column = table.column(name).combine_chunks()
    given = column.is_valid()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        given = pc.and_(given, pc.not_equal(column.fill_null(""), ""))
    return np.array(given.to_numpy(zero_copy_only=False), bool)


def _repeated(rows: Int64) -> int | None:
    """The first row that names again what an earlier one named; -1 names nothing."""
    places = np.flatnonzero(rows >= 0)
    _, kept = np.unique(rows[places], return_index=True)
    again = np.setdiff1d(np.arange(len(places)), kept)
    return int(places[again[0]]) if len(again) else None

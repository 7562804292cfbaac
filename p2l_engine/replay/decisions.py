"""Reads logged decisions: the server's export, the output of a batch run, or any table of choices with propensities."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from p2l_engine.prompts.parse import cell_turns
from p2l_engine.replay.columns import POLICY, first, lists, numbers, read_columns, texts
from p2l_engine.replay.logged import Bools, LoggedDecisions, Turns
from p2l_engine.replay.mixture import Float64, Mixture
from p2l_engine.replay.rewards import Reward, Rewarded, from_feedback, from_scores

COLUMNS = (
    "id", "session", "turns_hash", "prompt", "asked", "chosen", "model", "policy", "propensity", "propensity_error",
    "candidates", "expected_cost", "cost", "reward", "score", "win_rate",
)  # fmt: skip
AUTO = "auto"  # what a caller asks for who names no model
ROUNDING = 1e-6  # by which probabilities may be off
NAMES = pa.list_(pa.string())


def read_decisions(
    path: str | Path,
    feedback: str | Path | None = None,
    scores: str | Path | None = None,
    reward: Reward | None = None,
) -> LoggedDecisions:
    """The decisions of a file or folder, with rewards from feedback, from scores, or from its own column reward (or score, in a
    table without win_rate: servers and batch runs write the policy's coefficient as score).

    Raises ValueError, with the row, for propensities outside (0, 1], policies that do not sum to 1, ids that occur twice, rows
    without propensity, and logs without any decision or feedback.
    """
    table = read_columns(path, COLUMNS)
    chosen_column = "chosen" if "chosen" in table.column_names else "model"
    names = texts(table, chosen_column, path)
    ids = texts(table, "id", path) if "id" in table.column_names else None
    if ids is not None:
        _check_ids(ids, path)
    left_out = Counter[str]()
    rows = _decided(table, names, path, left_out)
    used = np.full(len(table), -1, np.int64)
    used[rows] = np.arange(len(rows))
    if not len(rows):
        why = ", ".join(f"{count:,} {reason}" for reason, count in left_out.items())
        raise ValueError(f"{path}: expected decisions of a policy, found none: {why}")
    table, names = table.take(pa.array(rows)), names.take(pa.array(rows))
    policy = lists(table, "policy", POLICY, path) if "policy" in table.column_names else None
    if policy is not None and policy.null_count == len(policy):
        policy = None
    candidates = lists(table, "candidates", NAMES, path) if "candidates" in table.column_names else None
    models = _models(names, policy, candidates)
    chosen = _indices(names, models).astype(np.int32)
    logged = None if policy is None else _mixture(policy, models, path, rows)
    propensity, known = _propensity(table, path, rows, chosen, logged)
    error = _propensity_error(table, path, rows)
    known &= error == 0  # else the policy is that of one draw
    cost, real = _costs(table, path, logged)
    prompt, keys, of_prompts = _prompts(table, ids.take(pa.array(rows)) if ids is not None else None, rows, path)
    own = _own_reward(table, path)
    log = LoggedDecisions(
        models, chosen, propensity, error, logged, known, _allowed(candidates, models), own, cost, real, prompt, keys,
        of_prompts, _session(table, path), "score", left_out,
    )  # fmt: skip
    if not np.isnan(own).all() and (scores is not None or feedback is not None):
        raise ValueError(f"{path}: has rewards of its own (column reward or score): expected no feedback or scores beside them")
    if feedback is None and reward is not None:
        raise ValueError(f"{path}: reward: expected a file of feedback, of which {reward!r} is a kind, got none")
    if scores is not None:
        return _with(log, from_scores(scores, ids, used, log))
    if feedback is not None:
        if ids is None:
            raise ValueError(f"{path}: expected a column 'id', which feedback names")
        return _with(log, from_feedback(feedback, ids, used, log, reward))
    return log


def _with(log: LoggedDecisions, found: Rewarded) -> LoggedDecisions:
    return replace(log, reward=found.reward, of=found.of, left_out=log.left_out + found.left_out)


def _check_ids(ids: pa.Array, path: str | Path) -> None:
    if ids.null_count:
        raise ValueError(f"{path}: row {first(ids.is_null().to_numpy(zero_copy_only=False))}: id: expected text, got nothing")
    counted = pc.value_counts(ids)
    times = pc.struct_field(counted, "counts").to_numpy()
    if (times > 1).any():
        id = pc.struct_field(counted, "values")[first(times > 1)].as_py()
        raise ValueError(
            f"{path}: expected every id once, got {id!r} {times[first(times > 1)]} times ({int((times > 1).sum()):,} ids more "
            "than once): was one part of the log read twice?"
        )


def _decided(table: pa.Table, names: pa.Array, path: str | Path, left_out: Counter[str]) -> npt.NDArray[np.int64]:
    """The rows on which a policy chose."""
    chosen = np.array(pc.not_equal(names.fill_null(""), "").to_numpy(zero_copy_only=False), bool)
    left_out["rows without a chosen model"] += int((~chosen).sum())
    if "asked" in table.column_names:
        asked = texts(table, "asked", path).fill_null(AUTO)
        auto = np.array(pc.equal(asked, AUTO).to_numpy(zero_copy_only=False), bool)
        left_out["rows on which the caller named the model"] += int((chosen & ~auto).sum())
        chosen &= auto
    for reason in [reason for reason, count in left_out.items() if not count]:
        del left_out[reason]
    return np.flatnonzero(chosen)


def _models(names: pa.Array, policy: pa.ListArray | None, candidates: pa.ListArray | None) -> tuple[str, ...]:
    found = set(names.unique().to_pylist())
    if policy is not None:
        found |= set(pc.struct_field(policy.flatten(), "model").unique().to_pylist())
    if candidates is not None:
        found |= set(candidates.flatten().unique().to_pylist())
    return tuple(sorted(name for name in found if name is not None))


def _indices(names: pa.Array, models: tuple[str, ...]) -> npt.NDArray[np.int64]:
    found = pc.index_in(names, value_set=pa.array(models, pa.string())).fill_null(-1)
    return np.asarray(found.to_numpy(zero_copy_only=False), np.int64)


def _padded(column: pa.ListArray) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], int]:
    """Of the flattened entries of lists: their rows, and their places within them; the length of the longest list."""
    lengths = np.asarray(pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False), np.int64)
    row = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(len(row)) - np.repeat(lengths.cumsum() - lengths, lengths)
    return row, place, int(lengths.max(initial=0))


def _mixture(policy: pa.ListArray, models: tuple[str, ...], path: str | Path, rows: npt.NDArray[np.int64]) -> Mixture:
    """The logging policy; a row without one has probabilities of 0."""
    row, place, width = _padded(policy)
    entries = policy.flatten()
    model = _indices(pc.struct_field(entries, "model"), models)
    p = np.asarray(pc.struct_field(entries, "probability").fill_null(np.nan).to_numpy(zero_copy_only=False), np.float64)
    if (wrong := ~((p >= 0) & (p <= 1 + ROUNDING)) | (model < 0)).any():
        bad = first(wrong)
        raise ValueError(
            f"{path}: row {rows[row[bad]]}: policy: expected a model and a probability in [0, 1], got {entries[bad].as_py()}"
        )
    indices, probabilities = np.zeros((len(policy), width), np.int32), np.zeros((len(policy), width))
    indices[row, place], probabilities[row, place] = model, p
    total = probabilities.sum(1)
    if (wrong := (np.abs(total - 1) > ROUNDING) & (np.bincount(row, minlength=len(policy)) > 0)).any():
        bad = first(wrong)
        raise ValueError(f"{path}: row {rows[bad]}: policy: expected probabilities that sum to 1, got {total[bad]:.9g}")
    return Mixture(indices, probabilities)


def _propensity(
    table: pa.Table,
    path: str | Path,
    rows: npt.NDArray[np.int64],
    chosen: npt.NDArray[np.int32],
    logged: Mixture | None,
) -> tuple[Float64, Bools]:
    """The propensities [N], and whether the logging policy says the same."""
    of_policy = None if logged is None else logged.of(chosen)
    if "propensity" in table.column_names:
        given = table.column("propensity").combine_chunks()
        missing = np.array(given.is_null().to_numpy(zero_copy_only=False), bool)
        if missing.any():
            raise ValueError(
                _without(f"{path}: row {rows[first(missing)]} and {int(missing.sum()) - 1:,} more have no propensity")
            )
        found, name = numbers(table, "propensity", path), "propensity"
    elif of_policy is not None:
        found, name = of_policy, "the policy's probability of the chosen model"
    else:
        raise ValueError(_without(f"{path}: the log has no propensities (columns propensity or policy)"))
    if (wrong := ~((found > 0) & (found <= 1 + ROUNDING))).any():
        bad = first(wrong)
        raise ValueError(
            f"{path}: row {rows[bad]}: {name}: expected a probability above 0 and up to 1, got {found[bad]:g} "
            f"({int(wrong.sum()):,} such rows): a model that was chosen had a probability of its own"
        )
    if of_policy is None:
        return found, np.zeros(len(found), bool)
    return found, np.abs(of_policy - found) <= ROUNDING * found


def _propensity_error(table: pa.Table, path: str | Path, rows: npt.NDArray[np.int64]) -> Float64:
    """[N]: 0 where the log has none."""
    if "propensity_error" not in table.column_names:
        return np.zeros(len(table))
    found = np.nan_to_num(numbers(table, "propensity_error", path), nan=0.0, posinf=-1.0)
    if (wrong := found < 0).any():
        given = table.column("propensity_error")[first(wrong)].as_py()
        raise ValueError(f"{path}: row {rows[first(wrong)]}: propensity_error: expected a finite number >= 0, got {given}")
    return found


def _without(what: str) -> str:
    return (
        f"{what}: how likely each choice was is what other policies are judged by; log the probability with which the model "
        "was drawn (p2l-engine serve and batch do), or give a matrix of every model's scores"
    )


def _costs(table: pa.Table, path: str | Path, logged: Mixture | None) -> tuple[Float64, Bools]:
    """The costs [N], real ones where there are any, else the expected cost where it is that of the chosen model alone."""
    none = np.full(len(table), np.nan)
    spent = numbers(table, "cost", path) if "cost" in table.column_names else none
    expected = numbers(table, "expected_cost", path) if "expected_cost" in table.column_names else none
    if logged is not None:
        expected = np.where((logged.probabilities > 0).sum(1) <= 1, expected, np.nan)
    cost = np.where(np.isnan(spent), expected, spent)
    if (wrong := (cost < 0) | np.isinf(cost)).any():
        raise ValueError(f"{path}: cost: expected finite numbers >= 0, got {cost[first(wrong)]:g}")
    return cost, ~np.isnan(spent)


def _own_reward(table: pa.Table, path: str | Path) -> Float64:
    name = "reward" if "reward" in table.column_names else "score"
    if name not in table.column_names or (name == "score" and "win_rate" in table.column_names):
        return np.full(len(table), np.nan)
    found = numbers(table, name, path)
    if np.isinf(found).any():
        raise ValueError(f"{path}: {name}: expected finite numbers, got {found[first(np.isinf(found))]:g}")
    return found


def _allowed(candidates: pa.ListArray | None, models: tuple[str, ...]) -> Bools | None:
    if candidates is None:
        return None
    row, _, _ = _padded(candidates)
    allowed = np.zeros((len(candidates), len(models)), bool)
    allowed[row, _indices(candidates.flatten(), models)] = True
    allowed[np.bincount(row, minlength=len(candidates)) == 0] = True  # not logged
    return None if allowed.all() else allowed


def _prompts(
    table: pa.Table, ids: pa.Array | None, rows: npt.NDArray[np.int64], path: str | Path
) -> tuple[npt.NDArray[np.int64], list[str], list[Turns | None]]:
    """Each row's prompt, and the keys and texts of prompts. Rows without hash and text are their own prompt."""
    n = len(table)
    cells = table.column("prompt").combine_chunks() if "prompt" in table.column_names else pa.nulls(n)
    hashes = texts(table, "turns_hash", path) if "turns_hash" in table.column_names else pa.nulls(n, pa.string())
    hashes = pc.if_else(pc.equal(hashes, ""), None, hashes)
    if hashes.null_count and cells.null_count < n:
        listed = pa.types.is_list(cells.type) or pa.types.is_large_list(cells.type)
        known = pa.array([None if of is None else repr(of) for of in cells.to_pylist()]) if listed else cells
        hashes = pc.coalesce(hashes, pc.cast(known, pa.string()))
    alone = np.array(hashes.is_null().to_numpy(zero_copy_only=False), bool)
    own = ids if ids is not None else pa.array([f"row {row}" for row in rows])
    encoded = pc.if_else(hashes.is_null(), pc.binary_join_element_wise("\x00", own, ""), hashes).dictionary_encode()
    prompt = np.asarray(encoded.indices.to_numpy(zero_copy_only=False), np.int64)
    keys: list[str] = encoded.dictionary.to_pylist()
    found: list[Turns | None] = [None] * len(keys)
    if cells.null_count < n:
        valid = np.flatnonzero(cells.is_valid().to_numpy(zero_copy_only=False) & ~alone)
        of, where = np.unique(prompt[valid], return_index=True)
        for number, cell in zip(of.tolist(), cells.take(pa.array(valid[where])).to_pylist(), strict=True):
            try:
                found[number] = cell_turns(cell)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
    return prompt, keys, found


def _session(table: pa.Table, path: str | Path) -> npt.NDArray[np.int64] | None:
    if "session" not in table.column_names:
        return None
    column = texts(table, "session", path)
    column = pc.if_else(pc.equal(column, ""), None, column)
    if column.null_count == len(column):
        return None
    encoded = column.dictionary_encode()
    found = np.asarray(encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False), np.int64)
    alone = found < 0
    found[alone] = len(encoded.dictionary) + np.arange(int(alone.sum()))
    return found

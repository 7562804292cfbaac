"""Reads logged decisions: the server's export, the output of a batch run, or any table of choices with propensities."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from p2l_engine.replay.choices import read_choices
from p2l_engine.replay.columns import MODELS, Int64, bounded, comparable, first, matrix, numbers, read_columns, texts
from p2l_engine.replay.expected_score import Rates, rates_of
from p2l_engine.replay.logged import Bools, LoggedDecisions, Turns
from p2l_engine.replay.mixture import Float64, Mixture
from p2l_engine.replay.rewards import Reward, Rewarded, from_feedback, from_scores
from p2l_engine.tables.turns import cell_turns

COLUMNS = (
    "id", "session", "turns_hash", "prompt", "asked", "outcome", "chosen", "model", "policy", "propensity",
    "propensity_error", "candidates", "expected_cost", "cost", "reward", "score", "win_rate", "theta",
)  # fmt: skip
AUTO = "auto"  # what a caller asks for who names no model
CACHED = "cached"  # the outcome of a request that an earlier answer served


def read_decisions(
    path: str | Path,
    feedback: str | Path | None = None,
    scores: str | Path | None = None,
    reward: Reward | None = None,
    csv_escape: str | None = None,
    column: str | None = None,
) -> LoggedDecisions:
    """The decisions of a file or folder, with rewards from feedback, from scores, or from its own column reward (or score, in a
    table without win_rate: servers and batch runs write the policy's coefficient as score). column: of the prompts, None:
    prompt.

    Raises ValueError, with the row, for propensities outside (0, 1], policies that do not sum to 1, ids that occur twice, rows
    without propensity, and logs without any decision or feedback.
    """
    table = read_columns(path, COLUMNS, csv_escape, column)
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
    of = read_choices(table, names, path, rows)
    cost, real = _costs(table, path, rows, of.logged)
    prompt, keys, of_prompts = _prompts(table, ids.take(pa.array(rows)) if ids is not None else None, rows, path)
    own = _own_reward(table, path, rows)
    log = LoggedDecisions(
        of.models, of.chosen, of.propensity, of.error, of.logged, of.known, of.allowed, reward=own, cost=cost, real=real,
        prompt=prompt, keys=keys, texts=of_prompts, session=_session(table, path), rates=_rates(table, of.models, prompt),
        left_out=left_out,
    )  # fmt: skip
    if not np.isnan(own).all() and (scores is not None or feedback is not None):
        raise ValueError(f"{path}: has rewards of its own (column reward or score): expected no feedback or scores beside them")
    if feedback is None and reward is not None:
        raise ValueError(f"{path}: reward: expected a file of feedback, of which {reward!r} is a kind, got none")
    if scores is not None:
        return _with(log, from_scores(scores, ids, used, log, csv_escape, column))
    if feedback is not None:
        if ids is None:
            raise ValueError(f"{path}: expected a column 'id', which feedback names")
        return _with(log, from_feedback(feedback, ids, used, log, reward, csv_escape))
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


def _decided(table: pa.Table, names: pa.Array, path: str | Path, left_out: Counter[str]) -> Int64:
    """The rows on which a policy chose."""
    chosen = np.array(pc.not_equal(names.fill_null(""), "").to_numpy(zero_copy_only=False), bool)
    left_out["rows without a chosen model"] += int((~chosen).sum())
    for name, expected, reason in (
        ("asked", (AUTO, ""), "rows on which the caller named the model"),
        ("outcome", (CACHED,), "rows that an earlier answer served"),
    ):
        if name not in table.column_names:
            continue
        found = texts(table, name, path).fill_null("")
        among = np.array(pc.is_in(found, pa.array(expected)).to_numpy(zero_copy_only=False), bool)
        others = ~among if name == "asked" else among
        left_out[reason] += int((chosen & others).sum())
        chosen &= ~others
    for reason in [reason for reason, count in left_out.items() if not count]:
        del left_out[reason]
    return np.flatnonzero(chosen)


def _costs(table: pa.Table, path: str | Path, rows: Int64, logged: Mixture | None) -> tuple[Float64, Bools]:
    """The costs [N], real ones where there are any, else the expected cost where it is that of the chosen model alone."""
    none = np.full(len(table), np.nan)
    spent, expected = (
        bounded(numbers(table, name, path, rows), name, path, rows, 0.0) if name in table.column_names else none
        for name in ("cost", "expected_cost")
    )
    if logged is not None:
        expected = np.where((logged.probabilities > 0).sum(1) <= 1, expected, np.nan)
    return np.where(np.isnan(spent), expected, spent), ~np.isnan(spent)


def _own_reward(table: pa.Table, path: str | Path, rows: Int64) -> Float64:
    name = "reward" if "reward" in table.column_names else "score"
    if name not in table.column_names or (name == "score" and "win_rate" in table.column_names):
        return np.full(len(table), np.nan)
    return bounded(numbers(table, name, path, rows), name, path, rows)


def _prompts(
    table: pa.Table, ids: pa.Array | None, rows: Int64, path: str | Path
) -> tuple[Int64, list[str], list[Turns | None]]:
    """Each row's prompt, and the keys and texts of prompts. Rows without hash and text are their own prompt."""
    n = len(table)
    cells = table.column("prompt").combine_chunks() if "prompt" in table.column_names else pa.nulls(n)
    hashes = texts(table, "turns_hash", path) if "turns_hash" in table.column_names else pa.nulls(n, pa.string())
    hashes = pc.if_else(pc.equal(hashes, ""), None, hashes)
    if hashes.null_count and cells.null_count < n:
        hashes = pc.coalesce(hashes, comparable(cells))
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
                row = rows[valid[prompt[valid] == number][0]]
                raise ValueError(f"{path}: row {row}: {error}") from None
    return prompt, keys, found


def _rates(table: pa.Table, models: tuple[str, ...], prompt: Int64) -> Rates | None:
    """Win rates by prompt from the theta that a batch run wrote (``--coefficients``)."""
    of_theta = (table.schema.metadata or {}).get(MODELS, b"").decode().splitlines()
    if not of_theta or "theta" not in table.column_names:
        return None
    firsts = np.unique(prompt, return_index=True)[1]
    return rates_of(matrix(table, "theta", len(of_theta), firsts), of_theta, models)


def _session(table: pa.Table, path: str | Path) -> Int64 | None:
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

"""Reads what could have been chosen on each row of a table, and how probably: candidates, logging policies, propensities."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from p2l_engine.replay.columns import MOST, POLICY, Int64, first, lists, numbers
from p2l_engine.replay.logged import Bools, Choices
from p2l_engine.replay.mixture import Float64, Mixture

ROUNDING = 1e-6  # by which probabilities may be off
NAMES = pa.list_(pa.string())


def read_choices(table: pa.Table, names: pa.Array, path: str | Path, rows: Int64) -> Choices:
    """names [N]: the chosen models; rows [N]: the rows' numbers in the file.

    Raises ValueError, with the row, where there is no propensity, or one outside (0, 1]; where a policy does not sum to 1, or
    candidates or a policy are without the chosen model.
    """
    policy = lists(table, "policy", POLICY, path, rows) if "policy" in table.column_names else None
    if policy is not None and policy.null_count == len(policy):
        policy = None
    candidates = lists(table, "candidates", NAMES, path, rows) if "candidates" in table.column_names else None
    models = _models(names, policy, candidates)
    chosen = _indices(names, models).astype(np.int32)
    logged = None if policy is None else _mixture(policy, models, path, rows)
    propensity, known = _propensity(table, path, rows, chosen, logged)
    error = _propensity_error(table, path, rows)
    known &= error == 0  # else the policy is that of one draw
    return Choices(models, chosen, propensity, error, logged, known, _allowed(candidates, models, chosen, path, rows))


def _models(names: pa.Array, policy: pa.ListArray | None, candidates: pa.ListArray | None) -> tuple[str, ...]:
    found = set(names.unique().to_pylist())
    if policy is not None:
        found |= set(pc.struct_field(policy.flatten(), "model").unique().to_pylist())
    if candidates is not None:
        found |= set(candidates.flatten().unique().to_pylist())
    return tuple(sorted(name for name in found if name is not None))


def _indices(names: pa.Array, models: tuple[str, ...]) -> Int64:
    found = pc.index_in(names, value_set=pa.array(models, pa.string())).fill_null(-1)
    return np.asarray(found.to_numpy(zero_copy_only=False), np.int64)


def _padded(column: pa.ListArray) -> tuple[Int64, Int64, int]:
    """Of the flattened entries of lists: their rows, and their places within them; the length of the longest list."""
    lengths = np.asarray(pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False), np.int64)
    row = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(len(row)) - np.repeat(lengths.cumsum() - lengths, lengths)
    return row, place, int(lengths.max(initial=0))


def _mixture(policy: pa.ListArray, models: tuple[str, ...], path: str | Path, rows: Int64) -> Mixture:
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
    rows: Int64,
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
        found, name = numbers(table, "propensity", path, rows), "propensity"
    elif of_policy is not None:
        found, name = of_policy, "the policy's probability of the chosen model"
    else:
        raise ValueError(_without(f"{path}: the log has no propensities (columns propensity or policy)"))
    if (wrong := ~((found >= 1 / MOST) & (found <= 1 + ROUNDING))).any():
        bad = first(wrong)
        raise ValueError(
            f"{path}: row {rows[bad]}: {name}: expected a probability above 0 and up to 1, got {found[bad]:g} "
            f"({int(wrong.sum()):,} such rows): a model that was chosen had a probability of its own"
        )
    found = np.minimum(found, 1.0)
    if of_policy is None or logged is None:
        return found, np.zeros(len(found), bool)
    if (wrong := (of_policy == 0) & (logged.probabilities > 0).any(1)).any():
        raise ValueError(
            f"{path}: row {rows[first(wrong)]}: policy: expected a probability above 0 of the chosen model "
            f"({int(wrong.sum()):,} such rows); if another model answered for it, log the one that was drawn as 'chosen'"
        )
    return found, np.abs(of_policy - found) <= ROUNDING * found


def _propensity_error(table: pa.Table, path: str | Path, rows: Int64) -> Float64:
    """[N]: 0 where the log has none."""
    if "propensity_error" not in table.column_names:
        return np.zeros(len(table))
    found = np.nan_to_num(numbers(table, "propensity_error", path, rows), nan=0.0, posinf=-1.0)
    if (wrong := found < 0).any():
        given = table.column("propensity_error")[first(wrong)].as_py()
        raise ValueError(f"{path}: row {rows[first(wrong)]}: propensity_error: expected a finite number >= 0, got {given}")
    return found


def _without(what: str) -> str:
    return (
        f"{what}: how likely each choice was is what other policies are judged by; log the probability with which the model "
        "was drawn (p2l-engine serve and batch do), or give a matrix of every model's scores"
    )


def _allowed(
    candidates: pa.ListArray | None,
    models: tuple[str, ...],
    chosen: npt.NDArray[np.int32],
    path: str | Path,
    rows: Int64,
) -> Bools | None:
    if candidates is None:
        return None
    row, _, _ = _padded(candidates)
    named = _indices(candidates.flatten(), models)
    allowed = np.zeros((len(candidates), len(models)), bool)
    allowed[row[named >= 0], named[named >= 0]] = True
    allowed[np.bincount(row, minlength=len(candidates)) == 0] = True  # not logged
    if (wrong := ~allowed[np.arange(len(chosen)), chosen]).any():
        bad = first(wrong)
        raise ValueError(
            f"{path}: row {rows[bad]}: candidates: expected the chosen model among them, got {models[chosen[bad]]!r} chosen "
            f"from {candidates[bad].as_py()} ({int(wrong.sum()):,} such rows)"
        )
    return None if allowed.all() else allowed

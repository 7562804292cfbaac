"""Votes with the source of each: the value of a column, or the file that the vote is in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from p2l_engine.feedback import FeedbackModel
from p2l_engine.tables.limits import MAX_DROPPED
from p2l_engine.tables.rows import listed
from p2l_engine.votes.cells import Unusable, category_of
from p2l_engine.votes.columns import vote_table
from p2l_engine.votes.read import Dropped, read, votes_of
from p2l_engine.votes.votes import Votes

FILE = "file"  # in place of a column: the file that a row is in


def read_within(
    path: str | Path | Sequence[str | Path],
    sources: str | None,
    feedback: FeedbackModel,
    columns: Mapping[str, str] | None = None,
    max_dropped: float = MAX_DROPPED,
    complete: bool = False,
    answers_once: bool = False,
    csv_escape: str | None = None,
) -> tuple[Votes, Dropped]:
    """Votes of files whose column ``sources`` says within which rows scores compare, see ``read_by_source``; None: within all,
    see ``read``, which ``complete`` is for. Raises what they raise."""
    if sources is None:
        return read(
            path, None, feedback, columns, max_dropped, complete=complete, answers_once=answers_once, csv_escape=csv_escape
        )
    votes, _, dropped = read_by_source(
        path, sources, feedback, columns, max_dropped, answers_once=answers_once, csv_escape=csv_escape
    )
    return votes, dropped


def read_by_source(
    path: str | Path | Sequence[str | Path],
    by: str,
    feedback: FeedbackModel,
    columns: Mapping[str, str] | None = None,
    max_dropped: float = MAX_DROPPED,
    leave_out: Mapping[str, Sequence[Any]] | None = None,
    weighted: bool = True,
    answers_once: bool = False,
    csv_escape: str | None = None,
) -> tuple[Votes, npt.NDArray[np.str_], Dropped]:
    """Votes on all models that are in the files, the source [V] of each, and which rows were skipped.

    path, columns, max_dropped, leave_out, weighted, answers_once, csv_escape: as for ``read``. by: the column that names the
    sources ("none" where a row has no value), or "file" where no column has that name. Scores become votes within each source,
    also where not every model has a score on a prompt. Raises ValueError where there is no such column, for fewer than
    two sources, and as ``read`` does for each of them.
    """
    table = vote_table(path, columns, leave_out, weighted, also=(by,), csv_escape=csv_escape)
    if by in table.names:
        labels = [category_of(value) for value in table.columns[by]]
    elif by == FILE:
        labels = [file for file, _ in table.rows]
    else:
        raise ValueError(f"{table.shown}: by: expected {FILE!r} or one of {listed(table.names)}, got {by!r}")
    dropped = Dropped(len(table))
    rows: dict[str, list[int]] = {}
    for i, label in enumerate(labels):
        if i in table.invalid:
            dropped.add(Unusable(f"row: {table.invalid[i].reason}", table.invalid[i].text), table.where(i))
        else:
            rows.setdefault(label, []).append(i)
    if len(dropped) > max_dropped * dropped.rows:
        raise ValueError(
            f"{table.shown}: {len(dropped):,} of {dropped.rows:,} rows cannot be read, more than the share max_dropped = "
            f"{max_dropped:g}: {'; '.join(dropped.lines())}"
        )
    if len(rows) < 2:
        raise ValueError(f"{table.shown}: expected votes of two sources at least, got {', '.join(rows) or 'none'}")
    parts = []
    for label in sorted(rows):
        part = replace(table.take(rows[label]), shown=f"{table.shown}, {by} {label}")
        votes, skipped = votes_of(part, None, feedback, max_dropped, complete=False, answers_once=answers_once)
        parts.append((label, votes))
        dropped.include(skipped)
    return *_together(parts), dropped


def balanced(votes: Votes, source: npt.NDArray[np.str_], balance: float) -> Votes:
    """The votes with weights such that a source whose votes weigh W in all weighs W^balance, times a constant that leaves the
    mean weight as it is. balance: 1 leaves the weights as they are, 0 gives all sources the same weight. source [V]."""
    names, of = np.unique(source, return_inverse=True)
    total = np.bincount(of, votes.weight, len(names))
    share = np.divide(np.power(total, balance), total, out=np.zeros_like(total), where=total > 0)
    weight = votes.weight * share[of]
    return replace(votes, weight=weight * (votes.weight.sum() / weight.sum()) if weight.any() else weight)


def _together(parts: Sequence[tuple[str, Votes]]) -> tuple[Votes, npt.NDArray[np.str_]]:
    """The votes of all sources, equal prompts as one, and the source of each vote. A prompt's category is its first
    source's, or that source where it has none."""
    models = tuple(sorted({name for _, votes in parts for name in votes.models}))
    place: dict[tuple[str, ...], int] = {}
    columns: list[tuple[npt.NDArray[np.int64], ...]] = []
    category: dict[tuple[str, ...], str] = {}
    for label, votes in parts:
        for turns, name in zip(votes.prompts, votes.category or [label] * len(votes.prompts), strict=True):
            category.setdefault(turns, name)
        row = np.array([place.setdefault(turns, len(place)) for turns in votes.prompts], np.int64)
        model = np.array([*map(models.index, votes.models), -1], np.int64)
        columns.append((row[votes.prompt], model[votes.a], model[votes.b]))
    prompt, a, b = (np.concatenate(each) for each in zip(*columns, strict=True))
    outcome = np.concatenate([votes.outcome for _, votes in parts])
    weight = np.concatenate([votes.weight for _, votes in parts])
    source = np.repeat([label for label, _ in parts], [len(votes) for _, votes in parts])
    categories = [category[turns] for turns in place]
    return Votes.make(place, models, prompt, a, b, outcome, weight, categories), source[np.argsort(prompt, kind="stable")]

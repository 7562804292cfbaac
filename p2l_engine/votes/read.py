"""Checks the rows of a table and makes votes of them; invalid rows are skipped and counted by reason."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from p2l_engine.feedback import FeedbackModel, Outcome
from p2l_engine.tables.limits import MAX_DROPPED
from p2l_engine.tables.turns import cell_turns
from p2l_engine.tables.whole import Table
from p2l_engine.votes.cells import LABELS, ONE_HOT, Label, Unusable, category_of, label_of, seconds_of, weight_of
from p2l_engine.votes.columns import OTHER, PROMPTS, has_scores, vote_table
from p2l_engine.votes.scores import from_scores, score_matrix
from p2l_engine.votes.votes import Votes

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Dropped:
    """rows: how many were read. counts: skipped rows by reason. first: where the first of each reason is (rows from 0), and its
    value. ties: how many were skipped, since bt models have none."""

    rows: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    ties: int = 0

    def add(self, problem: Unusable, where: str) -> None:
        self.counts[problem.reason] = self.counts.get(problem.reason, 0) + 1
        self.first.setdefault(problem.reason, f"{where}{problem.value}")

    def include(self, other: Dropped) -> None:
        """Adds the rows that were skipped in a part of the table, which is counted in ``rows`` already."""
        for reason, count in other.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
            self.first.setdefault(reason, other.first[reason])
        self.ties += other.ties

    def __len__(self) -> int:
        return sum(self.counts.values())

    def lines(self) -> list[str]:
        """One line for each reason, the most frequent first."""
        ordered = sorted(self.counts.items(), key=lambda item: -item[1])
        found = [f"{count:,} x {reason} (the first is {self.first[reason]})" for reason, count in ordered]
        return found + ([f"{self.ties:,} ties: the feedback model 'bt' has none ('bt-tie' does)"] if self.ties else [])


def read(
    path: str | Path | Sequence[str | Path],
    models: tuple[str, ...] | None = None,
    feedback: FeedbackModel | None = None,
    columns: Mapping[str, str] | None = None,
    max_dropped: float = MAX_DROPPED,
    leave_out: Mapping[str, Sequence[Any]] | None = None,
    weighted: bool = True,
    complete: bool = True,
    answers_once: bool = False,
    csv_escape: str | None = None,
) -> tuple[Votes, Dropped]:
    """Votes of parquet, jsonl or csv files, folders and globs of them, URIs, a hub data set's name (its split ``train``), or
    several of these read as one, each file once; and which rows were skipped.

    A row has a prompt (the column prompt, conversation or conversation_a: text, a list of user turns, a list of messages, or
    such a list as JSON; a conversation_b beside conversation_a must have the same user turns), model_a, model_b, and winner
    (model_a, model_b, tie, tie (bothbad), both_bad, or FastChat's leftvote, rightvote, tievote, bothbad_vote), or
    winner_model_a, winner_model_b and winner_tie, a 1 in one of them and 0 in the others, or preference_a or preference_b, the
    probability in [0, 1] that a or b is the better one, which becomes two votes of that weight; and optionally weight (>= 0),
    timestamp (seconds since 1970, or ISO 8601) and category. Or it has prompt, model and score: all scores together become
    votes, see ``from_scores``, and a column task is a category too. For a feedback model of values (ols, poisson): prompt,
    value (or score), and either model or model_a and model_b. Numbers may be written as text.

    models: the columns of the votes (for validation data); by default the sorted names in the file. feedback: models of
    values read values; bt skips ties. columns: the file's own name for some of the names above. leave_out: values of the
    file's columns; rows that have one are not read. weighted: False leaves the column weight out. complete: False takes scores
    of some models on some prompts too, see ``score_matrix``. answers_once: weighs votes that are made from scores, see
    ``from_scores``. csv_escape: see ``tables.find.find_each``. Raises ValueError if columns are missing, if no
    row can be used, or if more than the share ``max_dropped`` of the rows cannot.
    """
    table = vote_table(path, columns, leave_out, weighted, csv_escape=csv_escape)
    return votes_of(table, models, feedback, max_dropped, complete, answers_once)


def votes_of(
    table: Table,
    models: tuple[str, ...] | None = None,
    feedback: FeedbackModel | None = None,
    max_dropped: float = MAX_DROPPED,
    complete: bool = True,
    answers_once: bool = False,
) -> tuple[Votes, Dropped]:
    """``read`` for a table that was read already."""
    values = feedback is not None and feedback.of_values
    path, found = table.shown, set(table.names)
    if not values and has_scores(table):
        votes = from_scores(*score_matrix(table, complete), wanted=models, answers_once=answers_once)
        if not len(votes):
            raise ValueError(f"{path}: expected at least one prompt with scores of two models, got none")
        category = next((name for name in ("category", "task") if name in found), None)
        if category is not None:
            of: dict[tuple[str, ...], str] = {}
            for turns, cell in zip(map(cell_turns, table.columns["prompt"]), table.columns[category], strict=True):
                of.setdefault(turns, category_of(cell))
            votes = replace(votes, category=tuple(of[turns] for turns in votes.prompts))
        dropped = Dropped(len(table))
        return _of_model(votes, feedback, path, dropped), dropped
    prompt = next((name for name in PROMPTS if name in found), None)
    missing = [] if prompt else ["prompt"]
    label = label_of(found, values)
    if values:
        pair = {"model_a", "model_b"} <= found
        missing += [] if pair or "model" in found else ["model, or model_a and model_b"]
        missing += [] if label else ["value"]
    else:
        pair = True
        missing += [name for name in ("model_a", "model_b") if name not in found]
        partly = [name for name in ONE_HOT if name not in found] if found & {*ONE_HOT} else []
        missing += [] if label else partly or ["winner, preference_a or preference_b (or model and score)"]
    if missing or prompt is None or label is None:
        raise ValueError(f"{path}: expected the columns {', '.join(missing)}; got {sorted(found)}")
    ignored = [name for name in LABELS if name in found and name not in label.columns]
    if ignored and not values:
        read_from = " and ".join(label.columns)
        logger.warning("%s: votes are read from the column %s, and not from %s", path, read_from, " and ".join(ignored))
    rows = _Rows(table, prompt, pair, label, models)
    dropped = rows.read()
    if not rows.votes:
        reasons = "; ".join(dropped.lines()) or "the table is empty"
        raise ValueError(f"{path}: expected at least one vote that can be used, got none: {reasons}")
    if len(dropped) > max_dropped * dropped.rows:
        raise ValueError(
            f"{path}: {len(dropped):,} of {dropped.rows:,} rows cannot be used, more than the share max_dropped = "
            f"{max_dropped:g}: {'; '.join(dropped.lines())}"
        )
    return _of_model(rows.make(values), feedback, path, dropped), dropped


def _of_model(votes: Votes, feedback: FeedbackModel | None, path: str, dropped: Dropped) -> Votes:
    """The votes that this feedback model can use."""
    if feedback is not None and not (feedback.of_values or feedback.has_ties):
        ties = votes.outcome >= Outcome.TIE
        dropped.ties = int(ties.sum())
        return votes.where(~ties) if dropped.ties else votes
    if feedback is not None and feedback.counts and bool((votes.outcome < 0).any() or (votes.outcome % 1).any()):
        raise ValueError(f"{path}: value: expected counts (0, 1, 2 ...) for the feedback model {feedback.name!r}")
    return votes


class _Rows:
    """The rows of one table, read one by one."""

    def __init__(
        self,
        table: Table,
        prompt: str,
        pair: bool,
        label: Label,
        models: tuple[str, ...] | None,
    ) -> None:
        names = {"prompt": prompt, "a": "model_a" if pair else "model"}
        names |= {"b": "model_b"} if pair else {}
        names |= {name: name for name in ("weight", "timestamp", "category") if name in table.names}
        self.table = table
        self.columns = {ours: table.columns[theirs] for ours, theirs in names.items()}
        self.other = table.columns.get(OTHER) if prompt == "conversation_a" else None
        self.labels = [table.columns[name] for name in label.columns]
        self.parse, self.pair, self.models = label.parse, pair, models
        self.prompts: dict[tuple[str, ...], int] = {}
        self.category: list[str] = []
        # Prompt, a, b, outcome, weight, time of each vote, one after the other. In an array: a tuple for each would keep the
        # garbage collector busy.
        self.votes = array("d")
        self._known = None if models is None else set(models)
        self._names: dict[str, int] = {}  # in their order in the table
        self._parsed: dict[str, tuple[str, ...]] = {}

    def read(self) -> Dropped:
        """Fills prompts, categories and votes."""
        dropped = Dropped(len(self.table))
        for i in range(len(self.table)):
            try:
                self._row(i)
            except Unusable as problem:
                dropped.add(problem, self.table.where(i))
        return dropped

    def _row(self, i: int) -> None:
        column = self.columns
        if i in self.table.invalid:
            row = self.table.invalid[i]
            raise Unusable(f"row: {row.reason}", row.text)
        a = self._model(column["a"][i], "model_a" if self.pair else "model")
        b = self._model(column["b"][i], "model_b") if self.pair else -1
        if a == b:
            raise Unusable("a model against itself")
        parsed = self.parse(*(cells[i] for cells in self.labels))
        weight = weight_of(column["weight"][i]) if "weight" in column else 1.0
        time = seconds_of(column["timestamp"][i]) if "timestamp" in column else 0.0
        prompt = self._prompt(column["prompt"][i])
        if self.other is not None and self.other[i] is not None and self._prompt(self.other[i]) != prompt:
            raise Unusable(f"{OTHER}: expected the user's turns of conversation_a, got others")
        place = self.prompts.setdefault(prompt, len(self.prompts))
        if place == len(self.category):
            self.category.append(category_of(column["category"][i] if "category" in column else None))
        for outcome, share in parsed:
            if share > 0:
                self.votes.extend((place, a, b, outcome, weight * share, time))

    def _model(self, name: Any, column: str) -> int:
        if type(name) is str and (known := self._names.get(name)) is not None:
            return known
        if not isinstance(name, str) or not name.strip():
            raise Unusable(f"{column}: expected a name", name)
        if self._known is not None and name not in self._known:
            raise Unusable(f"{column}: expected one of the training votes' (or the checkpoint's) models", name)
        return self._names.setdefault(name, len(self._names))

    def _prompt(self, value: Any) -> tuple[str, ...]:
        key = value if isinstance(value, str) else None
        if key is not None and (known := self._parsed.get(key)) is not None:
            return known
        try:
            prompt = cell_turns(value)
        except ValueError as error:
            raise Unusable(str(error)) from None
        except RecursionError:
            raise Unusable("prompt: nested too deeply") from None
        if not any(turn.strip() for turn in prompt):
            raise Unusable("prompt: empty")
        if key is not None:
            self._parsed[key] = prompt
        return prompt

    def make(self, values: bool) -> Votes:
        columns = np.array(self.votes).reshape(-1, 6).T
        place, a, b = columns[:3].astype(np.int64)
        outcome, weight, time = columns[3:]
        names = list(self._names)
        models = self.models or tuple(sorted(names[i] for i in np.union1d(a, b) if i >= 0))
        column = {name: i for i, name in enumerate(models)}
        of_name = np.array([column.get(name, -1) for name in names] + [-1], np.int64)  # the last: of -1, no model
        return Votes.make(
            self.prompts, models, place, of_name[a], of_name[b], outcome if values else outcome.astype(np.int64),
            weight, self.category if "category" in self.columns else None, time if "timestamp" in self.columns else None,
        )  # fmt: skip

"""Rows of a table, each checked, to votes; what cannot be used is counted by its reason."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from p2l_engine.feedback import FeedbackModel, Outcome
from p2l_engine.tables.whole import BROKEN, read_table, turns
from p2l_engine.votes.cells import PREFERENCES, Unusable, feedback_of, seconds_of, weight_of
from p2l_engine.votes.scores import from_scores, score_matrix
from p2l_engine.votes.votes import Votes

PROMPTS = ("prompt", "conversation", "conversation_a")
COLUMNS = {"model_a", "model_b", "model", "winner", "value", "score", "weight", "timestamp", "category", "task"}
COLUMNS |= {*PROMPTS, *PREFERENCES}
MAX_DROPPED = 0.01

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Dropped:
    """Rows that could not be used: how many for each reason, and the first of each (from 0) with its value; and the ties that
    bt models, which know none, leave out."""

    rows: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    ties: int = 0

    def add(self, problem: Unusable, row: int) -> None:
        self.counts[problem.reason] = self.counts.get(problem.reason, 0) + 1
        self.first.setdefault(problem.reason, f"row {row}{problem.value}")

    def __len__(self) -> int:
        return sum(self.counts.values())

    def lines(self) -> list[str]:
        """One line a reason, the commonest first."""
        ordered = sorted(self.counts.items(), key=lambda item: -item[1])
        found = [f"{count:,} x {reason} (the first is {self.first[reason]})" for reason, count in ordered]
        return found + ([f"{self.ties:,} ties: the feedback model 'bt' knows none ('bt-tie' does)"] if self.ties else [])


def read(
    path: str | Sequence[str],
    models: tuple[str, ...] | None = None,
    feedback: FeedbackModel | None = None,
    columns: Mapping[str, str] | None = None,
    max_dropped: float = MAX_DROPPED,
    leave_out: Mapping[str, Sequence[Any]] | None = None,
) -> tuple[Votes, Dropped]:
    """Votes of a parquet, jsonl or csv file, a folder of them, a hub data set's name (its split ``train``), or several such
    read as one; and what of it could not be used.

    A row has a prompt (the column prompt, conversation or conversation_a: text, a list of user turns, a list of messages, or
    such a list as JSON), model_a, model_b, and winner (model_a, model_b, tie, tie (bothbad), both_bad), or preference_a or
    preference_b, the probability in [0, 1] that a or b is the better one, which becomes two votes of that weight; and, where
    they exist, weight (>= 0), timestamp (seconds since 1970, or ISO 8601) and category. Or it has prompt, model and score: all
    scores together become votes, see ``from_scores``, and a column task is a category too. For a feedback model of values (ols,
    poisson): prompt, value (or score), and either model or model_a and model_b. Numbers may be written as text.

    feedback: what the votes are for: models of values read those; bt leaves out ties. models fixes the columns (for validation
    data); else they are the sorted names found. columns: the file's own name for some of the names above. leave_out: values
    of the file's columns; the rows that have them are not read. Raises ValueError where columns are missing, where no row can
    be used, or where more than the share ``max_dropped`` of the rows cannot.
    """
    values = feedback is not None and feedback.of_values
    table = read_table(path)
    path = path if isinstance(path, str) else ", ".join(path)
    for name, values_out in (leave_out or {}).items():
        table = _without(table, name, values_out, path)
    unknown = sorted(set(columns or {}) - COLUMNS)
    if unknown:
        raise ValueError(f"columns: expected some of {', '.join(sorted(COLUMNS))}, got {', '.join(unknown)}")
    for ours, theirs in (columns or {}).items():
        if theirs not in table.column_names:
            raise ValueError(f"{path}: columns: expected one of {table.column_names} for {ours!r}, got {theirs!r}")
        table = table.drop_columns([ours] if ours in table.column_names and ours != theirs else []).rename_columns(
            [ours if name == theirs else name for name in table.column_names if name != ours or ours == theirs]
        )
    found = set(table.column_names) - {BROKEN}
    if not values and {"prompt", "model", "score"} <= found and not found & {"winner", *PREFERENCES}:
        votes = from_scores(*score_matrix(path, table), wanted=models)
        category = next((name for name in ("category", "task") if name in found), None)
        if category is not None:
            of = dict(zip(map(turns, table.column("prompt").to_pylist()), table.column(category).to_pylist(), strict=True))
            votes = replace(votes, category=tuple(str(of[prompt]) for prompt in votes.prompts))
        dropped = Dropped(table.num_rows)
        return _of_model(votes, feedback, path, dropped), dropped
    prompt = next((name for name in PROMPTS if name in found), None)
    missing = [] if prompt else ["prompt"]
    if values:
        pair = {"model_a", "model_b"} <= found
        missing += [] if pair or "model" in found else ["model, or model_a and model_b"]
        missing += [] if found & {"value", "score"} else ["value"]
    else:
        pair = True
        missing += [name for name in ("model_a", "model_b") if name not in found]
        missing += [] if found & {"winner", *PREFERENCES} else ["winner, preference_a or preference_b (or model and score)"]
    if missing or prompt is None:
        raise ValueError(f"{path}: expected the columns {', '.join(missing)}; got {sorted(found)}")
    said = feedback_of(found, values)
    ignored = sorted(({"winner", *PREFERENCES} & found) - {said[0]})
    if ignored and not values:
        logger.warning("%s: votes are read from the column %s, and not from %s", path, said[0], " and ".join(ignored))
    rows = _Rows(table, prompt, pair, said, models)
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


def _without(table: pa.Table, name: str, values: Sequence[Any], path: str) -> pa.Table:
    """Only the rows whose column has none of these values. Raises ValueError where that column, or one of them, is not there:
    what was misspelt would be trained on."""
    if name not in table.column_names:
        raise ValueError(f"{path}: leave_out: expected one of {table.column_names}, got {name!r}")
    column = table.column(name).combine_chunks()
    try:
        texts = pa.types.is_string(column.type)  # as all columns of csv files are
        wanted = pa.array([str(v) if texts and isinstance(v, int | float) else v for v in values], column.type)
    except (pa.ArrowException, TypeError) as error:
        raise ValueError(f"{path}: leave_out: {name}: expected values of the type {column.type}: {error}") from None
    missing = sorted(str(value) for value in wanted.filter(pc.invert(pc.is_in(wanted, column.unique()))).to_pylist())
    if missing:
        raise ValueError(f"{path}: leave_out: no row's {name} is {', '.join(missing)}")
    return table.filter(pc.invert(pc.is_in(column, wanted)))


def _of_model(votes: Votes, feedback: FeedbackModel | None, path: str, dropped: Dropped) -> Votes:
    """What this feedback model can use of them."""
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
        table: pa.Table,
        prompt: str,
        pair: bool,
        feedback: tuple[str, Callable[[Any], list[tuple[float, float]]]],
        models: tuple[str, ...] | None,
    ) -> None:
        names = {"prompt": prompt, "a": "model_a" if pair else "model", "feedback": feedback[0]}
        names |= {"b": "model_b"} if pair else {}
        names |= {name: name for name in ("weight", "timestamp", "category") if name in table.column_names}
        names |= {BROKEN: BROKEN} if BROKEN in table.column_names else {}
        self.columns = {ours: table.column(theirs).to_pylist() for ours, theirs in names.items()}
        self.parse, self.pair, self.models = feedback[1], pair, models
        self.n_rows = table.num_rows
        self.prompts: dict[tuple[str, ...], int] = {}
        self.category: list[str] = []
        self.votes: list[tuple[int, str, str, float, float, float]] = []
        self._known = None if models is None else set(models)
        self._parsed: dict[Any, tuple[str, ...]] = {}

    def read(self) -> Dropped:
        """Fills prompts, categories and votes."""
        dropped = Dropped(self.n_rows)
        for i in range(self.n_rows):
            try:
                self._row(i)
            except Unusable as problem:
                dropped.add(problem, i)
        return dropped

    def _row(self, i: int) -> None:
        column = self.columns
        if BROKEN in column and column[BROKEN][i] is not None:
            raise Unusable(BROKEN, column[BROKEN][i])
        a = self._model(column["a"][i], "model_a" if self.pair else "model")
        b = self._model(column["b"][i], "model_b") if self.pair else ""
        if a == b:
            raise Unusable("a model against itself")
        parsed = self.parse(column["feedback"][i])
        weight = weight_of(column["weight"][i]) if "weight" in column else 1.0
        time = seconds_of(column["timestamp"][i]) if "timestamp" in column else 0.0
        prompt = self._prompt(column["prompt"][i])
        place = self.prompts.setdefault(prompt, len(self.prompts))
        if place == len(self.category):
            category = column["category"][i] if "category" in column else None
            self.category.append("none" if category in (None, "") else str(category))
        self.votes += [(place, a, b, outcome, weight * share, time) for outcome, share in parsed if share > 0]

    def _model(self, name: Any, column: str) -> str:
        if not isinstance(name, str) or not name.strip():
            raise Unusable(f"{column}: expected a name", name)
        if self._known is not None and name not in self._known:
            raise Unusable(f"{column}: not one of the models that are known (the training votes', or the checkpoint's)", name)
        return name

    def _prompt(self, value: Any) -> tuple[str, ...]:
        key = value if isinstance(value, str) else None
        if key is not None and key in self._parsed:
            return self._parsed[key]
        try:
            prompt = turns(value)
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
        place, a, b, outcome, weight, time = zip(*self.votes, strict=True)
        models = self.models or tuple(sorted({*a, *b} - {""}))
        given: Any = np.array(outcome, np.float64 if values else np.int64)
        column = {name: i for i, name in enumerate(models)} | {"": -1}
        return Votes.make(
            self.prompts, models, np.array(place, np.int64), np.array([column[name] for name in a], np.int64),
            np.array([column[name] for name in b], np.int64), given,
            np.array(weight), self.category if "category" in self.columns else None,
            np.array(time) if "timestamp" in self.columns else None,
        )  # fmt: skip

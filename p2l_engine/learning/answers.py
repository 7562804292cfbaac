"""What answers took, from a table or from a server's log: output tokens, and seconds, of models' answers to prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from p2l_engine.tables.limits import MAX_DROPPED
from p2l_engine.tables.rows import listed
from p2l_engine.tables.turns import cell_turns
from p2l_engine.tables.whole import Table, read_table
from p2l_engine.votes.cells import Unusable, number
from p2l_engine.votes.read import Dropped
from p2l_engine.votes.votes import Votes

Float64 = npt.NDArray[np.float64]

DECISIONS = "decisions.parquet"  # of a log's export
TOKENS = ("completion_tokens", "output_tokens", "tokens_out")
SECONDS = ("latency_s", "seconds", "latency")
OF_LOGS = ("outcome", "estimated", "attempts", "latency_reserve", "latency_total")


@dataclass(frozen=True, slots=True)
class LoggedAnswers:
    """R answers to P prompts by M models. prompts: user turns. prompt, model [R]: their numbers. tokens, seconds [R] > 0, NaN
    where they are not known."""

    prompts: tuple[tuple[str, ...], ...]
    models: tuple[str, ...]
    prompt: npt.NDArray[np.int64]
    model: npt.NDArray[np.int64]
    tokens: Float64
    seconds: Float64

    def __len__(self) -> int:
        return len(self.prompt)

    def without(self, prompts: set[int]) -> LoggedAnswers:
        """Without the answers to these prompts."""
        kept = [p for p in range(len(self.prompts)) if p not in prompts]
        number = np.full(len(self.prompts), -1, np.int64)
        number[kept] = np.arange(len(kept))
        some = number[self.prompt] >= 0
        return LoggedAnswers(
            tuple(self.prompts[p] for p in kept), self.models, number[self.prompt[some]], self.model[some], self.tokens[some],
            self.seconds[some],
        )  # fmt: skip

    def mean_tokens(self) -> Float64:
        """[P, M]: of each model's answers to each prompt, NaN where there is none."""
        some = ~np.isnan(self.tokens)
        cell, shape = self.prompt[some] * len(self.models) + self.model[some], (len(self.prompts), len(self.models))
        total, count = (np.bincount(cell, of, shape[0] * shape[1]) for of in (self.tokens[some], None))
        return np.where(count > 0, total / np.maximum(count, 1), np.nan).reshape(shape)

    def observed(self, quantity: str) -> Votes:
        """The values of ``tokens`` or ``seconds``, where known, as votes of a model of values; all prompts are kept."""
        values: Float64 = getattr(self, quantity)
        some = ~np.isnan(values)
        none = np.full(int(some.sum()), -1, np.int64)
        return Votes.make(self.prompts, self.models, self.prompt[some], self.model[some], none, values[some])


@dataclass(slots=True)
class LeftOut:
    """dropped: invalid rows. unknown: answers of models that the checkpoint does not know, by name. skipped: rows of a log that
    say nothing of an answer, by reason."""

    dropped: Dropped
    unknown: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)


def read_answers(
    path: str | Path,
    models: tuple[str, ...],
    column: str | None = None,
    max_dropped: float = MAX_DROPPED,
    csv_escape: str | None = None,
) -> tuple[LoggedAnswers, LeftOut]:
    """The answers of these models in a table (parquet, csv, jsonl; a folder, glob or URI of such files), or in the folder of a
    log's export, and what was left out.

    A row of a table has a prompt, a model, completion_tokens (or output_tokens, tokens_out) and, if known, latency_s (or
    seconds, latency) in seconds. Of a log, answered decisions with a logged prompt and reported usage count; their seconds are
    known where the first attempt answered. column: of the prompts. csv_escape: see ``tables.find.find_each``. Raises ValueError
    where columns are missing, where more than the share ``max_dropped`` of the rows is invalid, and where no row is left.
    """
    folder, column = Path(path), "prompt" if column is None else column
    file = folder / DECISIONS if (folder / DECISIONS).is_file() else path
    table = read_table(file, {column, "model", *TOKENS, *SECONDS, *OF_LOGS}, csv_escape=csv_escape)
    names = set(table.names)
    tokens, seconds = (next((name for name in given if name in names), None) for given in (TOKENS, SECONDS))
    missing = [name for name in (column, "model") if name not in names] + ([] if tokens else [TOKENS[0]])
    if missing:
        raise ValueError(f"{table.shown}: expected the columns {', '.join(missing)}; it has {listed(table.names)}")
    rows = _AnswerRows(table, column, str(tokens), seconds, models)
    answers, left = rows.read()
    dropped = left.dropped
    if not len(answers):
        reasons = [*dropped.lines(), *(f"{count:,} x {reason}" for reason, count in left.skipped.items())]
        if left.unknown:
            reasons.append(f"{left.unknown.total():,} of models that the checkpoint does not know ({', '.join(left.unknown)})")
        raise ValueError(
            f"{table.shown}: expected answers of {', '.join(models[:8])}{' ...' if len(models) > 8 else ''}, got none: "
            f"{'; '.join(reasons) or 'the table is empty'}"
        )
    if len(dropped) > max_dropped * dropped.rows:
        raise ValueError(
            f"{table.shown}: {len(dropped):,} of {dropped.rows:,} rows cannot be used, more than the share max_dropped = "
            f"{max_dropped:g}: {'; '.join(dropped.lines())}"
        )
    return answers, left


class _AnswerRows:
    """The rows of one table, read one by one."""

    def __init__(self, table: Table, prompt: str, tokens: str, seconds: str | None, models: tuple[str, ...]) -> None:
        self.table, self.models, self.names = table, models, (tokens, seconds or "")
        self.log = {name: table.columns[name] for name in OF_LOGS if name in table.columns} if "outcome" in table.names else {}
        empty = [None] * len(table)
        columns = table.columns
        self.cells = columns[prompt], columns["model"], columns[tokens], columns[seconds] if seconds else empty
        self.prompts: dict[tuple[str, ...], int] = {}
        self._index = {name: k for k, name in enumerate(models)}
        self._parsed: dict[str, tuple[str, ...]] = {}

    def read(self) -> tuple[LoggedAnswers, LeftOut]:
        left = LeftOut(Dropped(len(self.table)))
        found: list[tuple[int, int, float, float]] = []
        for i in range(len(self.table)):
            if i in self.table.invalid:
                invalid = self.table.invalid[i]
                left.dropped.add(Unusable(f"row: {invalid.reason}", invalid.text), self.table.where(i))
                continue
            if self.log and (why := self._not_an_answer(i)) is not None:
                left.skipped[why] += 1
                continue
            try:
                row = self._row(i, left.unknown)
            except Unusable as problem:
                left.dropped.add(problem, self.table.where(i))
                continue
            if row is not None:
                found.append(row)
        prompt, model, tokens, seconds = zip(*found, strict=True) if found else ((), (), (), ())
        return LoggedAnswers(
            tuple(self.prompts), self.models, np.array(prompt, np.int64), np.array(model, np.int64),
            np.array(tokens, np.float64), np.array(seconds, np.float64),
        ), left  # fmt: skip

    def _not_an_answer(self, i: int) -> str | None:
        """Why a logged decision says nothing of what an answer takes."""
        prompt, _, tokens, _ = (cells[i] for cells in self.cells)
        outcome = self.log["outcome"][i]
        if outcome != "answered":
            return f"decisions with the outcome {outcome}"
        if prompt is None:
            return "prompts that were not logged"
        if tokens is None or self.log.get("estimated", {i: False})[i]:
            return "answers whose provider has not reported tokens"
        return "answers without output" if number(tokens) == 0 else None

    def _row(self, i: int, unknown: Counter[str]) -> tuple[int, int, float, float] | None:
        prompt, model, tokens, seconds = (cells[i] for cells in self.cells)
        if not isinstance(model, str) or not model.strip():
            raise Unusable("model: expected a name", model)
        parsed = self._prompt(prompt)
        of_tokens, of_seconds = self.names
        amounts = _amount(of_tokens, tokens), self._logged_seconds(i) if self.log else _amount(of_seconds, seconds)
        if np.isnan(amounts).all():
            raise Unusable(f"{of_tokens}: expected a number above 0, got none")
        if model not in self._index:
            unknown[model] += 1
            return None
        return self.prompts.setdefault(parsed, len(self.prompts)), self._index[model], *amounts

    def _prompt(self, value: Any) -> tuple[str, ...]:
        key = value if isinstance(value, str) else None
        if key is None or key not in self._parsed:
            try:
                parsed = cell_turns(value)
            except ValueError as error:
                raise Unusable(str(error)) from None
            if not any(turn.strip() for turn in parsed):
                raise Unusable("prompt: empty")
            if key is None:
                return parsed
            self._parsed[key] = parsed
        return self._parsed[key]

    def _logged_seconds(self, i: int) -> float:
        """From the moment the money was reserved to the end of the answer; NaN where an earlier attempt had failed."""
        attempts = self.log.get("attempts")
        begin, end = (number(self.log[name][i]) if name in self.log else None for name in ("latency_reserve", "latency_total"))
        once = attempts is not None and isinstance(attempts[i], Sequence) and len(attempts[i]) == 1
        return (end - begin) / 1000 if once and begin is not None and end is not None and end > begin else np.nan


def _amount(name: str, value: Any) -> float:
    """A number above 0, NaN for none. Raises Unusable."""
    if value is None or value == "":
        return np.nan
    found = number(value)
    if found is None or found <= 0:
        raise Unusable(f"{name}: expected a finite number above 0", value)
    return found

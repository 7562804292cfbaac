"""The log as parquet files: decisions, feedback, and what training and evaluation read, votes and scores."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from p2l_engine.decision_log.comparison import REPEATED, answering, content, no_answer, no_vote
from p2l_engine.decision_log.record import Attempt, Feedback, Preference, Record
from p2l_engine.decision_log.store import LogStore, Selection
from p2l_engine.tables.atomic import write_folder

ROWS, CHARACTERS = 10_000, 32 << 20  # of a row group, which ends early where prompts are long
WINNERS: dict[Preference, str] = {"this": "model_a", "other": "model_b", "tie": "tie", "both_bad": "both_bad"}
STAGES = ("parse", "coefficients", "choose", "reserve", "first_byte", "total")  # the first columns of latency

TIME, TEXT, NUMBER, WHOLE, TURNS = pa.timestamp("us", "UTC"), pa.string(), pa.float64(), pa.int64(), pa.list_(pa.string())
POLICY = pa.list_(pa.struct([("model", TEXT), ("probability", NUMBER)]))  # as a batch run writes it
ATTEMPTS = pa.list_(pa.struct([("model", TEXT), ("deployment", TEXT), ("status", WHOLE), ("error", TEXT), ("seconds", NUMBER)]))
DECISIONS = {
    "id": TEXT, "time": TIME, "key": TEXT, "session": TEXT, "turns_hash": TEXT, "prompt": TURNS, "api": TEXT, "asked": TEXT,
    "chosen": TEXT, "model": TEXT, "policy": POLICY, "propensity": NUMBER, "propensity_error": NUMBER, "candidates": TURNS,
    "win_rate": NUMBER, "score": NUMBER, "budget": NUMBER, "expected_cost": NUMBER, "cost": NUMBER, "estimated": pa.bool_(),
    "tokens_in": WHOLE, "tokens_cached": WHOLE, "tokens_out": WHOLE, "streamed": pa.bool_(), "status": WHOLE, "outcome": TEXT,
    "attempts": ATTEMPTS,
}  # fmt: skip
FILES = {
    "feedback.parquet": {
        "decision": TEXT, "time": TIME, "score": NUMBER, "against": TEXT, "preference": TEXT, "label": TEXT,
    },
    "votes.parquet": {
        "prompt": TURNS, "model_a": TEXT, "model_b": TEXT, "winner": TEXT, "timestamp": TIME, "decision_a": TEXT,
        "decision_b": TEXT,
    },
    "scores.parquet": {"prompt": TURNS, "model": TEXT, "score": NUMBER, "timestamp": TIME, "decision": TEXT},
}  # fmt: skip


@dataclass(slots=True)
class Exported:
    """rows: of each file. votes, scores: the preferences and scores that became none, by reason."""

    rows: dict[str, int] = field(default_factory=dict)
    votes: Counter[str] = field(default_factory=Counter)
    scores: Counter[str] = field(default_factory=Counter)


def export(store: LogStore, output: Path, which: Selection) -> Exported:
    """Writes the folder ``output``, whole or not at all; an earlier export in it is replaced.

    ``decisions.parquet`` has a row for each decision, oldest first: a record's fields, the user turns as the column prompt
    (null where texts were not logged), and a column latency_STAGE in milliseconds for each stage. ``feedback.parquet`` has
    what was said about them. ``votes.parquet`` has the preferences between answers of two models to the same logged prompt,
    and ``scores.parquet`` the scores of answers to logged prompts. What is no valid Unicode becomes "?". Raises ValueError for
    a folder with other files, OSError where it cannot be written.
    """
    names = ("decisions.parquet", *FILES)
    if output.exists() and not (output.is_dir() and {path.name for path in output.iterdir()} <= {*names}):
        raise ValueError(f"{output}: expected no folder, an empty one or an earlier export; nothing was changed")
    found = Exported()
    seen = {stage for latency in store.latencies(which) for stage in json.loads(latency)}
    stages = [*STAGES, *sorted(seen - {*STAGES})]
    columns = {**DECISIONS, **{f"latency_{_clean(stage)}": NUMBER for stage in stages}}

    def fill(folder: Path) -> None:
        with (
            _File(folder / "decisions.parquet", columns) as decisions,
            _File(folder / "feedback.parquet", FILES["feedback.parquet"]) as feedback,
            _File(folder / "votes.parquet", FILES["votes.parquet"]) as votes,
            _File(folder / "scores.parquet", FILES["scores.parquet"]) as scores,
        ):
            for page in store.pages(which):
                records = {record.id: record for record in page}
                said = store.feedback_on(list(records))
                others = {each.against for each in said if each.against is not None} - set(records)
                known = records | store.get(sorted(others))
                decisions.write([_decision(record, stages) for record in page])
                feedback.write([_feedback(each) for each in said])
                judged = store.feedback_on([*records, *others]) if others else said
                news = [pair for pair in zip(judged, _are_news(judged), strict=True) if pair[0].decision in records]
                preferences = [_vote(each, known) if new else REPEATED for each, new in news if each.preference is not None]
                votes.write(_usable(preferences, found.votes))
                scores.write(_usable([_score(each, known) for each in said if each.score is not None], found.scores))
            found.rows = {file.name: file.rows for file in (decisions, feedback, votes, scores)}

    write_folder(output, fill)
    return found


class _File:
    """A parquet file, written in row groups."""

    def __init__(self, path: Path, columns: Mapping[str, pa.DataType]) -> None:
        self.name, self.rows = path.name, 0
        self._schema = pa.schema(list(columns.items()))
        self._writer = pq.ParquetWriter(path, self._schema, compression="zstd")
        self._waiting: list[dict[str, Any]] = []
        self._characters = 0

    def __enter__(self) -> _File:
        return self

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows += len(rows)
        self._waiting += rows
        self._characters += sum(len(turn) for row in rows for turn in row.get("prompt") or ())
        if len(self._waiting) >= ROWS or self._characters >= CHARACTERS:
            self._write_group()

    def __exit__(self, *_: object) -> None:
        with self._writer:
            self._write_group()

    def _write_group(self) -> None:
        if self._waiting:
            self._writer.write_table(pa.Table.from_pylist(self._waiting, self._schema))
        self._waiting, self._characters = [], 0


def _usable(rows: Sequence[dict[str, Any] | str], reasons: Counter[str]) -> list[dict[str, Any]]:
    """The rows, without the reasons why others are none, which are counted."""
    reasons.update(row for row in rows if isinstance(row, str))
    return [row for row in rows if not isinstance(row, str)]


def _are_news(said: Sequence[Feedback]) -> list[bool]:
    """Whether each is the first of its content, oldest first."""
    first = dict[tuple[object, ...], int]()
    return [first.setdefault(content(each), i) == i for i, each in enumerate(said)]


def _vote(said: Feedback, records: Mapping[str, Record]) -> dict[str, Any] | str:
    """A row of votes.parquet, or why the preference is no vote."""
    a, b = records[said.decision], records.get(said.against or "")
    if b is None or (why := _unusable(a) or _unusable(b) or no_vote(a, b)) is not None:
        return str(no_vote(a, b) if b is None else why)
    winner = WINNERS[said.preference] if said.preference else ""
    models = {"model_a": _clean(answering(a)), "model_b": _clean(answering(b))}
    names = {**models, "decision_a": a.id, "decision_b": b.id}
    return {"prompt": a.turns, **names, "winner": winner, "timestamp": _microseconds(said.time)}


def _score(said: Feedback, records: Mapping[str, Record]) -> dict[str, Any] | str:
    """A row of scores.parquet, or why the score is none."""
    record = records[said.decision]
    row = {"prompt": record.turns, "model": _clean(answering(record)), "score": said.score, "decision": record.id}
    return _unusable(record) or {**row, "timestamp": _microseconds(said.time)}


def _unusable(record: Record) -> str | None:
    """Why nothing can be learnt from the answer."""
    if (why := no_answer(record)) is not None:
        return why
    if record.turns is None:
        return "the text of the prompt was not logged"
    if not any(turn.strip() for turn in record.turns):
        return "the prompt is empty"
    if any(_clean(turn) != turn for turn in record.turns):
        return "the prompt is no valid Unicode"
    return None


def _decision(record: Record, stages: Sequence[str]) -> dict[str, Any]:
    row = {name: _cell(getattr(record, name)) for name in DECISIONS if name not in ("prompt", "time")}
    row["time"], row["prompt"] = _microseconds(record.time), _cell(record.turns)
    row["policy"] = [{"model": _clean(model), "probability": p} for model, p in record.policy.items()]
    return row | {f"latency_{_clean(stage)}": record.latency.get(stage) for stage in stages}


def _feedback(said: Feedback) -> dict[str, Any]:
    row = {name: _cell(getattr(said, name)) for name in FILES["feedback.parquet"]}
    return {**row, "time": _microseconds(said.time)}


def _cell(value: Any) -> Any:
    if isinstance(value, Attempt):
        return {name: _cell(getattr(value, name)) for name in Attempt.__slots__}
    if isinstance(value, tuple):
        return [_cell(each) for each in value]
    return _clean(value) if isinstance(value, str) else value


def _clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")


def _microseconds(seconds: float) -> int:
    return round(seconds * 1_000_000)

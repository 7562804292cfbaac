"""Counts and times of a batch run, recorded from several threads."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

# Of a finished run's report, in its manifest.
RECORDED = ("rows", "routed", "repeated", "parts", "spend", "prices", "reasons")
MAX_REASONS = 100  # that are told apart


class Reason(NamedTuple):
    """Why rows were not routed: how many; what the first of them says, of which the others differ in numbers at most; and its
    file and row."""

    rows: int
    why: str
    where: str


@dataclass(frozen=True, slots=True)
class Report:
    """What a run has done so far. A report never changes: while a run is under way, each report is a new one.

    rows: read and decided, or, in the first pass of a batch budget, read and computed. routed: rows without an error. computed:
    prompts that this run computed. resumed: prompts whose coefficients an earlier run left. repeated: rows whose prompt is that
    of an earlier row. tokens: computed by this run. parts: written, or found unchanged. read: share of the input's bytes, 0 to
    1. spend: sum of the expected costs of all written rows. prices: dual price of each bound over the batch, in win rate per
    unit. reasons: why rows have an error, the commonest first. changed: what an earlier run, whose coefficients were used,
    decided otherwise, one line for each difference. kept: bytes of the coefficients that are there for other decisions.
    seconds: by stage; stages overlap.
    """

    rows: int = 0
    routed: int = 0
    computed: int = 0
    resumed: int = 0
    repeated: int = 0
    tokens: int = 0
    parts: int = 0
    read: float = 0.0
    spend: float = 0.0
    prices: Mapping[str, float] = field(default_factory=dict)
    reasons: tuple[Reason, ...] = ()
    changed: tuple[str, ...] = ()
    kept: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)

    def recorded(self) -> dict[str, Any]:
        """What a manifest tells of a finished run. All its prompts were computed by an earlier run then."""
        return {name: getattr(self, name) for name in RECORDED} | {"resumed": self.resumed + self.computed}

    @classmethod
    def of(cls, recorded: Mapping[str, Any]) -> Report:
        """The report that a manifest tells. Raises TypeError, KeyError for what is none."""
        return cls(**{**recorded, "reasons": tuple(Reason(*each) for each in recorded["reasons"])})


class Recorder:
    """Collects a run's report. Safe to call from any thread: each change replaces the whole report under a lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._report = Report()
        self._reasons: dict[str, Reason] = {}  # by what they say without numbers, and without what there was

    @property
    def report(self) -> Report:
        """All that was recorded until now."""
        return self._report

    def add(
        self,
        *,
        rows: int = 0,
        routed: int = 0,
        computed: int = 0,
        resumed: int = 0,
        repeated: int = 0,
        tokens: int = 0,
        parts: int = 0,
        spend: float = 0.0,
    ) -> None:
        """Adds to the counts."""
        with self._lock:
            now = self._report
            self._report = replace(
                now,
                rows=now.rows + rows,
                routed=now.routed + routed,
                computed=now.computed + computed,
                resumed=now.resumed + resumed,
                repeated=now.repeated + repeated,
                tokens=now.tokens + tokens,
                parts=now.parts + parts,
                spend=now.spend + spend,
            )

    def add_errors(self, errors: Iterable[tuple[str, str]]) -> None:
        """Counts rows that were not routed: why, and which row."""
        with self._lock:
            for why, where in errors:
                kind = re.sub(r"\d[\d.,e+-]*", "#", why.partition(": got ")[0])
                if kind not in self._reasons and len(self._reasons) >= MAX_REASONS:
                    kind, why = "", "other reasons"
                before = self._reasons.get(kind, Reason(0, why, where))
                self._reasons[kind] = before._replace(rows=before.rows + 1)
            found = sorted(self._reasons.values(), key=lambda reason: -reason.rows)
            self._report = replace(self._report, reasons=tuple(found))

    def set_read(self, read: float) -> None:
        """Sets the share of the input's bytes that was read, 0 to 1."""
        with self._lock:
            self._report = replace(self._report, read=read)

    def set_prices(self, prices: Mapping[str, float]) -> None:
        """Sets the dual prices of the bounds over the batch."""
        with self._lock:
            self._report = replace(self._report, prices=dict(prices))

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the seconds of the ``with`` block to a stage, also where it raises."""
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            with self._lock:
                before = self._report.seconds
                self._report = replace(self._report, seconds={**before, stage: before.get(stage, 0.0) + seconds})

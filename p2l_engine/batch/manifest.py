"""The manifest of a run, in the folder beside its output: what was computed and decided, and whether all of it was written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from p2l_engine.batch.contents import Content
from p2l_engine.batch.identity import Identity, same
from p2l_engine.batch.report import Report
from p2l_engine.tables.storage import Location

MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Manifest:
    """One run.

    coefficients, decisions: what these depend on (see ``identity``); decisions is None while the parts of earlier ones are
    removed. inputs: the files. state: the folder of the coefficients, None for the run's own. keep_coefficients: as in
    ``BatchConfig``. Of a finished run, report: what it did; parts: bytes of each part.
    """

    coefficients: Identity
    decisions: Identity | None
    inputs: tuple[Content, ...]
    state: str | None = None
    keep_coefficients: bool | None = None
    report: Report | None = None
    parts: Mapping[str, int] | None = None

    @property
    def complete(self) -> bool:
        """Whether all parts were written."""
        return self.report is not None

    def is_of(self, coefficients: Identity, decisions: Identity) -> bool:
        """Whether the run is the one with these identities."""
        return same(self.coefficients, coefficients) and same(self.decisions, decisions)


def read_manifest(output: Location, run: Location) -> Manifest | None:
    """The manifest of the run in a folder; None if there is none. Raises ValueError for a file that is no manifest."""
    place = run / MANIFEST
    if not place.exists():
        return None
    try:
        return _parsed(json.loads(place.read()))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{place.shown}: expected the manifest of a batch run: {error!r:.100}; remove {run.shown} and {output.shown}, or "
            "name another folder"
        ) from None


def write_manifest(run: Location, manifest: Manifest) -> None:
    """Raises OSError."""
    found = {"complete": manifest.complete} | asdict(manifest)
    if manifest.report is not None:
        found["report"] = manifest.report.recorded()
    (run / MANIFEST).write((json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode())


def _parsed(found: Any) -> Manifest:
    decisions, report = found["decisions"], found["report"]
    manifest = Manifest(
        dict(found["coefficients"]),
        None if decisions is None else dict(decisions),
        tuple(Content(**each | {"seen": each["seen"] and tuple(each["seen"])}) for each in found["inputs"]),
        found["state"],
        found["keep_coefficients"],
        None if report is None else Report.of(report),
        None if report is None else dict(found["parts"]),
    )
    if "inputs" not in manifest.coefficients:
        raise ValueError("no inputs")
    if manifest.report is not None and manifest.report.parts != len(manifest.parts or {}):
        raise ValueError("another number of parts")
    return manifest

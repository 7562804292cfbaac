"""What a batch run was asked for, and the manifest that remembers it: a run goes on only where all of it is the same."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any, Literal

from p2l_engine.batch.places import File, Place
from p2l_engine.batch.rows import BYTES, ROWS
from p2l_engine.engine import Engine
from p2l_engine.router import Router, Shares
from p2l_engine.routing.problem import Scope

MANIFEST = "_manifest.json"
STATE = "_state"


@dataclass(frozen=True, slots=True)
class Asked:
    """One batch run.

    inputs: paths, URIs, folders and globs of parquet, csv and jsonl (.gz, .zst) files. output: a folder or its URI. column: the
    prompts'; keep: the columns that the output repeats (None: all others). budget, budget_scope, max_share and min_share: as in
    ``Router.route_batch``; the batch is all rows that can be routed. price: instead of a budget, what one unit of cost must
    bring in win rate: that of an earlier run's budget over its batch (in its manifest and its parts' metadata). coefficients:
    write theta (and eta) too, in this type. strict: stop at the first row that cannot be routed. rows_per_part: of a part of
    the output, which is computed and resumed together; long prompts make smaller ones. state: where coefficients are kept until
    the end (a local folder; None: within the output, which must then be local).
    """

    inputs: Sequence[str]
    output: str
    column: str = "prompt"
    keep: Sequence[str] | None = None
    budget: float | None = None
    budget_scope: Scope = "prompt"
    price: float | None = None
    max_share: Shares = field(default_factory=dict)
    min_share: Shares = field(default_factory=dict)
    coefficients: Literal["float16", "float32"] | None = None
    strict: bool = False
    state: str | None = None
    rows_per_part: int = ROWS

    def __post_init__(self) -> None:
        if not self.inputs or isinstance(self.inputs, str):
            raise ValueError(f"inputs: expected a list of at least one path, got {self.inputs!r}")
        if self.budget is not None and not (math.isfinite(self.budget) and self.budget >= 0):
            raise ValueError(f"budget: expected a finite number >= 0, got {self.budget!r}")
        if self.price is not None and not (math.isfinite(self.price) and self.price >= 0):
            raise ValueError(f"price: expected a finite number >= 0, got {self.price!r}")
        if self.price is not None and (self.budget is not None or self.max_share or self.min_share):
            raise ValueError("price: expected no budget and no shares beside it")
        if self.budget_scope not in ("prompt", "batch"):
            raise ValueError(f"budget_scope: expected 'prompt' or 'batch', got {self.budget_scope!r}")
        if not 1 <= self.rows_per_part < 1 << 20:
            raise ValueError(f"rows_per_part: expected 1 to {(1 << 20) - 1:,}, got {self.rows_per_part!r}")
        if self.coefficients not in (None, "float16", "float32"):
            raise ValueError(f"coefficients: expected float16 or float32, got {self.coefficients!r}")

    @property
    def over_batch(self) -> bool:
        """Whether a decision depends on the other rows."""
        return bool((self.budget is not None and self.budget_scope == "batch") or self.max_share or self.min_share)


def identity(asked: Asked, router: Router, files: Sequence[File]) -> dict[str, Any]:
    """Everything that the output depends on, as JSON has it."""
    elsewhere = ("inputs", "output", "state", "strict", "max_share", "min_share")
    options = {name: value for name, value in asdict(asked).items() if name not in elsewhere}
    shares = {"max_share": asked.max_share, "min_share": asked.min_share}
    engine = router.engine
    found = {
        "version": version("p2l-engine"),
        "inputs": [[file.place.shown, file.size, file.modified] for file in files],
        **options,
        **{name: {str(models): share for models, share in given.items()} for name, given in shares.items()},
        "bytes_per_part": BYTES,
        "checkpoint": _checkpoint(engine),
        "computes in": f"{engine.device.type} {engine.dtype}".replace("torch.", ""),
        "catalog": {model.name: model.cost for model in router.catalog.models},
        "unit": router.catalog.unit,
        "opponents": router.q.tolist(),
        "objective": router.objective,
        "seed": router.seed,
    }
    parsed: dict[str, Any] = json.loads(json.dumps(found))
    return parsed


def _checkpoint(engine: Engine) -> dict[str, Any]:
    """Small files by content, weights by size and time: hashing gigabytes would take as long as a small batch."""
    found: dict[str, Any] = {}
    for file in sorted(engine.folder.iterdir()):
        if not file.is_file() or file.name in ("README.md", "evaluation.json"):
            continue
        stat = file.stat()
        if file.suffix in (".json", ".yaml", ".jinja", ".txt", ".model"):
            found[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
        else:
            found[file.name] = [stat.st_size, stat.st_mtime_ns]
    return found


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each thing that is not what it was."""
    lines = []
    for name in {**before, **now}:
        was, is_now = before.get(name), now.get(name)
        if was == is_now:
            continue
        if name == "inputs":  # [path, size, time] each
            was, is_now = ({file[0]: file[1:] for file in files or ()} for files in (was, is_now))
        if isinstance(was, dict) and isinstance(is_now, dict):
            names = [key for key in {**was, **is_now} if was.get(key) != is_now.get(key)]
            lines.append(f"{name}: {', '.join(names) or 'their order'}")
        else:
            lines.append(f"{name}: was {was!r:.60}, is {is_now!r:.60}")
    return lines


def read_manifest(output: Place) -> dict[str, Any] | None:
    """What an earlier run left in the output folder. Raises ValueError where the folder holds something else."""
    names = [name for name in output.names() if not (name.startswith(".") and name.endswith(".tmp"))]
    if MANIFEST in names:
        try:
            manifest: dict[str, Any] = json.loads((output / MANIFEST).read())
            return manifest
        except ValueError as error:
            raise ValueError(f"{(output / MANIFEST).shown}: expected the manifest of a batch run: {error}") from None
    if names:
        raise ValueError(
            f"{output.shown}: expected an empty folder or the output of an earlier batch run, found {', '.join(names[:3])}; "
            "name another folder"
        )
    return None


def write_manifest(output: Place, manifest: Mapping[str, Any]) -> None:
    (output / MANIFEST).write((json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())

"""What the output of a run depends on, as JSON for its manifest: a run is resumed only while all of it is unchanged."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch

from p2l_engine.batch.blocks import LETTERS
from p2l_engine.batch.config import BatchConfig
from p2l_engine.checkpoint import fingerprint
from p2l_engine.engine import Engine
from p2l_engine.router import Router
from p2l_engine.tables.storage import File

# Options that do not change the output, or that are recorded in another form.
NOT_RECORDED = ("inputs", "output", "state", "strict", "draw", "max_share", "min_share")


def identity(config: BatchConfig, router: Router, files: Sequence[File], compute: str) -> dict[str, Any]:
    """All that the output depends on, as it reads back from JSON. compute: see ``compute_signature``."""
    engine = router.engine
    shares = {"max_share": config.max_share, "min_share": config.min_share}
    found = {
        "version": version("p2l-engine"),
        "inputs": file_versions(files),
        **{name: value for name, value in asdict(config).items() if name not in NOT_RECORDED},
        **{name: {str(models): share for models, share in given.items()} for name, given in shares.items()},
        "letters_per_block": LETTERS,
        "checkpoint": _checkpoint(engine),
        "compute": compute,
        "date": engine.date,
        "catalog": {
            model.name: [model.cost, model.usd_per_m_in, model.usd_per_m_out] if model.per_token else model.cost
            for model in router.catalog.models
        },
        "unit": router.catalog.unit,
        "opponents": router.q.tolist(),
        "objective": router.objective,
        "seed": router.seed,
    }
    if router.explore is not None:
        found |= {"explore": router.explore, "draw": config.draw}
    parsed: dict[str, Any] = json.loads(json.dumps(found))
    return parsed


def file_versions(files: Sequence[File]) -> list[list[Any]]:
    """Path, size in bytes, and modification time of each input file."""
    return [[file.location.shown, file.size, file.modified] for file in files]


def compute_signature(device: str, dtype: torch.dtype, tokens_per_batch: int) -> str:
    """How coefficients are computed; device: cpu or cuda."""
    return f"{device} {dtype}, {tokens_per_batch} tokens per batch".replace("torch.", "")


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each difference between two identities."""
    lines = []
    for name in {**before, **now}:
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if name == "inputs":  # path, size and time of each file
            old, new = ({file[0]: file[1:] for file in files or ()} for files in (old, new))
        if isinstance(old, dict) and isinstance(new, dict):
            names = [key for key in {**old, **new} if old.get(key) != new.get(key)]
            lines.append(f"{name}: {', '.join(names) or 'their order'}")
        else:
            lines.append(f"{name}: was {old!r:.60}, is {new!r:.60}")
    return lines


def _checkpoint(engine: Engine) -> dict[str, list[str | int]]:
    """Digests, and for weights also the modification time, which detects a change between the samples; none for an adapter's
    backbone, which may be downloaded or converted anew."""
    digests = fingerprint.of_checkpoint(engine.folder, engine.base)
    times = {file.name: file.stat().st_mtime_ns for file in engine.folder.glob("*.safetensors")}
    return {name: [digest, times.get(name, 0)] for name, digest in digests.items()}

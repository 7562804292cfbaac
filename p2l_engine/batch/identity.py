"""What a run's coefficients depend on, and what its decisions depend on, as JSON for its manifest.

Coefficients are used again while the first is unchanged, and decided from again where only the second has changed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from p2l_engine import __version__
from p2l_engine.batch.blocks import LETTERS
from p2l_engine.batch.config import BatchConfig
from p2l_engine.batch.contents import Content, sha256
from p2l_engine.checkpoint import fingerprint
from p2l_engine.engine import Engine, described
from p2l_engine.router import Router
from p2l_engine.tables.layouts import PromptColumn
from p2l_engine.tables.storage import Partitions

Identity = dict[str, Any]

READING = ("plain_text", "csv_escape", "rows_per_part")  # options that prompts and blocks depend on
# Options that change neither coefficients nor decisions, or that are recorded in another form.
NOT_RECORDED = ("column", "inputs", "output", "state", "strict", "draw", "max_share", "min_share", "keep_coefficients")


def of_coefficients(
    config: BatchConfig, prompts: PromptColumn, engine: Engine, inputs: Sequence[Content], compute: str
) -> Identity:
    """All that coefficients and their blocks depend on. prompts: where they are. compute: see ``compute_signature``."""
    return _as_json(
        {
            "version": __version__,
            "inputs": [[file.size, file.digest] for file in inputs],
            "column": prompts.name,
            "cells": prompts.cells,
            **{name: value for name, value in asdict(config).items() if name in READING},
            "letters_per_block": LETTERS,
            "checkpoint": _checkpoint(engine),
            "compute": compute,
            "date": engine.date,
        }
    )


def of_decisions(config: BatchConfig, router: Router, sources: Sequence[str], partitions: Sequence[Partitions]) -> Identity:
    """All that the output depends on beside coefficients. sources: the files' names in it, see ``source_names``; partitions: of
    each file."""
    shares = {"max_share": config.max_share, "min_share": config.min_share}
    found = {
        **{name: value for name, value in asdict(config).items() if name not in (*READING, *NOT_RECORDED)},
        **{name: {str(models): share for models, share in given.items()} for name, given in shares.items()},
        "catalog": {
            model.name: [model.cost, model.usd_per_m_in, model.usd_per_m_out] if model.per_token else model.cost
            for model in router.catalog.models
        },
        "unit": router.catalog.unit,
        "opponents": router.q.tolist(),
        "objective": router.objective,
        "seed": router.seed,
        "sources": list(sources),
        "partitions_of_files": list(partitions),
    }
    if config.write_as is not None:
        found["provider_names"] = router.catalog.provider_names
    if router.explore is not None:
        found |= {"explore": router.explore, "draw": config.draw}
    return _as_json(found)


def compute_signature(device: str, dtype: torch.dtype, tokens_per_batch: int) -> str:
    """How coefficients are computed; device: cpu or cuda."""
    return f"{device} {described(dtype)}, {tokens_per_batch} tokens per batch"


def apart_from_inputs(identity: Identity) -> Identity:
    """What an identity of coefficients says of everything but the inputs."""
    return {name: value for name, value in identity.items() if name != "inputs"}


def same(before: Any, now: Any) -> bool:
    """Whether two identities are equal, also in the order of models and shares, by which ties are broken."""
    if isinstance(before, dict) and isinstance(now, dict):
        return list(before) == list(now) and all(same(before[name], now[name]) for name in before)
    return bool(before == now)


def continues(before: Identity, now: Identity) -> bool:
    """Whether coefficients of one identity serve the other, as far as their prompts are the same (see ``spill``): nothing but
    the inputs differs, and there, files may only have been added at the end."""
    old = before["inputs"]  # None: they changed while they were read
    rest = same(apart_from_inputs(before), apart_from_inputs(now))
    return rest and (old is None or old == now["inputs"][: len(old)])


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each difference between two identities, apart from inputs."""
    lines = []
    for name in {**before, **now}:
        old, new = before.get(name), now.get(name)
        if same(old, new) or name == "inputs":
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            names = [key for key in {**old, **new} if old.get(key) != new.get(key)]
            lines.append(f"{name}: {', '.join(names) or 'their order'}")
        else:
            lines.append(f"{name}: was {old!r:.60}, is {new!r:.60}")
    return lines


def _as_json(found: Mapping[str, Any]) -> Identity:
    """As it reads back."""
    parsed: Identity = json.loads(json.dumps(found))
    return parsed


def _checkpoint(engine: Engine) -> dict[str, str]:
    """Digests: of all bytes of the weights, also of an adapter's backbone."""
    digests = fingerprint.of_checkpoint(engine.folder, engine.base)
    folders = {"": engine.folder} | ({} if engine.base == engine.folder else {"backbone/": engine.base})
    for place, folder in folders.items():
        for file in folder.glob("*.safetensors"):
            with file.open("rb") as opened:
                digests[place + file.name] = sha256(opened)
    return digests

"""The dtype "auto": int8 on a CPU where the checkpoint's own figures say that it loses little, else the natural dtype.

The figures are those of its evaluation.json, which ``p2l-engine eval --dtype float32 --dtype int8 --card`` writes; the limits
are in ``reports.dtypes``.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from p2l_engine.backbone.head import Head
from p2l_engine.checkpoint import fingerprint
from p2l_engine.checkpoint.files import read_json
from p2l_engine.engine.device import natural_dtype
from p2l_engine.errors import CheckpointError
from p2l_engine.jsonable import from_json
from p2l_engine.reports import DtypeFigures, Subject
from p2l_engine.reports.dtypes import too_much

logger = logging.getLogger(__name__)

MEASURE = "measure it here with p2l-engine eval --dtype float32 --dtype int8 --card"


def auto_dtype(folder: Path, head: Head, packed: bool, device: torch.device) -> torch.dtype:
    """torch.int8, or the device's ``natural_dtype``; the log says which and why. folder, head: of the checkpoint; packed:
    whether its backbone is computed over packed tokens."""
    reason = _against_int8(folder / "evaluation.json", head, packed, device)
    dtype = torch.int8 if reason is None else natural_dtype(device)
    said = f"its loss is within the limits, by {folder / 'evaluation.json'}" if reason is None else f"not int8: {reason}"
    logger.info("dtype auto: %s; %s", str(dtype).removeprefix("torch."), said)
    return dtype


def _against_int8(file: Path, head: Head, packed: bool, device: torch.device) -> str | None:
    """Why not; None: nothing speaks against it."""
    if device.type != "cpu":
        return "it is computed on CPUs alone"
    if not packed:
        return "the backbone goes through transformers"
    if torch.cpu._is_amx_tile_supported():
        return "this CPU has AMX, which multiplies bfloat16 faster than int8 is computed here"
    try:
        stated = _stated(file, head)
    except CheckpointError as error:
        return f"{error}; {MEASURE}"
    exact = next((of for of in stated if of.dtype == "float32"), None)
    found = next((of for of in stated if of.dtype == "int8"), None)
    if exact is None or found is None:
        return f"{file} has no figures of float32 and of int8; {MEASURE}"
    problems = too_much(found, exact)
    return f"{file} states a loss beyond the limits: {'; '.join(problems)}" if problems else None


def _stated(file: Path, head: Head) -> tuple[DtypeFigures, ...]:
    """The dtypes' figures in the file. Raises CheckpointError where it is missing or broken, and where they are of another
    head."""
    found = read_json(file, dict)
    try:
        subject = from_json(Subject, found.get("checkpoint"), "checkpoint")
        dtypes = found.get("dtypes", [])
        if not isinstance(dtypes, list):
            raise TypeError(f"dtypes: expected a list, got {dtypes!r:.80}")
        stated = tuple(from_json(DtypeFigures, each, f"dtypes[{i}]") for i, each in enumerate(dtypes))
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: expected the JSON that 'p2l-engine eval' writes: {error}") from None
    if subject.head != fingerprint.of_head(head):
        raise CheckpointError(f"{file}: the figures of another head")
    return stated

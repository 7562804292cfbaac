"""A calibration stored in a checkpoint: linear maps in the head's rows, monotone ones in ``calibration.json``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from p2l_engine.backbone.head import Head
from p2l_engine.backbone.theta_map import FILE as MAP_FILE
from p2l_engine.backbone.theta_map import MonotoneStep, ThetaMap
from p2l_engine.backbone.uncertainty import FILE as UNCERTAINTY_FILE
from p2l_engine.checkpoint import Checkpoint
from p2l_engine.checkpoint.files import read_json
from p2l_engine.checkpoint.rewrite import rewrite
from p2l_engine.learning.calibration import CalibrationReport
from p2l_engine.learning.candidates import CoefficientMap


def write(source: Checkpoint, target: Path, found: CoefficientMap, report: CalibrationReport) -> None:
    """Writes ``source`` with the map ``found`` behind all that it has, so that calibrating again composes. Raises what
    ``checkpoint.rewrite`` raises."""
    head, theta_map = applied(source, found)
    files: dict[str, bytes | Callable[[Path], object] | None] = {MAP_FILE: None if theta_map is None else theta_map.contents()}
    if source.uncertainty is not None and source.theta_map is None and found.scale != 1:
        files[UNCERTAINTY_FILE] = replace(source.uncertainty, factors=source.uncertainty.factors * found.scale).write
    training = read_json(source.folder / "training_config.json", dict)
    rewrite(source, target, head, training={"calibrations": [*training.get("calibrations", []), _entry(report)]}, files=files)


def applied(source: Checkpoint, found: CoefficientMap) -> tuple[Head, ThetaMap | None]:
    """The head and the map of theta that give what ``found`` makes of the checkpoint's coefficients."""
    m, theta_map = len(source.models), source.theta_map
    scale, offset = torch.ones(source.head.width, dtype=torch.float64), torch.zeros(source.head.width, dtype=torch.float64)
    offsets = {name: found.offset(name) for name in source.models}
    if found.knots is not None and found.values is not None:
        steps = () if theta_map is None else theta_map.steps
        theta_map = ThetaMap(source.models, (*steps, MonotoneStep(found.knots, found.values)))
    elif theta_map is not None:
        theta_map = ThetaMap(source.models, (*theta_map.steps[:-1], theta_map.steps[-1].scaled(found.scale, offsets)))
    else:
        scale[:m] = found.scale
        offset[:m] = torch.tensor(list(offsets.values()), dtype=torch.float64)
    if source.head.has_eta:
        scale[m], offset[m] = found.eta_scale, found.eta_offset
    weight = source.head.weight.double() * scale[:, None]
    bias = source.head.bias.double() * scale + offset
    return Head(weight.float(), bias.float(), m), theta_map


def _entry(report: CalibrationReport) -> dict[str, Any]:
    """Of training_config.json's list ``calibrations``."""
    losses = {
        name: of["log_loss"].value for name, of in (("before", report.before), ("after", report.after)) if "log_loss" in of
    }
    return {"map": report.chosen, "votes": report.votes, "prompts": report.prompts, "held_out_log_loss": losses}

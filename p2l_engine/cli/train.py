"""p2l-engine train."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from p2l_engine.cli.terminal import interruptible

if TYPE_CHECKING:
    from p2l_engine.train.resumption import IfPresent


def train(
    config: Annotated[Path, typer.Option(help="YAML file with the settings of the run.")],
    max_steps: Annotated[
        int, typer.Option(help="Stop after this many optimiser steps, for a trial. -1: train for the config's epochs.")
    ] = -1,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run from its last saved state.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Delete the run's states and its checkpoint, and start again.")
    ] = False,
) -> None:
    """Fine-tune a P2L model on votes. On several GPUs: torchrun -m p2l_engine.train, with the same options."""
    if resume and restart:
        raise typer.BadParameter("cannot be combined with --resume", param_hint="--restart")
    if_present: IfPresent = "resume" if resume else "restart" if restart else "refuse"
    first = os.environ.get("RANK", "0") == "0"  # of torchrun's processes
    logging.getLogger().setLevel(logging.INFO if first else logging.ERROR)
    with interruptible("; --resume continues from the last saved state"):
        from p2l_engine.train.config import TrainConfig
        from p2l_engine.train.run import train as run

        folder = run(TrainConfig.load(config), max_steps, if_present)
    print(f"wrote {folder}")

"""p2l-engine export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from p2l_engine.checkpoint.export import export as write
from p2l_engine.cli.inputs import Checkpoint, err


def export(
    target: Annotated[Path, typer.Argument(help="The folder to write; it must not hold anything yet.")],
    evaluation: Annotated[
        Path | None, typer.Option(help="Figures for the model card, as 'eval --json' writes them; else the checkpoint's own.")
    ] = None,
    checkpoint: Checkpoint = None,
) -> None:
    """Write a checkpoint in the published layout: adapters merged, with a model card."""
    with err.status("merging and writing"):
        write(checkpoint, target, evaluation)
    err.print(f"wrote {target}", highlight=False, markup=False)

"""p2l-engine export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from p2l_engine.cli.inputs import Checkpoint
from p2l_engine.cli.terminal import note, status


def export(
    target: Annotated[Path, typer.Argument(help="Folder to write; it must not exist yet, or be empty.")],
    evaluation: Annotated[
        Path | None,
        typer.Option(
            help="Figures for the model card, as 'eval --json' writes them. Default: the checkpoint's evaluation.json.",
            show_default=False,
        ),
    ] = None,
    checkpoint: Checkpoint = None,
) -> None:
    """Write a merged checkpoint in the published layout, with a model card."""
    with status("merging and writing"):
        from p2l_engine.checkpoint.export import export as write

        write(checkpoint, target, evaluation)
    note(f"wrote {target}")

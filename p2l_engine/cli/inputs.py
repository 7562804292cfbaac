"""What commands share: options and their checks, the engine, progress bars."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from p2l_engine.catalog import Catalog
from p2l_engine.engine import Engine
from p2l_engine.router import Opponents, Router, Shares

out, err = Console(), Console(stderr=True)

PLOTS = (".png", ".svg", ".pdf")


class Scope(StrEnum):
    """What a budget bounds."""

    PROMPT = "prompt"
    BATCH = "batch"


class Dtype(StrEnum):
    """What the backbone computes in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


Checkpoint = Annotated[
    str | None,
    typer.Option(help="Checkpoint folder or hub name; the built-in default when not given.", show_default=False),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; CUDA where there is one.", show_default=False)]
DtypeOption = Annotated[
    Dtype | None, typer.Option(help="bfloat16 where the hardware multiplies it, else float32.", show_default=False)
]

CatalogOption = Annotated[
    Path | None,
    typer.Option("--catalog", help="The models to choose from (YAML); the checkpoint's own catalog.yaml when not given."),
]
LeaveOut = Annotated[bool, typer.Option("--leave-out", help="Leave out models that only one side knows.")]


def load_engine(checkpoint: str | None, device: str | None, dtype: Dtype | None, tokens_per_batch: int | None = None) -> Engine:
    with err.status("loading the checkpoint"):
        return Engine.from_pretrained(checkpoint, device, getattr(torch, dtype.value) if dtype else None, tokens_per_batch)


def load_router(
    engine: Engine, catalog: Path | None, leave_out: bool, seed: int = 0, opponents: Opponents = "uniform"
) -> Router:
    """A router over the catalog named, or the checkpoint's own."""
    shown = catalog or engine.folder / "catalog.yaml"
    if not shown.is_file():
        raise typer.BadParameter(
            f"the checkpoint has no catalog.yaml of its own: name one; not found: {shown}", param_hint="--catalog"
        )
    return Router(engine, Catalog.from_yaml(shown), opponents, seed, "leave_out" if leave_out else "error")


@contextmanager
def progress(total: int) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda done: bar.advance(task, done)


def check_writable(file: Path | None, option: str, kinds: Sequence[str] = ()) -> None:
    """Before the work, not after it: whether a file can be written there, of one of these kinds (suffixes)."""
    if file is None:
        return
    if kinds and file.suffix.lower() not in kinds:
        raise typer.BadParameter(f"expected a name that ends in {', '.join(kinds)}, got {file.name!r}", param_hint=option)
    if file.is_dir() or not os.access(file if file.exists() else file.absolute().parent, os.W_OK):
        raise typer.BadParameter(f"{file} cannot be written: is its folder there?", param_hint=option)


def check_model(name: str | None, models: Sequence[str], option: str) -> None:
    if name is not None and name not in models:
        raise typer.BadParameter(f"expected one of {', '.join(models)}, got {name!r}", param_hint=option)


def swaps_of(given: Sequence[str] | None, models: Sequence[str]) -> list[tuple[str, str]]:
    """OLD:NEW each; names may hold colons themselves."""

    def swap(text: str) -> tuple[str, str]:
        for old in models:
            if text.startswith(f"{old}:") and text.removeprefix(f"{old}:") in models:
                return old, text.removeprefix(f"{old}:")
        raise typer.BadParameter(f"expected OLD:NEW, two of {', '.join(models)}, got {text!r}", param_hint="--replace")

    return [swap(text) for text in given or []]


def write_json(report: dict[str, Any], file: Path) -> None:
    file.write_text(json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    err.print(f"wrote {file}", highlight=False, markup=False)


def numbers_of(given: list[str] | None, option: str) -> dict[str, float]:
    """NAME=NUMBER each, every name once; names may hold equals signs themselves."""
    found: dict[str, float] = {}
    for text in given or []:
        name, _, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            name = ""
        if not name:
            raise typer.BadParameter(f"expected NAME=NUMBER, such as o1=0.1, got {text!r}", param_hint=option)
        if name in found:
            raise typer.BadParameter(f"expected every name once, got {name} twice", param_hint=option)
        found[name] = value
    return found


def shares_of(given: list[str] | None, option: str) -> Shares:
    """``numbers_of`` for shares of models."""
    return {name: share for name, share in numbers_of(given, option).items()}


def short(text: str, width: int) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 1] + "…"

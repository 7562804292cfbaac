"""What commands share: options, the engine, prompts from arguments, files and standard input, progress bars."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from p2l_engine.catalog import Catalog
from p2l_engine.engine import Engine
from p2l_engine.errors import PromptError
from p2l_engine.prompts import Prompt, user_turns
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


def read_prompts(given: list[str] | None, file: Path | None) -> list[Prompt]:
    if given and file:
        raise typer.BadParameter("give prompts as arguments or a file, not both", param_hint="--file")
    if given:
        return list(given)
    if file and file.suffix in (".parquet", ".csv"):
        return _column_of(file)
    text = read_text(file) if file else read_stdin()
    # Only "\n" ends a line: str.splitlines also breaks at characters that JSON strings and prompts may hold.
    lines = [(i, line.rstrip("\r")) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    where = str(file or "standard input")
    if not lines:
        raise typer.BadParameter(f"{where} holds no prompt", param_hint="prompts")
    if file and file.suffix == ".jsonl":
        return [_json_prompt(line, where, i) for i, line in lines]
    return [line for _, line in lines]


def _column_of(file: Path) -> list[Prompt]:
    from p2l_engine.votes.files import read_table, turns

    table = read_table(str(file))
    if "prompt" not in table.column_names:
        raise ValueError(f"{file}: expected a column 'prompt', got {table.column_names}")
    if not table.num_rows:
        raise typer.BadParameter(f"{file} holds no prompt", param_hint="prompts")
    found: list[Prompt] = []
    for i, value in enumerate(table.column("prompt").to_pylist()):
        try:
            found.append(turns(value))
        except ValueError as error:
            raise ValueError(f"{file}: row {i}: {error}") from None
    return found


def read_weights(file: Path) -> list[float] | None:
    """The prompts' weights, where the file has any. Only tables need the extra that reads them."""
    if file.suffix == ".jsonl":
        rows = [json.loads(line) for line in read_text(file).split("\n") if line.strip()]
        given = [row.get("weight") if isinstance(row, dict) else None for row in rows]
    elif file.suffix in (".parquet", ".csv"):
        from p2l_engine.votes.files import read_table

        table = read_table(str(file))
        given = table.column("weight").to_pylist() if "weight" in table.column_names else []
    else:
        return None
    if all(value is None for value in given):
        return None
    found = []
    for i, value in enumerate(given):
        try:
            weight = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            weight = math.nan
        if not 0 <= weight < math.inf:
            raise ValueError(
                f"{file}: row {i}: weight: expected a finite number >= 0 for every prompt, or for none: got {value!r}"
            )
        found.append(weight)
    return found


def check_writable(file: Path | None, option: str, kinds: Sequence[str] = ()) -> None:
    """Before the work, not after it: whether a file can be written there, of one of these kinds (suffixes)."""
    if file is None:
        return
    if kinds and file.suffix.lower() not in kinds:
        raise typer.BadParameter(f"expected a name that ends in {', '.join(kinds)}, got {file.name!r}", param_hint=option)
    if file.is_dir() or not os.access(file if file.exists() else file.absolute().parent, os.W_OK):
        raise typer.BadParameter(f"{file} cannot be written: is its folder there?", param_hint=option)


def _json_prompt(line: str, where: str, number: int) -> Prompt:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: line {number}: expected JSON: {error}") from None
    if isinstance(value, dict):
        if "prompt" not in value:
            raise ValueError(f"{where}: line {number}: expected the key 'prompt', got {sorted(value)}")
        value = value["prompt"]
    try:
        user_turns(value)
    except PromptError as error:
        raise ValueError(f"{where}: line {number}: {error.problem}") from None
    prompt: Prompt = value
    return prompt


def read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected UTF-8 text: {error}") from None


def read_stdin() -> str:
    if sys.stdin.isatty():
        raise typer.BadParameter("give a prompt, a file, or text on standard input", param_hint="prompts")
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input: expected UTF-8 text: {error}") from None


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

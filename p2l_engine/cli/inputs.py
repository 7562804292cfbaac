"""Options that several commands have, and their checks; how commands load the engine and the router."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from p2l_engine.cli.terminal import ellipsis, encodable, note, status

if TYPE_CHECKING:
    from p2l_engine.constraints import Shares
    from p2l_engine.engine import Engine
    from p2l_engine.opponents import Opponents
    from p2l_engine.router import Router

PLOTS = (".png", ".svg", ".pdf")
PROMPT_FILE = (
    "a table (.parquet, .csv, .jsonl; or a folder, glob or URI of such files), or any other file with one prompt on each line. "
    "A prompt in a table is a text, a list of user turns, or a list of messages"
)
ENGINE, MODELS = "Checkpoint and device", "Models to choose from"  # headings of options in a command's help


class BudgetScope(StrEnum):
    """What a budget bounds: the cost of each prompt, or the mean over all."""

    PROMPT = "prompt"
    BATCH = "batch"


class RewardKind(StrEnum):
    """Which feedback on a decision counts."""

    SCORE = "score"
    PREFERENCE = "preference"


Column = Annotated[
    str | None,
    typer.Option(
        "--column",
        help="Column of a table, or key of its jsonl objects, that holds the prompts; also one within another, such as "
        "body.messages. Default: prompt, or where a file of prompts of a known layout has them, which is said in one line.",
        show_default=False,
    ),
]
VoteColumn = Annotated[
    str | None,
    typer.Option(
        "--column",
        help="Column of a table, or key of its jsonl objects, that holds the prompts; also one within another, such as "
        "body.messages. Default: prompt; of votes also conversation or conversation_a.",
        show_default=False,
    ),
]
CsvEscape = Annotated[
    str | None,
    typer.Option(
        help="What escapes quotes in csv files: '\\' as Spark writes them. Default: quotes are doubled.", show_default=False
    ),
]
Sources = Annotated[
    str | None,
    typer.Option(
        help="The column that names the sources of scores, or 'file': scores compare within one source only, and models that "
        "a source lacks are no error. Default: all are of one source.",
        show_default=False,
    ),
]
Checkpoint = Annotated[
    str | None,
    typer.Option(
        help="Folder, name on the hub, or built-in name, such as builtin/llmrouter-9. Default: the default checkpoint.",
        show_default=False,
        rich_help_panel=ENGINE,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1, ... Default: cuda if available.", show_default=False, rich_help_panel=ENGINE),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="float32 (fp32), bfloat16 (bf16) or, on CPUs, int8; auto: int8 where the checkpoint's own figures say "
        "that it loses little. Default: bfloat16 where hardware multiplies it, else float32.",
        show_default=False,
        rich_help_panel=ENGINE,
    ),
]
Date = Annotated[
    str | None,
    typer.Option(
        help="The date that a chat template which reads the clock writes, such as 2026-01-31. Default: that of the training.",
        show_default=False,
        rich_help_panel=ENGINE,
    ),
]
CatalogFile = Annotated[
    Path | None,
    typer.Option(
        "--catalog",
        help="YAML file with the models and their costs. Default: the checkpoint's catalog.yaml.",
        show_default=False,
        rich_help_panel=MODELS,
    ),
]
LeaveOut = Annotated[
    bool,
    typer.Option(
        "--leave-out",
        help="Ignore models that only the checkpoint or only the catalog has, instead of failing.",
        rich_help_panel=MODELS,
    ),
]


def load_engine(
    checkpoint: str | None,
    device: str | None,
    dtype: str | None,
    date: str | None = None,
    tokens_per_batch: int | None = None,
    prefix_cache_bytes: int | Literal["auto"] = 0,
) -> Engine:
    """See ``Engine.from_pretrained``. Raises ValueError for an argument that cannot be used, CheckpointError."""
    with status("loading the checkpoint"):
        from p2l_engine.engine import Engine

        return Engine.from_pretrained(checkpoint, device, dtype, tokens_per_batch, date, prefix_cache_bytes)


def load_router(
    engine: Engine,
    catalog: Path | None,
    leave_out: bool,
    seed: int = 0,
    opponents: Opponents = "uniform",
    explore: Literal["thompson"] | None = None,
) -> Router:
    """A router over the given catalog, or over the checkpoint's own. Raises typer.BadParameter, CatalogError."""
    from p2l_engine.catalog import Catalog
    from p2l_engine.router import Router

    file = catalog or engine.folder / "catalog.yaml"
    if not file.is_file():
        raise typer.BadParameter(
            f"{file} not found" if catalog else f"the checkpoint has no catalog.yaml, give one: {file} not found",
            param_hint="--catalog",
        )
    return Router(engine, Catalog.from_yaml(file), opponents, seed, "leave_out" if leave_out else "error", explore=explore)


def check_writable(file: Path | None, option: str, kinds: Sequence[str] = ()) -> None:
    """Called before the work starts. kinds: the suffixes that are allowed. Raises typer.BadParameter."""
    if file is None:
        return
    if kinds and file.suffix.lower() not in kinds:
        raise typer.BadParameter(f"expected a name that ends in {', '.join(kinds)}, got {file.name!r}", param_hint=option)
    if file.is_dir() or not os.access(file if file.exists() else file.absolute().parent, os.W_OK):
        raise typer.BadParameter(f"{file} cannot be written: is its folder there?", param_hint=option)


def check_model(name: str | None, models: Sequence[str], option: str) -> None:
    """Raises typer.BadParameter for a name that is not one of ``models``."""
    if name is not None and name not in models:
        raise typer.BadParameter(f"expected one of {', '.join(models)}, got {name!r}", param_hint=option)


def swaps_of(given: Sequence[str] | None, models: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs (old, new) from "OLD:NEW" strings; names may contain colons. Raises typer.BadParameter."""

    def swap(text: str) -> tuple[str, str]:
        found = [(old, new) for old in models for new in models if old != new and f"{old}:{new}" == text]
        if len(found) > 1:
            raise typer.BadParameter(f"expected one reading, got {text!r}, which may be {found}", param_hint="--replace")
        if not found:
            raise typer.BadParameter(f"expected OLD:NEW, two of {', '.join(models)}, got {text!r}", param_hint="--replace")
        return found[0]

    return [swap(text) for text in given or []]


def write_json(report: dict[str, Any], file: Path) -> None:
    """Writes the report, indented, and says so on stderr."""
    from p2l_engine.tables.atomic import write_file

    write_file(file, json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    note(f"wrote {file}")


def numbers_of(given: list[str] | None, option: str) -> dict[str, float]:
    """A dict from "NAME=NUMBER" strings; names may contain "=". Raises typer.BadParameter, also for a name given twice."""
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


def vote_columns(column: str | None) -> dict[str, str] | None:
    """What ``votes.read`` takes for ``--column``."""
    return None if column in (None, "prompt") else {"prompt": str(column)}


def shares_of(given: list[str] | None, option: str) -> Shares:
    """``numbers_of``, as the type of shares that the router takes."""
    return {name: share for name, share in numbers_of(given, option).items()}


def flat(text: str) -> str:
    """The text on one line."""
    return " ".join(text.split())


def short(text: str, width: int) -> str:
    """The text on one line, cut to ``width`` characters."""
    text, dots = encodable(flat(text)), ellipsis()
    return text if len(text) <= width else text[: width - len(dots)] + dots

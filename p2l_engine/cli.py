"""The command line: p2l-engine route, leaderboard, info. Needs the extra ``cli`` (typer, rich, matplotlib)."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

import p2l_engine
from p2l_engine.catalog import Catalog
from p2l_engine.engine import Engine
from p2l_engine.errors import PromptError
from p2l_engine.leaderboard import Leaderboard
from p2l_engine.prompts import Prompt, user_turns
from p2l_engine.router import Decision, Router
from p2l_engine.routing import native

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Prompt-to-Leaderboard: route prompts to chat models.")
out, err = Console(), Console(stderr=True)


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


@app.command()
def route(
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts; or use --file, or standard input.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(help="Prompts from a file: .jsonl (text, turns, messages, or an object with 'prompt'), else one a line."),
    ] = None,
    budget: Annotated[float | None, typer.Option(help="Upper bound on the expected cost, in the catalog's unit.")] = None,
    budget_scope: Annotated[Scope, typer.Option(help="Bound each prompt's cost, or the batch's mean.")] = Scope.PROMPT,
    catalog: Annotated[
        Path | None,
        typer.Option(help="The models to choose from (YAML); the checkpoint's own catalog.yaml when not given."),
    ] = None,
    leave_out: Annotated[bool, typer.Option("--leave-out", help="Leave out models that only one side knows.")] = False,
    seed: Annotated[int, typer.Option(help="Of the draws from mixed policies.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines instead of a table.")] = False,
    checkpoint: Checkpoint = None,
    device: Device = None,
    dtype: DtypeOption = None,
) -> None:
    """Choose the best model for each prompt, within a budget."""
    batch = _prompts(prompts, file)
    engine = _engine(checkpoint, device, dtype)
    shown = catalog or engine.folder / "catalog.yaml"
    if not shown.is_file():
        raise typer.BadParameter(
            f"the checkpoint has no catalog.yaml of its own: name one; not found: {shown}", param_hint="--catalog"
        )
    router = Router(engine, Catalog.from_yaml(shown), seed=seed, unmatched="leave_out" if leave_out else "error")
    with _progress(len(batch)) as advance:
        decisions = router.route_batch(batch, budget, budget_scope.value, progress=advance)
    if as_json:
        for prompt, decision in zip(batch, decisions, strict=True):
            print(json.dumps({"prompt": prompt, **_fields(decision)}))
        return
    out.print(_decisions_table(batch, decisions, router.catalog.unit))
    mean = float(np.mean([decision.expected_cost for decision in decisions]))
    out.print(f"mean expected cost {mean:.4g} {router.catalog.unit}", style="dim", markup=False)


@app.command()
def leaderboard(
    prompt: Annotated[str | None, typer.Argument(help="One prompt; or use --file, or standard input as one text.")] = None,
    file: Annotated[Path | None, typer.Option(help="The prompt from a file, whole.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also write a bar chart to this file (.png, .svg, .pdf).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines instead of a table.")] = False,
    checkpoint: Checkpoint = None,
    device: Device = None,
    dtype: DtypeOption = None,
) -> None:
    """Show the leaderboard of one prompt."""
    text = prompt if prompt is not None else _read_text(file) if file else _stdin()
    user_turns(text)
    board = Leaderboard.of(_engine(checkpoint, device, dtype).coefficients([text]))
    if plot is not None:
        from p2l_engine import plot as plots

        plots.leaderboard(board, _short(text, 110), plot)
        err.print(f"wrote {plot}", highlight=False, markup=False)
    if as_json:
        for place in board:
            print(
                json.dumps(
                    {
                        "rank": place.rank,
                        "model": place.model,
                        "coefficient": place.coefficient,
                        "win_rate": place.win_rate,
                    }
                )
            )
        return
    table = Table(title=Text(_short(text, 90)), title_justify="left")
    for name, justify in (("rank", "right"), ("model", "left"), ("coefficient", "right"), ("win rate", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for place in board:
        table.add_row(str(place.rank), Text(place.model), f"{place.coefficient:.3f}", f"{place.win_rate:.1%}")
    out.print(table)


@app.command()
def info(checkpoint: Checkpoint = None, device: Device = None, dtype: DtypeOption = None) -> None:
    """Show what the engine runs on, and the checkpoint."""
    engine = _engine(checkpoint, device, dtype)
    table = Table(show_header=False)
    rows = {
        "p2l-engine": p2l_engine.__version__,
        "torch, transformers": f"{torch.__version__}, {transformers.__version__}",
        "device": torch.cuda.get_device_name(engine.device)
        if engine.device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
        "dtype": str(engine.dtype).removeprefix("torch."),
        "native core": f"{native.isa()}, up to {native.threads(1 << 20)} threads",
        "backbone": f"{engine.backbone.name}, {engine.n_parameters / 1e6:.0f} M parameters",
        "checkpoint": str(engine.folder),
        "feedback model": engine.feedback.name,
        f"{len(engine.models)} models": "\n".join(engine.models),
    }
    for name, value in rows.items():
        table.add_row(name, Text(value))
    out.print(table)


def main() -> None:
    """The console script: typer's own errors as they are, the project's errors in one line and exit status 2."""
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=err, show_path=False, show_time=False)],
    )
    transformers.utils.logging.disable_progress_bar()
    try:
        app()
    except (ValueError, TypeError, OSError, ArithmeticError, RuntimeError) as error:
        message = f"error: {error}".encode(errors="backslashreplace").decode()
        err.print(message, style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


def _engine(checkpoint: str | None, device: str | None, dtype: Dtype | None) -> Engine:
    with err.status("loading the checkpoint"):
        return Engine.from_pretrained(checkpoint, device, getattr(torch, dtype.value) if dtype else None)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda done: bar.advance(task, done)


def _prompts(given: list[str] | None, file: Path | None) -> list[Prompt]:
    if given and file:
        raise typer.BadParameter("give prompts as arguments or a file, not both", param_hint="--file")
    if given:
        return list(given)
    text = _read_text(file) if file else _stdin()
    # Only "\n" ends a line: str.splitlines also breaks at characters that JSON strings and prompts may hold.
    lines = [(i, line.rstrip("\r")) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    where = str(file or "standard input")
    if not lines:
        raise typer.BadParameter(f"{where} holds no prompt", param_hint="prompts")
    if file and file.suffix == ".jsonl":
        return [_json_prompt(line, where, i) for i, line in lines]
    return [line for _, line in lines]


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


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected UTF-8 text: {error}") from None


def _stdin() -> str:
    if sys.stdin.isatty():
        raise typer.BadParameter("give a prompt, a file, or text on standard input", param_hint="prompts")
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input: expected UTF-8 text: {error}") from None


def _fields(decision: Decision) -> dict[str, Any]:
    fields = {name: getattr(decision, name) for name in Decision.__slots__}
    # JSON has no infinity: a score beyond every coefficient (win rate 0 or 1) is null.
    return fields | {"score": decision.score if math.isfinite(decision.score) else None}


def _decisions_table(batch: Sequence[Prompt], decisions: Sequence[Decision], unit: str) -> Table:
    table = Table(caption=Text(f"cost in {unit}"), caption_justify="left")
    for name, justify in (
        ("prompt", "left"), ("model", "left"), ("policy", "left"), ("cost", "right"), ("win rate", "right"), ("score", "right"),
    ):  # fmt: skip
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for prompt, decision in zip(batch, decisions, strict=True):
        policy = ", ".join(f"{name} {p:.0%}" for name, p in decision.policy.items()) if len(decision.policy) > 1 else "certain"
        table.add_row(
            Text(_short(" / ".join(user_turns(prompt)), 44)), Text(decision.model), Text(policy),
            f"{decision.expected_cost:.4g}", f"{decision.win_rate:.1%}", f"{decision.score:.2f}",
        )  # fmt: skip
    return table


def _short(text: str, width: int) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 1] + "…"


if __name__ == "__main__":
    main()

"""p2l-engine route."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from p2l_engine.cli.inputs import (
    PROMPT_FILE,
    BudgetScope,
    CatalogFile,
    Checkpoint,
    Column,
    CsvEscape,
    Date,
    Device,
    Dtype,
    LeaveOut,
    load_engine,
    load_router,
    shares_of,
    short,
)
from p2l_engine.cli.progress import progress
from p2l_engine.cli.terminal import out

if TYPE_CHECKING:
    from rich.table import Table

    from p2l_engine.decision import Decision
    from p2l_engine.prompts import Prompt

PROMPT = 18  # characters of a line of a prompt, at least


def route(
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Prompts. Default: those of --file, or the lines of standard input.")
    ] = None,
    file: Annotated[str | None, typer.Option(help=f"Read the prompts from {PROMPT_FILE}.")] = None,
    column: Column = None,
    csv_escape: CsvEscape = None,
    budget: Annotated[float | None, typer.Option(help="Upper bound on the expected cost, in the catalog's unit.")] = None,
    budget_scope: Annotated[
        BudgetScope, typer.Option(help="Apply the budget to each prompt's cost, or to the mean cost of all prompts.")
    ] = BudgetScope.PROMPT,
    max_share: Annotated[
        list[str] | None,
        typer.Option(help="NAME=SHARE: send at most this share of the prompts to a model. May be repeated."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed for drawing a model where a policy mixes two.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines instead of a table.")] = False,
    catalog: CatalogFile = None,
    leave_out: LeaveOut = False,
    checkpoint: Checkpoint = None,
    device: Device = None,
    dtype: Dtype = None,
    date: Date = None,
) -> None:
    """Choose the best model for each prompt, within a budget."""
    from p2l_engine.cli.prompts import read_prompts

    batch = read_prompts(prompts, file, column, csv_escape)
    shares = shares_of(max_share, "--max-share")
    router = load_router(load_engine(checkpoint, device, dtype, date), catalog, leave_out, seed)
    with progress(len(batch)) as advance:
        decisions = router.route_batch(batch, budget, budget_scope.value, shares, progress=advance)
    if as_json:
        for prompt, decision in zip(batch, decisions, strict=True):
            print(json.dumps({"prompt": prompt, **_fields(decision)}))
        return
    out().print(decisions_table(batch, decisions, router.catalog.unit, out().width))
    mean = sum(decision.expected_cost for decision in decisions) / len(decisions)
    out().print(f"mean expected cost {mean:.4g} {router.catalog.unit}", style="dim", markup=False)
    if far := sum(decision.far for decision in decisions):
        line = f"{far:,} of {len(decisions):,} far from the training prompts: chosen mostly by one leaderboard for all prompts"
        out().print(line, style="dim", markup=False)


def _fields(decision: Decision) -> dict[str, Any]:
    fields = {name: getattr(decision, name) for name in decision.__slots__}
    # JSON has no infinity: a score beyond every coefficient (win rate 0 or 1) is null.
    return fields | {"score": decision.score if math.isfinite(decision.score) else None}


def decisions_table(batch: Sequence[Prompt], decisions: Sequence[Decision], unit: str, width: int) -> Table:
    """For each prompt the chosen model, and below it, where the policy mixes two or more, their probabilities."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from p2l_engine.cli.table import LEAST, shortened
    from p2l_engine.prompts import user_turns

    numbers = [(f"{of.expected_cost:.4g}", f"{of.win_rate:.1%}", f"{of.score:.2f}") for of in decisions]
    headings = ("cost", "win rate", "score")
    taken = sum(max(map(len, column)) for column in zip(headings, *numbers, strict=True))
    room = max(width - taken - PROMPT - 12, LEAST)  # 12: the space between the columns
    table = Table(box=box.SIMPLE_HEAD, caption=Text(f"cost in {unit}"), caption_justify="left")
    table.add_column("prompt", overflow="fold")
    table.add_column("model", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for prompt, decision, of in zip(batch, decisions, numbers, strict=True):
        lines = [shortened(decision.model, room)]
        if len(decision.policy) > 1:
            lines += [f"{p:4.0%} {shortened(name, room - 5)}" for name, p in decision.policy.items()]
        table.add_row(Text(short(" / ".join(user_turns(prompt)), 44)), Text("\n".join(lines)), *of)
    return table

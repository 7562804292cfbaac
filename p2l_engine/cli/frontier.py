"""p2l-engine frontier."""

from __future__ import annotations

import json
from pathlib import Path, PurePath
from typing import Annotated

import typer

from p2l_engine.cli.inputs import (
    PLOTS,
    PROMPT_FILE,
    CatalogFile,
    Checkpoint,
    Column,
    CsvEscape,
    Date,
    Device,
    Dtype,
    LeaveOut,
    check_writable,
    load_engine,
    load_router,
)
from p2l_engine.cli.progress import progress
from p2l_engine.cli.terminal import note, out
from p2l_engine.cli.top import All, Top, cut, limit
from p2l_engine.plotting import TOP


def frontier(
    file: Annotated[
        str,
        typer.Argument(help=f"Prompts: {PROMPT_FILE}."),
    ],
    column: Column = None,
    csv_escape: CsvEscape = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the curve into this file (.png, .svg, .pdf).")] = None,
    budgets: Annotated[
        int, typer.Option(min=2, help="Budgets to show, at equal distances from the cheapest policy to the best one.")
    ] = 9,
    top: Top = TOP,
    all_models: All = False,
    catalog: CatalogFile = None,
    leave_out: LeaveOut = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines instead of a table.")] = False,
    checkpoint: Checkpoint = None,
    device: Device = None,
    dtype: Dtype = None,
    date: Date = None,
) -> None:
    """Show the win rate that each mean budget over these prompts buys, and that of each single model."""
    import numpy as np

    from p2l_engine import routing
    from p2l_engine.cli.prompts import read_prompts
    from p2l_engine.cli.table import print_table
    from p2l_engine.tables.storage import shown

    check_writable(plot, "--plot", PLOTS)
    if plot is not None:  # now: a missing package must not fail a command whose work is done
        from p2l_engine.cli.plots import frontier as draw
    batch = read_prompts(None, file, column, csv_escape)
    router = load_router(load_engine(checkpoint, device, dtype, date), catalog, leave_out)
    with progress(len(batch)) as advance:
        coefficients = router.engine.coefficients(batch, advance)
    v, costs = router.win_rates(coefficients), router.costs_of(coefficients)
    curve = routing.frontier(v, costs)
    shown_costs = np.linspace(curve.cost[0], curve.cost[-1], budgets if len(curve.cost) > 1 else 1)
    least = costs.min(axis=-1).max()  # below it, some prompt has no model within a budget of its own
    each = [
        None if costs.ndim == 2 and budget < least else float(routing.solve_budget(v, costs, budget).value.mean())
        for budget in shown_costs
    ]
    rows = [
        ("batch budget", cost, curve.at(cost), per_prompt) for cost, per_prompt in zip(shown_costs.tolist(), each, strict=True)
    ]
    singles = sorted(
        zip(router.names, curve.model_cost.tolist(), curve.model_value.tolist(), strict=True), key=lambda row: row[1]
    )
    best = {name for name, _, _ in sorted(singles, key=lambda row: -row[2])[: limit(top, all_models)]}
    left_out = cut(len(best), len(singles))
    unit = router.catalog.unit
    if plot is not None:
        title = f"{len(batch)} prompts of {PurePath(shown(file)).name}{left_out.replace('models', 'models named')}"
        draw(curve, v, costs, router.names, unit, title, plot, best)
        note(f"wrote {plot}")
    if as_json:
        for _, cost, value, per_prompt in rows:
            print(json.dumps({"budget": cost, "win_rate": value, "win_rate_per_prompt_budget": per_prompt}))
        for name, cost, value in singles:
            print(json.dumps({"model": name, "mean_cost": cost, "win_rate": value}))
        return
    lines = [
        (f"{cost:.4g}", f"{value:.1%}", "" if per_prompt is None else f"{per_prompt:.1%}", "")
        for _, cost, value, per_prompt in rows
    ]
    lines += [("", "", "", "")] + [(f"{cost:.4g}", "", f"{value:.1%}", name) for name, cost, value in singles if name in best]
    title = f"{len(batch)} prompts; cost in {unit}{left_out}"
    print_table(title, ("mean cost", "batch budget", "per prompt", "one model for all"), lines, out())

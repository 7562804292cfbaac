"""p2l-engine replay."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from p2l_engine.cli.inputs import (
    PLOTS,
    CatalogFile,
    Checkpoint,
    CsvEscape,
    Date,
    Device,
    Dtype,
    LeaveOut,
    RewardKind,
    VoteColumn,
    check_writable,
    load_engine,
    write_json,
)
from p2l_engine.cli.progress import progress
from p2l_engine.cli.terminal import note, out, status

if TYPE_CHECKING:
    from collections.abc import Sequence

    from p2l_engine.coefficients import Coefficients
    from p2l_engine.engine import Engine
    from p2l_engine.replay.report import PolicyReplay, ReplayReport
    from p2l_engine.reports import Figure

SHARES = 3  # models whose shares the table shows


def replay(
    log: Annotated[
        str,
        typer.Argument(
            help="A folder of `p2l-engine log export`, the output of `p2l-engine batch`, a table (.parquet, .csv, .jsonl) with "
            "the columns model and propensity, or a matrix of scores (prompt, model, score; or RouterBench's columns)."
        ),
    ],
    policy: Annotated[Path, typer.Option(help="YAML file of policies by name.", show_default=False)],
    feedback: Annotated[
        str | None, typer.Option(help="Feedback on the decisions. Default: feedback.parquet of an export.", show_default=False)
    ] = None,
    scores: Annotated[
        str | None,
        typer.Option(help="Scores of answers instead: prompt, model, score; or decision, score.", show_default=False),
    ] = None,
    reward: Annotated[
        RewardKind | None,
        typer.Option(help="Which feedback counts. Default: scores where there are any, else preferences.", show_default=False),
    ] = None,
    column: VoteColumn = None,
    csv_escape: CsvEscape = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write everything that was found to this file.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write a row for each policy and estimator to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw cost and value into this file (.png, .svg, .pdf).")] = None,
    catalog: CatalogFile = None,
    leave_out: LeaveOut = False,
    checkpoint: Checkpoint = None,
    device: Device = None,
    dtype: Dtype = None,
    date: Date = None,
) -> None:
    """Judge other policies on logged decisions: what each would have earned and cost, with intervals."""
    check_writable(as_json, "--json")
    check_writable(csv, "--csv")
    check_writable(plot, "--plot", PLOTS)
    if feedback is not None and scores is not None:
        raise typer.BadParameter("give feedback or scores, not both", param_hint="--scores")
    from p2l_engine.catalog import Catalog
    from p2l_engine.jsonable import to_json
    from p2l_engine.replay.compare import replay as judge
    from p2l_engine.replay.engines import Engines
    from p2l_engine.replay.policies import read_policies
    from p2l_engine.replay.read import read_log
    from p2l_engine.replay.report import csv_text
    from p2l_engine.tables.atomic import write_file

    if plot is not None:  # now: a missing package must not fail a command whose work is done
        from p2l_engine.replay.plot import plane

    def load(name: str | None) -> Engine:
        return load_engine(name or checkpoint, device, dtype, date)

    def compute(engine: Engine, prompts: Sequence[tuple[str, ...]]) -> Coefficients:
        with progress(len(prompts)) as advance:
            return engine.coefficients(prompts, advance)

    policies = read_policies(policy)
    costs = None if catalog is None else Catalog.from_yaml(catalog)
    with status("reading the log"):
        logged = read_log(log, feedback, scores, None if reward is None else reward.value, csv_escape, column)
    report = judge(logged, policies, Engines(load, compute, costs), leave_out)
    if as_json is not None:
        write_json(to_json(report), as_json)
    if csv is not None:
        write_file(csv, csv_text(report))
        note(f"wrote {csv}")
    if plot is not None:
        plane(report, plot)
        note(f"wrote {plot}")
    _show(report)


def _show(report: ReplayReport) -> None:
    from p2l_engine.cli.table import print_table

    exact = any(of.verdict == "exact" for of in report.policies)
    what = "mean score" if report.of == "score" else "win rate against the log's choices"
    kind = "prompts of a matrix" if exact else f"decisions, {report.with_reward:,} with feedback"
    title = f"{report.rows:,} {kind}; value: {what}; ± {report.level:.0%} intervals"
    columns = ("policy", "value", "cost", "effective", "verdict")
    print_table(title, columns, [_row(of) for of in report.policies], out(), dense=True)
    if units := {of.unit for of in report.policies if of.unit is not None and not of.cost}:
        note(f"costs with ~ are those expected by a policy's catalog, in {' or '.join(sorted(units))}")
    print_table("shares of its choices", ("policy", "model", "share"), _shares(report.policies), out(), dense=True)
    for of in report.policies:
        for reason in of.reasons:
            note(f"{of.name}: refused: {reason}", warning=True)
        for warning in of.warnings:
            note(f"{of.name}: {warning}", warning=True)
    if not exact:
        if report.with_reward < report.rows:
            note(
                f"{report.rows - report.with_reward:,} decisions have no feedback: whether it came is taken to depend on "
                "neither the model nor the answer, given the prompt"
            )
        if report.estimated:
            note(f"{report.estimated:,} of {report.rows:,} propensities are estimates, of draws of the coefficients")
        if report.real_costs < report.with_cost:
            note(f"{report.with_cost - report.real_costs:,} of {report.with_cost:,} costs are expected ones, not spent")
    for reason, count in report.left_out.items():
        note(f"left out: {count:,} {reason}")


def _row(of: PolicyReplay) -> tuple[str, ...]:
    from p2l_engine.replay.report import shown_figure

    value, cost = shown_figure(of.value), shown_figure(of.cost)
    expected = "" if of.expected_cost is None else f"~{of.expected_cost:.4g}"
    effective = "" if of.effective_rows is None else f"{of.effective_rows:,.0f}"
    return of.name, _text(value, ".4f"), _text(cost, ".4g") or expected, effective, of.verdict


def _text(figure: Figure | None, form: str) -> str:
    return "" if figure is None else f"{figure.value:{form}} ±{(figure.high - figure.low) / 2:.2g}"


def _shares(policies: Sequence[PolicyReplay]) -> list[tuple[str, str, str]]:
    """The largest shares of each policy."""
    rows = []
    for of in policies:
        largest, rest = list(of.shares.items())[:SHARES], len(of.shares) - SHARES
        found = [(name, f"{share:.1%}") for name, share in largest]
        if rest > 0:
            found.append((f"{rest} more", f"{max(1 - sum(share for _, share in largest), 0.0):.1%}"))
        rows += [(of.name if i == 0 else "", *row) for i, row in enumerate(found)]
    return rows

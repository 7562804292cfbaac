"""p2l-engine lengths."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from p2l_engine.cli.inputs import (
    CatalogFile,
    CsvEscape,
    Date,
    Device,
    Dtype,
    VoteColumn,
    check_writable,
    load_engine,
    load_router,
    write_json,
)
from p2l_engine.cli.progress import progress
from p2l_engine.cli.terminal import note, out, status
from p2l_engine.tables.limits import MAX_DROPPED

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt

    from p2l_engine.engine import Engine
    from p2l_engine.evaluation.spent import HeldBudget
    from p2l_engine.learning.answers import LeftOut, LoggedAnswers
    from p2l_engine.learning.length_report import LengthReport

    Float32 = npt.NDArray[np.float32]

FIGURES = {
    "absolute_error": "mean absolute error",
    "root_mean_square": "root mean square error",
    "deviance": "Poisson deviance",
    "ratio": "predicted / observed",
}


def lengths(
    checkpoint: Annotated[str, typer.Argument(help="Folder, name on the hub, or built-in name, such as builtin/llmrouter-9.")],
    log: Annotated[
        str,
        typer.Option(
            help="Answers to learn from: a table (.parquet, .csv, .jsonl; or a folder, glob or URI of such files) with the "
            "columns prompt, model, completion_tokens and, if known, latency_s; or the folder that 'log export' has written."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the new checkpoint; missing or empty.")],
    column: VoteColumn = None,
    csv_escape: CsvEscape = None,
    max_dropped: Annotated[float, typer.Option(min=0, max=1, help="The share of rows that may be invalid.")] = MAX_DROPPED,
    budget: Annotated[
        float | None,
        typer.Option(
            help="A mean cost of a prompt: also say by what such a budget over a batch is to be divided to be kept by what "
            "answers really cost. Takes prompts that all models of the catalog with answers have answered."
        ),
    ] = None,
    catalog: CatalogFile = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
    bootstrap: Annotated[int, typer.Option(min=2, help="Number of bootstrap samples for the intervals.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the folds and of the bootstrap.")] = 0,
    cache: Annotated[bool, typer.Option(help="Keep hidden states of prompts in the user's cache folder.")] = True,
    device: Device = None,
    dtype: Dtype = None,
    date: Date = None,
) -> None:
    """Learn how many tokens each model writes for a prompt, and how long it takes, and write a checkpoint that expects it.

    Costs of routing then depend on the prompt, where the catalog has prices for tokens. The figures are of prompts that were
    not learned from: the error of the predicted mean, beside that of each model's mean.
    """
    check_writable(as_json, "--json")
    if catalog is not None and budget is None:
        raise typer.BadParameter("expected --budget, which it is for", param_hint="--catalog")
    from p2l_engine import arguments
    from p2l_engine import checkpoint as checkpoints
    from p2l_engine.checkpoint.rewrite import check_target
    from p2l_engine.evaluation.spent import answered
    from p2l_engine.jsonable import to_json
    from p2l_engine.learning import hidden, write
    from p2l_engine.learning.answers import read_answers
    from p2l_engine.learning.length_report import FOLDS, LEAST_ANSWERS, LEAST_CONVERSATIONS, fitted, length_report
    from p2l_engine.votes import conversations

    if budget is not None:
        budget = arguments.finite_number("--budget", budget, "a number above 0", lambda each: each > 0)
    engine = load_engine(checkpoint, device, dtype, date)
    check_target(engine.folder, output)
    answers, left = read_answers(log, engine.models, column, max_dropped, csv_escape)
    _say(left)
    answers = _readable(engine, answers)
    if budget is not None:  # now: what it lacks must not fail a command whose work is done
        with load_router(engine, catalog, leave_out=True) as router:
            answered(router, answers.mean_tokens())
    with progress(len(answers.prompts)) as advance:
        prompts = [list(turns) for turns in answers.prompts]
        states = hidden.hidden_states(engine, prompts, hidden.cache_folder() if cache else None, advance)
    observed = {"tokens": answers.observed("tokens"), "seconds": answers.observed("seconds")}
    few = observed["seconds"]
    if len(few) < LEAST_ANSWERS or len(set(conversations(few)[few.prompt].tolist())) < LEAST_CONVERSATIONS:
        note(f"{len(few):,} answers with a latency: too few to learn seconds from", warning=True)
        del observed["seconds"]
    with progress(FOLDS * len(observed), "parts") as advance:
        reports = {name: length_report(name, states, of, bootstrap, seed, advance) for name, of in observed.items()}
    rows = {name: fitted(states, of).rows() for name, of in observed.items()}
    with status("writing"):
        record = {"answers": len(answers), "prompts": len(answers.prompts)}
        write.write_lengths(checkpoints.load(checkpoint, date), output, rows, record)
    _show(list(reports.values()))
    if unseen := [name for name in engine.models if name not in reports["tokens"].models]:
        note(
            f"no answers of {', '.join(unseen)}: expected to be as long as the others' on average, and to cost what the "
            "catalog says",
            warning=True,
        )
    for name, report in reports.items():
        if report.gain["deviance"].low <= 0:
            note(f"{name}: prompts of this log say no more of them than each model's mean does", warning=True)
    _check_prices(engine)
    note(f"wrote {output}")
    figures = {name: to_json(report) for name, report in reports.items()}
    if budget is not None:
        figures["budget"] = to_json(
            _held(load_engine(str(output), device, dtype, date), catalog, answers, states, budget, seed)
        )
    if as_json:
        write_json(figures, as_json)


def _held(
    engine: Engine, catalog: Path | None, answers: LoggedAnswers, states: Float32, budget: float, seed: int
) -> HeldBudget:
    """By what the budget is to be divided, said."""
    from p2l_engine.evaluation.spent import held_budget
    from p2l_engine.learning.length_report import crossed

    with load_router(engine, catalog, leave_out=True) as router:
        with progress(len(answers.prompts)) as advance:
            coefficients = engine.coefficients([list(turns) for turns in answers.prompts], advance)
        _, expected = crossed(states, answers.observed("tokens"), seed)
        found = held_budget(router, coefficients, expected, answers.mean_tokens(), budget)
        unit = router.catalog.unit
    shown = "as it is" if found.factor == 1 else f"divided by {found.factor:.3g}, as {found.holds:.4g} {unit}"
    of = f"{found.prompts:,} prompts that {len(found.models)} models have answered"
    note(f"a budget of {budget:g} over a batch is kept {shown}, on {of}")
    return found


def _say(left: LeftOut) -> None:
    for line in left.dropped.lines():
        note(f"dropped {line}", warning=True)
    for why, count in left.skipped.most_common():
        note(f"skipped {count:,} {why}")
    if left.unknown:
        names = ", ".join(sorted(left.unknown)[:8])
        note(f"skipped {left.unknown.total():,} answers of models that the checkpoint does not know: {names}", warning=True)


def _readable(engine: Engine, answers: LoggedAnswers) -> LoggedAnswers:
    """Without the answers to prompts that the template or the tokenizer refuses, which are counted."""
    _, problems = engine.encoder.encode_each([list(turns) for turns in answers.prompts])
    if not problems:
        return answers
    first = min(problems)
    kept = answers.without(set(problems))
    note(
        f"dropped {len(answers) - len(kept):,} answers to {len(problems):,} prompts that cannot be read (the first: "
        f"{problems[first]})",
        warning=True,
    )
    return kept


def _show(reports: Sequence[LengthReport]) -> None:
    from p2l_engine.cli.table import print_table

    for report in reports:
        models = [(name, f"{of.answers:,}", f"{of.mean:,.4g}") for name, of in report.models.items()]
        print_table(f"{report.quantity} that were learned from", ("model", "answers", "mean"), models, out())
        lines = []
        for name, shown in FIGURES.items():
            of = (report.before[name], report.after[name], report.gain.get(name))
            cells = ("" if each is None else f"{each.value:,.4g} ({each.low:,.4g} to {each.high:,.4g})" for each in of)
            lines.append((shown, *cells))
        print_table(
            f"{report.quantity} of {report.answers:,} answers to {report.prompts:,} prompts, each predicted from the others, "
            "with 95% intervals",
            ("", "each model's mean", "predicted mean", "less by"),
            lines,
            out(),
        )


def _check_prices(engine: Engine) -> None:
    """Says so where the checkpoint's catalog has no prices for tokens."""
    from p2l_engine.catalog import Catalog

    file = engine.folder / "catalog.yaml"
    if file.is_file() and not any(model.per_token for model in Catalog.from_yaml(file).models):
        note("catalog.yaml has no prices for tokens: costs depend on the prompt only with usd_per_m_in and usd_per_m_out")

"""p2l-engine adapt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from p2l_engine.cli.adapted import catalog_with, note_written, show, with_votes, write_learned
from p2l_engine.cli.inputs import PROMPT_FILE, CsvEscape, Date, Device, Dtype, Sources, VoteColumn, vote_columns
from p2l_engine.cli.progress import progress
from p2l_engine.cli.terminal import note, status
from p2l_engine.tables.limits import MAX_DROPPED

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from p2l_engine.engine import Engine
    from p2l_engine.votes import Votes

LEARNING = "Learning"  # heading of options in the help


def adapt(
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            help="Folder, name on the hub, or built-in name, such as builtin/llmrouter-9. Default: the default checkpoint."
        ),
    ] = None,
    votes: Annotated[
        str | None,
        typer.Option(
            help="Votes, or scores of several models, to learn from: a table (.parquet, .csv, .jsonl), a folder, glob or URI "
            "of such files, or a data set on the hub. Models that the checkpoint lacks are added."
        ),
    ] = None,
    target: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write; it must not exist yet, or be empty.")
    ] = None,
    models: Annotated[
        Path | None,
        typer.Option(
            help="YAML file on the new models, 'models: {NAME: {like: KNOWN, prior_rating: NUMBER, cost: NUMBER}}', each key "
            "if wanted, and 'ratings: {KNOWN: NUMBER}', which say what a rating means.",
            rich_help_panel=LEARNING,
        ),
    ] = None,
    learned: Annotated[
        Path | None,
        typer.Option(
            help="Instead of votes: what a service learned from its feedback, the folder of serve.learn.state or a file that "
            "Learner.save wrote. The checkpoint is the one that it began with.",
            show_default=False,
        ),
    ] = None,
    drop: Annotated[
        list[str] | None,
        typer.Option(help="Retire this model: its row is left out; may be repeated.", rich_help_panel=LEARNING),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help=f"Prompts that say how your prompts vary; few votes learn more with them: {PROMPT_FILE}.",
            rich_help_panel=LEARNING,
        ),
    ] = None,
    known_votes: Annotated[
        float | None,
        typer.Option(
            min=1,
            help="How many votes the row of a trained model counts for, against the new votes on it. Default: 36,000.",
            show_default=False,
            rich_help_panel=LEARNING,
        ),
    ] = None,
    sources: Sources = None,
    column: VoteColumn = None,
    csv_escape: CsvEscape = None,
    max_dropped: Annotated[float, typer.Option(min=0, max=1, help="The share of rows that may be invalid.")] = MAX_DROPPED,
    cache: Annotated[bool, typer.Option(help="Keep hidden states of prompts in the user's cache folder.")] = True,
    device: Device = None,
    dtype: Dtype = None,
    date: Date = None,
) -> None:
    """Add models to a checkpoint, and update those that it has, from votes or scores; its backbone stays as it is."""
    if target is None:
        raise typer.BadParameter("expected a folder to write", param_hint="--output")
    if votes is None and models is None and learned is None and not drop:
        raise typer.BadParameter(
            "expected votes, what a service learned, descriptions of new models or a model to drop", param_hint="--votes"
        )
    for name, given_too in (("--votes", votes), ("--models", models), ("--prompts", prompts), ("--known-votes", known_votes)):
        if learned is not None and given_too is not None:
            raise typer.BadParameter(f"cannot be combined with {name}: adapt what it wrote, afterwards", param_hint="--learned")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise typer.BadParameter(
            f"expected a folder that does not exist yet, or an empty one, got {target}", param_hint="--output"
        )
    from p2l_engine.learning.new_models import Descriptions

    described = Descriptions() if models is None else Descriptions.read(models)
    with status("loading"):
        import numpy as np
        import torch

        from p2l_engine import checkpoint as checkpoints
        from p2l_engine.catalog import Catalog
        from p2l_engine.checkpoint.rewrite import check_target
        from p2l_engine.engine import Engine
        from p2l_engine.learning import hidden, names, write
        from p2l_engine.learning.adapt import adapt as learn
        from p2l_engine.learning.rows import KNOWN_VOTES
        from p2l_engine.votes import Votes, prompts_hash
        from p2l_engine.votes.by_source import read_within

        loaded = checkpoints.load(checkpoint, date)
    if loaded.theta_map is not None:
        raise ValueError(
            f"{loaded.folder}: calibrated by a monotone map (calibration.json), behind which rows cannot be learned: adapt the "
            "checkpoint it came from, and calibrate that again, or calibrate with linear maps alone (--map)"
        )
    check_target(loaded.folder, target)
    file = loaded.folder / "catalog.yaml"
    if file.is_file():
        Catalog.from_yaml(file)  # now: it must not fail a command whose work is done
    if learned is not None:
        write_learned(loaded, target, learned, drop or [])
        return
    unknown = sorted(set(drop or []) - set(loaded.models))
    if unknown:
        raise typer.BadParameter(f"expected some of {', '.join(loaded.models)}, got {', '.join(unknown)}", param_hint="--drop")
    nothing = np.zeros(0, np.int64)
    given = Votes.make([], loaded.models, nothing, nothing, nothing, nothing)
    if votes is not None:
        columns = vote_columns(column)
        given, dropped = read_within(
            votes, sources, loaded.feedback, columns, max_dropped, answers_once=True, csv_escape=csv_escape
        )
        for line in dropped.lines():
            note(f"dropped {line}", warning=True)
    retired = write.retired_models(loaded.folder)
    listed = [model.name for model in described.models]
    found = [name for name in given.models if name not in loaded.models and name not in listed]
    names.check_new([*listed, *found], loaded.models, retired)
    engine = Engine(loaded, device, dtype)
    given = _readable(engine, given)
    names.check_connected(given, loaded.models, loaded.feedback)
    reference = _reference(prompts, column, csv_escape)
    store = hidden.cache_folder() if cache else None
    every = [*given.prompts, *reference]
    with progress(len(every)) as advance:
        states = hidden.hidden_states(engine, [list(turns) for turns in every], store, advance)
    mean_theta = _mean_theta(loaded.head, states)
    new = described.as_new_models(loaded.models, mean_theta)
    new += type(described)(tuple(_described(name) for name in found)).as_new_models(loaded.models, mean_theta)
    adapted = learn(
        loaded.head, loaded.models, loaded.feedback, given, states[: len(given.prompts)], new, loaded.uncertainty, states,
        KNOWN_VOTES if known_votes is None else known_votes,
    )  # fmt: skip
    record = {"votes": len(given), "prompts": len(given.prompts), "new": list(adapted.new), "prompts_hash": prompts_hash(given)}
    if len(given) and any(same.get("prompts_hash") == record["prompts_hash"] for same in write.learned(loaded.folder)):
        note(
            "votes on the same prompts were learned from before: if they are the same votes, they count twice now", warning=True
        )
    costs = {model.name: model.cost for model in described.models if model.cost is not None}
    catalog = catalog_with(file, costs, adapted.models, adapted.new, drop or []) if file.is_file() else None
    write.write(loaded, target, adapted.head, adapted.models, adapted.uncertainty, drop or (), record, catalog)
    if len(given):
        show(adapted, given, states[: len(given.prompts)], loaded.feedback, torch.from_numpy)
    for name in adapted.new:
        if name not in with_votes(given):
            note(f"{name} has no votes: its row is what the prior says", warning=True)
    note_written(adapted.uncertainty, target)


def _described(name: str) -> Any:
    from p2l_engine.learning.new_models import Described

    return Described(name)


def _readable(engine: Engine, votes: Votes) -> Votes:
    """Without the votes on prompts that the template or the tokenizer refuses, which are counted."""
    import numpy as np

    _, problems = engine.encoder.encode_each([list(turns) for turns in votes.prompts])
    if not problems:
        return votes
    refused = np.isin(votes.prompt, list(problems))
    first = min(problems)
    note(
        f"dropped {int(refused.sum()):,} votes on {len(problems):,} prompts that cannot be read (the first: {problems[first]})",
        warning=True,
    )
    return votes.where(~refused)


def _reference(prompts: str | None, column: str | None, csv_escape: str | None) -> list[tuple[str, ...]]:
    if prompts is None:
        return []
    from p2l_engine.cli.prompts import PromptFile
    from p2l_engine.prompts.parse import user_turns

    return [tuple(user_turns(prompt, i)) for i, prompt in enumerate(PromptFile.read(prompts, column, csv_escape).prompts)]


def _mean_theta(head: Any, states: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """[M]: over these hidden states, or at the mean of none, 0."""
    import numpy as np

    middle = states.mean(0, dtype=np.float64) if len(states) else np.zeros(states.shape[1])
    m = head.n_models
    found: npt.NDArray[np.float64] = head.weight[:m].double().numpy() @ middle + head.bias[:m].double().numpy()
    return found

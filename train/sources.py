"""Score tables of several sources as one: python -m p2l_engine.train.sources POOL.yaml --data FOLDER -o OUT.parquet.

The table has the columns prompt, task, model, score and source. Training reads it with ``sources: source``: scores compare
within one source only, since two sources grade differently.

Prompts of different sources that differ in case, white space, quotes and the marks of a sentence alone are one prompt, spelled
as in the first source. Operators, brackets and marks within numbers tell prompts apart: 12 + 3 is not 12 * 3. Within a source
no spelling is changed, since there any mark may be what is asked (a sokoban board, a program). Splits by hash keep all texts of
the same letters and digits in one part.
"""

from __future__ import annotations

import io
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from pydantic import BaseModel, ConfigDict, Field, field_validator
from rich.console import Console
from rich.table import Table as TextTable

from p2l_engine.tables.atomic import write_file
from p2l_engine.tables.turns import cell_turns
from p2l_engine.tables.whole import Table, read_table
from p2l_engine.train.definition import Definition
from p2l_engine.train.spelling import spelling
from p2l_engine.votes.scores import SCORES, score_matrix

COLUMNS = ("prompt", "task", "model", "score", "source")
ALL = "all"  # the total's row, where sources are counted


class SourceOptions(BaseModel):
    """One source. path: relative to the data's folder. origin, license: for the model card. within: columns within whose values
    alone scores compare, such as the judge. names: as in ``Pool``, for this source; it comes first."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    origin: str
    license: str
    within: list[str] = []
    names: dict[str, list[str]] = {}


class Pool(Definition):
    """What is pooled. names: for each model the other names under which sources have it; models of other names, other versions
    among them, are other models. leave_out: models. min_prompts: models with fewer prompts that they share with another model
    are left out."""

    sources: Annotated[dict[str, SourceOptions], Field(min_length=1)]
    names: dict[str, list[str]] = Field(default_factory=dict)
    leave_out: list[str] = Field(default_factory=list)
    min_prompts: Annotated[int, Field(ge=1)] = 1

    @field_validator("sources")
    @classmethod
    def _named(cls, sources: dict[str, SourceOptions]) -> dict[str, SourceOptions]:
        if wrong := [name for name in sources if not name or name == ALL or "/" in name]:
            raise ValueError(f"expected names without '/', other than {ALL!r}, got {', '.join(map(repr, wrong))}")
        return sources


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """One score. group: the source, and the values of its columns ``within``."""

    prompt: tuple[str, ...]
    task: str
    model: str
    score: float
    group: str


def pool(options: Pool, data: Path) -> tuple[list[ScoreRow], dict[str, int]]:
    """The scores of all sources, and the models that were left out with the number of prompts that they share with another.

    Raises ValueError for a row that is invalid, a second score of a model, or a second task, on a prompt within a source, for a
    name of ``names`` or ``leave_out`` that no source has, and for a source of which no row is left.
    """
    canonical = _canonical("names", options.names)
    found: dict[str, list[ScoreRow]] = {}
    seen: set[str] = set()
    for name, source in options.sources.items():
        of_source: set[str] = set()
        own = _canonical(f"sources.{name}.names", source.names)
        found[name] = _rows(name, source, data, canonical | own, of_source)
        if unknown := sorted(set(own) - of_source):
            raise ValueError(f"sources.{name}.names: expected models of the source, found none named {', '.join(unknown)}")
        seen |= of_source
    known = {row.model for rows in found.values() for row in rows}
    if unknown := sorted(set(canonical) - seen | set(options.leave_out) - known):
        raise ValueError(f"names, leave_out: expected models of the sources, found none named {', '.join(unknown)}")
    rows = [row for row in _spelled_alike(found) if row.model not in options.leave_out]
    rows, left_out = _connected(rows, options.min_prompts)
    if empty := sorted(set(options.sources) - {source_of(row) for row in rows}):
        raise ValueError(
            f"sources: no row of {', '.join(empty)} is left, without the models of leave_out and those that share under "
            f"min_prompts = {options.min_prompts:,} prompts with another: expected some; leave the source out"
        )
    return rows, left_out


def _canonical(where: str, names: Mapping[str, list[str]]) -> dict[str, str]:
    """The name of a model by each of its other names."""
    if repeated := [name for name, count in Counter(n for others in names.values() for n in others).items() if count > 1]:
        raise ValueError(f"{where}: expected each name of a source once, got twice {', '.join(sorted(repeated))}")
    return {other: name for name, others in names.items() for other in others}


def source_of(row: ScoreRow) -> str:
    """The row's source, without the values of its columns ``within``."""
    return row.group.split("/")[0]


def _spelled_alike(found: Mapping[str, list[ScoreRow]]) -> list[ScoreRow]:
    """The rows of all sources, in which prompts of different sources with the same ``spelling`` are as in the first. Texts of
    which one source has several are left alone."""
    spelled: dict[tuple[str, ...], tuple[str, ...]] = {}
    rows: list[ScoreRow] = []
    for of_source in found.values():
        own: defaultdict[tuple[str, ...], set[tuple[str, ...]]] = defaultdict(set)
        for prompt in {row.prompt for row in of_source}:
            own[tuple(map(spelling, prompt))].add(prompt)
        alike = {prompts.pop(): key for key, prompts in own.items() if len(prompts) == 1}
        shared = {prompt: spelled.setdefault(key, prompt) for prompt, key in alike.items()}
        rows += [replace(row, prompt=shared.get(row.prompt, row.prompt)) for row in of_source]
    return rows


def _rows(name: str, source: SourceOptions, data: Path, canonical: Mapping[str, str], seen: set[str]) -> list[ScoreRow]:
    """The rows of one source. Adds the names of its models, as it has them, to ``seen``."""
    table = read_table(data / source.path, {*COLUMNS[:4], *source.within}).with_numbers_as_text({"prompt"})
    if missing := [column for column in (*SCORES, *source.within) if column not in table.columns]:
        raise ValueError(f"{table.shown}: expected the columns {', '.join(missing)}; it has {', '.join(table.names)}")
    given = table.columns["model"]
    seen.update(model for model in given if isinstance(model, str))
    _check_names(table, source.within, canonical)
    table = replace(table, columns={**table.columns, "model": [canonical.get(model, model) for model in given]})
    groups: dict[str, list[int]] = {}
    for i, values in enumerate(zip([name] * len(table), *(table.columns[column] for column in source.within), strict=True)):
        groups.setdefault("/".join(map(str, values)), []).append(i)
    found = []
    for group, of in groups.items():
        part = table.take(of)
        prompts, models, scores = score_matrix(part, complete=False)
        for p, m in np.argwhere((scores < 0) | (scores > 1))[:1].tolist():
            raise ValueError(
                f"{table.shown}: score: expected 0 to 1, since equal ones are a tie from 0.5 up, got {scores[p, m]:g} of "
                f"{models[m]!r} on {prompts[p][0][:60]!r}"
            )
        kinds = part.columns.get("task", [None] * len(part))
        tasks: dict[tuple[str, ...], str] = {}
        for i, (cell, kind) in enumerate(zip(part.columns["prompt"], kinds, strict=True)):
            task = f"{name}/{str(kind).removeprefix(f'{name}/')}" if kind else name
            if (first := tasks.setdefault(cell_turns(cell), task)) != task:
                raise ValueError(f"{part.located(i)}: task: expected the prompt's first one, {first!r}, got {task!r}")
        found += [
            ScoreRow(prompts[p], tasks[prompts[p]], models[m], float(scores[p, m]), group)
            for p, m in np.argwhere(np.isfinite(scores)).tolist()
        ]
    return found


def _check_names(table: Table, within: Sequence[str], canonical: Mapping[str, str]) -> None:
    """Raises ValueError where two names of one model have scores on the same prompt."""
    first: dict[tuple[str, ...], str] = {}
    cells = zip(*(table.columns[column] for column in ("model", "prompt", *within)), strict=True)
    for i, (model, *where) in enumerate(cells):
        name = canonical.get(model, model)
        if (other := first.setdefault((str(name), *map(repr, where)), model)) != model:
            raise ValueError(
                f"{table.located(i)}: names: {other!r} and {model!r} are both {name!r}, and have a score each on this prompt: "
                "expected other versions under names of their own"
            )


def _connected(rows: list[ScoreRow], least: int) -> tuple[list[ScoreRow], dict[str, int]]:
    """Without the models that share fewer than ``least`` prompts with another model that stays."""
    left_out: dict[str, int] = {}
    while True:
        on: defaultdict[tuple[tuple[str, ...], str], list[str]] = defaultdict(list)
        for row in rows:
            on[row.prompt, row.group].append(row.model)
        prompts: dict[str, set[tuple[str, ...]]] = {row.model: set() for row in rows}
        for (prompt, _), models in on.items():
            if len(models) > 1:
                for model in models:
                    prompts[model].add(prompt)
        few = {model: len(prompts[model]) for model in prompts if len(prompts[model]) < least}
        if not few:
            return rows, left_out
        left_out |= few
        rows = [row for row in rows if row.model not in few]


def write(rows: list[ScoreRow], path: Path) -> None:
    """Writes the table as parquet, byte-identical for equal rows."""
    ordered = sorted(rows, key=lambda row: (row.group, row.prompt, row.model))
    text = {turns: json.dumps(turns, ensure_ascii=False) for turns in {row.prompt for row in ordered}}
    columns = {
        "prompt": [text[row.prompt] for row in ordered],
        "task": [row.task for row in ordered],
        "model": [row.model for row in ordered],
        "score": pa.array([row.score for row in ordered], pa.float64()),
        "source": [row.group for row in ordered],
    }
    stream = io.BytesIO()
    pq.write_table(pa.table(columns), stream, compression="zstd")
    write_file(path, stream.getbuffer())


def counts(rows: list[ScoreRow], options: Pool) -> dict[str, tuple[str, str, str]]:
    """Numbers of prompts, models and scores by source, and of all."""
    parts = {name: [row for row in rows if source_of(row) == name] for name in options.sources}
    return {
        name: (f"{len({row.prompt for row in part}):,}", f"{len({row.model for row in part}):,}", f"{len(part):,}")
        for name, part in (parts | {ALL: rows}).items()
    }


def card(rows: list[ScoreRow], options: Pool) -> str:
    """The sources with their licences as a table in Markdown, for a model card."""
    lines = ["| source | licence | prompts | models | scores |", "|---|---|---|---|---|"]
    of = counts(rows, options)
    lines += [
        f"| [{name}]({source.origin}) | {source.license} | {' | '.join(of[name])} |" for name, source in options.sources.items()
    ]
    return "\n".join([*lines, f"| all | | {' | '.join(of[ALL])} |", ""])


def summary(rows: list[ScoreRow], options: Pool, left_out: Mapping[str, int]) -> TextTable:
    """Prompts, models and scores by source, and the models that were left out."""
    table = TextTable("source", "license", "prompts", "models", "scores", title="Pooled scores")
    for name, found in counts(rows, options).items():
        table.add_row(name, options.sources[name].license if name in options.sources else "", *found)
    if left_out:
        table.caption = (
            f"left out, as they share under {options.min_prompts:,} prompts with another model: {len(left_out)} models: "
            + ", ".join(f"{name} ({count:,})" for name, count in sorted(left_out.items()))
        )
    return table


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    definition: Annotated[Path, typer.Argument(metavar="POOL.yaml", help="Which sources, and under which names.")],
    data: Annotated[Path, typer.Option(help="The folder of the sources' files.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The parquet file to write.")],
    card_file: Annotated[
        Path | None, typer.Option("--card", help="Also write the sources with their licences here, for a model card.")
    ] = None,
) -> None:
    """Pools score tables of several sources into one table to train on."""
    try:
        if not output.parent.is_dir():
            raise ValueError(f"--output: expected a file in a folder that exists, got {output}")
        options = Pool.load(definition)
        with Console(stderr=True).status(f"reading {len(options.sources)} sources"):
            rows, left_out = pool(options, data)
        write(rows, output)
        if card_file is not None:
            write_file(card_file, card(rows, options))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    Console().print(summary(rows, options, left_out))
    print(f"wrote {output}")


if __name__ == "__main__":
    app()

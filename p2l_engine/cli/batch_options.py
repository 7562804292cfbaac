"""The options of p2l-engine batch."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from p2l_engine.batch.config import KEPT_BYTES
from p2l_engine.cli.inputs import BudgetScope

READING, DECIDING, RUN, CLUSTER = "Reading", "Deciding", "Running", "Ray"  # headings in the help


class Floats(StrEnum):
    """Types that coefficients are stored in."""

    FLOAT16 = "float16"
    FLOAT32 = "float32"


class Formats(StrEnum):
    """Formats of the output's files."""

    PARQUET = "parquet"
    JSONL = "jsonl"
    CSV = "csv"


class WriteAs(StrEnum):
    """Requests that rows are written as."""

    OPENAI_BATCH = "openai-batch"


class SplitBy(StrEnum):
    """Columns that split the output."""

    MODEL = "model"


class Errors(StrEnum):
    """What an invalid row costs."""

    ROW = "row"
    STOP = "stop"


class Explore(StrEnum):
    """Ways to explore."""

    THOMPSON = "thompson"


InputsArgument = Annotated[
    list[str],
    typer.Argument(
        help="Files (.parquet, .csv, .jsonl; the last two also compressed as .gz or .zst), folders and globs, or URIs "
        "such as s3://bucket/folder."
    ),
]
OutputOption = Annotated[
    str, typer.Option("--output", "-o", help="Folder or URI for the results: files of parts, in the order of the input.")
]
PlainTextOption = Annotated[
    bool,
    typer.Option("--plain-text", help="Never parse a prompt as a JSON list of turns.", rich_help_panel=READING),
]
PartitionsOption = Annotated[
    bool,
    typer.Option(
        "--partitions/--no-partitions",
        help="Whether folders such as lang=en/ are columns.",
        rich_help_panel=READING,
    ),
]
KeepOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Input column to copy to the output; may be repeated; '' for none. Default: all columns.",
        show_default=False,
        rich_help_panel=READING,
    ),
]
StrictOption = Annotated[
    bool,
    typer.Option("--strict", help="The same as --errors stop.", rich_help_panel=READING),
]
ErrorsOption = Annotated[
    Errors | None,
    typer.Option(
        help="What to do with a row that cannot be routed or kept: row, say why in its column error; stop, end the run. "
        "Default: row.",
        show_default=False,
        rich_help_panel=READING,
    ),
]
BudgetOption = Annotated[
    float | None,
    typer.Option(help="Upper bound on the expected cost, in the catalog's unit.", rich_help_panel=DECIDING),
]
BudgetScopeOption = Annotated[
    BudgetScope,
    typer.Option(help="Apply the budget to each row's cost, or to the mean cost of all rows.", rich_help_panel=DECIDING),
]
PriceOption = Annotated[
    float | None,
    typer.Option(
        help="Instead of a budget: the dual price of an earlier run's budget (win rate per unit of cost).",
        show_default=False,
        rich_help_panel=DECIDING,
    ),
]
MaxShareOption = Annotated[
    list[str] | None,
    typer.Option(
        help="NAME=SHARE: send at most this share of the rows to a model. May be repeated.",
        rich_help_panel=DECIDING,
    ),
]
MinShareOption = Annotated[
    list[str] | None,
    typer.Option(
        help="NAME=SHARE: send at least this share of the rows to a model. May be repeated.",
        rich_help_panel=DECIDING,
    ),
]
OpponentOption = Annotated[
    list[str] | None,
    typer.Option(
        help="NAME=WEIGHT: a model that win rates are measured against. May be repeated; the weights sum to 1. "
        "Default: all models of the checkpoint, equally.",
        show_default=False,
        rich_help_panel=DECIDING,
    ),
]
SeedOption = Annotated[int, typer.Option(help="Seed for drawing a model where a policy mixes two.", rich_help_panel=DECIDING)]
ExploreOption = Annotated[
    Explore | None,
    typer.Option(
        help="Draw each row's coefficients from their posterior, where the checkpoint has one; adds the columns propensity "
        "and propensity_error.",
        show_default=False,
        rich_help_panel=DECIDING,
    ),
]
DrawOption = Annotated[
    str | None,
    typer.Option(
        help="Kept input column, such as an id, by which rows with equal prompts are drawn independently. Default: alike.",
        show_default=False,
        rich_help_panel=DECIDING,
    ),
]
SourceOption = Annotated[
    bool,
    typer.Option(
        "--source/--no-source", help="Write where each row comes from: source_file and source_row.", rich_help_panel=RUN
    ),
]
OutputFormatOption = Annotated[
    Formats | None,
    typer.Option(
        "--format",
        help="Format of the output's files. Default: parquet; with --as, jsonl.",
        show_default=False,
        rich_help_panel=RUN,
    ),
]
SplitByOption = Annotated[
    SplitBy | None,
    typer.Option(
        help="Write each model's rows into files of their own, and rows with an error into files named errors-.",
        show_default=False,
        rich_help_panel=RUN,
    ),
]
WriteAsOption = Annotated[
    WriteAs | None,
    typer.Option(
        "--as",
        help="Write the rows as requests of OpenAI's batch API, which can be submitted; with --split-by model.",
        show_default=False,
        rich_help_panel=RUN,
    ),
]
CoefficientsOption = Annotated[
    Floats | None,
    typer.Option(help="Also write each row's theta and eta, rounded to this type.", show_default=False, rich_help_panel=RUN),
]
RestartOption = Annotated[
    bool,
    typer.Option("--restart", help="Delete an earlier run from the output folder and start again.", rich_help_panel=RUN),
]
RowsPerPartOption = Annotated[
    int,
    typer.Option(
        min=1, help="Rows of one output file. A file is the unit of work that a resumed run repeats.", rich_help_panel=RUN
    ),
]
StateOption = Annotated[
    str | None,
    typer.Option(
        help="Local folder for the run's coefficients. Default: OUT.run, beside the output OUT.",
        show_default=False,
        rich_help_panel=RUN,
    ),
]
KeepCoefficientsOption = Annotated[
    bool | None,
    typer.Option(
        "--keep-coefficients/--no-keep-coefficients",
        help="Keep the coefficients when the run is complete, so that another budget needs no forward pass. Default: up to "
        f"{KEPT_BYTES >> 30} GiB.",
        show_default=False,
        rich_help_panel=RUN,
    ),
]
TokensPerBatchOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Tokens in one forward pass. Default: 4,096 on a CPU, 32,768 on a GPU.",
        show_default=False,
        rich_help_panel=RUN,
    ),
]
RayOption = Annotated[
    str | None,
    typer.Option(
        help="Compute coefficients on a Ray cluster: auto, HOST:PORT, or local to start one on this machine.",
        show_default=False,
        rich_help_panel=CLUSTER,
    ),
]
RayWorkersOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Number of workers. Default: one for each GPU, or one for each node if there is no GPU.",
        show_default=False,
        rich_help_panel=CLUSTER,
    ),
]

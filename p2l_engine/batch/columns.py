"""The columns of an output: its own, and which of the input's can stand beside them."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable, Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from p2l_engine.batch.config import BatchConfig
from p2l_engine.batch.output import check_format, not_for_spark
from p2l_engine.batch.sources import SOURCE_COLUMNS

logger = logging.getLogger(__name__)

OUTPUT_COLUMNS = (
    "model",
    "policy",
    "expected_cost",
    "win_rate",
    "score",
    "expected_tokens",
    "expected_seconds",
    "kept",
    "theta",
    "eta",
    "deviation",
    "error",
)
USAGE = ("expected_tokens", "expected_seconds")  # where the checkpoint has learned how long answers are
KEPT = "kept"  # where the checkpoint has a shrinkage: the share of the differences between models that was kept
EXPLORED = ("propensity", "propensity_error")  # further ones where the router explores


def own_columns(explores: bool) -> tuple[str, ...]:
    """The columns of decisions. explores: whether the router does."""
    return (*OUTPUT_COLUMNS, *(EXPLORED if explores else ()))


def check_columns(config: BatchConfig, kept: pa.Schema, own: tuple[str, ...], where: str) -> None:
    """Refuses kept columns that the format cannot hold, and those named like the output's own: capital letters tell no columns
    apart in Spark and DuckDB; and a column to draw by that is not kept, or has no texts. Says which columns Spark cannot read.
    own: see ``own_columns``. where: the input, for messages. Raises ValueError."""
    _check_writable(where, kept)
    check_format(config.format, kept)
    own = (*own, *(SOURCE_COLUMNS if config.source else ()))
    taken = [name for name in kept.names if name.casefold() in own]
    if taken:
        source = any(name.casefold() in SOURCE_COLUMNS for name in taken)
        raise ValueError(
            f"keep: the output has columns of its own named {', '.join(taken)}: name the ones to keep, or none (--keep '')"
            + ("; --no-source leaves out source_file and source_row" if source else "")
        )
    alike = sorted(alike_names(kept))
    if alike and config.write_as is None:
        logger.warning(
            "kept names that differ in capital letters alone, which Spark does not open and DuckDB renames: %s; --keep names "
            "the columns to keep", ", ".join(alike),
        )  # fmt: skip
    if config.draw is not None:
        if config.draw not in kept.names:
            raise ValueError(f"draw: expected one of the columns {', '.join(kept.names)}, got {config.draw!r}")
        as_texts(kept.empty_table(), config.draw)
    if config.format == "parquet" and config.write_as is None:
        if config.coefficients == "float16":
            logger.info("coefficients: rounded to float16 and written as float32, since Spark reads no float16")
        unread = not_for_spark(kept)
        if unread:
            logger.info("kept columns that Spark reads from no parquet, with --format jsonl as text: %s", ", ".join(unread))


def alike_names(fields: Iterable[pa.Field], place: str = "") -> Iterator[str]:
    """Names that differ in capital letters alone, of columns and of the keys within each: ``id and ID``."""
    fields, known = list(fields), dict[str, list[str]]()
    for field in fields:
        known.setdefault(field.name.casefold(), []).append(f"{place}{field.name}")
        kind = field.type
        inner = [kind.field(i) for i in range(kind.num_fields)] if pa.types.is_nested(kind) else []
        if pa.types.is_struct(kind):
            yield from alike_names(inner, f"{place}{field.name}.")
        else:  # a list's item and a map's key and value have no names of the user's
            for each in inner:
                yield from alike_names([each.with_name(field.name)], place)
    yield from (" and ".join(names) for names in known.values() if len(names) > 1)


def _check_writable(where: str, schema: pa.Schema) -> None:
    """Refuses what parquet cannot store: empty objects, and lists nested too deeply."""
    written = io.BytesIO()
    try:
        pq.write_table(schema.empty_table(), written)
        pq.read_table(written)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{where}: a column cannot be written to parquet: {error}; leave it out with --keep") from None


def as_texts(table: pa.Table, column: str) -> list[str | None]:
    """A column as texts. Raises ValueError for one of lists or objects."""
    try:
        found: list[str | None] = pc.cast(table.column(column), pa.string()).to_pylist()
    except pa.ArrowException as error:
        raise ValueError(f"draw: {column}: expected texts or numbers: {error}") from None
    return found

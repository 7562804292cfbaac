"""Routes batches of rows inside other data pipelines, such as Ray Data and Spark."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from p2l_engine.batch.blocks import Block, turns_of
from p2l_engine.batch.columns import own_columns
from p2l_engine.batch.config import check_decision_options
from p2l_engine.batch.decide import Decider
from p2l_engine.batch.deduplicator import Deduplicator, locate
from p2l_engine.catalog import Catalog
from p2l_engine.chooser import Explore
from p2l_engine.constraints import Constraints
from p2l_engine.engine import Engine
from p2l_engine.opponents import Opponents
from p2l_engine.router import Router
from p2l_engine.routing import Objective
from p2l_engine.tables.layouts import PromptColumn
from p2l_engine.tables.nested import split_column

Columns = Mapping[str, npt.NDArray[Any]]


class Route:
    """Routes batches of rows: a callable class for Ray Data's ``map_batches``, Spark's ``predict_batch_udf`` (docs/clusters.md)
    and other pipelines.

    All arguments can be pickled; the checkpoint is loaded where the object is made, once per worker. checkpoint: a folder, a
    hub or built-in name, or None for the default. catalog: a catalog, its file, or None for the checkpoint's own. column,
    plain_text: as in ``BatchConfig``. budget: upper bound on each row's expected cost. price: instead of a budget, see
    ``BatchConfig``. coefficients: also return theta and eta, in this type. device, dtype, tokens_per_batch, date:
    as in ``Engine.from_pretrained``. opponents, objective, seed, unmatched, explore: as in ``Router``; draw: as in
    ``BatchConfig``, a column of the batch. Raises
    what those raise; ValueError for options out of range; InfeasibleBudget for a budget below the cheapest model.
    """

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        catalog: Catalog | str | Path | None = None,
        *,
        column: str = "prompt",
        plain_text: bool = False,
        budget: float | None = None,
        price: float | None = None,
        coefficients: Literal["float16", "float32"] | None = None,
        opponents: Opponents = "uniform",
        objective: Objective = "bt",
        seed: int = 0,
        explore: Explore | None = None,
        draw: str | None = None,
        unmatched: Literal["error", "leave_out"] = "error",
        device: str | None = None,
        dtype: str | None = None,
        tokens_per_batch: int | None = None,
        date: str | None = None,
    ) -> None:
        check_decision_options(budget, price, coefficients)
        engine = Engine.from_pretrained(checkpoint, device, dtype, tokens_per_batch, date)
        if not isinstance(catalog, Catalog):
            catalog = Catalog.from_yaml(engine.folder / "catalog.yaml" if catalog is None else catalog)
        self.router = Router(engine, catalog, opponents, seed, unmatched, objective, explore=explore)
        self.draw = draw
        self.column, self.plain_text = column, plain_text
        self.budget, self.price, self.coefficients = budget, price, coefficients
        if not self.router.costs_vary:
            self.router.solve(np.zeros((1, len(self.router.names))), Constraints(budget))  # refuses an infeasible budget now

    def __call__(self, batch: Columns) -> dict[str, npt.NDArray[Any]]:
        """The columns of the batch [n] and those of ``p2l-engine batch``: model, policy (a list of {model, probability} per
        row), expected_cost, win_rate, score, expected_tokens and expected_seconds where the checkpoint expects them, kept where
        it has a shrinkage, optionally theta [n, M], eta [n] and deviation [n, M], and error.

        In a row that cannot be routed, error says why, numbers are NaN and other values None. Raises ValueError where the batch
        has no column of prompts, or a column with a name of the result's.
        """
        where = PromptColumn(*split_column(self.column, list(batch)))
        for name, column in (("column", where.column), ("draw", self.draw)):
            if column is not None and column not in batch:
                raise ValueError(f"{name}: expected one of {', '.join(batch) or 'none'}, got {column!r}")
        taken = [name for name in batch if name in own_columns(self.router.explore is not None)]
        if taken:
            raise ValueError(f"batch: the result has columns of its own named {', '.join(taken)}: rename or drop them")
        prompts = [turns_of(_without_arrays(cell), self.plain_text, where) for cell in batch[where.column]]
        block = Deduplicator().add(Block(0, 0, prompts, pa.table({})))
        engine, new = self.router.engine, block.new_prompts
        outputs = next(engine.outputs_of([new])).outputs if new else np.empty((0, engine.width), np.float32)
        decider = Decider(
            self.router, lambda references: outputs[locate(references)[1]], self.budget, self.price, self.coefficients
        )
        tokens = None if self.draw is None else [None if value is None else str(value) for value in batch[self.draw]]
        table = decider.decide(block, tokens=tokens).table
        return {**batch, **{name: _array(table.column(name)) for name in table.column_names}}


def _without_arrays(value: Any) -> Any:
    """A cell with nested arrays as lists, and NaN, which is pandas' missing text, as None."""
    if isinstance(value, np.ndarray | list):
        return [_without_arrays(item) for item in value]
    if isinstance(value, dict):
        return {name: _without_arrays(item) for name, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _array(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    if pa.types.is_fixed_size_list(column.type):
        width, flat = column.type.list_size, column.combine_chunks()
        rows = np.full((len(flat), width), np.nan, column.type.value_type.to_pandas_dtype())
        rows[flat.is_valid().to_numpy(zero_copy_only=False)] = flat.flatten().to_numpy().reshape(-1, width)
        return rows
    if pa.types.is_list(column.type):
        out = np.empty(len(column), object)
        out[:] = column.to_pylist()
        return out
    return np.asarray(column.to_numpy())

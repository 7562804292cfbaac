"""A worker of somebody else's pipeline: batches of columns in, the same rows with their decisions out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from p2l_engine.batch.blocks import Block, turns_of
from p2l_engine.batch.config import check
from p2l_engine.batch.decide import OURS, Decider
from p2l_engine.batch.deduplicator import Distinct, split
from p2l_engine.catalog import Catalog
from p2l_engine.engine import Engine
from p2l_engine.router import Opponents, Router
from p2l_engine.routing import Objective

Columns = Mapping[str, npt.NDArray[Any]]


class Route:
    """Routes batches of rows: for Ray Data's ``map_batches``, Spark's ``predict_batch_udf`` (docs/clusters.md), or alone.

    All arguments can be pickled; the checkpoint is loaded when a worker makes its own object. checkpoint: a folder, a hub name,
    or None for the built-in default. catalog: one, its file, or None for the checkpoint's own. column and
    plain_text: as in ``Asked``. budget: for each prompt; or price: of an earlier run's budget (see ``Asked``).
    coefficients: give theta and eta too, in this type. device, dtype ("float32", "bfloat16"), tokens_per_batch: as in
    ``Engine``; the rest as in ``Router``. Raises what those raise.
    """

    def __init__(
        self,
        checkpoint: str | None = None,
        catalog: Catalog | str | None = None,
        *,
        column: str = "prompt",
        plain_text: bool = False,
        budget: float | None = None,
        price: float | None = None,
        coefficients: Literal["float16", "float32"] | None = None,
        opponents: Opponents = "uniform",
        objective: Objective = "bt",
        seed: int = 0,
        unmatched: Literal["error", "leave_out"] = "error",
        device: str | None = None,
        dtype: str | None = None,
        tokens_per_batch: int | None = None,
    ) -> None:
        check(budget, price, coefficients)
        if dtype not in (None, "float32", "bfloat16"):
            raise ValueError(f"dtype: expected 'float32' or 'bfloat16', got {dtype!r}")
        engine = Engine.from_pretrained(checkpoint, device, getattr(torch, dtype) if dtype else None, tokens_per_batch)
        if not isinstance(catalog, Catalog):
            catalog = Catalog.from_yaml(catalog or engine.folder / "catalog.yaml")
        self.router = Router(engine, catalog, opponents, seed, unmatched, objective)
        self.column, self.plain_text = column, plain_text
        self.budget, self.price, self.coefficients = budget, price, coefficients
        self.router.solve(np.zeros((1, len(self.router.names))), budget)  # what no prompt can have is refused now

    def __call__(self, batch: Columns) -> dict[str, npt.NDArray[Any]]:
        """The columns of the batch [n], and those of ``p2l-engine batch``: model, policy (a list of {model, probability} each),
        expected_cost, win_rate, score, theta [n, M] and eta where asked for, error. Where a row cannot be routed, error says
        why, its numbers are NaN and the rest is None. Raises ValueError where the prompts' column is not there, or a column of
        the batch has a name of those.
        """
        if self.column not in batch:
            raise ValueError(f"column: expected one of {', '.join(batch) or 'none'}, got {self.column!r}")
        taken = [name for name in batch if name in OURS]
        if taken:
            raise ValueError(f"batch: the result has columns of its own named {', '.join(taken)}: rename or drop those")
        prompts = [turns_of(_plain(prompt), self.plain_text) for prompt in batch[self.column]]
        unit = Distinct().unit(Block(0, 0, prompts, pa.table({})))
        engine = self.router.engine
        found = next(engine.outputs_of([unit.new])).outputs if unit.new else np.empty((0, engine.head.width), np.float32)
        decider = Decider(
            self.router, lambda references: found[split(references)[1]], self.budget, self.price, self.coefficients
        )
        table = decider.decide(unit).table
        return {**batch, **{name: _array(table.column(name)) for name in table.column_names}}


def _plain(value: Any) -> Any:
    """Nested arrays as lists, and what pandas makes of nothing as None."""
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value]
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

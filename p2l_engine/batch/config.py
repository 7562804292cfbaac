"""The options of a batch run. Importing this module loads neither torch nor pyarrow."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from p2l_engine.tables.quotes import check_escape
from p2l_engine.tables.storage import shown

if TYPE_CHECKING:
    from p2l_engine.constraints import Constraints, Shares
    from p2l_engine.routing.problem import Scope
    from p2l_engine.tables.layouts import PromptColumn

ROWS_PER_PART = 8192
MAX_ROWS_PER_PART = (1 << 20) - 1
FormatName = Literal["parquet", "jsonl", "csv"]  # of the output
KEPT_BYTES = 1 << 30  # of coefficients that a finished run keeps unless it is told otherwise


@dataclass(frozen=True, slots=True)
class BatchConfig:
    """The options of one batch run. Raises ValueError for values out of range.

    Input:
        inputs: paths, URIs, folders and globs of parquet, csv and jsonl files (csv and jsonl also as .gz and .zst).
        column: the column of prompts, also one within another (``body.messages``); None: ``prompt``, or what the files' layout
            says (see ``tables.layouts``).
        plain_text: treat text as one user turn even where it is a JSON list.
        partitions: whether folders such as ``lang=en/`` are columns.
        csv_escape: what escapes quotes in csv files, such as a backslash; None for doubled quotes. See ``tables.quotes``.
        strict: stop at the first row that cannot be routed.

    Decisions:
        budget, budget_scope, max_share, min_share: as in ``Router.route_batch``. The batch is all rows that can be routed.
        draw: where the router explores, the kept column by whose text rows with equal prompts are drawn independently (None:
            they are drawn alike).
        price: instead of a budget, the win rate that one unit of cost must gain: the dual price of an earlier run's batch
            budget, which is in the metadata of its parts.

    Output:
        output: a folder or its URI.
        keep: input columns that the output repeats (None: all except the prompts).
        source: also write each row's ``source_file`` (see ``sources.source_names``) and ``source_row``, from 0.
        format: of the parts.
        split_by: "model": each model's rows in files of their own, and rows without a model in files named errors-.
        write_as: "openai-batch": requests of OpenAI's batch API, in files of jsonl for each model (see ``request_files``),
            instead of rows; with split_by "model".
        coefficients: also write theta and eta, rounded to this type.
        rows_per_part: rows of one output part, 1 to 1,048,575. A part is computed and resumed as a whole; parts of long
            prompts have fewer rows.
        state: local folder for coefficients (None: OUT.run beside the output OUT, which must then be local).
        keep_coefficients: whether coefficients stay when the run is complete, so that other decisions need no forward pass
            (None: if they have at most ``KEPT_BYTES``, or an earlier run of this output was asked to keep them).
    """

    inputs: Sequence[str | Path]
    output: str | Path
    column: str | PromptColumn | None = None
    plain_text: bool = False
    partitions: bool = True
    csv_escape: str | None = None
    keep: Sequence[str] | None = None
    source: bool = True
    format: FormatName = "parquet"
    split_by: Literal["model"] | None = None
    write_as: Literal["openai-batch"] | None = None
    budget: float | None = None
    budget_scope: Scope = "prompt"
    price: float | None = None
    max_share: Shares = field(default_factory=dict)
    min_share: Shares = field(default_factory=dict)
    coefficients: Literal["float16", "float32"] | None = None
    strict: bool = False
    draw: str | None = None
    state: str | Path | None = None
    rows_per_part: int = ROWS_PER_PART
    keep_coefficients: bool | None = None

    def __post_init__(self) -> None:
        if isinstance(self.inputs, str | os.PathLike) or not self.inputs:
            raise ValueError(f"inputs: expected a list of at least one path, got {self.inputs!r}")
        for name, folder in (("output", self.output), ("state", self.state)):
            if folder is not None and not os.fspath(folder):
                raise ValueError(f"{name}: expected a folder, got ''")
        if self.state is not None and "://" in os.fspath(self.state):
            raise ValueError(f"state: expected a local folder, got {shown(os.fspath(self.state))!r}")
        keep = list(self.keep or ())
        if not all(keep) or len(set(keep)) < len(keep):
            raise ValueError(f"keep: expected names of columns, each once, got {keep!r}")
        if self.draw is not None and self.keep is not None and self.draw not in self.keep:
            raise ValueError(f"draw: expected a column that is kept ({', '.join(keep) or 'none is'}), got {self.draw!r}")
        check_escape(self.csv_escape)
        check_decision_options(self.budget, self.price, self.coefficients)
        if self.price is not None and (self.max_share or self.min_share):
            raise ValueError("price: cannot be combined with max_share or min_share")
        if self.budget_scope not in ("prompt", "batch"):
            raise ValueError(f"budget_scope: expected 'prompt' or 'batch', got {self.budget_scope!r}")
        if self.format not in get_args(FormatName):
            raise ValueError(f"format: expected {' or '.join(get_args(FormatName))}, got {self.format!r}")
        if self.split_by not in (None, "model"):
            raise ValueError(f"split_by: expected 'model' or None, got {self.split_by!r}")
        if self.write_as not in (None, "openai-batch"):
            raise ValueError(f"write_as: expected 'openai-batch' or None, got {self.write_as!r}")
        if self.write_as is not None:
            if self.split_by != "model":
                raise ValueError(
                    "write_as: expected split_by 'model' with it (--split-by model): OpenAI takes one model in a file"
                )
            if self.format == "csv" or self.coefficients is not None:
                raise ValueError("write_as: requests are jsonl and have no coefficients: leave out format and coefficients")
        if not 1 <= self.rows_per_part <= MAX_ROWS_PER_PART:
            raise ValueError(f"rows_per_part: expected 1 to {MAX_ROWS_PER_PART:,}, got {self.rows_per_part!r}")

    @property
    def constraints(self) -> Constraints:
        """What the policies must satisfy."""
        from p2l_engine.constraints import Constraints  # here: the command line reads this module's constants

        return Constraints(self.budget, self.budget_scope, self.max_share, self.min_share)

    @property
    def over_batch(self) -> bool:
        """Whether the decision for a row depends on the other rows."""
        return bool((self.budget is not None and self.budget_scope == "batch") or self.max_share or self.min_share)


def check_decision_options(budget: float | None, price: float | None, coefficients: str | None) -> None:
    """Raises ValueError for options that ``BatchConfig`` and ``Route`` have in common."""
    if budget is not None and not (math.isfinite(budget) and budget >= 0):
        raise ValueError(f"budget: expected a finite number >= 0, got {budget!r}")
    if price is not None and not (math.isfinite(price) and price >= 0):
        raise ValueError(f"price: expected a finite number >= 0, got {price!r}")
    if price is not None and budget is not None:
        raise ValueError(f"price: cannot be combined with a budget, got budget {budget!r}")
    if coefficients not in (None, "float16", "float32"):
        raise ValueError(f"coefficients: expected float16 or float32, got {coefficients!r}")

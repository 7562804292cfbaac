"""A batch run's files and identity, checked before anything is computed."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pyarrow as pa

from p2l_engine.batch.columns import check_columns, own_columns
from p2l_engine.batch.config import BatchConfig
from p2l_engine.batch.contents import Content, contents, differences_of
from p2l_engine.batch.identity import Identity, of_coefficients, of_decisions
from p2l_engine.batch.manifest import read_manifest
from p2l_engine.batch.request_ids import CUSTOM_ID, check_ids
from p2l_engine.batch.run_folder import run_folder
from p2l_engine.batch.sources import source_names
from p2l_engine.router import Router
from p2l_engine.tables.chunked import kept_schema
from p2l_engine.tables.find import find
from p2l_engine.tables.layouts import prompt_column
from p2l_engine.tables.read_share import Told, untold
from p2l_engine.tables.storage import File, Location

Reading = Callable[[str, float], object]  # called with what is read, and how much of it, 0 to 1


@dataclass(frozen=True, slots=True)
class Job:
    """One run: its options, input files and what they hold, output folder, the run's own folder beside it (see ``run_folder``),
    the files' names in the output (see ``source_names``), the kept columns (None for a run that is finished), and what its
    coefficients and decisions depend on (see ``identity``)."""

    config: BatchConfig
    files: list[File]
    inputs: list[Content]
    output: Location
    run: Location
    sources: dict[str, str]
    schema: pa.Schema | None
    coefficients: Identity
    decisions: Identity

    @classmethod
    def of(cls, config: BatchConfig, router: Router, compute: str, reading: Reading) -> Job:
        """Finds the files. compute: see ``compute_signature``. reading: see ``runner.run``.

        Raises ValueError for inputs that cannot be read, or overlap with the output, and columns that the output cannot hold;
        InfeasibleBudget or Infeasible for bounds that no prompts can meet.
        """
        files = find(config.inputs, partitions=config.partitions, csv_escape=config.csv_escape)
        output = Location.of(config.output)
        run = run_folder(output)
        for location in (*map(Location.of, config.inputs), *(file.location for file in files)):
            if location.holds(output) or output.holds(location) or run.holds(location):
                raise ValueError(
                    f"output: {output.shown} and the input {location.shown}: expected neither within the other, since parts "
                    "would be read as prompts; name another folder"
                )
        if config.state is None and not output.is_local:
            raise ValueError(f"state: expected a local folder where the output is not local ({output.shown}), got None")
        state = None if config.state is None else Location.of(config.state)
        if state is not None and os.path.exists(state.path) and not os.path.isdir(state.path):
            raise ValueError(f"state: expected a folder, got the file {state.shown}; name another one")
        if state is not None and output.holds(state):
            raise ValueError(
                f"state: expected a folder outside of the output {output.shown}, which readers of tables open whole, got "
                f"{state.shown}"
            )
        nothing = np.zeros((1, len(router.names)))
        router.solve(nothing, config.constraints, nothing[0] if router.costs_vary else None)
        prompts = prompt_column(files, config.column, config.plain_text)
        config = replace(config, column=prompts)
        sources = source_names(files) if config.source or config.write_as else {}
        before = read_manifest(output, run)
        inputs = contents(files, () if before is None else before.inputs, partial(reading, "hashing inputs"))
        coefficients = of_coefficients(config, prompts, router.engine, inputs, compute)
        decisions = of_decisions(config, router, list(sources.values()), [file.partitions for file in files])
        job = cls(config, files, inputs, output, run, sources, None, coefficients, decisions)
        if before is not None and before.complete and before.is_of(coefficients, decisions):
            return job
        schema = job.kept_schema(partial(reading, "finding the types of kept columns"))
        check_columns(config, schema, own_columns(router.explore is not None), files[0].shown)
        if config.write_as is not None and CUSTOM_ID in schema.names:
            told = partial(reading, f"checking that each {CUSTOM_ID} is another")
            check_ids(
                files,
                prompts.column,
                schema.field(CUSTOM_ID),
                sources,
                told,
            )
        return replace(job, schema=schema)

    def kept_schema(self, told: Told = untold) -> pa.Schema:
        """The kept columns. Reads the rows of jsonl files, unless they are known; told: see ``chunked.kept_schema``."""
        if self.schema is not None:
            return self.schema
        prompts = prompt_column(self.files, self.config.column, self.config.plain_text)
        return kept_schema(self.files, prompts.column, self.config.keep, told)

    def changed_inputs(self) -> list[str]:
        """One line for each of the files that is not what it was when the run began. Files that came later are none of them."""
        try:
            return differences_of(self.inputs, contents(self.files, self.inputs))
        except ValueError as error:  # such as a file that was removed
            return [f"inputs: changed: {error}"]

"""A batch run's files and identity, checked before anything is computed."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from p2l_engine.batch.config import BatchConfig
from p2l_engine.batch.identity import differences, file_versions, identity
from p2l_engine.batch.run_folder import run_folder
from p2l_engine.batch.sources import source_names
from p2l_engine.router import Router
from p2l_engine.tables.chunked import kept_schema
from p2l_engine.tables.find import find, find_each
from p2l_engine.tables.layouts import prompt_column
from p2l_engine.tables.storage import File, Location

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Job:
    """One run: its options, input files, output folder, the run's own folder beside it (see ``run_folder``), the files' names
    in the output (see ``source_names``), all that the output depends on (see ``identity``), and the kept columns."""

    config: BatchConfig
    files: list[File]
    output: Location
    run: Location
    sources: dict[str, str]
    identity: dict[str, Any]
    schema: pa.Schema

    @classmethod
    def of(cls, config: BatchConfig, router: Router, compute: str) -> Job:
        """Finds the files. compute: see ``compute_signature``.

        Raises ValueError for inputs that cannot be read, or overlap with the output, and InfeasibleBudget or Infeasible for
        bounds that no prompts can meet.
        """
        each, output = find_each(config.inputs), Location.of(config.output)
        files = [file for of_one in each for file in of_one]
        run = run_folder(output)
        for location in (*map(Location.of, config.inputs), *(file.location for file in files)):
            if location.holds(output) or output.holds(location) or run.holds(location):
                raise ValueError(
                    f"output: {output.shown} and the input {location.shown}: expected neither within the other, since parts "
                    "would be read as prompts; name another folder"
                )
        if config.state is None and not output.is_local:
            raise ValueError(f"state: expected a local folder where the output is not local ({output.shown}), got None")
        nothing = np.zeros((1, len(router.names)))
        router.solve(nothing, config.constraints, nothing[0] if router.costs_vary else None)
        prompts = prompt_column(files, config.column, config.plain_text)
        schema = kept_schema(files, prompts.column, config.keep)
        config = replace(config, column=prompts)
        sources = source_names(config.inputs, each) if config.source or config.write_as else {}
        found = identity(config, router, files, compute) | {"sources": list(sources.values())}
        if config.write_as is not None:
            found["provider_names"] = router.catalog.provider_names
        return cls(config, files, output, run, sources, found, schema)

    def check_inputs_unchanged(self) -> None:
        """Raises ValueError where an input file is not the one that the run began with."""
        files = find(self.config.inputs, logger.debug)
        changed = differences({"inputs": self.identity["inputs"]}, {"inputs": file_versions(files)})
        if changed:
            raise ValueError(f"{'; '.join(changed)}: changed while it was read; run again with --restart")

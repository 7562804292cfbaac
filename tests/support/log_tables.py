"""Tables of logged decisions, as files."""

from __future__ import annotations

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq


def table(path, **columns):
    """A file of these columns, in the format of its name."""
    n = len(next(iter(columns.values())))
    rows = [{name: values[i] for name, values in columns.items()} for i in range(n)]
    if path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(columns))
            writer.writeheader()
            writer.writerows(
                {name: json.dumps(of) if isinstance(of, dict | list) else of for name, of in row.items()} for row in rows
            )
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def entries(**policy):
    """A policy as a cell has it."""
    return [{"model": model, "probability": p} for model, p in policy.items()]

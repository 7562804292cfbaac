"""Input files for batch runs, and readers and checks of their output."""

from __future__ import annotations

import gzip
import io
import json

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

PROMPTS = [f"question {i % 60} " + "so " * (i % 11) for i in range(150)]  # with repetitions


def write(path, prompts=PROMPTS, **more):
    """Writes prompts and a column ``id`` in the format of the file name's ending, and returns the path as text."""
    columns = {"id": [f"row {i}" for i in range(len(prompts))], "prompt": prompts} | more
    table, name = pa.table(columns), str(path)
    if name.endswith(".parquet"):
        pq.write_table(table, path, row_group_size=40)
        return name
    text = io.BytesIO()
    if ".csv" in name:
        pa.csv.write_csv(table, text)
    else:
        text.write("".join(json.dumps(row) + "\n" for row in table.to_pylist()).encode())
    compress = {"gz": gzip.compress, "zst": lambda data: pa.compress(data, "zstd", asbytes=True)}
    path.write_bytes(compress.get(name.rsplit(".", 1)[1], bytes)(text.getvalue()))
    return name


def output(folder):
    """All rows of a run's parts, or None without parts."""
    parts = sorted(folder.glob("part-*.parquet"))
    return pa.concat_tables([pq.read_table(part) for part in parts]) if parts else None


def contents(folder):
    """The bytes of each file in a folder."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def manifest(folder):
    """The manifest of the run whose output is a folder; None if there is none."""
    path = folder.with_name(f"{folder.name}.run") / "manifest.json"
    return json.loads(path.read_text()) if path.exists() else None


def assert_routed_as(rows, decisions):
    """Output rows hold these decisions."""
    assert len(rows) == len(decisions)
    for row, d in zip(rows, decisions, strict=True):
        assert row["model"] == d.model
        assert {part["model"]: part["probability"] for part in row["policy"]} == pytest.approx(d.policy, abs=1e-4)
        for name in ("expected_cost", "win_rate", "score"):
            assert row[name] == pytest.approx(getattr(d, name), abs=1e-4)
        assert row["error"] is None

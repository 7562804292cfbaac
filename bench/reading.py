"""Reading files of prompts: CPU seconds for a gigabyte to find the types of kept columns, and to read the rows, in each format.

Rows have a prompt of 80 words, an id, a text, a truth value, and (not in csv) an object with a list. Each figure is the median
of the rounds: python -m bench.reading
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from p2l_engine.tables.chunked import kept_schema, read_rows
from p2l_engine.tables.find import find
from p2l_engine.tables.storage import File


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000, help="of each file")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        for path in write(Path(folder), options.rows):
            (file,) = find([path])
            types = cpu(partial(kept_schema, [file], "prompt"), options.rounds)
            rows = cpu(partial(read, file, kept_schema([file], "prompt")), options.rounds)
            size = file.size / 1e9
            print(f"{path.suffix[1:]} ({size:.3f} GB): types {types / size:.2f} s/GB, rows {rows / size:.2f} s/GB")


def read(file: File, schema: pa.Schema) -> int:
    """The number of its rows."""
    return sum(len(rows.prompts) for rows in read_rows([file], "prompt", schema=schema))


def write(folder: Path, count: int) -> list[Path]:
    """The same rows as jsonl, csv and parquet."""
    rng, words = np.random.default_rng(0), np.array(["lorem", "ipsum", "dolor", "é", "a\n", "sit", "amet,"])
    rows: list[dict[str, Any]] = [
        {"id": i, "prompt": " ".join(rng.choice(words, 80)), "user": f"u{i % 1000}", "ok": True,
         "about": {"lang": "en", "score": float(rng.random()), "tags": ["a", "b"]}}
        for i in range(count)
    ]  # fmt: skip
    paths = [folder / f"in.{ending}" for ending in ("jsonl", "csv", "parquet")]
    paths[0].write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = pa.Table.from_pylist(rows)
    pa.csv.write_csv(table.drop_columns(["about"]), paths[1])
    pq.write_table(table, paths[2])
    return paths


def cpu(work: Callable[[], object], rounds: int) -> float:
    """Median CPU seconds."""
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return float(np.median(seconds))


if __name__ == "__main__":
    main()

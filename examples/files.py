"""A file of prompts to a file of decisions; the command line does the same: p2l-engine batch prompts.jsonl -o decisions."""

import json
import tempfile
from pathlib import Path

import pyarrow.parquet as pq

from p2l_engine import Catalog, Engine, Router
from p2l_engine.batch import BatchConfig, run

folder = Path(tempfile.mkdtemp())
rows = [{"id": i, "prompt": ["What is 17 * 23?", "Write a haiku about rain."][i % 2]} for i in range(6)] + [{"id": 6}]
(folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

engine = Engine.from_pretrained()
router = Router(engine, Catalog.from_yaml(engine.folder / "catalog.yaml"))
config = BatchConfig([str(folder / "prompts.jsonl")], str(folder / "decisions"), budget=0.0005, budget_scope="batch")
report = run(router, config)
print(f"{report.routed} of {report.rows} rows routed, {report.computed} different prompts computed, spend {report.spend:.4f}")
for row in pq.read_table(folder / "decisions").select(["id", "model", "expected_cost", "error"]).to_pylist():
    print(row)

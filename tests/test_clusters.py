"""The examples of docs/clusters.md, as they stand there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from p2l_engine import Engine, Router
from tests.support.catalogs import catalog

EXAMPLES = {
    re.search("pyspark|ray", code)[0]: code
    for code in re.findall(r"```python\n(.*?)```", Path("docs/clusters.md").read_text(encoding="utf-8"), re.DOTALL)
}
BUDGET = 1.5
PROMPTS = [None if i == 7 else f"question {i}" for i in range(60)]


@pytest.mark.parametrize("package", ["ray", "pyspark"])
def test_the_example_routes_as_the_router_routes(package, engine, tmp_path):
    pytest.importorskip(package)
    if package == "pyspark" and shutil.which("java") is None and "JAVA_HOME" not in os.environ:
        pytest.skip("Spark needs Java")
    shutil.copytree(engine.folder, tmp_path / "checkpoint")
    costs = "".join(f"  {model.name}: {{cost: {model.cost}}}\n" for model in catalog().models)
    (tmp_path / "catalog.yaml").write_text(f"models:\n{costs}")
    pq.write_table(pa.table({"id": range(60), "prompt": PROMPTS}), tmp_path / "prompts.parquet")
    # Ray's and Spark's workers have working folders of their own, and this checkpoint its own budgets.
    code = re.sub(r"(budget\W+)0\.3", rf"\g<1>{BUDGET}", EXAMPLES[package])
    code = re.sub(r'"(checkpoint|catalog\.yaml)"(?!:)', rf'"{tmp_path}/\1"', code)
    assert str(BUDGET) in code
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = sorted(pq.read_table(tmp_path / "decisions").to_pylist(), key=lambda row: row["id"])
    assert [row["prompt"] for row in rows] == PROMPTS
    assert "got nothing" in rows.pop(7)["error"]
    natural = Engine.from_pretrained(engine.folder, "cpu")  # as the examples have it: bfloat16, where the CPU multiplies that
    decisions = Router(natural, catalog()).route_batch([prompt for prompt in PROMPTS if prompt], BUDGET)
    assert np.mean([row["model"] == d.model for row, d in zip(rows, decisions, strict=True)]) > 0.9
    np.testing.assert_allclose([row["score"] for row in rows], [d.score for d in decisions], atol=0.2)
    np.testing.assert_allclose([row["expected_cost"] for row in rows], BUDGET)

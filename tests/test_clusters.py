"""Ray and Spark: output equal to one machine's, workers that die, and the examples of docs/clusters.md."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from p2l_engine import Engine, Router
from p2l_engine.batch import BatchConfig, Route, run
from p2l_engine.batch.blocks import blocks
from p2l_engine.batch.identity import compute_signature
from p2l_engine.checkpoint import fingerprint
from p2l_engine.engine import as_dtype
from p2l_engine.native.binding import isa
from p2l_engine.tables.chunked import read_rows
from p2l_engine.tables.find import find
from p2l_engine.tables.whole import read_table
from p2l_engine.votes import read
from tests.support.batch_files import contents
from tests.support.catalogs import catalog
from tests.support.command import p2l_engine
from tests.support.layouts import LAYOUTS, TALKS, TURNS, chat, write_jsonl

pytestmark = [pytest.mark.cluster, pytest.mark.xdist_group("clusters")]

DOCS = Path(__file__).parent.parent / "docs" / "clusters.md"
BUDGET = 1.5


@pytest.fixture(scope="module")
def ray_module():
    """Ray with one thread per worker: with other numbers of threads, the last bits of products differ on some CPUs. Its
    workers have low priority by default (nice 15), and would wait for the tests beside these."""
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_worker_niceness", "0")
        yield ray
    ray.shutdown()


@pytest.fixture
def ray(ray_module):
    """A connection to the one cluster of these tests, which has two CPUs."""
    if not ray_module.is_initialized():
        ray_module.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        ray_module.data.DataContext.get_current().enable_progress_bars = False
    return ray_module


@pytest.fixture(scope="module")
def spark():
    pytest.importorskip("pyspark", reason="PySpark is not installed")
    if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
        pytest.skip("Spark needs Java")
    from pyspark.sql import SparkSession

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYSPARK_PYTHON", sys.executable)
        patch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
        # Java compiles once, quickly: these jobs end before better code would pay.
        java = "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
        made = SparkSession.builder.master("local[1]").config("spark.driver.extraJavaOptions", java)
        session = made.config("spark.ui.enabled", "false").config("spark.sql.shuffle.partitions", 1).getOrCreate()
        yield session
        session.stop()


@pytest.fixture
def given(tmp_path, rng):
    """1,000 rows in 20 blocks, of which the first cannot be routed."""
    path = tmp_path / "in.parquet"
    prompts = [f"question {rng.integers(700)} " + "so " * int(rng.integers(20)) for _ in range(1000)]
    pq.write_table(pa.table({"id": range(1000), "prompt": [None, *prompts[1:]]}), path)
    return str(path)


@contextmanager
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def cluster(engine, checkpoint=None, **more):
    from p2l_engine.batch.ray import Cluster

    return Cluster(engine, str(checkpoint or engine.folder), device="cpu", dtype=torch.float32, **more)


def write_catalog(folder):
    costs = "".join(f"  {model.name}: {{cost: {model.cost}}}\n" for model in catalog().models)
    (folder / "catalog.yaml").write_text(f"models:\n{costs}")


@pytest.mark.parametrize("scope", ["prompt", "batch"])
def test_output_is_that_of_one_machine_even_if_a_worker_dies(scope, router, given, ray, tmp_path, monkeypatch):
    from tests.support.dying_workers import DiesOnce

    options = {"budget": BUDGET, "budget_scope": scope, "rows_per_part": 50}
    with one_thread():
        alone = run(router, BatchConfig([given], str(tmp_path / "one"), **options))
    monkeypatch.setattr("p2l_engine.batch.ray._Compute", DiesOnce)
    shutil.copytree(router.engine.folder, tmp_path / "checkpoint")
    with cluster(router.engine, tmp_path / "checkpoint", workers=2) as workers:
        report = run(router, BatchConfig([given], str(tmp_path / "ray"), **options), workers=workers)
    assert (tmp_path / "died").exists()
    assert contents(tmp_path / "ray") == contents(tmp_path / "one")
    assert (report.computed, report.rows, report.tokens) == (alone.computed, 1000, alone.tokens)


def test_an_interrupted_run_is_resumed_without_ray(router, given, ray, tmp_path):
    options = {"budget": BUDGET, "rows_per_part": 50}

    def stop(report):
        if report.rows >= 500:
            raise InterruptedError

    with cluster(router.engine) as workers, pytest.raises(InterruptedError):
        run(router, BatchConfig([given], str(tmp_path / "two"), **options), progress=stop, workers=workers)
    with one_thread():
        run(router, BatchConfig([given], str(tmp_path / "one"), **options))
        report = run(router, BatchConfig([given], str(tmp_path / "two"), **options))
    assert report.resumed >= 300
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_workers_whose_int8_is_of_another_instruction_set_stop_the_run(router, ray):
    from p2l_engine.batch.ray import Cluster, _Compute

    folder = router.engine.folder
    files, started = fingerprint.of_checkpoint(folder, router.engine.base), "cpu int8 on a PDP-11, 4096 tokens per batch"
    worker = _Compute(str(folder), "cpu", "torch.int8", 4096, None, files, started)
    with pytest.raises(
        ValueError, match=f"dtype: expected what the machine that started .*{started}, got cpu int8 .* use CPUs of one"
    ):
        worker.engine  # noqa: B018
    with Cluster(router.engine, str(folder), device="cpu", dtype="auto") as cluster:  # it has no figures
        assert cluster.compute == compute_signature("cpu", as_dtype(None, torch.device("cpu")), 4096)
    with Cluster(router.engine, str(folder), device="cpu", dtype="int8") as cluster:
        assert cluster.compute == f"cpu int8 on {isa()}, 4096 tokens per batch"


def test_workers_that_die_each_time_end_the_run(router, given, ray, tmp_path, monkeypatch):
    from tests.support.dying_workers import Dies

    monkeypatch.setattr("p2l_engine.batch.ray._Compute", Dies)
    with (
        cluster(router.engine) as workers,
        pytest.raises(RuntimeError, match="a worker died 4 times, perhaps for lack of memory"),
    ):
        run(router, BatchConfig([given], str(tmp_path / "out")), workers=workers)
    assert not json.loads((tmp_path / "out.run" / "manifest.json").read_text())["complete"]


def test_workers_with_another_checkpoint_are_refused(router, given, ray, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(router.engine.folder, other)
    weights = next(other.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    for checkpoint, message in ((other, f"differs from that of .*: {weights.name}"), (tmp_path / "none", "a hub name")):
        with cluster(router.engine, checkpoint) as workers, pytest.raises(ValueError, match=message):
            run(router, BatchConfig([given], str(tmp_path / "out")), workers=workers)
    for more, message in (({"workers": 0}, "workers: expected 1 to 2"), ({"workers": 3}, "workers: expected 1 to 2")):
        with pytest.raises(ValueError, match=message):
            cluster(router.engine, **more)


def test_workers_share_the_cpus_of_nodes_that_differ(ray):
    from p2l_engine.batch.ray import cpus_per_worker

    assert [cpus_per_worker([8], n) for n in (1, 2, 3, 8)] == [8, 4, 2, 1]
    assert [cpus_per_worker([2, 8], n) for n in (1, 2, 3, 4, 10)] == [8, 4, 2, 2, 1]
    assert cpus_per_worker([0, 4, 4], 2) == 4


def test_route_maps_the_batches_of_a_dataset(router, given, ray):
    arguments = {"catalog": catalog(), "budget": 1.5, "seed": 3, "device": "cpu", "dtype": "float32", "coefficients": "float32"}
    dataset = ray.data.read_parquet(given).limit(600)
    dataset.context.execution_options.preserve_order = True
    found = dataset.map_batches(
        Route,
        fn_constructor_kwargs={"checkpoint": str(router.engine.folder), **arguments},
        batch_size=256,
        compute=ray.data.ActorPoolStrategy(size=1),
    ).take_all()
    rows = pq.read_table(given).slice(0, 600).to_pylist()
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    decisions = router.route_batch([row["prompt"] for row in rows[1:]], 1.5)
    assert [row["model"] for row in found] == [None, *(d.model for d in decisions)]
    np.testing.assert_allclose([row["score"] for row in found[1:]], [d.score for d in decisions], atol=1e-4)
    assert "got nothing" in found[0]["error"]
    assert {part["model"] for part in found[1]["policy"]} == set(decisions[0].policy)


def test_times_and_types_that_spark_writes(spark, tmp_path):
    """INT96, Spark's default, beyond the years that fit in nanoseconds; an empty part; types that another day has otherwise."""
    from pyspark.sql import functions as F

    spark.conf.set("spark.sql.session.timeZone", "UTC")
    spark.conf.set("spark.sql.parquet.outputTimestampType", "INT96")
    texts = ["9999-12-31 23:59:59.999999", "0001-01-01 00:00:00", "1816-03-29 05:56:08.066277", "2024-02-29 12:00:00.000001"]
    votes = [(f"p{i}", "x", "y", "tie", i, text) for i, text in enumerate(texts)]
    frame = spark.createDataFrame(votes, "prompt string, model_a string, model_b string, winner string, id int, t string")
    frame = frame.withColumn("t", F.to_timestamp("t")).withColumn("o", F.struct(F.array("t").alias("l")))
    frame.repartition(3).write.parquet(f"{tmp_path}/one")
    frame.select("o", F.col("id").cast("long"), "t", "prompt").limit(0).write.parquet(f"{tmp_path}/none")
    frame.select("o", F.col("id").cast("double"), "prompt").write.parquet(f"{tmp_path}/two")
    rows, problems = [], 0
    for chunk in read_rows(find([f"{tmp_path}/one", f"{tmp_path}/none", f"{tmp_path}/two"]), "prompt", ["id", "t", "o"]):
        rows += chunk.kept.to_pylist()
        problems += len(chunk.problems)
    rows = sorted(rows, key=lambda row: (row["t"] is None, row["id"]))
    assert (len(rows), problems) == (8, 0)
    times = [datetime.fromisoformat(text) for text in texts]
    assert [row["t"].replace(tzinfo=None) if row["t"] else None for row in rows] == [*times, *[None] * 4]
    assert [row["o"]["l"][0].replace(tzinfo=None) for row in rows] == times * 2
    assert [row["id"] for row in rows] == [0, 1, 2, 3] * 2
    table = read_table(f"{tmp_path}/one", ["t", "winner"])
    assert sorted(time.replace(tzinfo=None) for time in table.columns["t"]) == sorted(times)
    assert len(read(f"{tmp_path}/one")[0]) == 4


def test_conversations_that_spark_writes_are_recognised(spark, tmp_path):
    """Structs as Spark infers them from jsonl, maps, and JSON in csv."""
    from pyspark.sql import functions as F

    for layout, (row_of, said) in LAYOUTS.items():
        write_jsonl(tmp_path / "in.jsonl", [row_of(talk, i) for i, talk in enumerate(TALKS)])
        frame = spark.read.json(f"{tmp_path}/in.jsonl").coalesce(1)
        column = said.partition(" ")[0].partition(".")[0]
        nested = [name for name in frame.columns if name.startswith((column, "conversation"))]
        as_text = frame.withColumns({name: F.to_json(name) for name in nested})
        for name, given_ in (("parquet", frame), ("json", frame), ("csv", as_text)):
            folder = f"{tmp_path}/{layout}.{name}"
            given_.write.format(name).options(**({"header": True, "escape": '"'} if name == "csv" else {})).save(folder)
            assert [turns for block in blocks(find([folder]), None) for turns in block.prompts] == TURNS
    maps = spark.createDataFrame([(chat(talk),) for talk in TALKS], "messages array<map<string,string>>")
    maps.coalesce(1).write.parquet(f"{tmp_path}/maps")
    assert [turns for block in blocks(find([f"{tmp_path}/maps"]), None) for turns in block.prompts] == TURNS


def test_spark_opens_the_output_as_it_is(spark, router, given, tmp_path):
    for name in ("parquet", "jsonl", "csv"):
        run(router, BatchConfig([given], str(tmp_path / name), coefficients="float16", format=name, rows_per_part=300))
    rows = pq.read_table(tmp_path / "parquet").to_pylist()
    frames = {
        "parquet": spark.read.parquet(str(tmp_path / "parquet")),
        "jsonl": spark.read.json(str(tmp_path / "jsonl")),
        "csv": spark.read.csv(str(tmp_path / "csv"), header=True, inferSchema=True, escape='"', multiLine=True),
    }
    for name, frame in frames.items():
        found = [row.asDict(recursive=True) for row in frame.orderBy("source_row").collect()]
        assert len(found) == len(rows) == 1000
        for row, expected in zip(found, rows, strict=True):
            assert {row["source_file"], expected["source_file"]} == {"in.parquet"}
            row["policy"] = json.loads(row["policy"] or "null") if name == "csv" else row["policy"]
            assert {key: row[key] for key in ("id", "source_row", "model", "error", "win_rate", "policy")} == {
                key: expected[key] for key in ("id", "source_row", "model", "error", "win_rate", "policy")
            }
        theta = found[1]["theta"] if name != "csv" else json.loads(found[1]["theta"])
        assert theta == pytest.approx(rows[1]["theta"], abs=1e-6)


def test_csv_and_partitions_of_spark_are_read_as_they_were_written(spark, tmp_path):
    """With quotes that a backslash escapes, its default, and folders that name columns."""
    texts = [
        'a "b"',
        '"',
        "\\",
        'a\\"',
        "C:\\new",
        "C:\\\\x",
        "x,\\",
        'x,\\\\"y',
        '"\n"',
        '",',
        "two\nlines",
        "a\rb",
        "",
        None,
        "é",
        "'",
        '""',
    ]
    places = ["en", None, "zh:Hans", "a/b", "100%", "x=y", "_u"]
    rows = [(f"{i}", text, places[i % len(places)], i % 2) for i, text in enumerate(texts)]
    frame = spark.createDataFrame(rows, "id string, prompt string, place string, _day int")
    frame.write.partitionBy("place", "_day").csv(str(tmp_path / "csv"), header=True)
    frame.write.partitionBy("place", "_day").parquet(str(tmp_path / "parquet"))
    names = ["id", "prompt", "place", "_day"]
    for folder in ("csv", "parquet"):
        found = read_table(tmp_path / folder, names, csv_escape="\\").columns
        read = sorted(zip(*(found[name] for name in names), strict=True), key=lambda row: int(row[0]))
        assert read == [(number, text, place, f"{day}") for number, text, place, day in rows]
    with pytest.raises(ValueError, match=r"row \d+: .*--csv-escape"):
        read_table(tmp_path / "csv", names)


@pytest.mark.parametrize("package", ["ray", "spark"])
def test_the_example_in_the_docs_gives_the_routers_decisions(package, engine, request, tmp_path):
    request.getfixturevalue(package)  # the example uses the connection that is open
    prompts = [None if i == 7 else f"question {i}" for i in range(60)]
    shutil.copytree(engine.folder, tmp_path / "checkpoint")
    write_catalog(tmp_path)
    pq.write_table(pa.table({"id": range(60), "prompt": prompts}), tmp_path / "prompts.parquet")
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    (code,) = (code for code in blocks if re.search(f"import (py)?{package}|from py{package}", code))
    code, budgets = re.subn(r"(budget\W+)0\.3", rf"\g<1>{BUDGET}", code)
    # Workers run in other directories.
    code, paths = re.subn(r'"(checkpoint|catalog\.yaml|prompts\.parquet|decisions)"(?!:)', rf'"{tmp_path}/\1"', code)
    assert (budgets, paths) == (1, 4)
    exec(compile(code, str(DOCS), "exec"), {"__name__": "__main__"})
    rows = sorted(pq.read_table(tmp_path / "decisions").to_pylist(), key=lambda row: row["id"])
    assert [row["prompt"] for row in rows] == prompts
    assert "got nothing" in rows.pop(7)["error"]
    natural = Engine.from_pretrained(engine.folder, "cpu")  # of the examples' dtype: bfloat16 where the CPU multiplies it
    decisions = Router(natural, catalog()).route_batch([prompt for prompt in prompts if prompt], BUDGET)
    assert np.mean([row["model"] == d.model for row, d in zip(rows, decisions, strict=True)]) > 0.9
    np.testing.assert_allclose([row["score"] for row in rows], [d.score for d in decisions], atol=0.2)
    np.testing.assert_allclose([row["expected_cost"] for row in rows], BUDGET)


def test_the_command_starts_and_ends_a_cluster_of_its_own(router, ray_module, tmp_path, monkeypatch):
    ray_module.shutdown()
    write_catalog(tmp_path)
    pq.write_table(pa.table({"prompt": ["one", "two", "three"]}), tmp_path / "in.parquet")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(router.engine.folder, "checkpoint")
    shared = ["in.parquet", "--checkpoint", "checkpoint", "--catalog", "catalog.yaml", "--dtype", "float32", "--device", "cpu"]

    def command(*more):
        with one_thread():
            return p2l_engine("batch", *shared, *more)

    assert not command("-o", "one").status
    assert not command("-o", "ray", "--ray", "local").status
    assert contents(tmp_path / "ray") == contents(tmp_path / "one")
    assert not ray_module.is_initialized()
    for more, message in (
        (["--ray-workers", "2"], "needs --ray"),
        (["--ray", "127.0.0.1:9"], "expected a Ray cluster's head at 127.0.0.1:9, nothing answers there"),
        (["--ray", "nonsense"], "address: expected local, auto or HOST:PORT, got 'nonsense'"),
    ):
        ended = command("-o", "other", *more)
        assert (ended.status, message in ended.message) == (2, True), ended.err
    assert not ray_module.is_initialized()

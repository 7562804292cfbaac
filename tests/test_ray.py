"""Coefficients from a Ray cluster of this machine: the bytes of one machine, whoever dies."""

from __future__ import annotations

import json
import shutil
import threading
from contextlib import contextmanager, suppress

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from p2l_engine import cli
from p2l_engine.batch import Asked, Route, run
from tests.support.batch_files import contents
from tests.support.catalogs import catalog

ray = pytest.importorskip("ray", reason="Ray is not installed")


@contextmanager
def one_thread():
    """As each of two workers has, on two CPUs: with other threads other last bits, on some machines."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def connected():
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    rng = np.random.default_rng()
    path = tmp_path_factory.mktemp("ray") / "in.parquet"
    prompts = [f"question {rng.integers(3000)} " + "so " * int(rng.integers(40)) for _ in range(4000)]
    pq.write_table(pa.table({"id": range(4000), "prompt": [None, *prompts[1:]]}), path)
    return str(path)


def cluster(engine, checkpoint=None, **more):
    from p2l_engine.batch.ray import Cluster

    return Cluster(engine, str(checkpoint or engine.folder), device="cpu", dtype=torch.float32, **more)


def workers():
    """Of this process's own cluster; some may be gone by now."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found += [process] if "MapWorker" in "".join(process.cmdline()) else []
    return found


@pytest.mark.parametrize("scope", ["prompt", "batch"])
def test_the_bytes_are_those_of_one_machine_even_if_a_worker_is_killed(scope, router, given, connected, tmp_path):
    asked = {"budget": 1.5, "budget_scope": scope, "rows_per_part": 100}
    with one_thread():
        whole = run(router, Asked([given], str(tmp_path / "one"), **asked))
    killed = []

    def kill_one(report):
        if report.rows >= 400 and not killed:
            killed.append(workers()[0])
            killed[0].kill()

    with cluster(router.engine, workers=2) as both:
        report = run(router, Asked([given], str(tmp_path / "ray"), **asked), progress=kill_one, workers=both)
    assert killed
    assert contents(tmp_path / "ray") == contents(tmp_path / "one")
    assert (report.computed, report.rows, report.tokens) == (whole.computed, 4000, whole.tokens)


def test_a_run_begun_elsewhere_ends_without_ray(router, given, connected, tmp_path):
    asked = {"budget": 1.5, "rows_per_part": 100}
    run(router, Asked([given], str(tmp_path / "one"), **asked))

    def stop(report):
        if report.rows >= 1000:
            raise InterruptedError

    with cluster(router.engine) as one, pytest.raises(InterruptedError):
        run(router, Asked([given], str(tmp_path / "two"), **asked), progress=stop, workers=one)
    report = run(router, Asked([given], str(tmp_path / "two"), **asked))
    assert report.resumed >= 700
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_workers_that_die_each_time_end_the_run(router, given, connected, tmp_path, monkeypatch):
    stop = threading.Event()

    def kill():
        while not stop.wait(0.02):
            for process in workers():
                with suppress(psutil.NoSuchProcess):
                    process.kill()

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        with (
            cluster(router.engine) as one,
            pytest.raises(RuntimeError, match="a worker died 4 times; was there not enough memory"),
        ):
            run(router, Asked([given], str(tmp_path / "out")), workers=one)
    finally:
        stop.set()
        thread.join()
    assert not json.loads((tmp_path / "out" / "_manifest.json").read_text())["complete"]


def test_workers_with_another_checkpoint_are_refused(router, given, connected, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(router.engine.folder, other)
    weights = next(other.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with cluster(router.engine, other) as one, pytest.raises(ValueError, match=f"is another than .*: {weights.name}"):
        run(router, Asked([given], str(tmp_path / "out")), workers=one)
    with cluster(router.engine, tmp_path / "none") as one, pytest.raises(ValueError, match="expected a folder or a hub name"):
        run(router, Asked([given], str(tmp_path / "out")), workers=one)
    for more, message in (({"workers": 0}, "workers: expected 1 to 2"), ({"workers": 3}, "workers: expected 1 to 2")):
        with pytest.raises(ValueError, match=message):
            cluster(router.engine, **more)


def test_workers_share_the_cpus_of_nodes_that_differ():
    from p2l_engine.batch.ray import share

    assert [share([8], n) for n in (1, 2, 3, 8)] == [8, 4, 2, 1]
    assert [share([2, 8], n) for n in (1, 2, 3, 4, 10)] == [8, 4, 2, 2, 1]
    assert share([0, 4, 4], 2) == 4


def test_route_maps_the_batches_of_a_dataset(router, given, connected):
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


def test_the_command_makes_a_cluster_of_its_own(router, tmp_path, monkeypatch, capsys):
    ray.shutdown()
    costs = "".join(f"  {model.name}: {{cost: {model.cost}}}\n" for model in catalog().models)
    (tmp_path / "catalog.yaml").write_text(f"models:\n{costs}")
    pq.write_table(pa.table({"prompt": ["one", "two", "three"]}), tmp_path / "in.parquet")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(router.engine.folder, "checkpoint")

    def command(*more):
        shared = [
            "in.parquet",
            "--checkpoint",
            "checkpoint",
            "--catalog",
            "catalog.yaml",
            "--dtype",
            "float32",
            "--device",
            "cpu",
        ]
        monkeypatch.setattr("sys.argv", ["p2l-engine", "batch", *shared, *more])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, " ".join(capsys.readouterr().err.split())

    assert not command("-o", "one")[0]
    assert not command("-o", "ray", "--ray", "local")[0]
    assert contents(tmp_path / "ray") == contents(tmp_path / "one")
    assert not ray.is_initialized()
    for more, message in (
        (["--ray-workers", "2"], "expected --ray beside it"),
        (["--ray", "127.0.0.1:9"], "expected a Ray cluster's head at 127.0.0.1:9, found nothing that answers"),
        (["--ray", "nonsense"], "address: expected local, auto or HOST:PORT, got 'nonsense'"),
    ):
        code, said = command("-o", "other", *more)
        assert (code, message in said) == (2, True), said
    assert not ray.is_initialized()

"""Batch runs that are killed, or run out of room, or find a changed folder: what goes on, what is refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from itertools import islice

import numpy as np
import pytest

from p2l_engine import Router
from p2l_engine.batch import Asked, run
from tests.support.batch_files import PROMPTS, contents, write
from tests.support.catalogs import COSTS, catalog
from tests.support.tiny import MODELS


def test_one_run_at_a_time(router, tmp_path):
    asked = Asked([write(tmp_path / "in.parquet")], str(tmp_path / "out"), rows_per_part=32)
    said = []

    def again(report):
        for restart in (False, True):
            with pytest.raises(RuntimeError, match="out: another run is writing here") as refused:
                run(router, asked, restart)
            said.append(refused)

    run(router, asked, progress=again)
    assert len(said) >= 2
    assert run(router, asked).rows == 150


def test_finished_runs_are_what_they_were(router, tmp_path, caplog):
    given, out = write(tmp_path / "in.parquet", ["a", None, "b"]), tmp_path / "out"
    asked = Asked([given], str(out), rows_per_part=1)
    run(router, asked)
    before = contents(out)
    with pytest.raises(ValueError, match="1 of its 3 rows have an error"):
        run(router, Asked([given], str(out), rows_per_part=1, strict=True))
    (out / "part-000001.parquet").unlink()
    (out / "part-000002.parquet").write_bytes(before["part-000002.parquet"][:-1])
    assert run(router, asked).rows == 3
    assert "2 parts of the finished run are gone or changed" in caplog.text
    assert contents(out) == before
    (out / "part-000007.parquet").write_bytes(b"another's")
    with pytest.raises(ValueError, match="part-000007.parquet: expected parts of this run alone"):
        run(router, asked)


def test_a_state_is_found_wherever_it_was(router, tmp_path):
    given, asked = write(tmp_path / "in.parquet"), {"budget": 1.5, "budget_scope": "batch", "rows_per_part": 32}

    def stop(report):
        if report.rows >= 64:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run(router, Asked([given], str(tmp_path / "out"), state=str(tmp_path / "a"), **asked), progress=stop)
    with pytest.raises(ValueError, match="budget: was 1.5, is 2.0"):
        run(router, Asked([given], str(tmp_path / "out"), state=str(tmp_path / "b"), **asked | {"budget": 2.0}))
    run(router, Asked([given], str(tmp_path / "out"), state=str(tmp_path / "b"), **asked | {"budget": 2.0}), restart=True)
    assert not any((tmp_path / "a").iterdir())
    with pytest.raises(InterruptedError):
        run(router, Asked([given], str(tmp_path / "here"), **asked), progress=stop)
    (tmp_path / "here").rename(tmp_path / "there")
    assert run(router, Asked([given], str(tmp_path / "there"), **asked)).resumed >= 30
    assert not (tmp_path / "there" / "_state").exists()


def test_a_run_of_something_else_is_refused_with_what_changed(router, tmp_path):
    given, out = write(tmp_path / "in.parquet"), str(tmp_path / "out")
    run(router, Asked([given], out, budget=1.5, rows_per_part=32))
    before = contents(tmp_path / "out")
    for changed, message in (
        (Asked([given], out, budget=2.0, rows_per_part=32), "budget: was 1.5, is 2.0"),
        (Asked([given], out, budget=1.5, rows_per_part=32, keep=["id"]), r"keep: was None, is \['id'\]"),
    ):
        with pytest.raises(ValueError, match=f"asked for something else: {message}; undo that"):
            run(router, changed)
    other = Router(router.engine, catalog(costs=[1.0, 2.0, 3.0, 4.0, 6.0]), seed=4)
    with pytest.raises(ValueError, match="catalog: epsilon; seed: was 3, is 4"):
        run(other, Asked([given], out, budget=1.5, rows_per_part=32))
    assert contents(tmp_path / "out") == before
    os.utime(given, ns=(0, 0))
    with pytest.raises(ValueError, match=rf"inputs: {given}"):
        run(router, Asked([given], out, budget=1.5, rows_per_part=32))
    report = run(router, Asked([given], out, budget=2.0, rows_per_part=64), restart=True)
    assert report.parts == 3 == len(list((tmp_path / "out").glob("part-*")))
    (tmp_path / "out" / "part-000001.parquet").unlink()
    assert run(router, Asked([given], out, budget=2.0, rows_per_part=64)).computed == len(set(PROMPTS))
    assert len(list((tmp_path / "out").glob("part-*"))) == 3


def test_what_was_spoiled_meanwhile_is_named(router, tmp_path, caplog):
    given, asked = write(tmp_path / "in.parquet"), {"budget": 1.5, "rows_per_part": 32}
    run(router, Asked([given], str(tmp_path / "whole"), **asked))

    def stop(report):
        if report.rows >= 64:
            raise InterruptedError

    def cut(name):
        with pytest.raises(InterruptedError):
            run(router, Asked([given], str(tmp_path / name), **asked), progress=stop)
        return tmp_path / name

    spilled = next((cut("spill") / "_state").glob("run-*/*"))
    data = spilled.read_bytes()
    np.save(spilled, np.load(spilled)[:3])
    for message in (
        f"{spilled.name}: expected more than .* rows, got 3; remove it",
        f"{spilled.name}: cannot be read.*; remove it",
    ):
        with pytest.raises(ValueError, match=message):
            run(router, Asked([given], str(tmp_path / "spill"), **asked))
        spilled.write_bytes(data[:100])
    spilled.unlink()
    run(router, Asked([given], str(tmp_path / "spill"), **asked))
    assert contents(tmp_path / "spill") == contents(tmp_path / "whole")
    manifest = cut("manifest") / "_manifest.json"
    for text in (
        manifest.read_text()[:50],
        "[]",
        "{}",
        "null",
        '{"asked": 5, "complete": true}',
        '{"asked": {}, "complete": true}',
    ):
        manifest.write_text(text)
        for restart in (False, True):
            with pytest.raises(ValueError, match="_manifest.json: expected the manifest of a batch run; remove it"):
                run(router, Asked([given], str(manifest.parent), **asked), restart=restart)
    # What an input was when the run began is not what it is at its end.
    changing = write(tmp_path / "changing.parquet")
    with pytest.raises(ValueError, match=r"inputs: .*changing.parquet: changed while it was read; run again with --restart"):
        run(router, Asked([changing], str(tmp_path / "changing"), **asked), progress=lambda _: os.utime(changing, ns=(0, 0)))
    foreign = cut("foreign") / "part-000777.parquet"
    foreign.write_bytes(b"another's")
    with pytest.raises(ValueError, match="part-000777.parquet: expected parts of this run alone; remove them"):
        run(router, Asked([given], str(foreign.parent), **asked))
    foreign.unlink()
    run(router, Asked([given], str(foreign.parent), **asked))
    assert contents(foreign.parent) == contents(tmp_path / "whole")
    part = cut("part") / "part-000000.parquet"
    part.write_bytes(part.read_bytes()[:-1])
    run(router, Asked([given], str(part.parent), **asked))
    assert "part-000000.parquet is not what it was" in caplog.text
    assert contents(part.parent) == contents(tmp_path / "whole")
    # A copy's manifest names the state of another run, which is not the copy's to remove.
    kept = {"state": str(tmp_path / "kept")} | asked
    with pytest.raises(InterruptedError):
        run(router, Asked([given], str(tmp_path / "first"), **kept), progress=stop)
    shutil.copytree(tmp_path / "first", tmp_path / "copy")
    theirs = contents(next((tmp_path / "kept").iterdir()))
    run(router, Asked([given], str(tmp_path / "copy"), **kept), restart=True)
    assert contents(tmp_path / "copy") == contents(tmp_path / "whole")
    assert contents(next((tmp_path / "kept").iterdir())) == theirs
    assert run(router, Asked([given], str(tmp_path / "first"), **kept)).resumed >= 30
    # A run that came to nothing stands in no other's way.
    with pytest.raises(ValueError, match="expected the columns nonsense"):
        run(router, Asked([given], str(tmp_path / "again"), column="nonsense", **asked))
    run(router, Asked([given], str(tmp_path / "again"), **asked))
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")


@pytest.mark.parametrize("scope", ["prompt", "batch"])
def test_a_full_disk_loses_nothing(scope, router, tmp_path, monkeypatch):
    """Writing fails at every place in turn; what goes on from there ends with the same bytes."""
    given = write(tmp_path / "in.parquet")
    asked = {"budget": 1.5, "budget_scope": scope, "rows_per_part": 32}
    run(router, Asked([given], str(tmp_path / "whole"), **asked))
    from p2l_engine.tables import storage

    real, left = storage.write_local, [0]

    def failing(path, data):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device", str(path))
        real(path, data)

    for module in ("tables.storage", "batch.spill"):
        monkeypatch.setattr(f"p2l_engine.{module}.write_local", failing)
    failures = 0
    for _ in range(50):
        left[0] = 2
        try:
            run(router, Asked([given], str(tmp_path / "out"), **asked))
            break
        except OSError as error:
            assert "No space left" in str(error)
            failures += 1
    assert failures > 3
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_state_folder_keeps_what_is_not_the_runs(router, tmp_path, monkeypatch):
    given, kept = write(tmp_path / "in.parquet"), tmp_path / "kept"
    kept.mkdir()
    (kept / "thesis.txt").write_text("precious")
    (kept / "coefficients-000000.npy").write_text("another's")
    asked = {"budget": 1.5, "rows_per_part": 32}
    run(router, Asked([given], str(tmp_path / "whole"), **asked))
    # Two runs that are cut short share the folder, and nothing in it.
    real = router.engine.outputs_of

    def cut_short(chunks):
        yield from islice(real(chunks), 2)
        raise InterruptedError

    monkeypatch.setattr(router.engine, "outputs_of", cut_short)
    for more in ({}, {"column": "id"}):
        with pytest.raises(InterruptedError):
            run(router, Asked([given], str(tmp_path / f"out{len(more)}"), state=str(kept), **asked, **more))
    assert len(list(kept.glob("run-*"))) == 2
    monkeypatch.undo()
    run(router, Asked([given], str(tmp_path / "out"), state=str(kept), **asked))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert len(list(kept.glob("run-*"))) == 2
    run(router, Asked([given], str(tmp_path / "out0"), state=str(kept), **asked), restart=True)
    assert contents(tmp_path / "out0") == contents(tmp_path / "whole")
    assert len(list(kept.glob("run-*"))) == 1
    assert (kept / "thesis.txt").read_text() == "precious"
    assert (kept / "coefficients-000000.npy").read_text() == "another's"


ALONE = {"capture_output": True, "text": True, "timeout": 600, "env": os.environ | {"PYTHONPATH": os.getcwd()}}


def command(engine, folder, given, scope):
    """Arguments of the command line, but for the output, and the catalog that they name."""
    costs = "".join(f"  {name}: {{cost: {cost}}}\n" for name, cost in zip(MODELS, COSTS, strict=True))
    (folder / "catalog.yaml").write_text(f"models:\n{costs}")
    return [
        given, "--checkpoint", str(engine.folder), "--device", "cpu", "--dtype", "float32", "--catalog", "catalog.yaml",
        "--budget", "1.5", "--budget-scope", scope, "--rows-per-part", "64",
    ]  # fmt: skip


FULL = """
import os, subprocess, sys
from pathlib import Path
import p2l_engine.batch, p2l_engine.cli, p2l_engine.cli.batch
import torch
torch.set_num_threads(1)  # threads do not outlive a fork

def ended(output):
    pid = os.fork()
    if not pid:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open("log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.argv = ["p2l-engine", "batch", *sys.argv[1:], "-o", output]
        try:
            p2l_engine.cli.main()
        except SystemExit as error:
            os._exit(error.code or 0)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(Path(folder).rglob("*")) if file.is_file()}

assert ended("whole") == 0, Path("log").read_text()
whole, failures, size = contents("whole"), 0, 16
os.mkdir("disk")
subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", "disk"], check=True)
while (code := ended("disk/out")) != 0:
    assert code == 2 and "No space left on device" in Path("log").read_text(), (code, Path("log").read_text())
    assert "Traceback" not in Path("log").read_text()
    found = contents("disk/out") if os.path.isdir("disk/out") else {}
    for name in found:
        if name.startswith("part-"):
            assert found[name] == whole[name], f"{name} is not whole"
        assert name.startswith(("part-", "_manifest.json", "_state/")), name
    failures, size = failures + 1, size + 24
    subprocess.run(["mount", "-o", f"remount,size={size}k", "disk"], check=True)
assert contents("disk/out") == whole, "other bytes"
print(f"{failures} times full, at last {size} KiB")
assert failures >= 3
"""


MOUNTS = ["unshare", "--user", "--map-root-user", "--mount"]


def may_mount():
    try:
        return subprocess.run([*MOUNTS, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not may_mount(), reason="needs a file system of its own: unshare --user --mount is not permitted here")
@pytest.mark.parametrize("scope", ["prompt", "batch"])
def test_a_disk_that_really_fills_up_loses_nothing(scope, engine, tmp_path):
    write(tmp_path / "in.jsonl.gz", [f"question {i}" for i in range(1500)])
    arguments = command(engine, tmp_path, "in.jsonl.gz", scope)
    done = subprocess.run([*MOUNTS, sys.executable, "-c", FULL, *arguments], cwd=tmp_path, **ALONE)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)


KILLED = """
import os, random, shutil, signal, sys, time
from pathlib import Path
import p2l_engine.batch, p2l_engine.cli, p2l_engine.cli.batch  # before the first fork: seconds, once

def begin(output):
    pid = os.fork()
    if not pid:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(f"{output}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        sys.argv = ["p2l-engine", "batch", *arguments, "-o", output]
        try:
            p2l_engine.cli.main()
        except SystemExit as error:
            os._exit(error.code or 0)
        os._exit(0)
    return pid

def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(Path(folder).rglob("*")) if file.is_file()}

seed, *arguments = sys.argv[1:]
random.seed(int(seed))
start = time.monotonic()
assert ended(begin("whole")) == 0
took = time.monotonic() - start
whole, kills, finished = contents("whole"), 0, 0
while kills < 20:
    pid = begin("out")
    time.sleep(random.uniform(0, took))
    os.kill(pid, signal.SIGKILL)
    if ended(pid) == 0 or random.random() < 0.2:
        assert ended(begin("out")) == 0
        assert contents("out") == whole, "other bytes"
        shutil.rmtree("out")
        finished += 1
    else:
        kills += 1
assert ended(begin("out")) == 0
assert contents("out") == whole, "other bytes"
print(f"{kills} kills, {finished + 1} times to the end, {len(whole)} files, {took:.1f} s uninterrupted")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("scope", ["prompt", "batch"])
def test_killed_at_any_moment_it_ends_with_the_same_bytes(scope, engine, tmp_path):
    rng = np.random.default_rng()
    prompts = [f"question {rng.integers(1500)} " + "so " * int(rng.integers(11)) for _ in range(2000)]
    write(tmp_path / "in.jsonl.gz", prompts)
    arguments = command(engine, tmp_path, "in.jsonl.gz", scope)
    done = subprocess.run([sys.executable, "-c", KILLED, str(rng.integers(1 << 30)), *arguments], cwd=tmp_path, **ALONE)
    assert done.returncode == 0, done.stdout + done.stderr + (tmp_path / "out.log").read_text()
    print(done.stdout)

"""Interrupted batch runs: which are resumed, with byte-identical output, and which are refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file

from p2l_engine import Engine, Router
from p2l_engine.batch import BatchConfig, run
from p2l_engine.batch.identity import _checkpoint
from p2l_engine.tables.storage import Location
from tests.support import tiny
from tests.support.batch_files import PROMPTS, contents, write
from tests.support.cases import slow_but
from tests.support.catalogs import COSTS, catalog
from tests.support.command import p2l_engine
from tests.support.other_user import open_folder, problem_of_other_user
from tests.support.tiny import MODELS


@pytest.mark.slow
def test_one_run_at_a_time(router, tmp_path):
    config = BatchConfig([write(tmp_path / "in.parquet")], str(tmp_path / "out"), rows_per_part=32)
    refusals = []

    def again(report):
        for restart in (False, True):
            with pytest.raises(RuntimeError, match="out.run: another run is writing here") as refused:
                run(router, config, restart)
            refusals.append(refused)

    run(router, config, progress=again)
    assert len(refusals) >= 2
    assert run(router, config).rows == 150


def test_complete_runs_are_left_unchanged_and_damaged_parts_written_again(router, tmp_path, caplog):
    given, out = write(tmp_path / "in.parquet", ["a", None, "b"]), tmp_path / "out"
    config = BatchConfig([given], str(out), rows_per_part=1)
    run(router, config)
    before = contents(out)
    with pytest.raises(ValueError, match="1 of its 3 rows have an error"):
        run(router, BatchConfig([given], str(out), rows_per_part=1, strict=True))
    (out / "part-000001.parquet").unlink()
    (out / "part-000002.parquet").write_bytes(before["part-000002.parquet"][:-1])
    assert run(router, config).rows == 3
    assert "2 parts of the finished run are missing or changed" in caplog.text
    assert contents(out) == before
    (out / "part-000007.parquet").write_bytes(b"foreign")
    with pytest.raises(ValueError, match="part-000007.parquet: expected only parts of this run"):
        run(router, config)


@pytest.mark.slow
def test_state_is_found_after_a_change_of_folder_or_a_move(router, tmp_path, caplog):
    given, options = write(tmp_path / "in.parquet"), {"budget": 1.5, "budget_scope": "batch", "rows_per_part": 32}

    def stop(report):
        if report.rows >= 64:
            raise InterruptedError

    def config(folder, **more):
        return BatchConfig([given], tmp_path / "out", state=tmp_path / folder, **options | more)

    with pytest.raises(InterruptedError):
        run(router, config("a"), progress=stop)
    assert run(router, config("b", budget=2.0)).resumed >= 30
    assert f"out: continued with its coefficients in {tmp_path}/a/run-" in caplog.text
    run(router, config("b", keep_coefficients=False), restart=True)
    assert not any((tmp_path / "a").iterdir())
    assert not any((tmp_path / "b").iterdir())
    with pytest.raises(InterruptedError):
        run(router, BatchConfig([given], tmp_path / "here", **options), progress=stop)
    for name in ("", ".run"):
        (tmp_path / f"here{name}").rename(tmp_path / f"there{name}")
    assert run(router, BatchConfig([given], tmp_path / "there", **options)).resumed >= 30


@pytest.mark.slow
def test_a_run_of_other_inputs_or_prompts_is_refused_and_says_what_changed(router, tmp_path):
    given, out = write(tmp_path / "in.parquet"), tmp_path / "out"
    run(router, BatchConfig([given], out, budget=1.5, rows_per_part=32))
    before = contents(out)
    for changed, message in (
        ({"column": "id"}, "column: was 'prompt', is 'id'"),
        ({"rows_per_part": 64}, "rows_per_part: was 32, is 64"),
        ({"plain_text": True, "budget": 2.0}, "plain_text: was False, is True; budget: was 1.5, is 2.0"),
    ):
        with pytest.raises(ValueError, match=f"holds a run with other inputs or options: {message}; use the same ones"):
            run(router, BatchConfig([given], out, **{"budget": 1.5, "rows_per_part": 32} | changed))
    assert contents(out) == before
    report = run(router, BatchConfig([given], out, budget=2.0, rows_per_part=64, keep_coefficients=False), restart=True)
    assert report.parts == 3 == len(list(out.glob("part-*")))
    (out / "part-000001.parquet").unlink()
    assert run(router, BatchConfig([given], out, budget=2.0, rows_per_part=64)).computed == len(set(PROMPTS))
    assert len(list(out.glob("part-*"))) == 3


@pytest.mark.slow
def test_damaged_files_are_named(router, tmp_path, caplog):
    given, options = write(tmp_path / "in.parquet"), {"budget": 1.5, "rows_per_part": 32}
    run(router, BatchConfig([given], str(tmp_path / "whole"), **options))

    def stop(report):
        if report.rows >= 64:
            raise InterruptedError

    def cut(name):
        with pytest.raises(InterruptedError):
            run(router, BatchConfig([given], str(tmp_path / name), **options), progress=stop)
        return tmp_path / name

    spilled = next(cut("spill").with_suffix(".run").glob("coefficients-*"))
    data = spilled.read_bytes()
    np.save(spilled, np.load(spilled)[:3])
    for message in (
        f"{spilled.name}: expected more than .* rows, got 3; remove this file",
        f"{spilled.name}: cannot be read.*; remove this file",
    ):
        with pytest.raises(ValueError, match=message):
            run(router, BatchConfig([given], str(tmp_path / "spill"), **options))
        spilled.write_bytes(data[:100])
    spilled.unlink()
    run(router, BatchConfig([given], str(tmp_path / "spill"), **options))
    assert contents(tmp_path / "spill") == contents(tmp_path / "whole")
    manifest = cut("manifest").with_suffix(".run") / "manifest.json"
    for text in (
        manifest.read_text()[:50],
        "[]",
        "{}",
        "null",
        manifest.read_text().replace('"report": null', '"report": {}'),
        manifest.read_text().replace('"inputs": [', '"inputs": [5, '),
    ):
        manifest.write_text(text)
        for restart in (False, True):
            with pytest.raises(
                ValueError, match="manifest.json: expected the manifest of a batch run: .*; remove .*manifest.run"
            ):
                run(router, BatchConfig([given], str(tmp_path / "manifest"), **options), restart=restart)
    foreign = cut("foreign") / "part-000777.parquet"
    foreign.write_bytes(b"foreign")
    with pytest.raises(ValueError, match="part-000777.parquet: expected only parts of this run; remove these files"):
        run(router, BatchConfig([given], str(foreign.parent), **options))
    foreign.unlink()
    run(router, BatchConfig([given], str(foreign.parent), **options))
    assert contents(foreign.parent) == contents(tmp_path / "whole")
    part = cut("part") / "part-000000.parquet"
    part.write_bytes(part.read_bytes()[:-1])
    run(router, BatchConfig([given], str(part.parent), **options))
    assert "part-000000.parquet: its size has changed, written again" in caplog.text
    assert contents(part.parent) == contents(tmp_path / "whole")
    # The manifest of a copied folder names the original's state, which must not be removed.
    kept = {"state": str(tmp_path / "kept")} | options
    with pytest.raises(InterruptedError):
        run(router, BatchConfig([given], str(tmp_path / "first"), **kept), progress=stop)
    for name in ("", ".run"):
        shutil.copytree(tmp_path / f"first{name}", tmp_path / f"copy{name}")
    (state,) = (tmp_path / "kept").iterdir()
    theirs = contents(state)
    run(router, BatchConfig([given], str(tmp_path / "copy"), **kept), restart=True)
    assert contents(tmp_path / "copy") == contents(tmp_path / "whole")
    assert contents(state) == theirs
    assert run(router, BatchConfig([given], str(tmp_path / "first"), **kept)).resumed >= 30
    # A run that failed before it computed anything does not block another one.
    with pytest.raises(ValueError, match="expected the columns nonsense"):
        run(router, BatchConfig([given], str(tmp_path / "again"), column="nonsense", **options))
    run(router, BatchConfig([given], str(tmp_path / "again"), **options))
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_a_run_of_an_adapter_is_refused_where_its_backbone_changed(tmp_path, monkeypatch):
    """By a single weight, too, which lies between the samples that other fingerprints take."""
    monkeypatch.setattr("p2l_engine.checkpoint.fingerprint.SAMPLES", 2)
    monkeypatch.setattr("p2l_engine.checkpoint.fingerprint.SAMPLE", 1 << 12)
    base = tiny.write(tmp_path / "base")
    folder = tmp_path / "adapter"
    folder.mkdir()
    head = {f"base_model.model.{n}": w for n, w in load_file(base / "model.safetensors").items() if n.startswith("head.")}
    query = "base_model.model.model.layers.1.self_attn.q_proj"
    factors = {f"{query}.lora_{side}.weight": torch.ones(shape) for side, shape in {"A": (2, 48), "B": (48, 2)}.items()}
    save_file(head | factors, folder / "adapter_model.safetensors")
    adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": "../base"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    for name in ("model_list.json", "training_config.json"):
        shutil.copy(base / name, folder)
    config = BatchConfig([write(tmp_path / "in.parquet", PROMPTS[:9])], str(tmp_path / "out"))

    def again():
        run(Router(Engine.from_pretrained(folder, device="cpu", dtype=torch.float32), catalog(), seed=3), config)

    again()
    (base / "notes.txt").touch()
    os.utime(base / "model.safetensors", ns=(0, 0))  # fetched anew
    (base / "notes.txt").unlink()
    again()
    weights = load_file(base / "model.safetensors")
    one = weights["model.layers.1.self_attn.q_proj.weight"].clone()
    one[3, 5] += 1e-3
    for name, changed in {
        "model.safetensors": lambda: save_file(
            weights | {"model.layers.1.self_attn.q_proj.weight": one}, base / "model.safetensors"
        ),
        "config.json": lambda: (base / "config.json").write_text(
            (base / "config.json").read_text().replace("10000.0", "20000.0")
        ),
        "tokenizer_config.json": lambda: (base / "tokenizer_config.json").write_text(
            (base / "tokenizer_config.json").read_text() + " "
        ),
    }.items():
        kept = (base / name).read_bytes()
        changed()
        with pytest.raises(ValueError, match=f"checkpoint: backbone/{name}; use the same"):
            again()
        (base / name).write_bytes(kept)
    again()


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"keep": None}, "keep: the output has columns of its own named Model"),
        ({"keep": ["source_row"]}, "--no-source leaves out"),
        ({"keep": ["photo"], "format": "csv"}, "column 'photo': the type binary cannot be written as csv"),
        ({"keep": ["empty"]}, "in.parquet: a column cannot be written to parquet"),
        ({"keep": ["nothing"]}, "nothing"),
        ({"column": "nothing"}, "nothing"),
        ({"budget": 0.5}, "budget 0.5 is infeasible"),
    ],
)
def test_what_is_refused_loses_nothing_of_an_earlier_run(restart, changed, message, router, tmp_path, monkeypatch):
    more = {"Model": ["m"] * 150, "source_row": [1] * 150, "photo": [b"p"] * 150, "empty": [1] * 150}
    given, out = write(tmp_path / "in.parquet", **more), tmp_path / "out"
    run(router, BatchConfig([given], out, keep=["id"], rows_per_part=32))
    before = contents(out), contents(tmp_path / "out.run")
    if changed.get("keep") == ["empty"]:  # which no file of parquet has, but objects of jsonl
        schema = pa.schema([("empty", pa.struct([]))])
        monkeypatch.setattr("p2l_engine.batch.job.kept_schema", lambda *_: schema)
    with pytest.raises(ValueError, match=message):
        run(router, BatchConfig([given], out, **{"keep": ["id"], "rows_per_part": 32} | changed), restart)
    assert (contents(out), contents(tmp_path / "out.run")) == before


@pytest.mark.slow
@hypothesis.given(models=st.permutations(MODELS), shares=st.permutations(MODELS[:3]), stopped=st.booleans())
@hypothesis.example(models=MODELS[::-1], shares=MODELS[:3], stopped=False)
@hypothesis.example(models=MODELS, shares=MODELS[2::-1], stopped=True)
@hypothesis.settings(max_examples=3, deadline=None)
def test_another_order_of_models_or_shares_is_another_run(models, shares, stopped, engine, tmp_path_factory):
    """It decides between equals, and prices are written in the order of shares."""
    folder = tmp_path_factory.mktemp("order")
    given, costs = write(folder / "in.parquet"), dict(zip(MODELS, COSTS, strict=True))
    first, second = (Router(engine, catalog(names, [costs[name] for name in names])) for names in (MODELS, models))

    def config(output, names):
        bounds = {"max_share": dict.fromkeys(names, 0.3), "min_share": {"epsilon": 0.2}}
        return BatchConfig([given], folder / output, rows_per_part=32, **bounds)

    def stop(report):
        if stopped and report.parts == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError) if stopped else nullcontext():
        run(first, config("out", MODELS[:3]), progress=stop)
    report = run(second, config("out", shares))
    run(second, config("fresh", shares))
    assert contents(folder / "out") == contents(folder / "fresh")
    expected = ["catalog: their order"] * (models != MODELS) + ["max_share: their order"] * (shares != MODELS[:3])
    assert sorted(report.changed) == expected
    assert report.computed == 0


@pytest.mark.slow
def test_an_output_without_its_own_folder_is_never_written_over(router, tmp_path):
    given, out, options = write(tmp_path / "in.parquet"), tmp_path / "out", {"rows_per_part": 32}
    run(router, BatchConfig([given], out, **options))
    out.rename(tmp_path / "renamed")
    before = contents(tmp_path / "renamed")
    message = (
        r"renamed: holds the parts of a run .*rename or copy its folder NAME.run to .*renamed.run too "
        r"\(without an output there: out.run\)"
    )
    for restart in (False, True):
        with pytest.raises(ValueError, match=message):
            run(router, BatchConfig([given], tmp_path / "renamed", **options), restart)
    assert contents(tmp_path / "renamed") == before
    out.with_suffix(".run").rename(tmp_path / "renamed.run")
    assert run(router, BatchConfig([given], tmp_path / "renamed", rows_per_part=32)).rows == 150
    assert contents(tmp_path / "renamed") == before
    (tmp_path / "other.run").mkdir()
    (tmp_path / "other.run" / "state.pt").touch()
    with pytest.raises(
        ValueError, match=r"other.run: expected the folder of .*other's run, found state.pt; name another output"
    ):
        run(router, BatchConfig([given], tmp_path / "other"))
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / "_manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="earlier: holds a run of an earlier version"):
        run(router, BatchConfig([given], tmp_path / "earlier"))


@pytest.mark.parametrize("restart", slow_but((False,), [False, True]))
def test_removed_parts_are_gone_on_the_disk_before_the_manifest_says_so(restart, router, tmp_path, monkeypatch):
    """Else a power failure could bring them back, as parts of the new decisions."""
    given, out, events = write(tmp_path / "in.parquet"), tmp_path / "out", []
    run(router, BatchConfig([given], out, rows_per_part=32))
    fsync, remove = os.fsync, Location.remove

    def synced(file):
        events.append(Path(os.readlink(f"/proc/self/fd/{file}")).relative_to(tmp_path).as_posix())
        fsync(file)

    def removed(location):
        events.append("removed")
        remove(location)

    monkeypatch.setattr("os.fsync", synced)
    monkeypatch.setattr(Location, "remove", removed)
    run(router, BatchConfig([given], out, rows_per_part=32, budget=2.0), restart)
    last = len(events) - events[::-1].index("removed")
    assert events[last] == "out"
    assert events[last + 1].startswith("out.run/.manifest.json")


@pytest.mark.parametrize("place", slow_but(("link/x",), ["out/x", "out/a/b/x", "out.run/x", "link/x"]))
def test_an_output_within_a_runs_folders_is_refused(place, router, tmp_path):
    """Readers of the outer output would read its rows, too."""
    given, out = write(tmp_path / "in.parquet"), tmp_path / "out"
    run(router, BatchConfig([given], out))
    (tmp_path / "link").symlink_to(out)
    before = contents(out), contents(tmp_path / "out.run")
    with pytest.raises(ValueError, match=f"output: .*{place} is within .*out(.run)?, which is another run's"):
        run(router, BatchConfig([given], tmp_path / place))
    assert (contents(out), contents(tmp_path / "out.run")) == before
    assert run(router, BatchConfig([given], tmp_path / "beside" / "x")).rows == 150


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("finished", slow_but((False,), [False, True]))
@pytest.mark.parametrize("links", slow_but((True,), [False, True]))
def test_a_renamed_or_copied_run_has_the_coefficients_of_its_state(copied, finished, links, router, tmp_path, monkeypatch):
    given = write(tmp_path / "in.parquet")
    scope = "prompt" if links else "batch"  # in which no part is written before all is computed

    def config(output, budget=1.5, **more):
        options = {"rows_per_part": 32, "state": tmp_path / "state", "budget_scope": scope}
        return BatchConfig([given], tmp_path / output, budget=budget, **options, **more)

    def stop(report):
        if not finished and report.rows >= 96:
            raise InterruptedError

    with nullcontext() if finished else pytest.raises(InterruptedError):
        run(router, config("out"), progress=stop)
    for name in ("", ".run"):
        if copied:
            shutil.copytree(tmp_path / f"out{name}", tmp_path / f"there{name}")
        else:
            (tmp_path / f"out{name}").rename(tmp_path / f"there{name}")
    if not links:
        monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError(95, "Operation not supported")))
    if finished:
        assert run(router, config("there", keep_coefficients=True)).rows == 150
    report = run(router, config("there", 2.0))
    assert report.computed == (0 if finished else len(set(PROMPTS)) - report.resumed) < len(set(PROMPTS)) // 2
    run(router, config("fresh", 2.0))
    assert contents(tmp_path / "there") == contents(tmp_path / "fresh")
    if copied:  # which keeps its own
        run(router, config("there", 2.0, keep_coefficients=False))
        assert run(router, config("out", 3.0)).resumed >= report.resumed


def test_a_file_is_no_output(router, tmp_path):
    given = write(tmp_path / "in.parquet")
    for name in ("note.txt", "/dev/null"):
        (tmp_path / "note.txt").write_text("precious")
        with pytest.raises(ValueError, match=f"output: expected a folder, got the file .*{name}"):
            run(router, BatchConfig([given], tmp_path / name))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.parquet", "note.txt"]


def test_where_a_disk_is_mounted_is_no_output(router, tmp_path, monkeypatch):
    """Such as a container's volume: what is beside it is lost with the container."""
    given, volume = write(tmp_path / "in.parquet"), tmp_path / "volume"
    volume.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("os.path.ismount", lambda path: path == str(volume))
        with pytest.raises(ValueError, match="output: .*volume is where a disk is mounted, .*; name a folder within it"):
            run(router, BatchConfig([given], volume))
        assert run(router, BatchConfig([given], volume / "out")).rows == 150


def test_the_roots_of_stores_and_machines_are_no_outputs(router, tmp_path):
    given, state = write(tmp_path / "in.parquet"), tmp_path / "state"
    for root in ("/", "file:///", "memory://"):
        with pytest.raises(
            ValueError, match="output: expected a folder within .*, got its root; name one, such as .*/decisions"
        ):
            run(router, BatchConfig([given], root, state=state))


@pytest.mark.slow
@pytest.mark.parametrize("scope", slow_but(("prompt",), ["prompt", "batch"]))
def test_a_failure_of_any_write_loses_nothing(scope, router, tmp_path, monkeypatch):
    """Each write fails in turn; the resumed run produces byte-identical output."""
    given = write(tmp_path / "in.parquet")
    options = {"budget": 1.5, "budget_scope": scope, "rows_per_part": 32}
    run(router, BatchConfig([given], str(tmp_path / "whole"), **options))
    from p2l_engine.tables import storage

    real, left = storage.write_file, [0]

    def failing(path, data, work=None):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device", str(path))
        real(path, data, work)

    for module in ("tables.storage", "batch.spill"):
        monkeypatch.setattr(f"p2l_engine.{module}.write_file", failing)
    failures = 0
    for _ in range(50):
        left[0] = 2
        try:
            run(router, BatchConfig([given], str(tmp_path / "out"), **options))
            break
        except OSError as error:
            assert "No space left" in str(error)
            failures += 1
    assert failures > 3
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_write_that_fails_at_once_ends_the_run(router, tmp_path, monkeypatch):
    """The writer's future has failed before its callback is added, which then runs in the thread that submitted it."""

    class Immediate(ThreadPoolExecutor):
        def submit(self, call, *arguments):
            future = Future()
            try:
                future.set_result(call(*arguments))
            except OSError as error:
                future.set_exception(error)
            return future

    def failing(path, data, work=None):
        if "part-" in str(path):
            raise OSError(28, "No space left on device", str(path))
        real(path, data, work)

    from p2l_engine.tables import storage

    real = storage.write_file
    monkeypatch.setattr("p2l_engine.batch.pipeline.ThreadPoolExecutor", Immediate)
    monkeypatch.setattr("p2l_engine.tables.storage.write_file", failing)
    config = BatchConfig([write(tmp_path / "in.parquet")], str(tmp_path / "out"), budget=1.5, rows_per_part=32)
    errors = []

    def attempt():
        try:
            run(router, config)
        except OSError as error:
            errors.append(error)

    thread = threading.Thread(target=attempt, daemon=True)  # of its own: a deadlock must not stop the other tests
    thread.start()
    thread.join(300)
    assert [error.errno for error in errors] == [28]


@pytest.mark.slow
def test_other_files_in_a_state_folder_are_kept(router, tmp_path, monkeypatch):
    given, kept = write(tmp_path / "in.parquet"), tmp_path / "kept"
    kept.mkdir()
    (kept / "thesis.txt").write_text("precious")
    (kept / "coefficients-000000.npy").write_text("foreign")
    options = {"budget": 1.5, "rows_per_part": 32}
    run(router, BatchConfig([given], str(tmp_path / "whole"), **options))
    # Two interrupted runs share the folder, but no files in it.
    real = router.engine.outputs_of

    def interrupted(chunks):
        yield from islice(real(chunks), 2)
        raise InterruptedError

    monkeypatch.setattr(router.engine, "outputs_of", interrupted)
    for more in ({}, {"column": "id"}):
        with pytest.raises(InterruptedError):
            run(router, BatchConfig([given], str(tmp_path / f"out{len(more)}"), state=str(kept), **options, **more))
    assert len(list(kept.glob("run-*"))) == 2
    monkeypatch.undo()
    options["keep_coefficients"] = False
    run(router, BatchConfig([given], str(tmp_path / "out"), state=str(kept), **options))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert len(list(kept.glob("run-*"))) == 2
    run(router, BatchConfig([given], str(tmp_path / "out0"), state=str(kept), **options), restart=True)
    assert contents(tmp_path / "out0") == contents(tmp_path / "whole")
    assert len(list(kept.glob("run-*"))) == 1
    assert (kept / "thesis.txt").read_text() == "precious"
    assert (kept / "coefficients-000000.npy").read_text() == "foreign"


@pytest.mark.slow
@hypothesis.given(names=st.lists(st.from_regex(r"coefficients-[0-9a-f()\- ]{0,30}\.npy", fullmatch=True), max_size=4))
@hypothesis.settings(max_examples=5, deadline=None)
def test_copies_of_coefficients_are_left_alone(names, router, tmp_path_factory):
    """Such as those that a synchronised folder or a person made beside the run's own."""
    folder = tmp_path_factory.mktemp("copies")
    given, out = write(folder / "in.parquet", ["a", "b", "c"]), folder / "out"
    run(router, BatchConfig([given], out))
    (own,) = (folder / "out.run").glob("coefficients-*")
    names = {own.name.replace(".npy", " (1).npy"), own.name.replace(".npy", "-copy.npy"), "coefficients-copy.npy", *names}
    for name in names - {own.name}:
        (folder / "out.run" / name).write_text("foreign")
    assert run(router, BatchConfig([given], out, budget=2.0)).computed == 0
    run(router, BatchConfig([given], out, keep_coefficients=False))
    assert {file.name for file in (folder / "out.run").glob("coefficients-*")} == names - {own.name}


def test_coefficients_are_kept_in_a_local_folder_outside_of_the_output(router, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = write(tmp_path / "in.parquet")
    for state in (tmp_path / "out", "out/", "./out/state", tmp_path / "out" / "a" / "b"):
        with pytest.raises(ValueError, match="state: expected a folder outside of the output"):
            run(router, BatchConfig([given], "out", state=state))
    for state in ("s3://key:secret@bucket/state", "gs://bucket", "file:///tmp/state", "hf://datasets/a/b"):
        with pytest.raises(ValueError, match="state: expected a local folder, got '(?!.*secret)"):
            BatchConfig([given], "out", state=state)
    (tmp_path / "note.txt").write_text("precious")
    assert run(router, BatchConfig([given], "out", state="outer")).rows == 150
    for restart in (False, True):
        with pytest.raises(ValueError, match="state: expected a folder, got the file note.txt"):
            run(router, BatchConfig([given], "out", state="note.txt"), restart)
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_dir()] == []


def in_process_of_its_own(*arguments, folder, wrapper=()):
    """Runs tests.support.interrupted_runs: forks need a process without threads."""
    return subprocess.run(
        [*wrapper, sys.executable, "-m", "tests.support.interrupted_runs", *map(str, arguments)],
        cwd=folder, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
    )  # fmt: skip


MOUNTS = ["unshare", "--user", "--map-root-user", "--mount"]


def may_mount():
    try:
        return subprocess.run([*MOUNTS, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.slow
def test_a_real_full_disk_loses_nothing(engine, tmp_path):
    if not may_mount():
        pytest.skip("needs a file system of its own: unshare --user --mount is not permitted here")
    write(tmp_path / "in.jsonl.gz", [f"question {i}" for i in range(300)])
    costs = "".join(f"  {name}: {{cost: {cost}}}\n" for name, cost in zip(MODELS, COSTS, strict=True))
    (tmp_path / "catalog.yaml").write_text(f"models:\n{costs}")
    done = in_process_of_its_own("full", engine.folder, "in.jsonl.gz", "catalog.yaml", folder=tmp_path, wrapper=MOUNTS)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)


@pytest.mark.parametrize("name", ["._SUCCESS.0123456789ab.tmp", ".part-000001.parquet.0123456789ab.tmp"])
def test_a_kill_while_a_run_is_marked_as_complete_leaves_nothing(name, router, tmp_path):
    config = BatchConfig([write(tmp_path / "in.jsonl")], str(tmp_path / "out"))
    run(router, config)
    whole = contents(tmp_path / "out")
    beside = contents(tmp_path / "out.run")
    (tmp_path / "out" / "_SUCCESS").unlink()
    for folder in ("out", "out.run"):  # the first where the two are on different disks
        (tmp_path / folder / name).write_bytes(b"")
    run(router, config)
    assert contents(tmp_path / "out") == whole
    assert contents(tmp_path / "out.run") == beside


def test_the_output_never_has_a_file_that_is_not_whole(router, tmp_path, monkeypatch):
    """At which polars would stop after a kill."""
    given, seen, flush = write(tmp_path / "in.jsonl"), set(), os.fsync

    def look(descriptor):
        if (tmp_path / "out").is_dir():
            seen.update(os.listdir(tmp_path / "out"))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", look)
    for more in ({}, {"format": "csv"}, {"split_by": "model", "write_as": "openai-batch"}):
        run(router, BatchConfig([given], str(tmp_path / "out"), rows_per_part=40, **more))
    assert len(seen) > 8
    assert all(name == "_SUCCESS" or name.startswith("part-") for name in seen)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kind", ["killed", "decided"])
def test_a_run_killed_at_any_moment_resumes_to_identical_output(kind, engine, tmp_path, rng):
    prompts = [f"question {rng.integers(250)} " + "so " * int(rng.integers(4)) for _ in range(300)]
    write(tmp_path / "in.jsonl.gz", prompts)
    done = in_process_of_its_own(kind, engine.folder, "in.jsonl.gz", rng.integers(1 << 30), folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)


@pytest.mark.slow
def test_a_run_of_another_user_is_read_but_not_written_over(engine, router):
    let = "let this user write"
    with open_folder() as folder:
        given = write(folder / "in.jsonl")
        run(router, BatchConfig([given], str(folder / "out")))
        whole = contents(folder / "out")
        with pytest.MonkeyPatch.context() as patch:  # pytest's folder of the checkpoint is closed to others
            patch.setattr("p2l_engine.batch.identity._checkpoint", partial(lambda known, _: known, _checkpoint(engine)))
            assert problem_of_other_user(lambda: run(router, BatchConfig([given], str(folder / "out")))) == ""
            for more, restart in (({"budget": 2.0}, False), ({}, True)):
                said = problem_of_other_user(
                    lambda more=more, restart=restart: run(router, BatchConfig([given], str(folder / "out"), **more), restart)
                )
                assert (
                    said
                    == f"PermissionError: {folder}/out.run: cannot be written: Permission denied; name another output, or {let}"
                )
            said = problem_of_other_user(lambda: run(router, BatchConfig([given], str(folder / "new"))))
            assert "new.run: cannot be made: " in said
            assert "name an output in a folder that can be written" in said
        assert contents(folder / "out") == whole


READ_ONLY = """
mount --bind here here && mount -o remount,bind,ro here || exit 77
exec "$@"
"""


@pytest.mark.slow
def test_a_finished_output_on_a_read_only_mount_reports(engine, tmp_path, monkeypatch):
    if not may_mount():
        pytest.skip("needs a file system of its own: unshare --user --mount is not permitted here")
    (tmp_path / "here").mkdir()
    write(tmp_path / "in.jsonl.gz", [f"question {i}" for i in range(30)])
    costs = "".join(f"  {name}: {{cost: {cost}}}\n" for name, cost in zip(MODELS, COSTS, strict=True))
    (tmp_path / "catalog.yaml").write_text(f"models:\n{costs}")
    command = ["batch", "in.jsonl.gz", "-o", "here/out", "--checkpoint", str(engine.folder), "--device", "cpu",
               "--dtype", "float32", "--catalog", "catalog.yaml"]  # fmt: skip

    def ended(*wrapper, more=()):
        return subprocess.run(
            [*wrapper, sys.executable, "-m", "p2l_engine", *command, *more], cwd=tmp_path, capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
        )  # fmt: skip

    monkeypatch.chdir(tmp_path)
    assert p2l_engine(*command).status == 0
    before = contents(tmp_path / "here" / "out")
    read_only = (*MOUNTS, "sh", "-c", READ_ONLY, "sh")
    found = ended(*read_only)
    if found.returncode == 77:
        pytest.skip("a folder cannot be mounted read-only here")
    assert (found.returncode, found.stderr) == (0, "")
    assert "│ rows" in found.stdout
    found = ended(*read_only, more=["--budget", "2"])
    assert found.returncode == 2
    assert "Read-only file system" in found.stderr
    assert "Traceback" not in found.stderr
    assert contents(tmp_path / "here" / "out") == before


@pytest.mark.parametrize("same", [True, False])
def test_another_machine_that_writes_to_the_same_store_is_noticed(same, router, tmp_path):
    """Stores have no locks; a run of the same inputs and options writes the same bytes."""
    store = Location.of("memory://two-machines/out")
    config = BatchConfig([write(tmp_path / "in.jsonl")], store.shown, state=tmp_path / "state", rows_per_part=32)

    def begin_there(_):
        place = Location.of("memory://two-machines/out.run/manifest.json")
        found = json.loads(place.read())
        if not same:
            found["decisions"]["budget"] = 9.0
        place.write(json.dumps(found).encode())

    if same:
        assert run(router, config, restart=True, progress=begin_there).rows == 150
        return
    with pytest.raises(ValueError, match=r"out: another run, of other inputs or options, wrote here meanwhile.*--restart one"):
        run(router, config, restart=True, progress=begin_there)
    assert "_SUCCESS" not in store.names()
    assert run(router, config).rows == 150

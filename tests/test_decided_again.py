"""Runs with other decisions, places or inputs: which use the coefficients of an earlier run, and which are refused."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import tempfile
from itertools import count, islice
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from p2l_engine import Engine, Router
from p2l_engine.batch import BatchConfig, run
from tests.support.batch_files import PROMPTS, contents, manifest, write
from tests.support.cases import slow_but
from tests.support.catalogs import catalog
from tests.support.tiny import MODELS

DIFFERENT = len(set(PROMPTS))
ROWS = {"rows_per_part": 32}


@pytest.fixture
def no_forward_pass(router, monkeypatch):
    """After this is called, a forward pass fails the test."""

    def forbid():
        def fail(chunks):
            for _ in chunks:
                raise AssertionError("a forward pass")
            return
            yield

        monkeypatch.setattr(router.engine, "outputs_of", fail)

    return forbid


DECISIONS = {
    "budget": ({"budget": 2.0}, {}, ("budget: was 1.5, is 2.0",)),
    "scope": ({"budget_scope": "batch"}, {}, ("budget_scope: was 'prompt', is 'batch'",)),
    "price": ({"budget": None, "price": 0.02}, {}, ("budget: was 1.5, is None", "price: was None, is 0.02")),
    "max_share": ({"max_share": {"beta": 0.1}}, {}, ("max_share: beta",)),
    "min_share": ({"min_share": {("alpha", "beta"): 0.3}}, {}, ("min_share: ('alpha', 'beta')",)),
    "keep": ({"keep": ["id"]}, {}, ("keep: was None, is ['id']",)),
    "coefficients": ({"coefficients": "float32"}, {}, ("coefficients: was None, is 'float32'",)),
    "seed": ({}, {"seed": 4}, ("seed: was 3, is 4",)),
    "objective": ({}, {"objective": "half-ties"}, None),
    "opponents": ({}, {"opponents": {"alpha": 1.0}}, None),
    "format": ({"format": "jsonl"}, {}, ("format: was 'parquet', is 'jsonl'",)),
    "source": ({"source": False}, {}, ("source: was True, is False",)),
    "split_by": (
        {"split_by": "model", "write_as": "openai-batch"},
        {},
        ("split_by: was None, is 'model'", "write_as: was None, is 'openai-batch'"),
    ),
    "catalog": ({}, {"catalog": catalog(costs=[1.0, 2.0, 3.0, 4.0, 6.0])}, ("catalog: epsilon",)),
}


@pytest.mark.parametrize("name", slow_but(("budget", "scope", "format"), DECISIONS))
def test_a_finished_run_is_decided_again_without_a_forward_pass(name, router, tmp_path, no_forward_pass):
    options, of_router, changed = DECISIONS[name]
    of_router = {"catalog": catalog(), "seed": 3} | of_router
    other = Router(router.engine, of_router.pop("catalog"), **of_router)
    given, base = write(tmp_path / "in.parquet", note=[str(i) for i in range(150)]), {"budget": 1.5} | ROWS
    run(other, BatchConfig([given], tmp_path / "fresh", **base | options))
    run(router, BatchConfig([given], tmp_path / "out", **base))
    no_forward_pass()
    report = run(other, BatchConfig([given], tmp_path / "out", **base | options))
    assert (report.computed, report.resumed, report.rows) == (0, DIFFERENT, 150)
    assert report.changed == changed or (changed is None and report.changed[0].startswith(f"{name}: "))
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    again = run(other, BatchConfig([given], tmp_path / "out", **base | options))
    assert (again.resumed, again.changed) == (DIFFERENT, ())


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "budget": st.sampled_from([1.2, 1.5, 2.0]),
        "budget_scope": st.sampled_from(["prompt", "batch"]),
        "max_share": st.sampled_from([{}, {"beta": 0.1}]),
        "keep": st.sampled_from([None, [], ["id"]]),
        "coefficients": st.sampled_from([None, "float32"]),
        "source": st.booleans(),
        "written": st.sampled_from([{"format": "jsonl"}, {"format": "csv"}, {"split_by": "model"}]),
    },
).map(lambda options: {name: value for name, value in options.items() if name != "written"} | options.get("written", {}))


@pytest.mark.slow
@settings(max_examples=12)
@given(st.lists(st.tuples(OPTIONS, st.integers(0, 12)), min_size=1, max_size=4), OPTIONS)
def test_any_options_after_any_interruptions_give_the_output_of_a_new_run(router, interrupted, last):
    """A run is stopped after some of its steps, the next has other options."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as here:
        file, out = write(Path(here) / "in.parquet"), Path(here) / "out"
        for options, steps in interrupted:
            left = count(steps, -1)

            def stop(_, left=left):
                if next(left) <= 0:
                    raise InterruptedError

            try:
                run(router, BatchConfig([file], out, **ROWS | options), progress=stop)
            except InterruptedError:
                assert "_SUCCESS" not in os.listdir(out) or manifest(out)["report"]
        report = run(router, BatchConfig([file], out, **ROWS | last))
        run(router, BatchConfig([file], Path(here) / "fresh", **ROWS | last))
        assert contents(out) == contents(Path(here) / "fresh")
        assert report.computed + report.resumed == DIFFERENT


@pytest.mark.slow
def test_an_unfinished_run_is_decided_otherwise_from_what_it_has(router, tmp_path):
    given = write(tmp_path / "in.parquet")

    def stop(report):
        if report.rows >= 64:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run(router, BatchConfig([given], tmp_path / "out", **ROWS), progress=stop)
    report = run(router, BatchConfig([given], tmp_path / "out", keep=["id"], **ROWS))
    assert report.resumed >= 32
    assert report.changed == ("keep: was None, is ['id']",)
    run(router, BatchConfig([given], tmp_path / "fresh", keep=["id"], **ROWS))
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


@pytest.mark.slow
def test_how_long_coefficients_are_kept(router, tmp_path, monkeypatch):
    given, out = write(tmp_path / "in.parquet"), tmp_path / "out"

    def spilled():
        return list((tmp_path / "out.run").glob("coefficients-*"))

    report = run(router, BatchConfig([given], out, **ROWS))
    assert report.kept == sum(file.stat().st_size for file in spilled()) > 0
    assert run(router, BatchConfig([given], out, keep_coefficients=False, **ROWS)).kept == 0 == len(spilled())
    before = contents(out)
    message = (
        r"out: holds a run with other options: budget: was None, is 2.0; its coefficients.* are not in .*out.run \(--keep-c"
    )
    with pytest.raises(ValueError, match=message):
        run(router, BatchConfig([given], out, budget=2.0, **ROWS))
    assert contents(out) == before
    monkeypatch.setattr("p2l_engine.batch.runner.KEPT_BYTES", report.kept)
    assert run(router, BatchConfig([given], out, **ROWS), restart=True).kept == report.kept
    monkeypatch.setattr("p2l_engine.batch.runner.KEPT_BYTES", report.kept - 1)
    assert run(router, BatchConfig([given], out, **ROWS), restart=True).kept == 0 == len(spilled())
    run(router, BatchConfig([given], out, keep_coefficients=True, **ROWS), restart=True)
    assert run(router, BatchConfig([given], out, budget=2.0, **ROWS)).kept == report.kept  # as the run before was asked


@pytest.mark.slow
def test_decisions_that_fail_leave_those_before(router, tmp_path):
    """The parts of a finished run stay until the new decisions are known."""
    given, out = write(tmp_path / "in.parquet"), tmp_path / "out"
    run(router, BatchConfig([given], out, budget=1.5, budget_scope="batch", **ROWS))
    before, recorded = contents(out), manifest(out)
    for options, message in (
        ({"keep": ["none"]}, "expected the columns none"),
        ({"max_share": {name: 0.1 for name in MODELS}}, "cannot hold"),
        ({"budget": 0.5}, "infeasible"),
    ):
        with pytest.raises(ValueError, match=message):
            run(router, BatchConfig([given], out, **{"budget_scope": "batch"} | ROWS | options))
        assert contents(out) == before
        assert manifest(out) == recorded

    def stop(report):
        raise InterruptedError

    with pytest.raises(InterruptedError):  # between the two passes
        run(router, BatchConfig([given], out, budget=2.0, budget_scope="batch", **ROWS), progress=stop)
    assert contents(out) == before
    assert run(router, BatchConfig([given], out, budget=1.5, budget_scope="batch", **ROWS)).changed == ()


@pytest.mark.slow
def test_inputs_are_known_by_what_they_hold(router, tmp_path, no_forward_pass):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    write(tmp_path / "a" / "1.jsonl", PROMPTS[:80])
    write(tmp_path / "a" / "2.jsonl", PROMPTS[80:])
    out, options = tmp_path / "out", {"budget": 1.5} | ROWS
    run(router, BatchConfig([tmp_path / "a"], out, **options))
    no_forward_pass()
    before = contents(out)
    os.utime(tmp_path / "a" / "1.jsonl", ns=(0, 0))  # touched
    shutil.copytree(tmp_path / "a", tmp_path / "copied")
    (tmp_path / "a").rename(tmp_path / "renamed")
    for place in ("copied", "renamed"):
        assert run(router, BatchConfig([tmp_path / place], out, **options)).changed == ()
    assert contents(out) == before
    for name, other in (("1.jsonl", "2.jsonl"), ("2.jsonl", "1.jsonl")):
        shutil.copy(tmp_path / "copied" / name, tmp_path / "b" / other)
    with pytest.raises(ValueError, match="inputs: their order; use the same ones"):
        run(router, BatchConfig([tmp_path / "b"], out, **options))
    for name in ("1.jsonl", "2.jsonl"):
        (tmp_path / "copied" / name).replace(tmp_path / "b" / name)
    data = bytearray((tmp_path / "b" / "2.jsonl").read_bytes())
    data[data.index(b"question 29")] ^= 1
    times = (tmp_path / "b" / "2.jsonl").stat()
    (tmp_path / "b" / "2.jsonl").write_bytes(data)
    os.utime(tmp_path / "b" / "2.jsonl", ns=(times.st_atime_ns, times.st_mtime_ns))  # same size, same time
    with pytest.raises(ValueError, match=r"inputs: .*b/2.jsonl is new; inputs: .*a/2.jsonl is missing"):
        run(router, BatchConfig([tmp_path / "b"], out, **options))
    (tmp_path / "b").replace(tmp_path / "a")
    with pytest.raises(ValueError, match=r"inputs: .*a/2.jsonl changed; use"):
        run(router, BatchConfig([tmp_path / "a"], out, **options))
    (tmp_path / "a" / "2.jsonl").unlink()
    with pytest.raises(ValueError, match=r"inputs: .*2.jsonl is missing"):
        run(router, BatchConfig([tmp_path / "a"], out, **options))
    assert contents(out) == before


@pytest.mark.slow
def test_files_that_are_added_at_the_end_are_computed_alone(router, tmp_path):
    inputs = tmp_path / "in"
    inputs.mkdir()
    write(inputs / "day1.parquet", PROMPTS[:80])
    run(router, BatchConfig([inputs], tmp_path / "out", budget=1.5, budget_scope="batch", **ROWS))
    write(inputs / "day2.parquet", [f"new {i}" for i in range(40)])
    report = run(router, BatchConfig([inputs], tmp_path / "out", budget=1.5, budget_scope="batch", **ROWS))
    assert report.changed == (f"inputs: {inputs}/day2.parquet is new",)
    assert report.resumed >= 32  # of the blocks that were full
    assert report.computed + report.resumed == 120
    run(router, BatchConfig([inputs], tmp_path / "fresh", budget=1.5, budget_scope="batch", **ROWS))
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    write(inputs / "day0.parquet", ["before"])
    with pytest.raises(ValueError, match=r"inputs: .*day0.parquet is new; use the same ones"):
        run(router, BatchConfig([inputs], tmp_path / "out", budget=1.5, budget_scope="batch", **ROWS))


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["prompt", "batch"])
def test_an_input_that_changes_during_a_run_is_noticed_and_costs_its_own_prompts(scope, router, tmp_path):
    inputs, options = tmp_path / "in", {"budget": 1.5, "budget_scope": scope} | ROWS
    inputs.mkdir()
    write(inputs / "1.parquet", PROMPTS[:80])
    changing = Path(write(inputs / "2.jsonl", ["before"] * 9))
    before = changing.read_bytes()

    def change(report):
        changing.write_bytes(before.replace(b"before", b"after."))

    message = r"inputs: .*2.jsonl changed during the run: the same command reads it again"
    with pytest.raises(ValueError, match=message):
        run(router, BatchConfig([inputs], tmp_path / "out", **options), progress=change)
    report = run(router, BatchConfig([inputs], tmp_path / "out", **options))
    assert report.resumed >= 32
    run(router, BatchConfig([inputs], tmp_path / "fresh", **options))
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    # A file that comes during the run is not part of it; one that goes is missed.
    run(router, BatchConfig([inputs], tmp_path / "other", **options), progress=lambda _: write(inputs / "3.jsonl", ["late"]))
    assert contents(tmp_path / "other") == contents(tmp_path / "fresh")
    with pytest.raises(ValueError, match=r"inputs: changed: .*2.jsonl: cannot be read.* during the run"):
        run(router, BatchConfig([inputs], tmp_path / "gone", **options), progress=lambda _: changing.unlink(missing_ok=True))


@pytest.mark.slow
def test_an_input_that_changes_while_it_is_decided_again_leaves_the_decisions_before(router, tmp_path):
    given, out = Path(write(tmp_path / "in.jsonl")), tmp_path / "out"
    run(router, BatchConfig([given], out, budget=1.5, budget_scope="batch", **ROWS))
    before, recorded, text = contents(out), manifest(out), given.read_text()
    message = "changed during the run: .*out still holds the run before: name another folder, or --restart"
    with pytest.raises(ValueError, match=message):
        run(
            router,
            BatchConfig([given], out, budget=2.0, budget_scope="batch", **ROWS),
            progress=lambda _: given.write_text(text.replace("row 1", "row 2")),
        )
    assert contents(out) == before
    assert manifest(out) == recorded


@pytest.mark.slow
@given(
    prompts=st.lists(st.sampled_from(["a", "b", "c 1", "d 2", None, "new"]), min_size=1, max_size=90),
    odd=st.booleans(),
    end=st.sampled_from([b"", b'{"prompt": "ha', b"\xff\n"]),
    write_as=st.sampled_from([None, "openai-batch"]),
)
@example(prompts=["a"] * 80, odd=False, end=b'{"prompt": "ha', write_as=None)
@example(prompts=["a", "b"] * 40, odd=False, end=b"", write_as=None)
@settings(max_examples=8, deadline=None)
def test_an_input_that_changes_between_its_two_readings_is_named(prompts, odd, end, write_as, router, tmp_path_factory):
    """A budget over the batch reads it twice: whatever it holds the second time, decisions are never of both."""
    folder = tmp_path_factory.mktemp("twice")
    path, out, more = folder / "in.jsonl", folder / "out", {"split_by": "model", "write_as": write_as} if write_as else {}
    config = BatchConfig([path], out, budget=1.5, budget_scope="batch", **more, **ROWS)
    write(path, ["a", "b", "c 1", "d 2", "a"] * 16)
    rows = [{"id": 5 if odd and i == 3 else f"row {i}", "prompt": prompt} for i, prompt in enumerate(prompts)]
    rest = "".join(json.dumps(row) + "\n" for row in rows).encode()
    solve = router.solve

    def solved(v, *arguments):
        if v.shape[0] > 1:
            path.write_bytes(rest + end)
        return solve(v, *arguments)

    message = "in.jsonl changed during the run: the same"
    with patch.object(router, "solve", solved), pytest.raises(ValueError, match=message) as ended:
        run(router, config)
    assert not re.search("zip|npy|index|broadcast", str(ended.value))
    path.write_bytes(rest)
    run(router, config)
    run(router, dataclasses.replace(config, output=folder / "fresh"))
    assert contents(out) == contents(folder / "fresh")


@pytest.mark.parametrize("error", [OSError("Connection reset"), RuntimeError("block 2: the workers read other prompts")])
@pytest.mark.parametrize("changes", slow_but((True,), [False, True]))
def test_whatever_ends_a_run_a_changed_input_is_named(error, changes, router, tmp_path, monkeypatch):
    path, config = tmp_path / "in.jsonl", BatchConfig([tmp_path / "in.jsonl"], tmp_path / "out", **ROWS)
    write(path)
    real = router.engine.outputs_of

    def ended(chunks):
        yield from islice(real(chunks), 2)
        if changes:
            write(path, [*PROMPTS[:40], "new"])
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(router.engine, "outputs_of", ended)
        message = f"{error}; inputs: .*in.jsonl changed during the run: the same command" if changes else str(error)
        with pytest.raises(ValueError if changes else type(error), match=message):
            run(router, config)
    run(router, config)
    run(router, dataclasses.replace(config, output=tmp_path / "fresh"))
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("scope", ["prompt", "batch"])
@pytest.mark.parametrize("lost", slow_but((True,), [False, True]))
def test_an_interrupted_run_without_coefficients_is_decided_anew(lost, scope, router, tmp_path):
    """It has none where no row could be routed yet, or where the disk of its state is lost: there is nothing to keep."""
    prompts = PROMPTS[:64] if lost else [None] * 64
    config = BatchConfig([write(tmp_path / "in.jsonl", [*prompts, "a"])], tmp_path / "out", **ROWS)

    def stop(report):
        if report.parts == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run(router, config, progress=stop)
    for file in (tmp_path / "out.run").glob("coefficients-*"):
        file.unlink()
    other = dataclasses.replace(config, budget=2.0, budget_scope=scope)
    run(router, other)
    run(router, dataclasses.replace(other, output=tmp_path / "fresh"))
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


@pytest.mark.slow
def test_a_copied_checkpoint_is_the_same_and_a_changed_one_is_refused(router, tmp_path):
    given, out = write(tmp_path / "in.parquet"), tmp_path / "out"

    def routed(folder):
        return run(Router(Engine.from_pretrained(folder, device="cpu", dtype="float32"), catalog(), seed=3), config)

    config = BatchConfig([given], out, **ROWS)
    run(router, config)
    shutil.copytree(router.engine.folder, tmp_path / "copy", copy_function=shutil.copyfile)
    before = contents(out)
    assert routed(tmp_path / "copy").computed == 0
    assert contents(out) == before
    weights = tmp_path / "copy" / "model.safetensors"
    tensors = load_file(weights)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[tensors[name].numel() // 2] += 1e-3
    times = weights.stat()
    save_file(tensors, weights)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(ValueError, match="checkpoint: model.safetensors; use the same ones"):
        routed(tmp_path / "copy")
    assert contents(out) == before


@pytest.mark.slow
def test_runs_whose_manifest_is_lost_use_the_coefficients_that_a_state_folder_names(router, tmp_path):
    """The folder's name says what its coefficients depend on; those in the run's own folder are of unknown origin."""
    given, out = write(tmp_path / "in.parquet"), tmp_path / "out"
    for more in ({}, {"state": tmp_path / "state"}):
        run(router, BatchConfig([given], out, **ROWS, **more))
        shutil.rmtree(out)
        (tmp_path / "out.run" / "manifest.json").unlink()
        assert run(router, BatchConfig([given], out, **ROWS, **more)).computed == (0 if more else DIFFERENT)
        for folder in ("out", "out.run"):
            shutil.rmtree(tmp_path / folder)


def test_a_million_bytes_between_head_and_tail_count(tmp_path):
    from p2l_engine.batch.contents import contents as contents_of
    from p2l_engine.tables.find import find

    file = tmp_path / "in.jsonl"
    file.write_bytes(b'{"prompt": "' + bytes([97]) * (9 << 20) + b'"}\n')
    (before,) = contents_of(find([file]))
    with file.open("r+b") as opened:
        opened.seek(5_000_000)
        opened.write(b"b")
    (after,) = contents_of(find([file]), [before])
    assert (before.size, before.seen, before.digest == after.digest) == (after.size, None, False)


def test_large_files_are_hashed_once(tmp_path, monkeypatch):
    from p2l_engine.batch import contents as module
    from p2l_engine.tables.find import find

    file = tmp_path / "in.jsonl"
    file.write_text('{"prompt": "a"}\n')
    monkeypatch.setattr(module, "SETTLED", -(10**18))  # as if it had been written long ago
    found = module.contents(find([file]))
    monkeypatch.setattr(module, "sha256", lambda *_: "again")
    assert module.contents(find([file]), found) == found
    shutil.copy(file, tmp_path / "copy.jsonl")
    assert module.contents(find([tmp_path / "copy.jsonl"]), found)[0].digest == "again"
    os.utime(file, ns=(0, 0))
    assert module.contents(find([file]), found)[0].digest == "again"


def test_nothing_but_manifest_and_coefficients_is_left_beside_the_output(router, tmp_path):
    given, beside = write(tmp_path / "in.parquet"), tmp_path / "out.run"
    beside.mkdir()
    for left in (".manifest.json.0123.tmp", ".coefficients-000000-0123.npy.0123.tmp", "costs.npy"):
        (beside / left).touch()
    run(router, BatchConfig([given], tmp_path / "out", budget=1.5, budget_scope="batch", **ROWS))
    assert {file.name.partition("-")[0] for file in beside.iterdir()} == {"manifest.json", "coefficients"}
    assert {file.name.partition("-")[0] for file in (tmp_path / "out").iterdir()} == {"part", "_SUCCESS"}


def test_what_a_store_tells_of_an_object_is_taken_for_what_it_holds(tmp_path):
    """Without it, the object is read."""
    import fsspec

    from p2l_engine.batch.contents import contents as contents_of
    from p2l_engine.tables.find import find

    memory = fsspec.filesystem("memory")
    for name in ("a", "b"):
        memory.pipe(f"/told/{name}/in.jsonl", b'{"prompt": "a"}')
    read = contents_of(find(["memory://told/a", "memory://told/b"]))
    assert len({each.digest for each in read}) == 1
    assert len(read[0].digest) == 64
    for tag in ({"ETag": "x"}, {"md5Hash": "y", "etag": "x"}, {"blob_id": "z", "last_commit": None}):
        info = {"name": "/told/a/in.jsonl", "size": 15, "type": "file", **tag}
        with patch.object(type(memory), "info", lambda *_, info=info, **__: info):
            (told,) = contents_of(find(["memory://told/a/in.jsonl"]))
        name, value = next(iter(tag.items()))
        assert told.digest == f"{name.lower()} {value}"


@pytest.mark.slow
def test_a_link_to_an_output_is_that_output(router, tmp_path):
    given, out = write(tmp_path / "in.parquet"), tmp_path / "disk" / "out"
    out.mkdir(parents=True)
    (tmp_path / "link").symlink_to(out)
    run(router, BatchConfig([given], tmp_path / "link", **ROWS))
    assert sorted(os.listdir(tmp_path)) == ["disk", "in.parquet", "link"]
    assert run(router, BatchConfig([given], out, budget=2.0, **ROWS)).computed == 0


@pytest.mark.slow
def test_a_finished_run_whose_part_is_gone_is_not_marked_as_complete_until_it_is(router, tmp_path):
    given, out = write(tmp_path / "in.parquet"), tmp_path / "out"
    run(router, BatchConfig([given], out, **ROWS))
    (out / "part-000002.parquet").unlink()

    def stop(report):
        assert not (out / "_SUCCESS").exists()
        raise InterruptedError

    with pytest.raises(InterruptedError):
        run(router, BatchConfig([given], out, **ROWS), progress=stop)
    assert not (out / "_SUCCESS").exists()
    assert run(router, BatchConfig([given], out, **ROWS)).computed == 0
    assert (out / "_SUCCESS").exists()

"""What is found in folders and by globs: hidden names, links, and what cannot be read."""

from __future__ import annotations

import glob
import json
import os
import socket

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2l_engine.cli.prompts import PromptFile
from p2l_engine.replay.read import read_log
from p2l_engine.tables import listing
from p2l_engine.tables.chunked import read_rows
from p2l_engine.tables.find import find
from p2l_engine.tables.storage import Location
from p2l_engine.tables.whole import read_table
from tests.support.other_user import open_folder, problem_of_other_user


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def found(root, *patterns):
    """Paths below the root."""
    return [os.path.relpath(file.location.path, root) for file in find([f"{root}/{pattern}" for pattern in patterns])]


def test_what_a_pattern_spells_out_is_read(tmp_path, monkeypatch):
    touch(
        *(tmp_path / name for name in ("_x1.jsonl", "_day1/a.jsonl", "_day1/_b.jsonl", ".hidden/a.csv", "a.csv", "_x/.y/c.csv"))
    )
    assert found(tmp_path, "") == ["a.csv"]
    assert found(tmp_path, "_x*.jsonl") == ["_x1.jsonl"]
    assert found(tmp_path, "_day*/a.jsonl") == ["_day1/a.jsonl"]
    assert found(tmp_path, "_day*") == ["_day1/a.jsonl"]  # below a folder that matches, the rule is the folder's
    assert found(tmp_path, "_day*/_*") == ["_day1/_b.jsonl"]
    assert found(tmp_path, "**/_*.jsonl") == ["_x1.jsonl"]
    assert found(tmp_path, ".hidden/a.csv") == found(tmp_path, ".hid*/*") == found(tmp_path, ".hidden") == [".hidden/a.csv"]
    assert found(tmp_path, "_?/.y/*.csv") == ["_x/.y/c.csv"]
    for pattern in ("*.jsonl", "*/.y/*.csv", "*/a.jsonl", "[_]x1.jsonl"):
        with pytest.raises(ValueError, match='found none; names that start with "." or "_" are skipped'):
            found(tmp_path, pattern)
    monkeypatch.chdir(tmp_path)
    assert [file.location.path for file in find(["_x*.jsonl", "./_day*/a.jsonl"])] == [
        f"{tmp_path}/_x1.jsonl", f"{tmp_path}/_day1/a.jsonl",
    ]  # fmt: skip
    monkeypatch.chdir("/")
    assert [file.location.path for file in find([f"{tmp_path}/_day*/a.jsonl"])] == [f"{tmp_path}/_day1/a.jsonl"]


def test_a_pattern_may_begin_at_the_root(tmp_path, monkeypatch):
    """As ``/_day*/a.jsonl`` does: what is above the pattern is the root, wherever the command runs."""
    touch(tmp_path / "_day1" / "a.jsonl")
    monkeypatch.chdir(tmp_path)
    top = "/".join(["*" + part[1:] for part in str(tmp_path).split("/")[1:]])
    first = {file.location.path for file in find([f"/{top}/_day*/a.jsonl"])}
    assert f"{tmp_path}/_day1/a.jsonl" in first


def test_spark_leaves_files_that_are_no_tables(tmp_path, caplog):
    names = (
        "_SUCCESS",
        "._SUCCESS.crc",
        ".part-0.csv.crc",
        "_temporary/0/part-1.csv",
        "_metadata",
        "_common_metadata",
        "_spark_metadata/0",
    )
    touch(*(tmp_path / name for name in ("part-0.csv", *names)))
    assert found(tmp_path, "") == ["part-0.csv"]
    assert not caplog.records
    touch(tmp_path / "part-0.csv.crc")
    assert found(tmp_path, "") == ["part-0.csv"]
    assert caplog.text.strip().endswith(": part-0.csv.crc")


@pytest.mark.parametrize("log", ["_delta_log", ".hoodie"])
def test_a_table_with_a_log_of_its_own_is_named(log, tmp_path, caplog):
    """Its folder has files that it no longer has."""
    import fsspec

    names = (f"lake/table/{log}/0.json", "lake/table/a.csv")
    touch(*(tmp_path / name for name in names))
    memory = fsspec.filesystem("memory")
    for name in names:
        memory.pipe(f"/{name}", b"prompt\n")
    try:
        for given in (
            f"{tmp_path}/lake",
            f"{tmp_path}/lake/table",
            f"{tmp_path}/lake/*",
            "memory://lake",
            "memory://lake/table",
        ):
            caplog.clear()
            assert len(find([given])) == 1
            assert f"{given}: skipped, cannot be read: {log} (the log of a" in caplog.text
        caplog.clear()
        assert len(find([f"{tmp_path}/lake/table/*.csv"])) == len(find(["memory://lake/table/*.csv"])) == 1
        assert not caplog.records
    finally:
        memory.rm("/lake", recursive=True)


def test_names_that_look_like_globs_are_names_first(tmp_path):
    touch(
        *(
            tmp_path / name
            for name in ("x[12].csv", "x1.csv", "run[12]/a.csv", "run[12]/b.csv", "run1/c.csv", "deep/y?.csv", "deep/yz.csv")
        )
    )
    assert found(tmp_path, "x[12].csv") == ["x[12].csv"]
    assert found(tmp_path, "x[1].csv") == ["x1.csv"]
    assert found(tmp_path, "run[12]/*.csv") == ["run[12]/a.csv", "run[12]/b.csv"]
    assert found(tmp_path, "run[12]/[a]*") == ["run[12]/a.csv"]
    assert found(tmp_path, "*/y?.csv") == ["deep/y?.csv"]


def test_what_cannot_be_read_is_named(tmp_path, caplog, monkeypatch):
    touch(tmp_path / "a.csv", tmp_path / "sub" / "b.csv")
    (tmp_path / "dead.csv").symlink_to("nowhere.csv")
    (tmp_path / "loop.csv").symlink_to("loop.csv")
    (tmp_path / "sub" / "up").symlink_to("..")  # a circle: each file once
    os.mkfifo(tmp_path / "pipe.csv")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # whose whole path is too long for a socket's name
        server.bind("s.csv")
    expected = {
        "dead.csv": "a link to nothing",
        "loop.csv": "too many levels of symbolic links",
        "pipe.csv": "a named pipe",
        "s.csv": "a socket",
    }
    assert found(tmp_path, "") == ["a.csv", "sub/b.csv"]
    line = next(record.getMessage() for record in caplog.records)
    assert line == f"{tmp_path}/: skipped, cannot be read: dead.csv (a link to nothing) and 3 more"
    for name, problem in expected.items():
        caplog.clear()
        with pytest.raises(ValueError, match="found none"):
            found(tmp_path, f"{name[0]}*[.]csv" if name != "a.csv" else "")
        assert f"{name} ({problem})" in caplog.text
        with pytest.raises(ValueError, match=f"{name}: expected a file or folder, got {problem}"):
            find([tmp_path / name])


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_what_is_skipped_is_said_once(ending, tmp_path, caplog):
    rows = [{"messages": [{"role": "user", "content": "hi"}], "model": "x", "propensity": 0.5}]
    (tmp_path / "notes.txt").touch()
    (tmp_path / "dead.csv").symlink_to("nowhere")
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    else:
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for read_it in (PromptFile.read, read_log, lambda folder: read_table(folder, ["model"])):
        caplog.clear()
        read_it(tmp_path)
        said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert [line.rpartition(": ")[2] for line in said] == ["dead.csv (a link to nothing)", "notes.txt"]


@pytest.mark.slow
def test_what_another_user_may_not_read_is_named():
    with open_folder() as folder:
        touch(folder / "a" / "a.csv", folder / "closed" / "b.csv", folder / "unseen" / "c.csv", folder / "d.csv")
        for name, mode in (("closed", 0o000), ("unseen", 0o744), ("d.csv", 0o000)):
            (folder / name).chmod(mode)
        for pattern in (".", "closed", "*"):
            said = problem_of_other_user(lambda pattern=pattern: find([f"{folder}/{pattern}"]))
            assert said.endswith("closed: cannot be listed: Permission denied; let this user read it, or name other folders")
        assert problem_of_other_user(lambda: found(folder, "a/*.csv")) == ""
        for name in ("closed/b.csv", "unseen/c.csv"):
            said = problem_of_other_user(lambda name=name: find([folder / name]))
            assert said.endswith(f"{name}: expected a file or folder, got permission denied: let this user enter its folder")
        said = problem_of_other_user(lambda: found(folder, "unseen"))
        assert said.startswith(f"ValueError: {folder}/unseen: expected files in this folder")
        for read_it in (
            lambda: list(read_rows(find([folder / "d.csv"]), "prompt")),
            lambda: read_table(folder / "d.csv", ["p"]),
        ):
            assert problem_of_other_user(read_it).startswith(f"ValueError: {folder}/d.csv: cannot be read: [Errno 13]")
        (folder / "closed").chmod(0o755)
        (folder / "unseen").chmod(0o755)


def test_names_that_are_not_utf_8_are_refused_where_they_are_read(tmp_path, caplog):
    bad = os.fsdecode(b"z\xff")
    touch(tmp_path / "a.csv", tmp_path / f"{bad}.txt", tmp_path / f".{bad}.csv")
    assert found(tmp_path, "") == ["a.csv"]
    assert caplog.text.strip().endswith("z\\xff.txt")
    touch(tmp_path / bad / "b.csv")
    for path in (tmp_path, f"{tmp_path}/*/b.csv", tmp_path / bad / "b.csv"):
        with pytest.raises(ValueError, match="expected names of files in UTF-8: .*; rename those") as refused:
            find([path])
        str(refused.value).encode()


name = st.sampled_from(["a", "b", "ab", ".a", "_a", "_a=1", "a=b", "[a]", "a?"])
part = st.sampled_from(["*", "a*", "?", "_*", ".*", "[ab]*", "**", "a", "_a", "*b", "[[]a]", "a?"])


@pytest.mark.slow
@given(
    paths=st.lists(st.lists(name, min_size=1, max_size=3).map("/".join), min_size=1, max_size=6),
    pattern=st.lists(part, min_size=1, max_size=3).map("/".join),
)
@settings(deadline=None, max_examples=150)
def test_globs_agree_with_pythons(paths, pattern, tmp_path_factory):
    """Beside names with a "_", and names that are patterns: what Python's glob finds, and what is below its folders."""
    root = tmp_path_factory.mktemp("glob")
    for path in paths:
        touch(root / f"{path}.d" / "a.csv", root / f"{path}.csv")
    literal = any(os.path.lexists(root / "/".join(pattern.split("/")[: i + 1])) for i in range(3))
    if literal or "_" in pattern or pattern == "a":
        return
    here = set()
    for match in glob.glob(f"{root}/{pattern}", recursive=True):
        inner = (
            [match] if os.path.isfile(match) else [f"{folder}/{name}" for folder, _, names in os.walk(match) for name in names]
        )
        for file in inner:
            below = file.removeprefix(match).split("/")
            if not any(each.startswith(".") for each in below):
                here.add(os.path.normpath(file))
    visible = {
        file for file in here
        if not any(each.startswith("_") and "=" not in each for each in os.path.relpath(file, root).split("/"))
    }  # fmt: skip
    entries = {entry.path for entry in listing.glob_entries(Location.of(f"{root}/{pattern}"))}
    assert entries == visible


def test_stores_and_disks_agree_on_hidden_names(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    names = ["_x1.csv", "_day=1/a.csv", "_tmp/a.csv", "deep/_x/b.csv", "deep/er/c.csv", "x[12].csv", "x1.csv"]
    touch(*(tmp_path / name for name in names))
    for name in names:
        memory.pipe(f"/lake/{name}", b"prompt\n")
    try:
        for pattern in (
            "",
            "_x*.csv",
            "*",
            "**/*.csv",
            "*/_x/*.csv",
            "_*/a.csv",
            "deep",
            "de*/",
            "x[12].csv",
            "x[1].csv",
            "?1.csv",
        ):
            stored = find([f"memory://lake/{pattern}"])
            local = find([f"{tmp_path}/{pattern}"])
            assert [file.location.path.removeprefix("/lake/") for file in stored] == found(tmp_path, pattern), pattern
            assert [file.partitions for file in stored] == [file.partitions for file in local]
    finally:
        memory.rm("/lake", recursive=True)

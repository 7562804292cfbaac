"""The one atomic writer: whole files whatever fails, and whoever else writes."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from p2l_engine.routing.pacer import BudgetPacer
from p2l_engine.tables import atomic
from p2l_engine.tables.atomic import write_file, write_folder


def write_many(path, letter, times=50):
    for _ in range(times):
        write_file(path, letter * 100_000)


def is_whole(text):
    return len(text) == 100_000 and len(set(text)) == 1


@pytest.mark.slow
def test_threads_and_processes_write_one_file(tmp_path):
    path = tmp_path / "state"
    write_file(path, "a" * 100_000)
    processes = [multiprocessing.get_context("fork").Process(target=write_many, args=(path, letter)) for letter in "bc"]
    for process in processes:
        process.start()
    with ThreadPoolExecutor(6) as pool:
        writers = [pool.submit(write_many, path, letter) for letter in "def"]
        while not all(writer.done() for writer in writers):
            assert is_whole(path.read_text())
        for writer in writers:
            writer.result()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert is_whole(path.read_text())
    assert os.listdir(tmp_path) == ["state"]


@pytest.mark.slow
def test_a_pacer_is_saved_from_threads(tmp_path):
    pacer = BudgetPacer(1.0)

    def work(seed):
        for _ in range(20):
            pacer.choose([0.1 + seed / 100, 0.9], [0.5, 2.0])
            pacer.save(tmp_path / "pacer.json")
            assert BudgetPacer.load(tmp_path / "pacer.json").count > 0

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    pacer.save(tmp_path / "pacer.json")
    assert BudgetPacer.load(tmp_path / "pacer.json").count == pacer.count == 160
    assert os.listdir(tmp_path) == ["pacer.json"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_changes_nothing(failing, tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_file(path, b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((atomic.os, "fsync") if failing == "fsync" else (atomic.Path, "replace")), fail)
    with pytest.raises(OSError, match="No space left"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_links_and_pipes_stay_what_they_are(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "file")
    write_file(tmp_path / "link", "é")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "file").read_text(encoding="utf-8") == "é"
    code = "from p2l_engine.tables.atomic import write_file; write_file('/dev/stdout', 'hello')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"hello"
    with pytest.raises(OSError, match="nowhere"):
        write_file(tmp_path / "nowhere" / "file", "x")


def test_folders_are_replaced_whole_or_not_at_all(tmp_path):
    def fill(text):
        def write(folder):
            (folder / "a.json").write_text(json.dumps(text))
            if text == "bad":
                raise ValueError("bad")

        return write

    target = tmp_path / "made" / "folder"
    write_folder(target, fill("first"))
    write_folder(target, fill("second"))
    with pytest.raises(ValueError, match="bad"):
        write_folder(target, fill("bad"))
    assert json.loads((target / "a.json").read_text()) == "second"
    assert not write_folder(target, fill("third"), replace=False)
    assert json.loads((target / "a.json").read_text()) == "second"
    (target.parent / "other").mkdir()
    assert write_folder(target.parent / "other", fill("first"), replace=False)
    assert sorted(os.listdir(target.parent)) == ["folder", "other"]
    assert target.stat().st_mode & 0o777 == 0o755


def test_many_replace_one_folder_at_once_and_leave_nothing_else(tmp_path):
    def work(text):
        def fill(folder):
            for name in "ab":
                (folder / name).write_text(text)

        assert all(write_folder(tmp_path / "log", fill) for _ in range(30))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, "abcd"))
    assert (tmp_path / "log" / "a").read_text() == (tmp_path / "log" / "b").read_text()
    assert os.listdir(tmp_path) == ["log"]


def test_a_link_to_a_folder_stays_one(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_folder(tmp_path / "link", lambda work: (work / "new").write_text("new"))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "new").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_a_file_is_written_in_another_folder_until_it_is_whole_unless_that_is_on_another_disk(tmp_path, monkeypatch):
    work, seen = tmp_path / "work", []
    work.mkdir()
    flush = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (seen.append(os.listdir(work)), flush(descriptor)))
    write_file(tmp_path / "a", "whole", work)
    assert (tmp_path / "a").read_text() == "whole"
    assert seen[0][0].startswith(".a.")
    rename = atomic.Path.replace

    def apart(self, target):
        if self.parent == work:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return rename(self, target)

    monkeypatch.setattr(atomic.Path, "replace", apart)
    write_file(tmp_path / "b", "whole", work)
    assert (tmp_path / "b").read_text() == "whole"
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "work"]
    assert not os.listdir(work)

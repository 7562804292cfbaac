"""Locks on folders: one process has it, until it leaves it, whatever it forked meanwhile."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from p2l_engine.checkpoint import weight_cache
from p2l_engine.tables import locks
from p2l_engine.tables.locks import folder_lock
from p2l_engine.tables.storage import Location


def forked(work):
    """A child that does this work and ends without the parent's handlers."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


def is_free(folder):
    try:
        with folder_lock(folder):
            return True
    except BlockingIOError:
        return False


def test_a_folder_is_locked_by_one_at_a_time(tmp_path):
    with folder_lock(tmp_path):
        assert not is_free(tmp_path)
    assert is_free(tmp_path)


def test_a_child_that_lives_longer_does_not_keep_the_lock(tmp_path):
    with folder_lock(tmp_path):
        child = forked(lambda: time.sleep(60))
        assert not is_free(tmp_path)
    try:
        assert is_free(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_child_that_leaves_the_block_does_not_end_its_parents_lock(tmp_path):
    lock = folder_lock(tmp_path)
    with lock:
        os.waitpid(forked(lambda: lock.__exit__(None, None, None)), 0)
        assert not is_free(tmp_path)
    assert is_free(tmp_path)


def test_who_waits_is_told_and_has_the_lock_next(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "TOLD_AFTER", 0.0)
    reading, writing = os.pipe()

    def hold():
        with folder_lock(tmp_path):
            os.write(writing, b"x")
            time.sleep(0.2)

    child, told = forked(hold), []
    os.read(reading, 1)
    with pytest.raises(BlockingIOError), folder_lock(tmp_path, 0.03):
        pass
    assert not told
    with folder_lock(tmp_path, 60, lambda: told.append(1)):
        assert told == [1]
    os.waitpid(child, 0)
    os.close(reading)
    os.close(writing)


def test_errors_within_a_locked_folder_stay_what_they_are(tmp_path):
    here = Location.of(str(tmp_path))
    with pytest.raises(BlockingIOError, match="the pipe is full"), here.alone():
        raise BlockingIOError("the pipe is full")
    with here.alone(), pytest.raises(RuntimeError, match="another run is writing here"), here.alone():
        pass


def test_packed_weights_leave_no_lock_to_a_process_that_was_forked_while_they_were_made(tmp_path):
    children = []

    def make():
        children.append(forked(lambda: time.sleep(60)))
        return {"a": torch.arange(3)}

    weight_cache.kept(tmp_path, "f", "how", make)
    try:
        assert is_free(tmp_path)
    finally:
        os.kill(children[0], signal.SIGKILL)
        os.waitpid(children[0], 0)


def test_a_process_that_is_stopped_while_it_packs_weights_stops_no_other(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(weight_cache, "LONGEST_WAIT", 0.1)
    monkeypatch.setattr(locks, "TOLD_AFTER", 0.05)

    def stopped():
        os.kill(os.getpid(), signal.SIGSTOP)
        return {"a": torch.arange(3)}

    child = forked(lambda: weight_cache.kept(tmp_path, "f", "how", stopped))
    os.waitpid(child, os.WUNTRACED)
    try:
        assert torch.equal(weight_cache.kept(tmp_path, "g", "how", lambda: {"a": torch.arange(5)})["a"], torch.arange(5))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    said = [record.getMessage() for record in caplog.records]
    assert said[0] == f"waiting for another process, which packs weights in {tmp_path}"
    assert "no packed weights can be kept here: another process has been packing weights for 0.1 s" in said[1]

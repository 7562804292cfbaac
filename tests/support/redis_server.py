"""A redis server of the distribution's package, on a port and in a folder of its own."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


class RedisServer:
    """A server that can be stopped, killed and started again. url: redis://127.0.0.1:PORT/0."""

    def __init__(self, folder: str, *options: str) -> None:
        self._folder, self._options = folder, options
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir", self._folder]
        self.process = subprocess.Popen(["redis-server", *options, *self._options], stdout=subprocess.DEVNULL)
        for _ in range(1000):
            assert self.process.poll() is None, "redis-server ended at once"
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            except OSError:
                time.sleep(0.01)
        raise AssertionError("redis-server does not answer")

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()


@contextmanager
def server(*options: str) -> Iterator[RedisServer]:
    """options: of its command line. Skips where the package is not installed."""
    if shutil.which("redis-server") is None:
        pytest.skip("redis is not installed (Debian's package redis-server)")
    pytest.importorskip("redis", reason="the Python package redis is not installed (extra redis)")
    folder = tempfile.mkdtemp(prefix="p2l-redis-")
    found = RedisServer(folder, *options)
    try:
        found.start()
        yield found
    finally:
        if found.process is not None:
            found.kill()
        shutil.rmtree(folder)

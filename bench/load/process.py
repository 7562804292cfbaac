"""A server in a process of its own: started, asked whether it is ready, measured, stopped."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

READY = 120.0  # seconds that a server may take to start
STOP = 30.0  # and to stop


class Process:
    """Runs a command until the context ends. ready: a path that answers once the server is up. log: what it wrote."""

    def __init__(
        self,
        command: Sequence[str],
        port: int,
        ready: str,
        environment: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.command, self.port, self._ready = list(command), port, ready
        self._environment = {**os.environ, **(environment or {})}
        self._headers, self._folder = dict(headers or {}), folder

    def __enter__(self) -> Self:
        self._output = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            self.command, stdout=self._output, stderr=subprocess.STDOUT, env=self._environment, cwd=self._folder
        )
        with contextlib.ExitStack() as unless_ready:
            unless_ready.callback(self.kill)
            self._wait()
            unless_ready.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    @property
    def log(self) -> str:
        """Its standard output and error so far, after its end too."""
        file = self._output.fileno()  # whose position is the process's
        return os.pread(file, os.fstat(file).st_size, 0).decode("utf-8", "replace")

    def stop(self) -> None:
        """SIGTERM, and SIGKILL where that does not help."""
        self.process.terminate()
        try:
            self.process.wait(STOP)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """SIGKILL, to its children too."""
        for process in reversed(self._all()):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def cpu(self) -> float:
        """CPU seconds so far, of its children too."""
        return sum(sum(process.cpu_times()[:2]) for process in self._all())

    def memory(self) -> float:
        """Resident MiB now, of its children too."""
        return float(sum(process.memory_info().rss for process in self._all())) / 2**20

    def _all(self) -> list[psutil.Process]:
        try:
            own = psutil.Process(self.process.pid)
            return [own, *own.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _wait(self) -> None:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{self._ready}", headers=self._headers)
        until = time.monotonic() + READY
        while True:
            if self.process.poll() is not None:
                raise OSError(f"{' '.join(self.command)} ended with status {self.process.returncode}:\n{self.log[-2000:]}")
            try:
                with urllib.request.urlopen(request, timeout=5):
                    return
            except OSError:
                if time.monotonic() > until:
                    raise OSError(f"{' '.join(self.command)} did not start:\n{self.log[-2000:]}") from None
                time.sleep(0.05)


def free_port() -> int:
    """A free port, below those that the system gives to outgoing connections: one of these could take it before its server
    does."""
    for port in random.sample(range(15_000, 32_000), 100):
        with socket.socket() as found, contextlib.suppress(OSError):
            found.bind(("127.0.0.1", port))
            return port
    raise OSError("expected a free port from 15,000 to 32,000, found none in a hundred tries")

"""The process that serves: it listens, and ends well when it is told to stop."""

from __future__ import annotations

import gc
import signal
from typing import Any

import uvicorn

from p2l_engine.serve.runtime import Runtime
from p2l_engine.serve.server import Server

GRACE = 30  # seconds that running requests get when the server stops
# Seconds that a connection without a request stays open. Load balancers and clients keep theirs for up to 60 (uvicorn: 5): the
# one that closes first must not be the server, which may do so just as a request arrives.
IDLE = 75
GROWTH = 10_000  # objects more than after the last collection, at which garbage is collected


class GracefulServer(uvicorn.Server):
    """Says that it is not ready any more as soon as it is told to stop."""

    def __init__(self, config: uvicorn.Config, server: Server) -> None:
        super().__init__(config)
        self._server = server

    def handle_exit(self, sig: int, frame: Any) -> None:
        """See uvicorn.Server."""
        self._server.ready = False
        # Not uvicorn's own, which raises the signal again at the end: a server that was told to stop has ended well.
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


def run(runtime: Runtime, host: str, port: int, grace: int = GRACE) -> None:
    """Serves until SIGTERM or Ctrl-C; requests that run then get ``grace`` seconds."""
    app = runtime.application()
    assert runtime.server is not None
    config = uvicorn.Config(
        app, host, port, loop="uvloop", http="httptools", ws="none", access_log=False, log_config=None, server_header=False,
        timeout_graceful_shutdown=grace, timeout_keep_alive=IDLE, lifespan="on", proxy_headers=False,
    )  # fmt: skip
    # Requests leave no reference cycles (a test checks it), but each makes so many objects that the collector would run for it,
    # at its usual threshold. What was loaded until now stays.
    gc.collect()
    gc.freeze()
    gc.set_threshold(GROWTH, 10, 10)
    GracefulServer(config, runtime.server).run()

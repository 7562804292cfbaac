"""A server that tells what it holds when it is asked by SIGUSR1: python -m bench.load.watched --config serve.yaml --port N."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from starlette.applications import Starlette

from p2l_engine import Engine
from p2l_engine.serve import settings
from p2l_engine.serve.listener import run
from p2l_engine.serve.runtime import Runtime


class Watched(Runtime):
    """Prints a line of JSON for each SIGUSR1: the event loop's tasks by name of their coroutine, and requests under way."""

    def application(self) -> Starlette:
        app = super().application()
        inner = app.router.lifespan_context

        @asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, self._tell)
            async with inner(app):
                yield

        app.router.lifespan_context = lifespan
        return app

    def _tell(self) -> None:
        assert self.server is not None
        tasks = Counter(getattr(task.get_coro(), "__qualname__", "?") for task in asyncio.all_tasks())
        print(json.dumps({"tasks": tasks, "running": self.server.running}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--checkpoint")
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    engine = Engine.from_pretrained(arguments.checkpoint)
    engine.warmup()
    logging.basicConfig(level=logging.WARNING)
    run(Watched(settings.load(arguments.config), engine), "127.0.0.1", arguments.port)


if __name__ == "__main__":
    main()

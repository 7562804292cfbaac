"""The file that a running server's configuration comes from: read again when it changes, checked against what cannot change."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Protocol

from p2l_engine.serve import settings
from p2l_engine.serve.settings import Config, ConfigError, Learn

FIXED = ("store", "cache", "prefix_cache_mb", "retention_days", "page", "cors", "traces")  # under serve: changes need a restart
EVERY = 1.0  # seconds between looks at the file


class ConfigSource(Protocol):
    """Where a running server's configuration comes from."""

    def after(self, before: Config) -> Config:
        """What it says now. Raises ConfigError, also where the change from ``before`` needs a restart."""

    def changes(self, known: Config) -> AsyncIterator[None]:
        """Yields whenever it may say something else than before; at first, than ``known``."""


class ConfigFile:
    """path: where it is. log_prompts: keep the text of prompts whatever the file says."""

    def __init__(self, path: Path, log_prompts: bool = False) -> None:
        self.path, self._log_prompts = path, log_prompts

    def after(self, before: Config) -> Config:
        """What it says now. Raises ConfigError, also where the change from ``before`` needs a restart."""
        config = adapted(settings.load(self.path), self._log_prompts)
        pairs: list[tuple[str, Any, Any]] = [("checkpoint", before.checkpoint, config.checkpoint)]
        pairs += [(f"serve.{name}", getattr(before.serve, name), getattr(config.serve, name)) for name in FIXED]
        pairs.append(("serve.learn", _fixed(before.serve.learn), _fixed(config.serve.learn)))
        for name, old, new in pairs:
            if old != new:
                raise ConfigError(f"{self.path}: {name}: was {old!r}, is {new!r}: this needs a restart")
        return config

    async def changes(self, known: Config) -> AsyncIterator[None]:
        """Yields whenever the file may say something else than before; at first, than ``known``, as after a checkpoint was
        loaded."""
        seen = await asyncio.to_thread(self.stamp)
        if await asyncio.to_thread(self._differs, known):
            yield
        while True:
            await asyncio.sleep(EVERY)
            now = await asyncio.to_thread(self.stamp)
            if now != seen and now is not None:  # a file that is just being replaced is not there for a moment
                seen = now
                yield

    def stamp(self) -> tuple[int, int, int] | None:
        """What tells one state of the file from another; None where it is not there."""
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _differs(self, known: Config) -> bool:
        try:
            return adapted(settings.load(self.path), self._log_prompts) != known
        except ConfigError:
            return True  # reading it again says why


def adapted(config: Config, log_prompts: bool) -> Config:
    """The configuration with what the command line says."""
    if not log_prompts:
        return config
    return config.model_copy(update={"serve": config.serve.model_copy(update={"log_prompts": True})})


def _fixed(learn: Learn | None) -> Learn | None:
    """What a restart is needed for: all but the new models."""
    return None if learn is None else learn.model_copy(update={"models": {}, "ratings": None})

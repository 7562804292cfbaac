"""One configuration for all fronts of a cluster: the machine that started the server reads the file, the fronts follow."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

from ray.exceptions import RayError

from p2l_engine.serve import config_file
from p2l_engine.serve.settings import Config

logger = logging.getLogger(__name__)


class SharedConfig:
    """What all fronts should use: an actor of the cluster. number: of the configuration, counted from 0."""

    def __init__(self, config: Config) -> None:
        self.number, self.config = 0, config

    def replace(self, config: Config) -> None:
        """From now on this one."""
        self.number, self.config = self.number + 1, config

    def newer(self, number: int) -> tuple[int, Config] | None:
        """The present configuration and its number, unless that is ``number``."""
        return None if number == self.number else (self.number, self.config)


class FollowedConfig:
    """A front's ``ConfigSource``. shared: the handle of a ``SharedConfig``; first: what the front starts with, which is number
    0: one that starts later gets the present one at once."""

    def __init__(self, shared: Any, first: Config) -> None:
        self._shared, self._number, self._now = shared, 0, first

    def after(self, before: Config) -> Config:
        """What it says now; it was checked where the file was read."""
        return self._now

    async def changes(self, known: Config) -> AsyncIterator[None]:
        """Yields whenever there is a newer one."""
        lost = False
        while True:
            try:
                found = await self._shared.newer.remote(self._number)
            except RayError as error:
                if not lost:
                    logger.error(
                        "the cluster's configuration cannot be read (%s): the present one is kept", type(error).__name__
                    )
                found, lost = None, True
            else:
                lost = False
            if found is not None:
                self._number, self._now = found
                yield
            await asyncio.sleep(config_file.EVERY)

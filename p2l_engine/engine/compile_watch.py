"""The watch for Triton compilations after the warm-up."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger(__name__)


class CompileWatch:
    """Logs a warning for every kernel that Triton compiles outside of a warm-up: there should be none."""

    _watching = False
    _warming = 0  # warm-ups under way

    @classmethod
    @contextmanager
    def paused(cls) -> Iterator[None]:
        """For a warm-up, whose compilations are meant."""
        cls._warming += 1
        try:
            yield
        finally:
            cls._warming -= 1

    @classmethod
    def start(cls) -> None:
        """Once for the process, however often it is called; a hook that is there already is called too."""
        if cls._watching:
            return
        cls._watching = True
        from triton import knobs

        before = knobs.runtime.jit_post_compile_hook

        def compiled(**details: Any) -> bool | None:
            if not cls._warming:
                name = getattr(details.get("fn"), "name", "a kernel")
                logger.warning("Triton compiled %s after the warm-up: this call had to wait for it", name)
            return before(**details) if before is not None else None

        knobs.runtime.jit_post_compile_hook = compiled

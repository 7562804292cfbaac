"""The watch for Triton compilations after the warm-up."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger(__name__)


class CompileWatch:
    """Logs a warning for every kernel that Triton compiles outside of a warm-up: there should be none.

    One for the process, as Triton's hook is. Safe from several threads. While any thread warms up, no compilation is logged.
    """

    _lock = threading.Lock()
    _watching = False
    _warming = 0  # warm-ups in progress

    @classmethod
    @contextmanager
    def paused(cls) -> Iterator[None]:
        """For a warm-up, which is expected to compile."""
        with cls._lock:
            cls._warming += 1
        try:
            yield
        finally:
            with cls._lock:
                cls._warming -= 1

    @classmethod
    def start(cls) -> None:
        """Sets Triton's hook, once for the process; a hook that was set before is called too."""
        with cls._lock:
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

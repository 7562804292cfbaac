"""What has a name of its own, without a model hub: checkpoints that the package carries, and the backbone under them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from p2l_engine.checkpoint import smollm2
from p2l_engine.errors import CheckpointError

PREFIX = "builtin/"
DEFAULT = "builtin/pool-85"  # where no checkpoint is named
CHECKPOINTS = (DEFAULT, "builtin/llmrouter-9")
ALIASES = {"default": DEFAULT}
PACKAGE = Path(__file__).parent.parent  # each checkpoint is in the folder of its name
FOLDERS: Mapping[str, Callable[[], Path]] = {
    **{name: partial(PACKAGE.joinpath, name) for name in CHECKPOINTS},
    smollm2.NAME: smollm2.folder,
}
NAMES = (*ALIASES, *FOLDERS)


def is_builtin(name: str) -> bool:
    """Whether it is one of ``NAMES``, or is spelled like one."""
    return name in ALIASES or name.startswith(PREFIX)


def folder(name: str) -> Path:
    """The folder of a checkpoint or backbone. Raises CheckpointError for a name that is none of ``NAMES``, and for a backbone
    whose package is not installed."""
    found = FOLDERS.get(ALIASES.get(name, name))
    if found is None:
        raise CheckpointError(f"checkpoint: expected one of {', '.join(NAMES)}, got {name!r}{nearest(name)}")
    return found()


def nearest(name: str) -> str:
    """The end of an error message: the one of ``NAMES`` that is spelled most like ``name``, if any is."""
    spelled = {known.removeprefix(PREFIX): known for known in NAMES}
    near = difflib.get_close_matches(name.removeprefix(PREFIX), spelled, n=1)
    return f"; did you mean {spelled[near[0]]!r}?" if near else ""

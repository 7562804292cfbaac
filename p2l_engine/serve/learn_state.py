"""The folder of what a server has learned: whose checkpoint it is, the learner's state, hidden states, and who learns there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from p2l_engine.checkpoint import fingerprint
from p2l_engine.engine import Engine
from p2l_engine.learning.learned import LearnedHead
from p2l_engine.learning.learner import FILE, Learner
from p2l_engine.serve.prompt_states import PromptStates
from p2l_engine.serve.settings import ConfigError, Learn
from p2l_engine.tables.atomic import write_file
from p2l_engine.tables.locks import folder_lock

NOT_COMPUTED_WITH = ("catalog.yaml",)


class LearnState:
    """The folder ``settings.state``, for this engine's checkpoint. Raises ConfigError where it cannot be written, or is of
    another checkpoint."""

    def __init__(self, settings: Learn, engine: Engine) -> None:
        self.folder, self.where = Path(settings.state), f"serve.learn.state: {settings.state}"
        self._learner, self._checkpoint = self.folder / FILE, self.folder / "checkpoint.json"
        self._lock = ExitStack()
        there = self.folder if self.folder.exists() else self.folder.parent
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise ConfigError(f"{self.where}: expected a folder that can be written, or a name in one")
        found = fingerprint.of_checkpoint(engine.folder, engine.base)
        self._of = {name: value for name, value in found.items() if name not in NOT_COMPUTED_WITH}
        try:
            known = json.loads(self._checkpoint.read_text(encoding="utf-8")) if self._checkpoint.exists() else self._of
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.where}: checkpoint.json cannot be read: {error}; name another folder") from None
        if known != self._of:
            different = sorted(name for name in {**known, **self._of} if known.get(name) != self._of.get(name))
            raise ConfigError(
                f"{self.where}: is of another checkpoint ({', '.join(different[:3])}): name another folder, or the checkpoint "
                "that it began with"
            )

    def read(self, checkpoint: LearnedHead) -> Learner | None:
        """The saved learner; None where there is none. Raises ConfigError for one that cannot be used."""
        if not self._learner.exists():
            return None
        try:
            return Learner.load(self._learner, checkpoint.head, checkpoint.feedback, checkpoint.uncertainty)
        except (ValueError, OSError) as error:
            raise ConfigError(f"{self.where}: {error}; name another folder to begin again") from None

    def open(self, most: int, days: float | None) -> PromptStates:
        """Makes the folder if there is none, and keeps other processes from learning there. most, days: of the hidden states
        that are kept. Raises ConfigError."""
        try:
            self.folder.mkdir(exist_ok=True)
            self._lock.enter_context(folder_lock(self.folder))
            write_file(self._checkpoint, json.dumps(self._of, indent=1))
            return PromptStates(self.folder / "prompts.sqlite", most, days)
        except BlockingIOError:
            self.close()
            raise ConfigError(f"{self.where}: another process learns there: each server needs a folder of its own") from None
        except (OSError, SQLAlchemyError) as error:
            self.close()
            raise ConfigError(f"{self.where}: cannot be written: {error}") from None

    def save(self, learner: Learner, notes: Mapping[str, Any]) -> None:
        """Writes the learner, with notes. Raises OSError."""
        learner.save(self._learner, notes)

    def close(self) -> None:
        """Others may learn there."""
        self._lock.close()

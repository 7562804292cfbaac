"""YAML files of what is pooled and priced, read into checked classes."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from p2l_engine.unique_keys import parsed


class Definition(BaseModel):
    """The contents of a YAML file; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads a YAML file. Raises ValueError that names each unknown, missing or invalid key, and OSError."""
        try:
            return cls.model_validate(parsed(path.read_text(encoding="utf-8")))
        except ValidationError as error:
            whole = cls.__name__.lower()
            lines = [f"{'.'.join(map(str, e['loc'])) or whole}: {e['msg']}, got {e['input']!r:.80}" for e in error.errors()]
            raise ValueError(f"{path}: " + "; ".join(lines)) from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

"""Reads the file of policies: what would have been decided, by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from p2l_engine.arguments import finite_number
from p2l_engine.routing import Objective
from p2l_engine.routing.problem import Scope

LOGGED = "logged"
KEYS = ("always", "budget", "budget_scope", "catalog", "checkpoint", "objective", "models", "max_share")


@dataclass(frozen=True, slots=True)
class PolicySpec:
    """One policy. logged: as it was. always: one model. Otherwise the router's, of this catalog and checkpoint (None: those of
    the command), among these models (None: all of the catalog), within this budget and these shares."""

    name: str
    logged: bool = False
    always: str | None = None
    budget: float | None = None
    budget_scope: Scope = "prompt"
    catalog: Path | None = None
    checkpoint: str | None = None
    objective: Objective = "bt"
    models: tuple[str, ...] | None = None
    max_share: Mapping[str, float] = field(default_factory=dict)

    @property
    def routed(self) -> bool:
        """Whether it needs coefficients."""
        return not self.logged and self.always is None


def read_policies(path: str | Path) -> tuple[PolicySpec, ...]:
    """A YAML file: ``policies: {NAME: logged, NAME: {always: MODEL}, NAME: {budget: 0.3, ...}}``. Paths of catalogs and
    checkpoints are relative to the file. Raises ValueError, naming the key, what was expected and what came."""
    from p2l_engine.unique_keys import parsed

    try:
        values = parsed(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"policies {path}: cannot be read: {error}") from None
    except ValueError as error:
        raise ValueError(f"policies {path}: {error}") from None
    where = f"policies {path}"
    top = _mapping(where, values)
    _known(where, top, ("policies",))
    entries = _mapping(f"{where}: policies", top.get("policies"))
    if not entries:
        raise ValueError(f"{where}: policies: expected at least one policy, got none")
    return tuple(_policy(f"{where}: {name}", name, entry, Path(path).parent) for name, entry in entries.items())


def nearest(name: str, known: Sequence[str]) -> str:
    """A few words that name what was perhaps meant, or nothing."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _policy(where: str, name: str, entry: object, folder: Path) -> PolicySpec:
    if isinstance(entry, str):
        if entry != LOGGED:
            raise ValueError(f"{where}: expected 'logged' or a mapping, got {entry!r}{nearest(entry, [LOGGED])}")
        return PolicySpec(name, logged=True)
    given = _mapping(where, {} if entry is None else entry)
    _known(where, given, KEYS)
    if "always" in given and (others := [key for key in given if key not in ("always", "catalog")]):
        raise ValueError(f"{where}: expected 'always' alone or with 'catalog', got {', '.join(others)} too")
    objective = given.get("objective", "bt")
    if objective not in ("bt", "half-ties", "not-bad"):
        raise ValueError(
            f"{where}.objective: expected 'bt', 'half-ties' or 'not-bad', got {objective!r}"
            f"{nearest(str(objective), ['bt', 'half-ties', 'not-bad'])}"
        )
    scope = given.get("budget_scope", "prompt")
    if scope not in ("prompt", "batch"):
        raise ValueError(f"{where}.budget_scope: expected 'prompt' or 'batch', got {scope!r}")
    if "budget_scope" in given and given.get("budget") is None:
        raise ValueError(f"{where}: budget_scope: expected a budget beside it, got none")
    budget = given.get("budget")
    checkpoint = given.get("checkpoint")
    return PolicySpec(
        name,
        always=_text(f"{where}.always", given["always"]) if "always" in given else None,
        budget=None if budget is None else finite_number(f"{where}.budget", budget, "a number >= 0", lambda x: x >= 0),
        budget_scope=scope,
        catalog=folder / _text(f"{where}.catalog", given["catalog"]) if "catalog" in given else None,
        checkpoint=None if checkpoint is None else _beside(_text(f"{where}.checkpoint", checkpoint), folder),
        objective=objective,
        models=_names(f"{where}.models", given["models"]) if "models" in given else None,
        max_share=_shares(f"{where}.max_share", given.get("max_share", {})),
    )


def _beside(checkpoint: str, folder: Path) -> str:
    """A checkpoint's folder beside the file, or its name."""
    return str(folder / checkpoint) if (folder / checkpoint).is_dir() else checkpoint


def _mapping(where: str, value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: expected a mapping, got {'nothing' if value is None else type(value).__name__}")
    for key in value:
        if not isinstance(key, str):
            raise ValueError(f"{where}: expected keys of text, got {key!r}; quote it")
        if not key.strip() or not key.isprintable():
            raise ValueError(f"{where}: expected keys of printable text, got {key!r:.60}")
    return dict(value)


def _known(where: str, values: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    for key in values:
        if key not in keys:
            raise ValueError(f"{where}: unknown key {key!r}, expected {', '.join(keys)}{nearest(key, keys)}")


def _text(where: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where}: expected text, got {value!r}")
    return value


def _names(where: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{where}: expected a list of models, got {value!r:.80}")
    if twice := sorted({name for name in value if value.count(name) > 1}):
        raise ValueError(f"{where}: expected every model once, got {', '.join(twice)} more than once")
    return tuple(value)


def _shares(where: str, value: object) -> dict[str, float]:
    return {
        name: finite_number(f"{where}.{name}", share, "a share in [0, 1]", lambda x: 0 <= x <= 1)
        for name, share in _mapping(where, value).items()
    }

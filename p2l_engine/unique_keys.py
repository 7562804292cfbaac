"""A YAML loader that refuses duplicate keys, and reads 1e-3 as a number."""

from __future__ import annotations

import re
from typing import Any

import yaml


class UniqueKeys(yaml.SafeLoader):
    """Refuses mappings that name a key twice; PyYAML itself keeps the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call, unused-ignore]
            if isinstance(key, str | int | float) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} occurs twice", key_node.start_mark)
            seen.add(key if isinstance(key, str | int | float) else id(key))
        return super().construct_mapping(node, deep)


UniqueKeys.add_implicit_resolver(  # type: ignore[no-untyped-call, unused-ignore]
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)  # as YAML 1.2 has it; PyYAML itself takes 1e-3 for a text


def parsed(text: str) -> Any:
    """A YAML text's value. Raises ValueError where it is no YAML, names a key twice, or is nested too deeply."""
    try:
        return yaml.load(text, UniqueKeys)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none
        raise ValueError(f"expected YAML: {error}") from None
    except RecursionError:
        raise ValueError("expected YAML, got values that are nested too deeply") from None

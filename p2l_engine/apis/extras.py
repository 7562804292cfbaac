"""What a request may cost beyond the text that is counted here: what only its provider can count, runs, or prices otherwise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

USUAL_TIERS = ("auto", "default", "standard", "standard_only", "flex")  # at no more than the usual price
# Top-level fields that no model reads as input.
NOT_READ = frozenset(
    ("model", "p2l", "metadata", "logit_bias", "stream_options", "include", "stop", "stop_sequences", "tool_choice", "user",
     "prompt_cache_key", "safety_identifier", "service_tier", "speed", "reasoning", "thinking", "cache_control",
     "context_management")
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Extras:
    """Bounds for hard limits.

    unseen: what only its provider can count (documents, audio, addresses), which may fill the context window. fields: bytes of
    other fields that a model may read. predicted: output tokens that may be billed beside max_tokens. tools: those that the
    provider itself runs, again and again within one request, each time reading all of the input; calls: the most of them, None:
    any number. tier: a service tier or speed with prices of its own. reasons: whether reasoning was asked for, which a stream
    may not show. lasting: whether it writes to the prompt cache for an hour.
    """

    unseen: tuple[str, ...] = ()
    fields: int = 0
    predicted: int = 0
    tools: tuple[str, ...] = ()
    calls: int | None = None
    tier: str | None = None
    reasons: bool = False
    lasting: bool = False

    @property
    def may_be_unbounded(self) -> bool:
        """Whether some models may not be able to tell what it costs at most."""
        return self.tier is not None or bool(self.tools or self.unseen)


NOTHING = Extras()


def size_of_fields(body: Mapping[str, Any], counted: Iterable[str]) -> int:
    """Bytes of all fields but those that are counted elsewhere, or that no model reads."""
    skipped = NOT_READ.union(counted)
    return sum(
        len(value.encode()) if isinstance(value, str) else len(orjson.dumps(value))
        for name, value in body.items()
        if isinstance(value, str | list | dict) and name not in skipped
    )


def tier_of(*values: object) -> str | None:
    """The first of these tiers or speeds that is not one at the usual price."""
    return next((value for value in values if isinstance(value, str) and value not in USUAL_TIERS), None)

"""The LiteLLM plugin with decisions in the proxy's own process: ``callback(RouterChoice(router))``. See docs/gateways.md."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from p2l_engine.serve.litellm import EXPLAINED, AutoChoice, Decided, Refusal, RouterFailed

IN_PROCESS = frozenset({"budget", "models", "session"})  # wishes that a router in this process can meet; it has no sessions


class Decides(Protocol):
    """A ``p2l_engine.Router``, in this process."""

    names: Any

    async def aroute(self, prompt: Any, budget: float | None = None) -> Any:
        """The decision for one prompt, with its ``model``."""

    def route_batch(self, prompts: Any, budget: float | None = None, *, allowed: Any = None) -> Any:
        """The decisions for several; allowed: [N, K] booleans over ``names``."""


class RouterChoice(AutoChoice):
    """Asks a router in this process. settings: see ``AutoChoice``."""

    def __init__(self, router: Decides, **settings: Any) -> None:
        super().__init__(**settings)
        self.router = router

    async def models(self) -> list[str]:
        """The router's models."""
        return list(self.router.names)

    async def decide(
        self, data: Mapping[str, Any], wishes: Mapping[str, Any], headers: Mapping[str, str], allowed: list[str] | None
    ) -> Decided:
        """See ``AutoChoice``."""
        router, budget, turns = self.router, budget_of(wishes, headers), turns_of(data)
        try:
            if allowed is None:
                work = router.aroute(turns, budget)
            else:
                mask = np.array([[name in allowed for name in router.names]])
                work = asyncio.to_thread(lambda: router.route_batch([turns], budget, allowed=mask)[0])
            found = await asyncio.wait_for(work, self.timeout)
        except TimeoutError:
            raise RouterFailed(f"no decision within {self.timeout:g} s") from None
        except ValueError as error:  # text that is no Unicode; a budget below the cheapest model
            raise Refusal(402 if type(error).__name__ == "InfeasibleBudget" else 400, str(error)) from None
        except Exception as error:
            raise RouterFailed(f"{type(error).__name__}: {error}") from error
        kept = {name: getattr(found, name) for name in EXPLAINED if hasattr(found, name)}
        return Decided(model=self.theirs(found.model), fallbacks=[], **kept)


def turns_of(data: Mapping[str, Any]) -> list[str]:
    """The user's turns, or what else was said where there are none; parts of messages that are no text by their kind."""
    given = data.get("messages") or data.get("input") or ""
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list):
        raise Refusal(400, f"messages: expected a list, got {type(given).__name__}", "messages")
    user, other = list[str](), [str(data[name]) for name in ("system", "instructions") if data.get(name)]
    for message in given:
        parts = message.get("content") if isinstance(message, dict) else None
        parts = [{"text": parts}] if isinstance(parts, str) else parts if isinstance(parts, list) else []
        parts = [part for part in parts if isinstance(part, dict) and part.get("type") != "tool_result"]
        text = "\n".join(str(part.get("text") or f"[{part.get('type')}]") for part in parts)
        if parts:
            (user if message.get("role") == "user" else other).append(text)
    return user or other or [""]


def budget_of(wishes: Mapping[str, Any], headers: Mapping[str, str]) -> float | None:
    """The budget that a request wishes for. Raises Refusal where it wishes for what a router in this process cannot do."""
    asked = set(wishes) | {name.removeprefix("x-p2l-").replace("-", "_") for name in headers if name.startswith("x-p2l-")}
    if others := sorted(asked - IN_PROCESS):
        raise Refusal(400, f"p2l.{others[0]:.40}: expected only {', '.join(sorted(IN_PROCESS))} here", "p2l")
    budget = wishes.get("budget")
    if budget is None and "x-p2l-budget" in headers:
        try:
            budget = float(headers["x-p2l-budget"])
        except ValueError:
            budget = headers["x-p2l-budget"]
    if budget is not None and (
        isinstance(budget, bool | str) or not isinstance(budget, int | float) or not 0 <= budget < math.inf
    ):
        raise Refusal(400, f"p2l.budget: expected USD >= 0, got {budget!r:.40}", "p2l.budget")
    return None if budget is None else float(budget)

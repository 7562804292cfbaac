"""What one request may cost at each model, and what it has cost: its tokens, bounds on them, and what they are billed as."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from fractions import Fraction

from p2l_engine.apis.api import Usage
from p2l_engine.apis.ask import Ask, Capability
from p2l_engine.serve.plan import Plan
from p2l_engine.serve.sessions import KeptAnswer
from p2l_engine.serve.tokens import Counted

MOST = Fraction(10**9)  # USD: more than any limit
FASTEST = 1_000  # tokens that a model writes in a second, at most
OWN_MARGIN = 1.05  # of a provider's own tokenizer: for how it writes tools and messages


@dataclass(eq=False)
class Bill:
    """See the module. counted: the request's tokens; own: the same by model, where its provider's tokenizer is known; kept: the
    answer that it continues."""

    plan: Plan
    ask: Ask
    counted: Counted
    own: dict[int, Counted] = field(default_factory=dict)
    kept: KeptAnswer | None = None

    def tokens_in(self, k: int | None = None) -> int:
        """Its input tokens by model k's own tokenizer where it is known, else by P2L's; images, and the conversation that a
        provider keeps, included."""
        kept = 0 if self.kept is None else self.kept.tokens
        counted = self.counted if k is None else self.own.get(k, self.counted)
        return counted.total + self._images(k) + kept

    def most_tokens_in(self, k: int | None = None) -> int:
        """The most input tokens that a provider, or model k's, may count."""
        margin = self.plan.serve.token_margin if k is None or k not in self.own else OWN_MARGIN
        return math.ceil((self.tokens_in(k) - self._images(k) + self._images(k, at_most=True)) * margin) + 16

    def differing(self) -> list[int]:
        """The models whose input tokens are not those of the P2L tokenizer."""
        if not self.ask.images:
            return list(self.own)
        return [k for k, model in enumerate(self.plan.models) if k in self.own or model.image_tokens is not None]

    def _images(self, k: int | None, at_most: bool = False) -> int:
        """The tokens of its images. at_most: whatever their size is: a provider may read it otherwise."""
        images, rule = self.ask.images, None if k is None else self.plan.models[k].image_tokens
        if rule is None or not images:
            return images * self.plan.serve.tokens_per_image
        known = () if at_most else self.ask.pictures
        return sum(map(rule.of, known)) + (images - len(known)) * rule.bound

    def worst(self, k: int) -> Fraction:
        """The most that model k can cost. What ``unbounded`` names is left out."""
        ask, extras, calls = self.ask, self.ask.extras, self.most_calls(k)
        tokens_in = self.input_bound(k)
        # Each call of a tool that runs at the provider is another round.
        found = self.plan.prices.worst(
            k, tokens_in * (calls + 1), ask.max_tokens, ask.outputs * (calls + 1), extras.lasting, extras.predicted, calls,
            self.may_have("audio"), self.may_have("image"),
        )  # fmt: skip
        return min(found * self.factor(k), MOST)

    def may_have(self, kind: Capability) -> bool:
        """Whether there may be audio, or images, in what it sends or what its provider keeps, or audio in its answer."""
        return kind in self.ask.needs or bool(self.ask.extras.unseen) or self.kept is not None

    def input_bound(self, k: int) -> int:
        """The most input tokens that model k may count in one round, of what is not counted here too."""
        extras, window = self.ask.extras, self.plan.models[k].context
        found = self.most_tokens_in(k) + extras.fields
        return found if window is None or not (extras.unseen or extras.tools) else max(found, window)

    def cost(self, k: int, usage: Usage) -> Fraction:
        """What model k has cost. The chat API does not tell how often its provider's tools were called."""
        if self.ask.api == "chat" and self.ask.extras.tools:
            usage = replace(usage, calls=self.most_calls(k))
        return self.plan.prices.cost(k, usage) * self.factor(k)

    def factor(self, k: int) -> Fraction:
        """How many times its usual prices model k costs at the tier that was asked for."""
        tier = self.ask.extras.tier
        return Fraction(1) if tier is None else Fraction(str(self.plan.models[k].tiers.get(tier, 1)))

    def most_calls(self, k: int) -> int:
        """Of tools that model k's provider runs."""
        bounds = [most for most in (self.ask.extras.calls, self.plan.models[k].max_tool_calls) if most is not None]
        return min(bounds, default=0) if self.ask.extras.tools else 0

    def unbounded(self, k: int) -> str | None:
        """Why no bound is known on what model k can cost; None where one is."""
        model, extras = self.plan.models[k], self.ask.extras
        if extras.tier is not None and extras.tier not in model.tiers:
            return f"its price at {extras.tier[:40]!r} is not stated: tiers"
        if extras.tools:
            missing = [name for name in ("usd_per_tool_call", "max_tool_calls", "context") if getattr(model, name) is None]
            if extras.calls is not None and "max_tool_calls" in missing:
                missing.remove("max_tool_calls")
            if missing and model.cost is None:
                return f"what {extras.tools[0][:40]} may cost, which its provider runs, is not stated: {', '.join(missing)}"
        if extras.unseen and model.context is None and model.cost is None:
            return f"how many tokens {extras.unseen[0]} has is not known here, and its context is not stated"
        return None

    def hides(self, k: int) -> bool:
        """Whether model k may have written more than a stream has shown."""
        return self.ask.extras.reasons or self.plan.models[k].reasons or any(d.reasons for d in self.plan.deployments[k])

    def estimated(self, k: int, written: int, reported: Usage | None, seconds: float) -> Usage:
        """Usage where the provider has not reported all: the most input that it may have counted, and one token for every three
        bytes written; where more may have been written unseen, as many as fit into the seconds since the request came."""
        out = -(-written // 3)
        if self.hides(k):
            out = max(out, math.ceil(seconds * FASTEST) * self.ask.outputs)
        audio = self.may_have("audio")  # at its price, since it is not known how much of it is not
        found = Usage(0, 0) if reported is None else reported
        if not found.tokens_in:
            bound = self.input_bound(k)
            image = bound if self.may_have("image") and not audio else 0
            found = replace(found, tokens_in=bound, audio_in=bound if audio else 0, image_in=image)
        if out > found.tokens_out:
            found = replace(found, tokens_out=out, audio_out=out if audio else 0)
        return found

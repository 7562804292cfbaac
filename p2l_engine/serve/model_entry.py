"""A model's entry in serve.yaml: its prices, what it can do, and where it runs."""

from __future__ import annotations

from typing import Annotated, Any, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from p2l_engine.apis.ask import ApiName, Capability
from p2l_engine.serve.image_tokens import ImageTokens
from p2l_engine.serve.section import Price, Section, Tokens


class Provider(Section):
    """One deployment of a model: where requests for it are sent.

    weight: its share of the model's requests, relative to the model's other deployments. api_key_env: the environment variable
    that holds its key. forward_client_key: send it the key that the client sent, instead. stream_usage: whether it reports
    usage in streams of the chat API when asked to.
    """

    base_url: Annotated[str, AfterValidator(_base_url)]
    model: str
    api: ApiName = "chat"
    api_key_env: str | None = None
    forward_client_key: bool = False
    weight: Annotated[float, Field(gt=0)] = 1.0
    name: str | None = None
    stream_usage: bool = True

    @model_validator(mode="after")
    def _one_key(self) -> Self:
        if self.forward_client_key and self.api_key_env:
            raise ValueError("expected api_key_env or forward_client_key, got both")
        return self


class Model(Section):
    """A chat model. Either ``cost``, a flat price in USD for each request, or prices in USD per million tokens with the
    expected tokens of a request.

    cached_from: tokens, below which its provider caches no prompt. context: its context window in tokens, None: unbounded.
    max_output: the most tokens that it writes. accepts: what a request may contain. provider: its deployment, or a list;
    empty: decisions only. usd_per_tool_call, max_tool_calls: price and greatest number, in one request, of calls of tools that
    its provider runs, such as web search. tiers: by service tier or speed, how many times the usual prices it costs. reasons:
    whether it may write, and bill, what its streams do not show. image_tokens: how its provider counts images; None: each as
    ``serve.tokens_per_image``. audio_tokens_per_s: tokens that it counts for a second of audio, for expected costs.
    usd_per_m_audio_in, usd_per_m_audio_out, usd_per_m_image_in: of tokens that its usage reports as audio or images; None: as
    other tokens.
    """

    cost: Price | None = None
    usd_per_m_in: Price | None = None
    usd_per_m_out: Price | None = None
    usd_per_m_cached: Price | None = None
    usd_per_m_cache_write: Price | None = None
    tokens_in: Annotated[float, Field(gt=0)] | None = None
    tokens_out: Annotated[float, Field(gt=0)] | None = None
    usd_per_m_cache_write_1h: Price | None = None
    usd_per_m_audio_in: Price | None = None
    usd_per_m_audio_out: Price | None = None
    usd_per_m_image_in: Price | None = None
    image_tokens: ImageTokens | None = None
    audio_tokens_per_s: Annotated[float, Field(ge=0)] = 10.0
    usd_per_tool_call: Price | None = None
    max_tool_calls: Tokens | None = None
    tiers: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    reasons: bool = False
    cached_from: Tokens = 1_024
    context: Tokens | None = None
    max_output: Tokens | None = None
    accepts: tuple[Capability, ...] = ("text",)
    provider: tuple[Provider, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _listed(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("provider"), dict):
            return {**values, "provider": [values["provider"]]}
        return values

    @model_validator(mode="after")
    def _priced(self) -> Self:
        prices = ("usd_per_m_in", "usd_per_m_out", "tokens_in", "tokens_out")
        more = [name for name in type(self).model_fields if name.startswith("usd_per_m_") and name not in prices]
        given = [name for name in (*prices, *more) if getattr(self, name) is not None]
        if self.cost is not None and given:
            raise ValueError(f"expected either cost or prices, got cost and {', '.join(given)}")
        if self.cost is None and (missing := [name for name in prices if getattr(self, name) is None]):
            raise ValueError(f"expected 'cost', or {', '.join(prices)}; missing {', '.join(missing)}")
        return self


def _base_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query or parts.fragment:
        raise ValueError("expected http(s)://HOST/PATH without user name, query or fragment")
    return url.rstrip("/")

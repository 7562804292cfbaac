"""The server's configuration: serve.yaml, checked. Nothing here opens a connection or loads a checkpoint."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from p2l_engine.routing import Limit, Objective
from p2l_engine.serve.model_entry import Model
from p2l_engine.serve.section import Price, Seconds, Section, Tokens
from p2l_engine.unique_keys import parsed


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names each key, what was expected and what came."""


def _answer_store(store: str) -> str:
    if not store or ("://" in store and not re.fullmatch(r"rediss?://([\w.-]+|\[[\da-fA-F:]+\])(:\d{1,5})?(/\d+)?", store)):
        raise ValueError("expected memory, a file, or redis://HOST:PORT[/DB], with a password under password_env")
    return store


def _origin(origin: str) -> str:
    if not re.fullmatch(r"\*|null|[a-z][a-z0-9+.-]*://[^/?#\s]+", origin):
        raise ValueError("expected an origin such as https://chat.example.com, without a path, or *")
    return origin


class LimitEntry(Section):
    """A hard limit on money really spent, as ``routing.Limit``. window: total, day, month, or seconds."""

    amount: Price
    window: Literal["total", "day", "month"] | Seconds = "total"
    zone: str | None = None
    key: str | None = None
    each_key: bool = False

    @property
    def limit(self) -> Limit:
        """The limit. Raises ValueError."""
        window = self.window if isinstance(self.window, str) else timedelta(seconds=self.window)
        return Limit(self.amount, window, self.zone, self.key, self.each_key)

    @model_validator(mode="after")
    def _valid(self) -> Self:
        assert self.limit
        return self


class Key(Section):
    """A caller's key. sha256: the hex digest of the secret. models: those that it may use; None: all."""

    id: Annotated[str, Field(pattern=r"^[\w.-]{1,64}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$")]
    models: tuple[str, ...] | None = None


class Timeouts(Section):
    """Seconds. first_byte: until a stream begins; whole: until an answer that is no stream begins, which is when it is written;
    idle: between two pieces, of a request's body too; total: the deadline of a request with all its attempts."""

    connect: Seconds = 5.0
    first_byte: Seconds = 60.0
    whole: Seconds = 300.0
    idle: Seconds = 30.0
    total: Seconds = 600.0


class Retries(Section):
    """attempts: upstream requests for one request, at most. backoff: seconds before the first retry of the same model, doubled
    each time up to most, with jitter."""

    attempts: Annotated[int, Field(ge=1, le=20)] = 4
    backoff: Seconds = 0.2
    most: Seconds = 5.0


class Cooldown(Section):
    """How long a deployment that failed is left out: seconds after the first failure, doubled by each further one, up to
    most."""

    seconds: Seconds = 2.0
    most: Seconds = 60.0


class Sessions(Section):
    """cache_seconds: how long a provider keeps a prompt's prefix. most: how many sessions are remembered."""

    cache_seconds: Seconds = 300.0
    most: Tokens = 10_000


class AnswerCache(Section):
    """Exact answers to equal requests. store: memory, an SQLite file of its own, or redis://HOST:PORT[/DB] (rediss: by TLS).

    password_env: the environment variable that holds redis's password. seconds: that an answer is kept. most_mb: of all
    answers, of which the largest may take an eighth; redis bounds its memory itself.
    """

    store: Annotated[str, AfterValidator(_answer_store)] = "memory"
    password_env: str | None = None
    seconds: Seconds = 3600.0
    most_mb: Annotated[float, Field(gt=0)] = 64.0


class Queue(Section):
    """seconds: that a prompt may have to wait for the engine, as far as can be foreseen; beyond, requests are refused with 503.
    most: prompts that may wait, however fast the engine is. cached: prompts whose coefficients are kept."""

    seconds: Seconds = 0.5
    most: Tokens = 64
    cached: Tokens = 10_000


class LearnedModel(Section):
    """A model that the checkpoint does not know. like: the known one that it resembles. prior_rating: of it, on the scale of
    ``ratings``."""

    like: str | None = None
    prior_rating: float | None = None


class Learn(Section):
    """Learning from feedback. state: the folder of what is learned. models: that join the checkpoint's, and ratings of known
    ones, as in ``adapt --models``. prompts: a table that says how prompts vary; None: the first that are asked say it.

    seconds: between two looks at the feedback. refine: votes after which the optimum over all of them is found again (or a
    tenth of all, if that is more). save_seconds: between two savings. prompts_kept: hidden states on disk, of the prompts that
    were asked last.
    """

    state: Annotated[str, Field(min_length=1)]
    models: dict[str, LearnedModel] = Field(default_factory=dict)
    ratings: dict[str, float] | None = None
    prompts: str | None = None
    seconds: Seconds = 1.0
    refine: Tokens = 1_000
    save_seconds: Seconds = 60.0
    prompts_kept: Tokens = 100_000

    @model_validator(mode="before")
    @classmethod
    def _nothing_said(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("models"), dict):
            return {**values, "models": {name: {} if of is None else of for name, of in values["models"].items()}}
        return values


class Serve(Section):
    """How the server behaves. Amounts in USD. prefix_cache_mb: of keys and values of chats' earlier turns, in MiB, 0 for none;
    auto: 512 where the engine can keep them."""

    budget: Annotated[float, Field(gt=0)] | None = None  # mean over the requests that bring no budget of their own
    horizon: Annotated[int, Field(ge=10)] = 500  # of the pacer that holds it
    objective: Objective = "bt"
    opponents: Literal["uniform"] | dict[str, Price] = "uniform"
    seed: int = 0
    explore: Literal["thompson"] | None = None  # as Router's: by a draw of each prompt's coefficients
    learn: Learn | None = None  # from feedback, while it serves
    limits: tuple[LimitEntry, ...] = ()
    over_limit: Literal["cheaper", "free", "refuse"] = "cheaper"
    keys: tuple[Key, ...] = ()
    timeouts: Timeouts = Timeouts()
    retries: Retries = Retries()
    cooldown: Cooldown = Cooldown()
    sessions: Sessions = Sessions()
    queue: Queue = Queue()
    cache: AnswerCache | None = None
    prefix_cache_mb: Literal["auto"] | Annotated[float, Field(ge=0)] = "auto"
    store: str | None = None  # an SQLite file, or the URL of a PostgreSQL database; None: nothing is kept
    log_prompts: bool = False
    retention_days: Annotated[float, Field(gt=0, le=10_000)] | None = None
    token_margin: Annotated[float, Field(ge=1)] = 1.25  # providers' token counts over the P2L tokenizer's, at most
    tokens_per_image: Tokens = 1_600
    body_mb: Annotated[float, Field(gt=0)] = 20.0
    answer_mb: Annotated[float, Field(gt=0)] = 64.0
    page: bool = True
    cors: tuple[
        Annotated[str, AfterValidator(_origin)], ...
    ] = ()  # origins of other web pages that may ask, such as https://chat.example.com
    traces: bool = False  # spans for OpenTelemetry, exported as the environment variables OTEL_... say

    @property
    def prefix_cache_bytes(self) -> int | Literal["auto"]:
        """``prefix_cache_mb`` as an engine takes it."""
        return "auto" if self.prefix_cache_mb == "auto" else int(self.prefix_cache_mb * 2**20)


class Config(Section):
    """The whole file."""

    models: dict[str, Model]
    checkpoint: str | None = None
    unit: str = "USD"  # another one only where no model has a provider: decisions need no currency
    serve: Serve = Serve()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.models:
            raise ValueError("models: expected at least one model, got none")
        ids = [key.id for key in self.serve.keys]
        if len(set(ids)) < len(ids):
            raise ValueError("serve.keys: expected each id once")
        for key in self.serve.keys:
            if unknown := sorted(set(key.models or ()) - set(self.models)):
                raise ValueError(f"serve.keys.{key.id}.models: expected names under models, got {', '.join(unknown)}")
        for entry in self.serve.limits:
            if entry.key is not None and entry.key not in ids:
                raise ValueError(f"serve.limits: expected the id of a key, got {entry.key!r}")
            if entry.each_key and not ids:
                raise ValueError("serve.limits: each_key needs serve.keys")
        if self.serve.learn is not None:
            if self.serve.store is None or self.serve.store.startswith("postgresql"):
                raise ValueError(
                    "serve.learn: needs an SQLite file under serve.store, which holds the feedback: servers that share a "
                    "database would each learn something else; leave serve.learn out there, and make one checkpoint for all of "
                    "them with 'p2l-engine log export' and 'p2l-engine adapt'"
                )
            if unknown := sorted(set(self.serve.learn.models) - set(self.models)):
                raise ValueError(f"serve.learn.models: expected names under models, got {', '.join(unknown)}")
        logged = [name for name in ("log_prompts", "retention_days") if getattr(self.serve, name)]
        if logged and self.serve.store is None:
            raise ValueError(f"serve.{logged[0]}: needs serve.store, a file such as serve.sqlite, which keeps the log")
        if self.serve.limits and self.serve.store is None:
            raise ValueError("serve.limits: need serve.store, a file such as serve.sqlite, which keeps what was spent")
        unbounded = [
            name for name, model in self.models.items() if model.provider and model.cost is None and not model.max_output
        ]
        if self.serve.limits and unbounded:
            raise ValueError(
                f"serve.limits: need max_output of every model, to reserve its worst case; missing: {', '.join(unbounded)}"
            )
        names = [provider.name for model in self.models.values() for provider in model.provider if provider.name]
        if len(set(names)) < len(names):
            raise ValueError("models: expected each provider's name once")
        if self.unit != "USD" and any(model.provider for model in self.models.values()):
            raise ValueError(f"unit: expected USD, in which providers are paid, got {self.unit!r}")
        if unprintable := [name for name in self.models if not name.isprintable() or not name]:
            raise ValueError(f"models: expected names of printable characters, got {unprintable[0]!r}")
        if "auto" in self.models:
            raise ValueError("models: 'auto' is the name under which requests are routed; name the model otherwise")
        return self


def load(path: Path) -> Config:
    """Reads serve.yaml. Raises ConfigError."""
    try:
        values = parsed(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    return parse(values, str(path))


def parse(values: object, where: str = "configuration") -> Config:
    """The same from a mapping. ``where`` is the start of error messages."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected a mapping of keys to values, got {type(values).__name__}")
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{where}: " + "; ".join(_line(e) for e in error.errors())) from None


def _line(error: Any) -> str:
    place = ".".join(map(str, error["loc"]))
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":  # this module's own: it says what came, where that helps
        return f"{place}: {message}" if place else message
    if "keys" in error["loc"]:  # the key may have been written in place of its hash
        return f"{place}: {message}"
    return f"{place}: {message}, got {error['input']!r:.80}"

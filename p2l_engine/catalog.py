"""The catalog: the chat models that may be chosen, what a request to each costs, and its provider settings."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from p2l_engine import arguments
from p2l_engine.apis.ask import Capability
from p2l_engine.errors import CatalogError

PRICES = ("usd_per_m_in", "usd_per_m_out", "tokens_in", "tokens_out")
# The settings of a model in the catalog of lmarena/p2l's router (route/datatypes.py).
P2L_SETTINGS = (
    "name", "type", "temp", "top_p", "top_k", "system_prompt", "api_key", "base_url", "max_tokens", "extra_fields",
)  # fmt: skip
DEFAULT_UNIT = "USD per request"


@dataclass(frozen=True, slots=True)
class CatalogModel:
    """One chat model: its name in the checkpoint, expected cost per request (>= 0), and the settings for calling its
    provider.

    usd_per_m_in, usd_per_m_out: its prices in USD per million tokens, both or neither; a checkpoint that expects how long
    answers are (``p2l-engine lengths``) then gives each prompt a cost of its own, in place of ``cost``. context: its context
    window in tokens; accepts: what a request may contain; None: not known. A server that decides by this catalog alone leaves
    the model out of requests that do not fit; a router does not read them.
    """

    name: str
    cost: float
    provider: Mapping[str, Any] = field(default_factory=dict)
    usd_per_m_in: float | None = None
    usd_per_m_out: float | None = None
    context: int | None = None
    accepts: tuple[Capability, ...] | None = None

    @property
    def per_token(self) -> bool:
        """Whether it has prices for tokens."""
        return self.usd_per_m_in is not None


@dataclass(frozen=True, slots=True)
class Catalog:
    """The chat models that a router may choose from. ``unit`` is the unit of their costs, and so of budgets. left_out: models
    that a checkpoint knows and that are never chosen, such as those without a price."""

    models: tuple[CatalogModel, ...]
    unit: str = DEFAULT_UNIT
    left_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        given: object = self.models
        if isinstance(given, str | bytes) or not isinstance(given, Sequence):
            raise CatalogError(f"catalog: models: expected a sequence of CatalogModel, got {given!r:.80}")
        if not self.models:
            raise CatalogError("catalog: models: expected at least one model, got none")
        _text("catalog: unit", self.unit)
        for i, model in enumerate(self.models):
            if not isinstance(model, CatalogModel):
                raise CatalogError(f"catalog: models[{i}]: expected a CatalogModel, got {model!r:.80}")
            _text(f"catalog: models[{i}].name", model.name)
        names = [*(model.name for model in self.models), *_names("catalog: left_out", self.left_out)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise CatalogError(f"catalog: expected every model once, got {', '.join(twice)} more than once")
        for model in self.models:
            _amount(f"catalog: models.{model.name}.cost", model.cost)
            prices = {key: getattr(model, key) for key in PRICES[:2]}
            given = {key: price for key, price in prices.items() if price is not None}
            _limits(f"catalog: models.{model.name}", model.context, model.accepts)
            for key, price in given.items():
                _amount(f"catalog: models.{model.name}.{key}", price)
            if len(given) == 1:
                raise CatalogError(
                    f"catalog: models.{model.name}: expected both {' and '.join(prices)}, got {', '.join(given)}"
                )

    @classmethod
    def from_yaml(cls, path: str | Path) -> Catalog:
        """Reads a catalog. Raises CatalogError, which names the key, what was expected and what was found.

        Either ``models: {name: {cost, provider?, context?, accepts?}}``, where instead of ``cost`` (per request) there may be
        prices in dollars per million tokens and the expected tokens of a request (usd_per_m_in, usd_per_m_out, tokens_in,
        tokens_out), ``unit`` names the unit of the costs, and ``left_out`` lists models of the checkpoint that are never
        chosen; or the layout of lmarena/p2l's router, ``model_configs: {name: {cost, type, temp, ...}}``, whose other settings
        become the provider's, and beside it the router's ``name``, which is not used.
        """
        try:
            text = arguments.path("path", path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CatalogError(f"catalog {path}: cannot be read: {error}") from None
        from p2l_engine.unique_keys import parsed

        try:
            values = parsed(text)
        except ValueError as error:
            raise CatalogError(f"catalog {path}: {error}") from None
        return cls.from_mapping(values, f"catalog {path}")

    @classmethod
    def from_mapping(cls, values: object, where: str = "catalog") -> Catalog:
        """The same from a mapping; ``where`` is the start of error messages."""
        top = _mapping(where, values)
        if "model_configs" in top:
            _known(where, top, ("model_configs", "name"))
            _text(f"{where}: name", top.get("name", ""))
            entries = _mapping(f"{where}: model_configs", top["model_configs"])
            return cls(tuple(_p2l_model(f"{where}: model_configs.{name}", name, entry) for name, entry in entries.items()))
        _known(where, top, ("models", "unit", "left_out"))
        if "models" not in top:
            raise CatalogError(f"{where}: expected the key 'models' (or lmarena/p2l's 'model_configs'), got {sorted(top)}")
        unit = _text(f"{where}: unit", top.get("unit", DEFAULT_UNIT))
        left_out = _names(f"{where}: left_out", top.get("left_out", ()))
        entries = _mapping(f"{where}: models", top["models"])
        return cls(tuple(_model(f"{where}: models.{name}", name, entry) for name, entry in entries.items()), unit, left_out)

    @property
    def names(self) -> tuple[str, ...]:
        """The models' names, in the catalog's order."""
        return tuple(model.name for model in self.models)

    @property
    def provider_names(self) -> dict[str, str]:
        """What their providers call them: the setting ``model`` of each, else its name."""
        return {model.name: str(model.provider.get("model", model.name)) for model in self.models}

    @property
    def costs(self) -> npt.NDArray[np.float64]:
        """Their costs, [K]."""
        return np.array([model.cost for model in self.models])

    @property
    def prices(self) -> npt.NDArray[np.float64]:
        """Their prices for an input and for an output token, USD, [2, K]; NaN for models without."""
        given = [(model.usd_per_m_in, model.usd_per_m_out) for model in self.models]
        return np.array([[np.nan if price is None else price / 1e6 for price in pair] for pair in given]).T

    def only(self, names: Iterable[str]) -> Catalog:
        """The catalog without the models that are not named."""
        wanted = set(arguments.several("names", names, "names of models"))
        return Catalog(tuple(model for model in self.models if model.name in wanted), self.unit, self.left_out)

    def matched(self, models: tuple[str, ...], unmatched: str) -> Catalog:
        """The catalog without models that a checkpoint of these ``models`` does not know. Raises CatalogError where it knows
        none, and, unless ``unmatched`` is "leave_out", where either knows a model that the other does not; the catalog knows
        those that it leaves out."""
        if unmatched not in ("error", "leave_out"):
            raise ValueError(f"unmatched: expected 'error' or 'leave_out', got {unmatched!r}")
        unknown, unknown_left_out = ([name for name in of if name not in models] for of in (self.names, self.left_out))
        without = [name for name in models if name not in self.names and name not in self.left_out]
        if unmatched == "error" and (unknown or unknown_left_out or without):
            problems = []
            if unknown or unknown_left_out:
                problems.append(f"the checkpoint does not know {', '.join([*unknown, *unknown_left_out])}")
            problems += [f"the catalog lacks {', '.join(without)}"] if without else []
            raise CatalogError(
                f"catalog: {'; '.join(problems)}; correct the catalog, or leave them out with unmatched='leave_out'"
            )
        if len(unknown) == len(self.models):
            raise CatalogError(
                f"catalog: the checkpoint knows none of its models ({', '.join(unknown)}); it knows {', '.join(models)}"
            )
        return self.only(models)


def _mapping(where: str, value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise CatalogError(f"{where}: expected a mapping, got {type(value).__name__}")
    for key in value:
        if not isinstance(key, str):
            raise CatalogError(f"{where}: expected keys of text, got {key!r}; quote it")
    return dict(value)


def _known(where: str, values: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    for key in values:
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise CatalogError(f"{where}: unknown key {key!r}, expected {', '.join(keys)}{hint}")


def _text(where: str, value: object) -> str:
    if not isinstance(value, str):
        raise CatalogError(f"{where}: expected text, got {value!r}")
    return value


def _names(where: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise CatalogError(f"{where}: expected a list of names, got {value!r:.80}")
    return tuple(_text(f"{where}[{i}]", name) for i, name in enumerate(value))


def _amount(where: str, value: object) -> float:
    try:
        return arguments.finite_number(where, value, "a finite number >= 0", lambda amount: amount >= 0)
    except ValueError as error:
        raise CatalogError(str(error)) from None


def _model(where: str, name: str, entry: object) -> CatalogModel:
    values = _mapping(where, entry)
    _known(where, values, ("cost", *PRICES, "provider", "context", "accepts"))
    provider = _mapping(f"{where}.provider", values.get("provider", {}))
    context, accepts = _limits(where, values.get("context"), values.get("accepts"))
    prices = [key for key in PRICES if key in values]
    if "cost" in values:
        if prices:
            raise CatalogError(f"{where}: expected either cost or prices, got cost and {', '.join(prices)}")
        cost = _amount(f"{where}.cost", values["cost"])
        return CatalogModel(name, cost, provider, context=context, accepts=accepts)
    if not prices:
        raise CatalogError(f"{where}: expected 'cost', or {', '.join(PRICES)}; got {sorted(values) or 'nothing'}")
    missing = [key for key in PRICES if key not in values]
    if missing:
        raise CatalogError(f"{where}: prices need {', '.join(PRICES)}; missing {', '.join(missing)}")
    price_in, price_out, tokens_in, tokens_out = (_amount(f"{where}.{key}", values[key]) for key in PRICES)
    cost = (price_in * tokens_in + price_out * tokens_out) / 1e6
    return CatalogModel(name, cost, provider, price_in, price_out, context, accepts)


def _limits(where: str, context: object, accepts: object) -> tuple[int | None, tuple[Capability, ...] | None]:
    known: tuple[Capability, ...] = get_args(Capability)
    try:
        window = None if context is None else arguments.whole_number(f"{where}.context", context, 1)
    except ValueError as error:
        raise CatalogError(str(error)) from None
    if accepts is None:
        return window, None
    if isinstance(accepts, str) or not isinstance(accepts, Sequence) or not set(map(str, accepts)) <= set(known):
        raise CatalogError(f"{where}.accepts: expected a list of {', '.join(known)}, got {accepts!r:.80}")
    return window, tuple(capability for capability in known if capability in accepts)


def _p2l_model(where: str, name: str, entry: object) -> CatalogModel:
    values = _mapping(where, entry)
    _known(where, values, ("cost", *P2L_SETTINGS))
    if "cost" not in values:
        raise CatalogError(f"{where}: expected 'cost', got {sorted(values) or 'nothing'}")
    cost = _amount(f"{where}.cost", values.pop("cost"))
    return CatalogModel(name, cost, values)

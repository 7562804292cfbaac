"""Everything that a configuration and a checkpoint say together: which models there are, what they cost, where they run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from p2l_engine.catalog import Catalog, CatalogModel
from p2l_engine.chooser import Chooser
from p2l_engine.coefficients import Coefficients
from p2l_engine.feedback import FeedbackModel
from p2l_engine.routing import Objective
from p2l_engine.serve.eligibility import Eligibility
from p2l_engine.serve.health import Deployment
from p2l_engine.serve.model_entry import Model
from p2l_engine.serve.prices import Prices
from p2l_engine.serve.settings import Config, ConfigError, Serve
from p2l_engine.serve.win_rates import WinRates


@dataclass(frozen=True, eq=False)
class Plan:
    """A configuration, ready to route. Frozen: a new configuration is a new plan, and requests keep the one they began with.

    names: the K models of the file, in its order. columns: of these, the indices of those that the checkpoint knows and that
    can be routed to; choosers: for them, by objective; places: theirs among the checkpoint's models. notes: what a user should
    know, one line each.
    """

    config: Config
    names: tuple[str, ...]
    models: tuple[Model, ...]
    columns: npt.NDArray[np.intp]
    choosers: Mapping[Objective, Chooser]
    prices: Prices
    deployments: tuple[tuple[Deployment, ...], ...]
    notes: tuple[str, ...]
    index: Mapping[str, int]
    eligibility: Eligibility
    win_rates: WinRates
    places: npt.NDArray[np.intp]

    @property
    def serve(self) -> Serve:
        """The section ``serve`` of the configuration."""
        return self.config.serve

    def foreseen(self, coefficients: Coefficients) -> npt.NDArray[np.float64] | None:
        """The output tokens [K] that the checkpoint expects of an answer to the prompt of these coefficients, NaN for models
        whose answers it has not seen; None where it expects nothing."""
        usage = coefficients.usage
        if usage is None:
            return None
        found = np.full(len(self.names), np.nan)
        found[self.columns] = np.where(usage.observed[self.places], usage.tokens_out[0, self.places], np.nan)
        return found

    def lines(self) -> list[str]:
        """The plan in words, for ``serve --check``."""
        routed = set(self.columns.tolist())
        found = []
        for k, (name, model) in enumerate(zip(self.names, self.models, strict=True)):
            price = (
                f"{model.cost:g} USD" if model.cost is not None else f"{model.usd_per_m_in:g}/{model.usd_per_m_out:g} USD per M"
            )
            where = ", ".join(f"{d.name} ({d.provider.api})" for d in self.deployments[k]) or "decisions only"
            found.append(f"{name}: {price}, {'routed' if k in routed else 'by name only'}, {where}")
        return [*found, *self.notes]


def make(config: Config, models: Sequence[str], feedback: FeedbackModel, environment: Mapping[str, str] = os.environ) -> Plan:
    """models and feedback: of the checkpoint. environment: where keys are. Raises ConfigError."""
    names = tuple(config.models)
    entries = tuple(config.models.values())
    known = [k for k, name in enumerate(names) if name in models]
    notes = []
    if unnamed := [name for name in models if name not in names]:
        notes.append(f"left out of the choice, since the configuration does not name them: {', '.join(unnamed)}")
    if unknown := [name for name in names if name not in models]:
        notes.append(f"reached by name only, since the checkpoint does not know them: {', '.join(unknown)}")
    if not known:
        raise ConfigError(f"models: the checkpoint knows none of them; it knows {', '.join(models)}")
    # The chooser's costs are not used: each request has its own.
    catalog = Catalog(tuple(CatalogModel(names[k], 0.0) for k in known))
    objectives: tuple[Objective, ...] = ("bt", "half-ties", "not-bad")
    try:
        choosers = {
            objective: Chooser(models, feedback, catalog, config.serve.opponents, config.serve.seed, "leave_out", objective)
            for objective in objectives
        }
    except ValueError as error:
        raise ConfigError(f"serve: {error}") from None
    deployments = tuple(_deployments(name, model, environment) for name, model in config.models.items())
    index = {name: k for k, name in enumerate(names)}
    columns = np.array([index[name] for name in choosers["bt"].names], np.intp)
    places = np.array([list(models).index(name) for name in choosers["bt"].names], np.intp)
    return Plan(
        config, names, entries, columns, choosers, Prices(config.models), deployments, tuple(notes), index,
        Eligibility(names, entries, deployments, columns), WinRates(choosers, columns, len(names), config.serve.queue.cached),
        places,
    )  # fmt: skip


def carry_over(before: Plan, after: Plan) -> None:
    """Deployments that both plans have keep their cooldowns."""
    states = {d.name: d for group in before.deployments for d in group}
    for deployment in (d for group in after.deployments for d in group):
        old = states.get(deployment.name)
        if old is not None and old.provider == deployment.provider:
            deployment.failures, deployment.until, deployment.reasons = old.failures, old.until, old.reasons
            deployment.problem = old.problem


def _deployments(name: str, model: Model, environment: Mapping[str, str]) -> tuple[Deployment, ...]:
    found = []
    for i, provider in enumerate(model.provider):
        key = None
        if provider.api_key_env is not None:
            key = environment.get(provider.api_key_env)
            if not key:
                raise ConfigError(f"models.{name}.provider: api_key_env: {provider.api_key_env} is not set in the environment")
            if not key.isascii() or not key.isprintable():
                raise ConfigError(f"models.{name}.provider: api_key_env: {provider.api_key_env} is no key: expected ASCII")
        own = provider.name or (name if len(model.provider) == 1 else f"{name}#{i + 1}")
        found.append(Deployment(own, name, provider, key))
    return tuple(found)

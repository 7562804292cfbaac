"""Which models may take a request, and why the others may not: what lasts is worked out once for each kind of request."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from p2l_engine.apis.ask import ApiName, Capability
from p2l_engine.serve.health import Deployment
from p2l_engine.serve.model_entry import Model

Mask = npt.NDArray[np.bool_]
Group = Callable[[int], Sequence[Deployment]]

NO_TOKENS: Mapping[int, int] = MappingProxyType({})
KINDS = 1_000  # that are remembered
DOWN = "all its deployments failed lately"
OTHER = "another model was named"
NOT_OF_KEY = "not among the models of this key"
NOT_ALLOWED = "not among the models that the caller allows"
SHOWN = 8  # reasons in a message


class Kind(NamedTuple):
    """What bars models from a request whatever its length and their health. named: the model that the caller wants; of_key and
    allowed: the models of the key, and those that the caller allows (None: all); kept: the deployment of ``Bill.kept``; homes:
    see ``Call``."""

    api: ApiName
    needs: frozenset[Capability]
    decision_only: bool
    named: str | None
    of_key: tuple[str, ...] | None
    allowed: frozenset[str] | None
    kept: str | None
    homes: frozenset[str] | None


def in_words(reasons: Mapping[str, str]) -> str:
    """Why no model may take a request: first of those that the caller wants and may have."""
    wanted = {name: why for name, why in reasons.items() if why not in (OTHER, NOT_OF_KEY, NOT_ALLOWED)}
    shown = [f"{name}: {why}" for name, why in (wanted or reasons).items()]
    return "; ".join([*shown[:SHOWN], f"and {len(shown) - SHOWN} more"] if len(shown) > SHOWN + 1 else shown)


class Eligibility:
    """Of the K models of a plan; columns: the indices of those that can be routed to."""

    def __init__(
        self,
        names: Sequence[str],
        models: Sequence[Model],
        deployments: Sequence[Sequence[Deployment]],
        columns: npt.NDArray[np.intp],
    ) -> None:
        self._names, self._models, self._deployments = names, models, deployments
        self._routed = frozenset(columns.tolist())
        self._every = [deployment for group in deployments for deployment in group]
        self._least_context = min((model.context or math.inf for model in models), default=math.inf)
        self._least_output = min((model.max_output or math.inf for model in models), default=math.inf)
        self._kinds: OrderedDict[Kind, tuple[Mask, dict[str, str]]] = OrderedDict()

    def of(
        self,
        kind: Kind,
        tokens: int,
        max_tokens: int | None,
        group: Group,
        is_up: Callable[[Deployment], bool],
        own: Mapping[int, int] = NO_TOKENS,
        unbounded: Callable[[int], str | None] | None = None,
    ) -> tuple[Mask, dict[str, str]]:
        """The models [K] that may take a request, and by name why others may not; neither may be changed.

        tokens: that it may have, answer included; own: the same at models whose provider's tokens are known; max_tokens: of the
        answer. group: where model k would take the request. unbounded: why no bound is known on what model k may cost; None
        where one is known at all models, or not needed.
        """
        found = self._kinds.get(kind)
        if found is None:
            found = self._kinds[kind] = self._lasting(kind, group)
            if len(self._kinds) > KINDS:
                self._kinds.popitem(last=False)
        most = max(tokens, *own.values()) if own else tokens
        fits = unbounded is None and most <= self._least_context and (max_tokens is None or max_tokens <= self._least_output)
        if fits and not any(deployment.until for deployment in self._every):  # none has failed since it last answered
            return found
        mask, reasons = found[0].copy(), dict(found[1])
        for k in np.flatnonzero(mask).tolist():
            model = self._models[k]
            needed = own.get(k, tokens)
            if model.context is not None and needed > model.context:
                why = f"{needed} tokens, answer and margin included, do not fit into its context of {model.context}"
            elif max_tokens is not None and model.max_output is not None and max_tokens > model.max_output:
                why = f"writes at most {model.max_output} tokens"
            elif unbounded is not None and (unknown := unbounded(k)) is not None:
                why = unknown
            elif (where := group(k)) and not any(map(is_up, where)):
                why = DOWN
            else:
                continue
            mask[k], reasons[self._names[k]] = False, why
        return mask, reasons

    def _lasting(self, kind: Kind, group: Group) -> tuple[Mask, dict[str, str]]:
        mask, reasons = np.ones(len(self._names), bool), dict[str, str]()
        for k, (name, model) in enumerate(zip(self._names, self._models, strict=True)):
            missing = sorted(kind.needs - set(model.accepts))
            speaks = any(deployment.provider.api == kind.api for deployment in self._deployments[k])
            if kind.named is not None and name != kind.named:
                why = OTHER
            elif kind.kept is not None and not group(k):
                why = "another model keeps the answer that this request continues"
            elif kind.homes is not None and not group(k):
                why = "its provider cannot read the reasoning that another one has encrypted"
            elif kind.of_key is not None and name not in kind.of_key:
                why = NOT_OF_KEY
            elif kind.allowed is not None and name not in kind.allowed:
                why = NOT_ALLOWED
            elif kind.named is None and k not in self._routed:
                why = "not known to the checkpoint"
            elif not speaks and not (kind.decision_only and not self._deployments[k]):
                why = f"no deployment of it speaks the {kind.api} API"
            elif missing:
                why = f"does not accept {', '.join(missing)}"
            else:
                continue
            mask[k], reasons[name] = False, why
        mask.setflags(write=False)
        return mask, reasons

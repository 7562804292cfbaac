"""What a policy of the file would have chosen on each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from p2l_engine.catalog import Catalog
from p2l_engine.chooser import Chooser
from p2l_engine.coefficients import Coefficients
from p2l_engine.constraints import Constraints, Shares
from p2l_engine.errors import Infeasible
from p2l_engine.replay.logged import Bools
from p2l_engine.replay.mixture import Mixture
from p2l_engine.replay.policies import PolicySpec, nearest
from p2l_engine.routing.problem import expected


class CannotChoose(Exception):
    """A policy that has no choice on some rows; the message says why."""


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """names: models, those of the log first; mixture [N] over them; expected_cost: the mean of the catalog's costs, in
    its unit, or None."""

    names: tuple[str, ...]
    mixture: Mixture
    expected_cost: float | None
    unit: str | None = None


def always(spec: PolicySpec, models: tuple[str, ...], n: int, catalog: Catalog | None) -> Target:
    """One model for every row. Raises ValueError for a name that neither the log nor the catalog knows."""
    name = spec.always or ""
    known = (*models, *(catalog.names if catalog is not None else ()))
    if name not in known:
        raise ValueError(f"{spec.name}: always: neither the log nor a catalog knows {name!r}{nearest(name, known)}")
    names = _with(models, [name])
    costs = {} if catalog is None else {model.name: (model.cost, catalog.unit) for model in catalog.models}
    return Target(names, Mixture.single(np.full(n, names.index(name))), *costs.get(name, (None, None)))


def routed(
    spec: PolicySpec,
    coefficients: Coefficients,
    prompt: npt.NDArray[np.int64],
    catalog: Catalog,
    models: tuple[str, ...],
    allowed: Bools | None,
    leave_out: bool = False,
) -> Target:
    """What the router would choose. coefficients: of P prompts; prompt [N]: each row's. models: the log's U; allowed [N, U]:
    which of them could take the request (None: all; models that the log does not know always could).

    Raises CatalogError and ValueError for models that the catalog or the checkpoint does not know, and CannotChoose where no
    choice holds the budget, or on rows without any model of the policy.
    """
    where = f"{spec.name}: catalog {spec.catalog or ''}".rstrip()
    for key, wanted in (("models", spec.models or ()), ("max_share", spec.max_share)):
        for name in wanted:
            if name not in catalog.names:
                raise ValueError(f"{where}: {key}: its models do not include {name!r}{nearest(name, catalog.names)}")
    try:
        unmatched: Literal["error", "leave_out"] = "leave_out" if leave_out else "error"
        chooser = Chooser(coefficients.models, coefficients.feedback, catalog, unmatched=unmatched, objective=spec.objective)
    except ValueError as error:
        raise type(error)(f"{spec.name}: {error}") from None
    names = _with(models, chooser.names)
    columns = np.array([names.index(name) for name in chooser.names])
    rates = chooser.win_rates(coefficients)
    mask, which = _mask(spec, chooser.names, columns, allowed, len(models), len(prompt))
    cell = prompt * (int(which.max(initial=0)) + 1) + which  # of equal prompts and equal candidates
    _, firsts, inverse = np.unique(cell, return_index=True, return_inverse=True)
    over_batch = (spec.budget is not None and spec.budget_scope == "batch") or bool(spec.max_share)
    rows = np.arange(len(prompt)) if over_batch else firsts
    shares: Shares = {name: share for name, share in spec.max_share.items()}
    constraints = Constraints(
        spec.budget, spec.budget_scope, max_share=shares, allowed=None if mask is None else mask[which[rows]]
    )
    prices = chooser.costs_of(coefficients)
    prices = prices if prices.ndim == 1 else prices[prompt[rows]]
    try:
        policies = chooser.solve(np.ascontiguousarray(rates[prompt[rows]]), constraints, prices)
    except Infeasible as error:
        raise CannotChoose(str(error)) from None
    mixture = Mixture(policies.indices, policies.probabilities)
    costs = expected(prices, policies.indices, policies.probabilities)
    mixture = mixture.averaged(inverse, firsts) if over_batch else mixture
    mixture, costs = mixture.take(inverse), costs if over_batch else costs[inverse]
    return Target(names, mixture.renumbered(columns), float(costs.mean()), catalog.unit)


def _mask(
    spec: PolicySpec, names: Sequence[str], columns: npt.NDArray[np.int64], allowed: Bools | None, u: int, n: int
) -> tuple[Bools | None, npt.NDArray[np.int64]]:
    """The different sets of models that may be chosen [S, K] (None: all, always), and which of them is each row's [N]."""
    own = np.array([spec.models is None or name in spec.models for name in names])
    if not own.any():
        raise ValueError(f"{spec.name}: models: the checkpoint knows none of {', '.join(spec.models or ())}")
    if allowed is None:
        return (None if own.all() else own[None]), np.zeros(n, np.int64)
    packed = np.packbits(allowed, axis=1)
    _, firsts, which = np.unique(packed, axis=0, return_index=True, return_inverse=True)
    sets = np.ones((len(firsts), len(names)), bool)
    in_log = columns < u
    sets[:, in_log] = allowed[firsts][:, columns[in_log]]
    sets &= own
    if not sets.any(1).all():
        empty = int(np.asarray(~sets.any(1))[which].sum())
        raise CannotChoose(f"on {empty:,} of {n:,} rows none of its models could take the request (column candidates)")
    return sets, which.reshape(n)


def _with(models: tuple[str, ...], others: Sequence[str]) -> tuple[str, ...]:
    return (*models, *(name for name in others if name not in models))

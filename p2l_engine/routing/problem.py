"""A routing LP: its objective and its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from p2l_engine.arguments import finite_number, several
from p2l_engine.errors import exactly
from p2l_engine.routing import arrays
from p2l_engine.routing.arrays import Array, Float64
from p2l_engine.routing.values import ArrayValues, Values

LARGEST = 1e290  # amount in a row over the batch: sums over a batch stay finite
Scope = Literal["prompt", "batch"]


@dataclass(frozen=True, slots=True, eq=False)
class Resource:
    """An upper bound on what policies use of a resource other than money: seconds, tokens, grams of carbon.

    amounts [M], or [N, M] where they depend on the prompt, >= 0. bound: in scope "prompt" every prompt's expected amount stays
    within it (a number, or [N]); in scope "batch" the mean over the prompts does (a number).
    """

    name: str
    amounts: Array
    bound: float | Array
    scope: Scope = "prompt"


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """Bounds on the mean probability, over the batch, of a model or of a group of models (their columns), in [0, 1]."""

    models: int | Sequence[int]
    at_most: float = 1.0
    at_least: float = 0.0
    name: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """amounts.p <= bound, for every prompt or in the mean over the batch; a ``min_share`` is stored negated.

    amounts [M] or [N, M]; bound a number, or [N] for a prompt row.
    """

    name: str
    amounts: Any
    bound: Any
    negated: bool = False

    @property
    def shared(self) -> bool:
        """Whether all prompts have the same amounts."""
        return bool(self.amounts.ndim == 1)

    def of(self, prompts: Any) -> Row:
        """The row of some of the prompts (a slice or indices); a batch row's bound stays."""
        amounts = self.amounts if self.shared else arrays.to_float64(self.name, self.amounts[prompts])
        return Row(self.name, amounts, self.bound[prompts] if np.ndim(self.bound) else self.bound, self.negated)

    def stated(self) -> str:
        """The row as the user wrote it; with the tightest bound where prompts have their own."""
        bound = float(np.min(self.bound)) * (-1.0 if self.negated else 1.0)
        return f"{self.name} {'= ' if 'share of ' in self.name else '<= '}{exactly(bound)}"


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """Maximise the mean over N prompts of v[n].p[n], over policies p[n] on M models, under the rows given here.

    value: v [N, M], or LazyWinRates. costs [M] or [N, M], >= 0; None: all 0. budget bounds every prompt's
    expected cost (a number, or [N]) or, with budget_scope "batch", their mean (a number); None: no budget. resources: further
    bounds of either scope. shares: over the batch. allowed [N, M] (or [M]) bool: which models each prompt may use; None: all.
    Raises ValueError and TypeError for bad shapes and values, naming the argument. The fields that solvers read are checked
    once, on construction: values, amounts (the costs), mask, prompt_rows and batch_rows.
    """

    value: Array | Values
    costs: Array | None = None
    budget: float | Array | None = None
    budget_scope: Scope = "prompt"
    resources: Sequence[Resource] = ()
    shares: Sequence[Share] = ()
    allowed: Array | None = None
    values: Values = field(init=False, repr=False)
    amounts: npt.NDArray[Any] = field(init=False, repr=False)
    mask: npt.NDArray[np.bool_] | None = field(init=False, repr=False)
    prompt_rows: tuple[Row, ...] = field(init=False, repr=False)
    batch_rows: tuple[Row, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        values = self.value if isinstance(self.value, Values) else ArrayValues(self.value)
        shape = values.shape
        rows: dict[Scope, list[Row]] = {"prompt": [], "batch": []}
        _scope("budget_scope", self.budget_scope)
        if isinstance(self.budget, bool | str):
            raise TypeError(f"budget: expected a number, got {self.budget!r}")
        costs = np.zeros(shape[1]) if self.costs is None else arrays.amounts("costs", self.costs, shape)
        if self.budget is not None:
            if self.costs is None:
                raise ValueError("costs: expected the models' costs where there is a budget, got None")
            rows[self.budget_scope].append(_row("budget", costs, self.budget, self.budget_scope, shape))
        names = {"budget"}
        for i, resource in enumerate(several("resources", self.resources, "Resource")):
            if not isinstance(resource, Resource):
                raise TypeError(f"resources[{i}]: expected a Resource, got {type(resource).__name__}")
            if resource.name in names:
                raise ValueError(f"resources[{i}].name: expected a name of its own, got {resource.name!r} twice")
            names.add(resource.name)
            amounts = arrays.amounts(resource.name, resource.amounts, shape)
            scope = _scope(f"resources[{i}].scope", resource.scope)
            rows[scope].append(_row(resource.name, amounts, resource.bound, scope, shape))
        for i, share in enumerate(several("shares", self.shares, "Share")):
            if not isinstance(share, Share):
                raise TypeError(f"shares[{i}]: expected a Share, got {type(share).__name__}")
            rows["batch"] += _share_rows(i, share, shape[1])
        labels = [row.name for row in rows["batch"]]
        if len(set(labels)) < len(labels):
            raise ValueError(f"shares: expected one Share for each group of models, got {', '.join(labels)}")
        object.__setattr__(self, "amounts", costs)
        object.__setattr__(self, "mask", _allowed(self.allowed, shape))
        object.__setattr__(self, "values", values)
        # Rows that cannot bind are left out, so that a simpler solver may do.
        object.__setattr__(self, "prompt_rows", tuple(row for row in rows["prompt"] if np.isfinite(row.bound).any()))
        object.__setattr__(self, "batch_rows", tuple(row for row in rows["batch"] if np.isfinite(row.bound)))


def expected(amounts: Any, indices: npt.NDArray[np.int32], probabilities: Float64) -> Float64:
    """What policies use in expectation [N], of amounts [M] or [N, M]."""
    return np.asarray((probabilities * of_models(amounts, indices)).sum(axis=1))


def of_prompts(amounts: Any, some: slice) -> Any:
    """Those of some prompts, [M] or [n, M], from amounts [M] or [N, M]."""
    return amounts if amounts.ndim == 1 else amounts[some]


def of_models(amounts: Any, indices: npt.NDArray[np.int32]) -> Any:
    """The amounts [N, W] of the models that policies mix, from amounts [M] or [N, M]."""
    return amounts[indices] if amounts.ndim == 1 else amounts[np.arange(len(indices))[:, None], indices]


def check_summable(name: str, amounts: Float64) -> None:
    """Raises ValueError where sums of these amounts over a batch may not be finite."""
    if (most := amounts.max(initial=0.0)) > LARGEST:
        raise ValueError(
            f"{name}: expected amounts of at most {LARGEST:g} in scope 'batch', so that their sums are finite, got "
            f"{most:g}; choose a larger unit"
        )


def _scope(name: str, scope: str) -> Scope:
    if scope == "prompt":
        return "prompt"
    if scope == "batch":
        return "batch"
    raise ValueError(f"{name}: expected 'prompt' or 'batch', got {scope!r}")


def _row(name: str, amounts: Float64, bound: Any, scope: Scope, shape: tuple[int | None, int]) -> Row:
    given = arrays.to_numpy(bound, name)
    if scope == "batch":
        check_summable(name, amounts)
    if given.ndim == 0:
        one = float(arrays.budgets(bound, 1, name)[0])
        least = float(amounts.min()) if amounts.ndim == 1 else -np.inf
        if scope == "batch" and one < least and shape[0] and np.broadcast_to(least, shape[0]).mean() <= one:
            one = least  # the mean of the least amounts as numpy rounds it, which callers take for the smallest bound
        return Row(name, amounts, one)
    if scope == "batch":
        raise ValueError(f"{name}: expected one number in scope 'batch', got shape {list(given.shape)}")
    if shape[0] is None:
        raise ValueError(f"{name}: expected one number for prompts from an iterator, got shape {list(given.shape)}")
    return Row(name, amounts, arrays.budgets(bound, shape[0], name))


def _share_rows(i: int, share: Share, m: int) -> list[Row]:
    columns = np.atleast_1d(np.asarray(share.models))
    if columns.ndim != 1 or columns.size == 0 or columns.dtype.kind not in "iu" or columns.min() < 0 or columns.max() >= m:
        raise ValueError(f"shares[{i}].models: expected columns in 0..{m - 1}, got {share.models!r}")
    for name, bound in (("at_most", share.at_most), ("at_least", share.at_least)):
        finite_number(f"shares[{i}].{name}", bound, "a share in [0, 1]", lambda x: 0 <= x <= 1)
    if share.at_least > share.at_most:
        raise ValueError(f"shares[{i}]: expected at_least <= at_most, got {exactly(share.at_least)} > {exactly(share.at_most)}")
    label = share.name or (f"model {columns[0]}" if len(columns) == 1 else f"models {', '.join(map(str, columns))}")
    member = np.zeros(m)
    member[columns] = 1.0
    rows = []
    if share.at_most < 1:
        rows.append(Row(f"max_share of {label}", member, float(share.at_most)))
    if share.at_least > 0:
        rows.append(Row(f"min_share of {label}", -member, -float(share.at_least), negated=True))
    return rows


def _allowed(allowed: Any, shape: tuple[int | None, int]) -> npt.NDArray[np.bool_] | None:
    if allowed is None:
        return None
    mask = arrays.to_numpy(allowed, "allowed")
    if mask.dtype != np.bool_:
        raise TypeError(f"allowed: expected bools, got {mask.dtype}")
    if mask.shape == (shape[1],) and shape[0] is not None:
        mask = np.broadcast_to(mask, (shape[0], shape[1]))
    if shape[0] is None or mask.shape != shape:
        raise ValueError(f"allowed: expected shape {[*shape]}, got {list(mask.shape)}")
    empty = ~mask.any(axis=1)
    if empty.any():
        raise ValueError(f"allowed[{int(np.argmax(empty))}]: expected at least one allowed model, got none for this prompt")
    return None if mask.all() else np.ascontiguousarray(mask)

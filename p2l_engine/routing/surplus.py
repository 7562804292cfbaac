"""Rows by what they leave beyond the least use, and the models that no bound admits.

Whatever it chooses, a prompt uses at least the least amount of its models. Only the surplus is a choice: amounts less the least
one, against the bound less the mean of the least. So all amounts and bounds are >= 0, and a tight bound is as well scaled as a
loose one. A row without surplus admits no model but those of the least amount; a model of which the surplus pays for less than
a share of 1e-12 is barred too, at a loss of at most that much value. Barring models may raise the least use of other rows:
until nothing changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from p2l_engine.routing import rounding
from p2l_engine.routing.arrays import Float64
from p2l_engine.routing.problem import Row
from p2l_engine.routing.values import CHUNK, Values

Mask = npt.NDArray[np.bool_]

ROUNDINGS = 8  # in units of the last place: how well an LP knows whether a row can be met
LEAST_BOUGHT = 1e-12  # a share below this is not worth a column


class NoPolicy(Exception):
    """No policy satisfies the rows. ``prompts``: a range with a prompt whose own rows conflict; None for batch rows."""

    def __init__(self, prompts: range | None = None) -> None:
        self.prompts = prompts
        super().__init__(prompts)


@dataclass(frozen=True, slots=True, eq=False)
class Surplus:
    """A row beyond its least use. least: of each prompt, [N], or [1] where it is the same for all. extra: what the bound leaves
    beyond it, >= 0: in the mean over the batch (a number), or of each prompt [N] for a prompt row (inf: no bound)."""

    row: Row
    least: Float64
    extra: Any

    def of(self, prompts: Any) -> Surplus:
        """The surplus of some of the prompts (a slice or indices); a batch row's extra stays."""
        least = self.least if len(self.least) == 1 else self.least[prompts]
        return Surplus(self.row.of(prompts), least, self.extra[prompts] if np.ndim(self.extra) else self.extra)

    def amounts(self, prompts: Any = slice(None)) -> Float64:
        """The amounts beyond the least, [n, M], or [1, M] where they are the same for all; below 0 for models that are not
        usable only."""
        own = self.row.of(prompts).amounts
        least = self.least if len(self.least) == 1 else self.least[prompts]
        return np.asarray((own[None, :] if self.row.shared else own) - least[:, None])

    @property
    def rounding(self) -> Any:
        """The rounding of an LP's products and sums, as a part of what the bound leaves (a number, or [N]): 0 where it leaves
        nothing, or there is no bound."""
        with np.errstate(invalid="ignore"):  # of an infinite bound
            slack = np.spacing(np.abs(np.asarray(self.row.bound, np.float64)))
        least: Any = self.least if np.ndim(self.extra) else np.abs(self.least).max()
        slack = ROUNDINGS * (np.nan_to_num(slack) + np.spacing(np.abs(least)))
        return np.divide(slack, self.extra, out=np.zeros(np.shape(self.extra)), where=np.asarray(self.extra) > 0)

    @property
    def base(self) -> float:
        """The smallest least use of any prompt."""
        return float(self.least.min())


@dataclass(frozen=True, slots=True, eq=False)
class Reduced:
    """The rows of an LP by their surplus, those for each prompt and those over the batch, and the usable models, [N, M] or
    [1, M]."""

    each: tuple[Surplus, ...]
    over: tuple[Surplus, ...]
    usable: Mask

    def binding(self) -> tuple[int, ...]:
        """The places of the batch rows that can bind; the others hold whatever is chosen. A row without surplus has barred all
        that could break it."""
        return tuple(k for k, row in enumerate(self.over) if 0 < row.extra < float(row.row.amounts.max()) - row.base)


def reduce(each: Sequence[Row], over: Sequence[Row], allowed: Mask | None, n: int, m: int) -> Reduced:
    """The rows of N prompts and M models by their surplus. Raises NoPolicy where one of them cannot hold beside the models that
    the others bar."""
    usable = np.ones((1, m), bool) if allowed is None else allowed
    while True:
        before, found = usable, []
        for row in (*each, *over):
            least = _least(row, usable, n)
            extra = _extra(row, least, n, row in each)
            found.append(Surplus(row, least, extra))
            usable = _admitted(found[-1], usable, n)
        if usable is before:
            return Reduced(tuple(found[: len(each)]), tuple(found[len(each) :]), usable)


def complete(reduced: Reduced, prices: Float64, values: Values, allowed: Mask | None) -> Float64:
    """Dual prices [K] of the batch rows over all models, from those over the usable ones: each barred model raises the price of
    the row that admits it least, until no prompt would rather have it."""
    if not reduced.over or reduced.usable.all() or (allowed is not None and (reduced.usable == allowed).all()):
        return prices
    raised, start = prices.copy(), 0
    for v in values.chunks():
        some = slice(start, start + len(v))
        start += len(v)
        usable = np.broadcast_to(_of(reduced.usable, some), v.shape)
        barred = ~usable if allowed is None else allowed[some] & ~usable
        amounts = [np.broadcast_to(row.amounts(some), v.shape) for row in reduced.over]
        v = v - sum((p * a for p, a in zip(prices, amounts, strict=True) if p), np.zeros(1))
        gain = v - np.where(usable, v, -np.inf).max(axis=1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            ratios = np.stack([np.where(a > 0, a / row.extra, 0.0) for a, row in zip(amounts, reduced.over, strict=True)])
            first = ratios.argmax(axis=0)
            for k, a in enumerate(amounts):
                preferred = barred & (first == k) & (ratios[k] * LEAST_BOUGHT > 0.5) & (gain > 0)
                if preferred.any():
                    raised[k] = max(raised[k], prices[k] + float((gain[preferred] / a[preferred]).max()))
    return raised


def _parts(n: int) -> Iterator[slice]:
    return (slice(start, min(start + CHUNK, n)) for start in range(0, n, CHUNK))


def _of(of_each: Any, some: slice) -> Any:
    """The entries of some prompts, of an array over all prompts or one entry for all."""
    return of_each if len(of_each) == 1 else of_each[some]


def shown(usable: Mask, prompts: Any, n: int) -> Mask:
    """A contiguous [n, M] mask of some prompts, from one for each or one for all."""
    return np.ascontiguousarray(np.broadcast_to(usable, (n, usable.shape[1])) if len(usable) == 1 else usable[prompts])


def _least(row: Row, usable: Mask, n: int) -> Float64:
    if row.shared and len(usable) == 1:
        return np.asarray(np.where(usable, row.amounts, np.inf).min(axis=1))
    return np.concatenate(
        [np.where(_of(usable, some), row.of(some).amounts, np.inf).min(axis=1) for some in _parts(n)] or [np.zeros(0)]
    )


def _extra(row: Row, least: Float64, n: int, each: bool) -> Any:
    """What the bound leaves beyond the least use."""
    if each:
        bound = np.broadcast_to(np.asarray(row.bound, np.float64), (n,))
        short = least > rounding.highest(bound)
        if short.any():
            i = int(np.argmax(short))
            raise NoPolicy(range(i, i + 1))
        return np.maximum(bound - least, 0.0)
    if rounding.mean(least) > rounding.highest(row.bound):
        raise NoPolicy
    return max(float(np.longdouble(row.bound) - least.sum(dtype=np.longdouble) / len(least)), 0.0)


def _admitted(surplus: Surplus, usable: Mask, n: int) -> Mask:
    """``usable`` less the models that the row bars; the same object where it bars none."""
    with np.errstate(over="ignore"):
        most = np.atleast_1d(np.asarray(surplus.extra, np.float64)) / LEAST_BOUGHT
    if float(surplus.row.amounts.max()) - surplus.base <= most.min():
        return usable
    if surplus.row.shared and len(usable) == 1 and len(most) == 1:
        barred = usable & (surplus.amounts() > most)
        return usable & ~barred if barred.any() else usable
    kept = usable
    for some in _parts(n):
        barred = _of(usable, some) & (surplus.amounts(some) > _of(most, some)[:, None])
        if barred.any():
            if kept is usable:
                kept = np.array(np.broadcast_to(usable, (n, usable.shape[1])))
            kept[some] &= ~barred
    return kept

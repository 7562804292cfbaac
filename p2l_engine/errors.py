"""The project's own errors; the message names the remedy. They are ValueErrors where the caller's input is at fault."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal


def exactly(number: float) -> str:
    """A number with as few digits as tell it from all others: messages compare nearly equal ones."""
    short = f"{number:g}"
    return short if float(short) == number else repr(float(number))


class Infeasible(ValueError):
    """No policy satisfies all rows of a routing problem.

    Attributes: ``rows`` (an irreducible infeasible subset of the rows, as the user wrote them), ``row`` (the name of one to
    relax), ``bound`` (its bound), ``nearest`` (its nearest feasible bound, same unit; None if no bound of this row alone is
    feasible), ``index`` (the first prompt concerned; None for rows over the whole batch).
    """

    def __init__(
        self, rows: Sequence[str], row: str, bound: float, nearest: float | None, index: int | None = None, count: int = 1
    ) -> None:
        self.rows, self.row, self.bound, self.nearest, self.index = tuple(rows), row, bound, nearest, index
        where = "over the batch" if index is None else f"for prompt {index}"
        more = f" (and {count - 1} more prompts)" if count > 1 else ""
        conflict = f"{' and '.join(self.rows)} {'cannot hold together' if len(self.rows) > 1 else 'cannot hold'}"
        remedy = (
            "relax one of them"
            if nearest is None
            else f"with the others unchanged, the nearest feasible bound of {row!r} is {nearest!r}"
        )
        super().__init__(f"infeasible {where}{more}: {conflict}; {remedy}")


class InfeasibleBudget(Infeasible):
    """No policy costs as little as the budget.

    Attributes beside those of Infeasible: ``budget``, and ``smallest`` (the smallest feasible budget, same unit).
    """

    def __init__(
        self, budget: float, smallest: float, index: int | None = None, count: int = 1, rows: Sequence[str] = ()
    ) -> None:
        super().__init__(rows or [f"budget <= {exactly(budget)}"], "budget", budget, smallest, index, count)
        self.budget, self.smallest = budget, smallest
        where = "over the batch" if index is None else f"for prompt {index}"
        more = f" (and {count - 1} more prompts)" if count > 1 else ""
        beside = f" beside {' and '.join(row for row in rows if not row.startswith('budget '))}" if len(rows) > 1 else ""
        self.args = (
            f"budget {exactly(budget)} is infeasible {where}{more}{beside}: the cheapest policy costs {smallest!r}; "
            f"raise the budget to at least {smallest!r}",
        )


class PromptError(ValueError):
    """A prompt that cannot be read. ``index``: its position in the batch."""

    def __init__(self, index: int, problem: str) -> None:
        self.index, self.problem = index, problem
        super().__init__(f"prompts[{index}]: {problem}")


class CheckpointError(ValueError):
    """A checkpoint folder with missing files, or with contents of the wrong shape."""


class CatalogError(ValueError):
    """A catalog that cannot be read, or that does not match the checkpoint's models."""


class SpendLimitReached(RuntimeError):
    """A reservation that does not fit into a spend limit; nothing was reserved.

    Attributes: ``limits`` (the names of those it does not fit into), ``worst_case`` (what was asked for), ``left`` (the largest
    reservation that would fit now), ``frees_at`` (when this one will fit at the latest if nothing else is reserved, in UTC;
    None where it never will by itself).
    """

    def __init__(self, limits: Sequence[str], worst_case: Decimal, left: Decimal, frees_at: datetime | None) -> None:
        self.limits, self.worst_case, self.left, self.frees_at = tuple(limits), worst_case, left, frees_at
        when = (
            f"it will fit at {frees_at.isoformat()} at the latest if nothing else is reserved"
            if frees_at
            else "it will not fit by itself: raise the limit, or settle or release what is reserved"
        )
        super().__init__(f"{worst_case:f} does not fit into {' and '.join(self.limits)}, {left:f} is left; {when}")


class UnknownReservation(LookupError):
    """A token that is of no reservation, or of one that was settled or released before."""

    def __init__(self, token: object) -> None:
        super().__init__(f"token: expected one of reserve() that is neither settled nor released yet, got {token!r}")

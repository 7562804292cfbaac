"""The project's own errors. All are ValueErrors: the caller's input is at fault, and the message says how to mend it."""

from __future__ import annotations


class InfeasibleBudget(ValueError):
    """No policy costs as little as the budget asks.

    Attributes: ``budget`` (what was asked), ``smallest`` (the smallest feasible budget, same unit), ``index`` (the first
    prompt concerned, or None when the budget is over the whole batch).
    """

    def __init__(self, budget: float, smallest: float, index: int | None = None, count: int = 1) -> None:
        self.budget, self.smallest, self.index = budget, smallest, index
        where = "over the batch" if index is None else f"for prompt {index}"
        more = f" (and {count - 1} more prompts)" if count > 1 else ""
        super().__init__(
            f"budget {budget:g} is infeasible {where}{more}: the cheapest policy costs {smallest!r}; "
            f"raise the budget to at least {smallest!r}"
        )


class PromptError(ValueError):
    """A prompt that cannot be read. ``index`` is its place in the batch."""

    def __init__(self, index: int, problem: str) -> None:
        self.index, self.problem = index, problem
        super().__init__(f"prompts[{index}]: {problem}")


class CheckpointError(ValueError):
    """A checkpoint folder that lacks something or holds something of the wrong shape."""


class CatalogError(ValueError):
    """A catalog that cannot be read, or that does not match the checkpoint's models."""

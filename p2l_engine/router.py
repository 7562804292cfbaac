"""The router: prompts in, decisions out."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from p2l_engine import routing
from p2l_engine.arguments import callback, instance
from p2l_engine.catalog import Catalog
from p2l_engine.chooser import Chooser, Explore
from p2l_engine.coefficients import Coefficients
from p2l_engine.constraints import Budget, Constraints, Shares
from p2l_engine.decision import Decision
from p2l_engine.engine import Engine
from p2l_engine.engine.batcher import WAIT, Batcher
from p2l_engine.engine.compile_watch import CompileWatch
from p2l_engine.errors import InfeasibleBudget
from p2l_engine.exploration import NO_UNCERTAINTY
from p2l_engine.opponents import Opponents
from p2l_engine.prompts.parse import Prompt, Turns, parse_batch, user_turns
from p2l_engine.routing import BudgetPacer, Objective, Resource, arrays
from p2l_engine.routing.problem import Scope


class Router(Chooser):
    """A Chooser with an engine: chooses, for each prompt, the policy of highest win rate within the budget.

    opponents, seed, unmatched, objective and explore: as for ``Chooser``. Safe to call from many threads, and from asyncio by
    ``aroute``: calls that arrive together become one batch. wait: seconds that a call may wait for others while several keep
    coming; a call that finds the engine idle never waits. Raises CatalogError; ValueError, also where a checkpoint without
    uncertainty is to explore.
    """

    def __init__(
        self,
        engine: Engine,
        catalog: Catalog,
        opponents: Opponents = "uniform",
        seed: int = 0,
        unmatched: Literal["error", "leave_out"] = "error",
        objective: Objective = "bt",
        wait: float = WAIT,
        explore: Explore | None = None,
    ) -> None:
        instance("engine", engine, Engine)
        super().__init__(engine.models, engine.feedback, catalog, opponents, seed, unmatched, objective, explore)
        if explore is not None and engine.uncertainty is None:
            raise ValueError(NO_UNCERTAINTY)
        self.engine = engine
        self._batcher = Batcher(engine, wait)
        # Stops the batcher's thread with the router. Calls keep their router alive, so none is running then, and the join
        # returns at once; at the interpreter's exit it lets the last calls finish.
        weakref.finalize(self, self._batcher.close)

    def route(
        self, prompt: Prompt, budget: float | None = None, pacer: BudgetPacer | None = None, draw: str | None = None
    ) -> Decision:
        """The decision for one prompt. Raises PromptError, InfeasibleBudget.

        budget: an upper bound on the policy's expected cost, in the catalog's unit; None: no budget. pacer: instead of a
        budget, a mean budget over the stream of prompts that the pacer sees. draw: a text, such as the request's id: calls
        with the same prompt and different texts are drawn independently; None: alike.
        """
        turns = user_turns(prompt)
        return self._batcher.run(turns, self._finish(turns, budget, pacer, draw))

    async def aroute(
        self, prompt: Prompt, budget: float | None = None, pacer: BudgetPacer | None = None, draw: str | None = None
    ) -> Decision:
        """``route`` for asyncio: does not block the event loop. Cancelling a task does not affect the others."""
        turns = user_turns(prompt)
        return await asyncio.wrap_future(self._batcher.submit(turns, self._finish(turns, budget, pacer, draw)))

    @property
    def costs_vary(self) -> bool:
        """Whether costs depend on the prompt: see ``costs_of``."""
        return self.costs_of(self.engine.split(np.empty((0, self.engine.width), np.float32))).ndim == 2

    def warmup(self) -> float:
        """``Engine.warmup``, and the same for the router's own steps. Returns the seconds it took."""
        start = time.perf_counter()
        with CompileWatch.paused():
            self.engine.warmup()
            self.route_batch(["a", "b"])
            self.route("a")
        return time.perf_counter() - start

    def close(self) -> None:
        """Finishes the running calls and takes no more; ``route_batch`` still works."""
        self._batcher.close()

    def __enter__(self) -> Router:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _finish(
        self, turns: Turns, budget: float | None, pacer: BudgetPacer | None, draw: str | None
    ) -> Callable[[Coefficients], Decision]:
        """What turns one prompt's coefficients into its decision."""
        if pacer is None:
            constraints = Constraints(budget)
            return lambda coefficients: self.decide(coefficients, [turns], constraints, [draw])[0]
        instance("pacer", pacer, BudgetPacer)
        if budget is not None:
            raise ValueError(f"budget: expected None with a pacer, which has its own, got {budget!r}")
        return lambda coefficients: self.pace(coefficients, pacer, turns, draw)

    def route_batch(
        self,
        prompts: Sequence[Prompt],
        budget: Budget | None = None,
        budget_scope: Scope = "prompt",
        max_share: Shares | None = None,
        min_share: Shares | None = None,
        resources: Sequence[Resource] = (),
        allowed: npt.NDArray[np.bool_] | None = None,
        progress: Callable[[int], object] | None = None,
        draws: Sequence[str | None] | None = None,
    ) -> list[Decision]:
        """The decisions for a batch, in order; the same as ``route``'s unless a constraint is over the batch.

        The constraints are those of ``Constraints``, over the K models of ``names``. progress: called with the number of
        prompts that each forward pass has finished. draws: as in ``decide``. Raises PromptError, InfeasibleBudget and
        Infeasible; ValueError and TypeError for arguments that are wrong.
        """
        constraints = Constraints(budget, budget_scope, max_share, min_share, resources, allowed)
        callback("progress", progress)
        turns = parse_batch(prompts)
        fits = self.objective == "bt" and len(self.models) <= routing.MAX_MODELS_ON_GPU
        if (
            self.explore is None
            and draws is None
            and constraints.only_prompt_budgets
            and fits
            and self.engine.lengths is None
            and self.engine.shrinkage is None  # decisions say what it kept
            and self.engine.device.type == "cuda"
        ):
            return self._route_on_gpu(turns, constraints, progress)
        return self.decide(self.engine.coefficients(turns, progress), turns, constraints, draws)

    def _route_on_gpu(
        self, turns: Sequence[Turns], constraints: Constraints, progress: Callable[[int], object] | None
    ) -> list[Decision]:
        """``route_batch`` under a budget for each prompt; only decisions leave the GPU."""
        from p2l_engine.routing import cuda  # needs Triton

        n, device = len(turns), self.engine.device
        limits = arrays.budgets(constraints.limits, n)
        q, columns = torch.from_numpy(self.q).to(device), torch.from_numpy(self._columns).to(device)
        costs, on_device, weights = torch.from_numpy(self.costs).to(device), torch.from_numpy(limits).to(device), q.float()

        def stage(hidden: torch.Tensor, rows: npt.NDArray[np.intp]) -> tuple[torch.Tensor, ...]:
            index = torch.from_numpy(rows)
            if device.type == "cuda":
                index = index.pin_memory().to(device, non_blocking=True)
            out, v = self.engine.head_win_rates(hidden, weights)
            theta = self.engine.head.split(out)[0]
            return cuda.policies(theta, v, columns, costs, on_device.index_select(0, index), q)

        found: list[tuple[Any, ...]] = [()] * n
        for rows, results in self.engine.stream(turns, stage):
            for row, *policy in zip(rows.tolist(), *(result.tolist() for result in results), strict=True):
                found[row] = tuple(policy)
            if progress is not None:
                progress(len(rows))
        bound = "no budget" if constraints.budget is None else "budget per prompt"
        decisions = []
        for i, (indices, probabilities, value, cost, score, finite) in enumerate(found):
            if not finite:
                raise FloatingPointError(f"prompts[{i}]: the backbone gave coefficients that are not finite")
            if not sum(probabilities):
                short = sum(not sum(other[1]) for other in found)
                raise InfeasibleBudget(float(limits[i]), cost, i, short)
            decisions.append(self._draws.decide(turns[i], bound, indices, probabilities, cost, value, score))
        return decisions

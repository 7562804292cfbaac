"""The router: prompts in, decisions out."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from p2l_engine import routing
from p2l_engine.catalog import Catalog
from p2l_engine.coefficients import Coefficients
from p2l_engine.decision import Decision, Draws
from p2l_engine.engine import Engine
from p2l_engine.engine.batcher import WAIT, Batcher
from p2l_engine.engine.compile_watch import CompileWatch
from p2l_engine.errors import CatalogError, InfeasibleBudget
from p2l_engine.native import routing as native
from p2l_engine.prompts.parse import Prompt, user_turns
from p2l_engine.routing import BudgetPacer, Objective, Policies, Problem, Resource, Share, arrays
from p2l_engine.routing.arrays import Float64
from p2l_engine.routing.problem import Scope, expected
from p2l_engine.routing.values import Values, compute

Shares = Mapping[str | tuple[str, ...], float]
Opponents = Literal["uniform"] | Mapping[str, float] | Sequence[float] | npt.NDArray[np.floating[Any]]


class Router:
    """Chooses, for each prompt, the policy of highest win rate within the budget (paper, Theorem 1).

    opponents: what win rates are measured against, over all models of the checkpoint: "uniform", {name: weight} (the others
    weigh nothing) or an array [M]; weights sum to 1. seed: of the draws from mixed policies; same seed and same prompt, same
    draw, whatever the batch. unmatched: what to do with models of the catalog that the checkpoint does not know, and the
    reverse: "error", or "leave_out" of the choice (models left out still count as opponents). objective: what is maximised,
    as in ``routing.win_rates``; decisions' win rates are of that kind, their scores Bradley-Terry's always.

    Safe to call from many threads, and from asyncio by ``aroute``: calls that arrive together become one batch. wait: seconds
    that a call may wait for others while several keep coming; a call that finds the engine idle never waits.
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
    ) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed: expected an integer, got {seed!r}")
        if engine.feedback.of_values:
            raise ValueError(
                f"engine: expected a checkpoint of votes, got the feedback model {engine.feedback.name!r}, whose coefficients "
                "give no win rates; routing.solve_budget(theta, costs, budget) maximises its expected values"
            )
        if objective == "half-ties" and not engine.feedback.has_eta:
            objective = "bt"  # the same where the coefficients know no ties
        if objective not in ("bt", "half-ties", "not-bad"):
            raise ValueError(f"objective: expected 'bt', 'half-ties' or 'not-bad', got {objective!r}")
        self.engine, self.seed, self.objective = engine, seed, objective
        self.catalog = _matched(catalog, engine.models, unmatched)
        self.q = _weights(opponents, engine.models)
        self.names = self.catalog.names
        self.costs = self.catalog.costs
        self._columns = np.array([engine.models.index(name) for name in self.names])
        self._batcher = Batcher(engine, wait)
        weakref.finalize(self, self._batcher.close)
        self._draws = Draws(seed, self.names)

    def route(self, prompt: Prompt, budget: float | None = None, pacer: BudgetPacer | None = None) -> Decision:
        """The decision for one prompt; budget None is no budget. Raises PromptError, InfeasibleBudget.

        With a pacer, whose mean budget then holds over the stream of prompts that it sees, instead of a budget of its own.
        """
        return self._batcher.run(prompt, self._finish(prompt, budget, pacer))

    async def aroute(self, prompt: Prompt, budget: float | None = None, pacer: BudgetPacer | None = None) -> Decision:
        """``route`` for asyncio: the event loop goes on meanwhile. A task that is cancelled takes nothing from the others."""
        return await asyncio.wrap_future(self._batcher.submit(prompt, self._finish(prompt, budget, pacer)))

    def warmup(self) -> float:
        """``Engine.warmup``, and the same for what the router does after it. Returns the seconds it took."""
        start = time.perf_counter()
        with CompileWatch.paused():
            self.engine.warmup()
            self.route_batch(["a", "b"])
            self.route("a")
        return time.perf_counter() - start

    def close(self) -> None:
        """Finishes the calls under way and takes no more; batches may still be routed."""
        self._batcher.close()

    def __enter__(self) -> Router:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _finish(self, prompt: Prompt, budget: float | None, pacer: BudgetPacer | None) -> Callable[[Coefficients], Decision]:
        """What is left to do for one prompt once its coefficients are there."""
        if pacer is None:
            return lambda coefficients: self.decide(coefficients, [prompt], budget)[0]
        if budget is not None:
            raise ValueError(f"budget: expected None beside a pacer, which has its own, got {budget!r}")
        return lambda coefficients: self._paced(coefficients, pacer)

    def _paced(self, coefficients: Coefficients, pacer: BudgetPacer) -> Decision:
        theta = arrays.matrix("theta", coefficients.theta)
        v = self._rates(theta, coefficients)
        price = pacer.price
        k = pacer.choose(v[0], self.costs)
        why = f"highest win rate less cost at {price:.4g} per {self.catalog.unit}: a mean budget of {pacer.budget:g}"
        name = self.names[k]
        score = native.bt_score(theta, self.q, self._bt_value(theta, v, np.array([[k]]), np.ones((1, 1))))
        return Decision(name, {name: 1.0}, float(self.costs[k]), float(v[0, k]), float(score[0]), why)

    def route_batch(
        self,
        prompts: Sequence[Prompt],
        budget: float | Sequence[float] | npt.NDArray[np.floating[Any]] | None = None,
        budget_scope: Scope = "prompt",
        max_share: Shares | None = None,
        min_share: Shares | None = None,
        resources: Sequence[Resource] = (),
        allowed: npt.NDArray[np.bool_] | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> list[Decision]:
        """The decisions for a batch, in order: those of ``route``, where no row is over the batch.

        budget: one number or, in scope "prompt", one per prompt; an upper bound on the expected cost of each prompt's policy
        (scope "prompt") or on their mean (scope "batch"). max_share and min_share {name, or tuple of names: share in [0, 1]}
        bound the mean probability of a model, or of a group, over the batch. resources: further bounds; allowed [N, K]: which
        models each prompt may use; both over the K models of ``names``. Raises PromptError, InfeasibleBudget and Infeasible.
        """
        plain = budget_scope == "prompt" and not (max_share or min_share or resources or allowed is not None)
        fits = self.objective == "bt" and len(self.engine.models) <= routing.MAX_MODELS_ON_GPU
        if plain and fits and self.engine.device.type == "cuda":
            return self._route_on_gpu(prompts, budget, progress)
        coefficients = self.engine.coefficients(prompts, progress)
        return self.decide(coefficients, prompts, budget, budget_scope, max_share, min_share, resources, allowed)

    def _route_on_gpu(
        self,
        prompts: Sequence[Prompt],
        budget: float | Sequence[float] | npt.NDArray[np.floating[Any]] | None,
        progress: Callable[[int], object] | None,
    ) -> list[Decision]:
        """``route_batch`` under a budget for each prompt, where only decisions leave the card."""
        from p2l_engine.routing import cuda  # needs Triton

        n, device = len(prompts), self.engine.device
        limits = arrays.budgets(None if budget is None else np.asarray(budget), n)
        q, columns = torch.from_numpy(self.q).to(device), torch.from_numpy(self._columns).to(device)
        costs, on_device, weights = torch.from_numpy(self.costs).to(device), torch.from_numpy(limits).to(device), q.float()

        def stage(hidden: torch.Tensor, rows: npt.NDArray[np.intp]) -> tuple[torch.Tensor, ...]:
            places = torch.from_numpy(rows)
            if device.type == "cuda":
                places = places.pin_memory().to(device, non_blocking=True)
            out, v = self.engine.outputs_and_win_rates(hidden, weights)
            return cuda.policies(self.engine.head.split(out)[0], v, columns, costs, on_device.index_select(0, places), q)

        found: list[tuple[Any, ...]] = [()] * n
        for rows, results in self.engine.stream(prompts, stage):
            for row, *policy in zip(rows.tolist(), *(result.tolist() for result in results), strict=True):
                found[row] = tuple(policy)
            if progress is not None:
                progress(len(rows))
        bound = "no budget" if budget is None else "budget per prompt"
        decisions = []
        for i, (indices, probabilities, value, cost, score, finite) in enumerate(found):
            if not finite:
                raise FloatingPointError(f"prompts[{i}]: the backbone gave coefficients that are not finite")
            if not sum(probabilities):
                short = sum(not sum(other[1]) for other in found)
                raise InfeasibleBudget(float(limits[i]), cost, i, short)
            decisions.append(self._draws.decide(user_turns(prompts[i], i), bound, indices, probabilities, cost, value, score))
        return decisions

    def decide(
        self,
        coefficients: Coefficients,
        prompts: Sequence[Prompt],
        budget: float | Sequence[float] | npt.NDArray[np.floating[Any]] | None = None,
        budget_scope: Scope = "prompt",
        max_share: Shares | None = None,
        min_share: Shares | None = None,
        resources: Sequence[Resource] = (),
        allowed: npt.NDArray[np.bool_] | None = None,
    ) -> list[Decision]:
        """``route_batch`` for coefficients already at hand (of the same prompts, from this router's engine)."""
        if coefficients.models != self.engine.models or len(coefficients) != len(prompts):
            raise ValueError(
                f"coefficients: expected those of {len(prompts)} prompts from this router's engine, got {len(coefficients)} "
                f"rows over {len(coefficients.models)} models"
            )
        v = self.win_rates(coefficients)
        policies = self.solve(v, budget, budget_scope, max_share, min_share, resources, allowed)
        scores = self.scores(coefficients, policies, v)
        turns = [user_turns(prompt, i) for i, prompt in enumerate(prompts)]
        bound = "no budget" if budget is None else f"budget per {budget_scope}"
        columns = (policies.indices, policies.probabilities, policies.cost, policies.value, scores)
        rows = zip(turns, *(column.tolist() for column in columns), strict=True)
        return [self._draws.decide(user, bound, *row) for user, *row in rows]

    def solve(
        self,
        v: Float64 | Values,
        budget: float | Sequence[float] | npt.NDArray[np.floating[Any]] | None = None,
        budget_scope: Scope = "prompt",
        max_share: Shares | None = None,
        min_share: Shares | None = None,
        resources: Sequence[Resource] = (),
        allowed: npt.NDArray[np.bool_] | None = None,
    ) -> Policies:
        """The policies of ``route_batch`` over the K models of ``names``, from ``win_rates`` v [N, K]."""
        limits = budget if budget is None or isinstance(budget, bool | str | int | float) else np.asarray(budget)
        if budget_scope == "prompt" and not (
            max_share or min_share or resources or allowed is not None or isinstance(v, Values)
        ):
            return routing.solve_budget(v, self.costs, limits)
        shares = self._shares(max_share, min_share)
        return routing.solve(Problem(v, self.costs, limits, budget_scope, resources, shares, allowed))

    def scores(self, coefficients: Coefficients, policies: Policies, v: Float64) -> Float64:
        """The Bradley-Terry score [N] of each prompt's policy; v [N, K] are the same coefficients' ``win_rates``."""
        theta = arrays.matrix("theta", coefficients.theta)
        value = self._bt_value(theta, v, policies.indices, policies.probabilities, policies.value)
        return native.bt_score(theta, self.q, value)

    def draw(self, turns: Sequence[str], indices: Sequence[int], probabilities: Sequence[float]) -> int:
        """The model, by its place in ``names``, that a prompt of these user turns gets under a mixed policy."""
        return self._draws.draw(turns, indices, probabilities)

    def win_rates(self, coefficients: Coefficients) -> Float64:
        """What is maximised, [N, K] over the K models of ``names``: their win rates against the opponents."""
        return self._rates(arrays.matrix("theta", coefficients.theta), coefficients)

    def _rates(self, theta: Float64, coefficients: Coefficients) -> Float64:
        # The router's own q was checked once; the native core takes it as it is.
        eta = None if coefficients.eta is None else arrays.to_float64("eta", coefficients.eta)
        return compute(theta, self.q, self.objective, eta, coefficients.feedback.name)[:, self._columns]

    def _bt_value(
        self, theta: Float64, v: Float64, indices: Any, probabilities: Float64, value: Float64 | None = None
    ) -> Float64:
        """The policies' Bradley-Terry win rates [N], which scores are made of."""
        if self.objective != "bt" or value is None:
            rates = v if self.objective == "bt" else native.win_rates(theta, self.q)[:, self._columns]
            value = expected(rates, indices, probabilities)
        return np.asarray(value.clip(0.0, 1.0))

    def _shares(self, max_share: Shares | None, min_share: Shares | None) -> list[Share]:
        bounds: dict[tuple[str, ...], dict[str, float]] = {}
        for argument, key, given in (("max_share", "at_most", max_share), ("min_share", "at_least", min_share)):
            for names, share in (given or {}).items():
                group = (names,) if isinstance(names, str) else tuple(names)
                unknown = sorted(set(group) - set(self.names))
                if unknown:
                    raise ValueError(f"{argument}: expected models of the catalog, got {', '.join(unknown)}")
                bounds.setdefault(group, {})[key] = share
        return [Share([self.names.index(n) for n in group], name=", ".join(group), **bound) for group, bound in bounds.items()]


def _matched(catalog: Catalog, models: tuple[str, ...], unmatched: str) -> Catalog:
    if unmatched not in ("error", "leave_out"):
        raise ValueError(f"unmatched: expected 'error' or 'leave_out', got {unmatched!r}")
    unknown = [name for name in catalog.names if name not in models]
    without = [name for name in models if name not in catalog.names]
    if unmatched == "error" and (unknown or without):
        problems = [f"the checkpoint does not know {', '.join(unknown)}"] if unknown else []
        problems += [f"the catalog lacks {', '.join(without)}"] if without else []
        raise CatalogError(f"catalog: {'; '.join(problems)}; mend the catalog, or leave them out with unmatched='leave_out'")
    if len(unknown) == len(catalog.models):
        raise CatalogError(
            f"catalog: the checkpoint knows none of its models ({', '.join(unknown)}); it knows {', '.join(models)}"
        )
    return catalog.only(models)


def _weights(opponents: Opponents, models: tuple[str, ...]) -> npt.NDArray[np.float64]:
    if isinstance(opponents, str):
        if opponents != "uniform":
            raise ValueError(f"opponents: expected 'uniform', a mapping or weights, got {opponents!r}")
        return np.full(len(models), 1.0 / len(models))
    if isinstance(opponents, Mapping):
        unknown = sorted(set(opponents) - set(models))
        if unknown:
            raise ValueError(f"opponents: the checkpoint does not know {', '.join(unknown)}; it knows {', '.join(models)}")
        opponents = [float(opponents.get(name, 0.0)) for name in models]
    return arrays.opponents(opponents, (1, len(models)), "opponents").reshape(len(models))

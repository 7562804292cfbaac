"""Routers by the true score of what they choose: the paper's Table 1 and Figure 11 on a matrix of scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from p2l_engine import routing
from p2l_engine.evaluation.categories import rows_by_category
from p2l_engine.reports import (
    BudgetChoice,
    BudgetRow,
    BudgetSingle,
    BudgetTask,
    Choice,
    RoutingFigures,
    Score,
    ScoreAndCost,
    TaskScores,
)

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]


def choices(theta: Float64, known: Float64, tasks_known: Sequence[str] | None, tasks: Sequence[str] | None) -> dict[str, Int64]:
    """The model [N] that each way of choosing takes for each prompt: ``routed`` by theta [N, M] without a budget, the best
    single model and, where tasks are known, each task's best model; both by the training prompts' scores ``known`` [T, M]."""
    best = int(known.mean(0).argmax())
    found = {"best_single": np.full(len(theta), best), "routed": theta.argmax(1)}
    if tasks_known is not None and tasks is not None:
        of = np.array(tasks_known)
        best_of = {task: int(known[of == task].mean(0).argmax()) for task in set(tasks_known)}
        found["task_best"] = np.array([best_of.get(task, best) for task in tasks])
    return found


def table(chosen: Mapping[str, Int64], scores: Float64, models: Sequence[str], tasks: Sequence[str] | None) -> RoutingFigures:
    """The mean true score of each choice, of every single model and of the oracle, overall and per task; compared with the best
    single model, with the standard error of the gain. scores [N, M]."""
    rows = np.arange(len(scores))
    got = {name: scores[rows, choice] for name, choice in chosen.items()} | {"oracle": scores.max(1)}
    base = got["best_single"]
    by_task = None
    if tasks is not None:
        of = np.array(tasks)
        by_task = {
            task: TaskScores(
                int((of == task).sum()),
                {model: float(scores[of == task, m].mean()) for m, model in enumerate(models)},
                {name: float(score[of == task].mean()) for name, score in got.items()},
            )
            for task in sorted(set(tasks))
        }
    return RoutingFigures(
        models[int(chosen["best_single"][0])],
        {name: Choice(float(score.mean()), *_points(score - base)) for name, score in got.items()},
        {model: float(scores[:, m].mean()) for m, model in enumerate(models)},
        by_task,
    )


def under_budgets(
    v: Float64,
    scores: Float64,
    known: Float64,
    costs: Float64,
    budgets: Sequence[float],
    models: Sequence[str],
    tasks: Sequence[str] | None = None,
) -> tuple[BudgetRow, ...]:
    """Mean true score [N, M] under each mean cost: of the batch budget and the per-prompt budget on win rates v [N, M], of the
    oracle on the true scores, and of the best single model within the budget (by ``known`` [T, M]). Overall, and for each task
    where there are any: the batch budget bounds the whole batch's mean cost, so that one task may cost more. Budgets below
    the cheapest model's cost are left out. costs [M]."""
    rows = []
    rows_of = {} if tasks is None else rows_by_category(tasks, len(scores))
    for budget in budgets:
        within = np.flatnonzero(costs <= budget)
        if not len(within):
            continue
        single = int(within[known[:, within].mean(0).argmax()])
        policies = {
            "batch": routing.solve_batch_budget(v, costs, budget),
            "prompt": routing.solve_budget(v, costs, budget),
            "oracle": routing.solve_batch_budget(scores, costs, budget),
        }
        got = {
            name: (np.take_along_axis(scores, p.indices.astype(np.int64), 1) * p.probabilities).sum(1)
            for name, p in policies.items()
        }
        by_task = {
            task: BudgetTask(
                len(of),
                Score(float(scores[of, single].mean())),
                {name: ScoreAndCost(float(got[name][of].mean()), float(p.cost[of].mean())) for name, p in policies.items()},
            )
            for task, of in rows_of.items()
        }
        rows.append(
            BudgetRow(
                float(budget),
                BudgetSingle(models[single], float(scores[:, single].mean()), float(costs[single])),
                None if tasks is None else by_task,
                {
                    name: BudgetChoice(float(got[name].mean()), *_points(got[name] - scores[:, single]), float(p.cost.mean()))
                    for name, p in policies.items()
                },
            )
        )
    return tuple(rows)


def _points(gain: Float64) -> tuple[float, float]:
    """The mean gain [N] in hundredths, and its standard error."""
    error = 100 * gain.std(ddof=1) / np.sqrt(len(gain)) if len(gain) > 1 else 0.0
    return float(100 * gain.mean()), float(error)


def distribution(
    choice: Int64, n_models: int, categories: Sequence[str], weights: npt.ArrayLike | None = None
) -> dict[str, tuple[float, ...]]:
    """The share of each category's prompts that each model gets (the paper's Figure 7): category to [M], summing to 1.
    weights [N] >= 0: of the prompts."""
    weight = np.ones(len(choice)) if weights is None else np.asarray(weights, np.float64)
    return {
        name: tuple((np.bincount(choice[rows], weight[rows], n_models) / weight[rows].sum()).tolist())
        for name, rows in rows_by_category(categories, len(choice), weights).items()
    }

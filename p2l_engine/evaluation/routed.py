"""Routers by the true score of what they choose: the paper's Table 1 and Figure 11 on a matrix of scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from p2l_engine import routing
from p2l_engine.evaluation.categories import rows_by_category

Float64 = npt.NDArray[np.float64]

BESIDE = ("budget", "best_single", "tasks")  # what a row of ``under_budgets`` holds beside the routers


def choices(theta: Float64, known: Float64, tasks_known: Sequence[str] | None, tasks: Sequence[str] | None) -> dict[str, Any]:
    """Which model [N] each way of choosing takes for each prompt: the router without a budget, the best single model and, where
    tasks are known, each task's best (both by the training prompts' scores ``known`` [T, M])."""
    best = int(known.mean(0).argmax())
    found = {"best_single": np.full(len(theta), best), "routed": theta.argmax(1)}
    if tasks_known is not None and tasks is not None:
        of = np.array(tasks_known)
        best_of = {task: int(known[of == task].mean(0).argmax()) for task in set(tasks_known)}
        found["task_best"] = np.array([best_of.get(task, best) for task in tasks])
    return found


def table(chosen: dict[str, npt.NDArray[np.int64]], scores: Float64, models: Sequence[str], tasks: Sequence[str] | None) -> Any:
    """Mean true score of each choice, of every single model and of the oracle, overall and per task; against the best single
    model with the standard error of the gain. scores [N, M]."""
    rows = np.arange(len(scores))
    got = {name: scores[rows, choice] for name, choice in chosen.items()} | {"oracle": scores.max(1)}
    base = got["best_single"]
    report: dict[str, Any] = {"best_single_model": models[int(chosen["best_single"][0])], "choices": {}, "models": {}}
    for name, score in got.items():
        gain = score - base
        report["choices"][name] = {
            "mean_score": float(score.mean()),
            "points_over_best_single": float(100 * gain.mean()),
            "standard_error_points": float(100 * gain.std(ddof=1) / np.sqrt(len(gain))) if len(gain) > 1 else 0.0,
        }
    report["models"] = {model: float(scores[:, m].mean()) for m, model in enumerate(models)}
    if tasks is not None:
        of = np.array(tasks)
        report["tasks"] = {
            task: {"prompts": int((of == task).sum())}
            | {name: float(score[of == task].mean()) for name, score in got.items()}
            | {"models": {model: float(scores[of == task, m].mean()) for m, model in enumerate(models)}}
            for task in sorted(set(tasks))
        }
    return report


def under_budgets(
    v: Float64,
    scores: Float64,
    known: Float64,
    costs: Float64,
    budgets: Sequence[float],
    models: Sequence[str],
    tasks: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Mean true score under each mean cost: the batch budget and the per-prompt budget on win rates v [N, M], the best single
    model within the budget (by ``known`` [T, M]), and the oracle on the true scores; overall, and for each task where there are
    any (the batch's budget is the whole batch's: a task may cost more than that). Budgets that no model meets are left out."""
    rows = []
    places = {} if tasks is None else rows_by_category(tasks, len(scores))
    for budget in budgets:
        within = np.flatnonzero(costs <= budget)
        if not len(within):
            continue
        single = int(within[known[:, within].mean(0).argmax()])
        batch, each = routing.solve_batch_budget(v, costs, budget), routing.solve_budget(v, costs, budget)
        oracle = routing.solve_batch_budget(scores, costs, budget)
        row: dict[str, Any] = {"budget": float(budget)}
        of_task: dict[str, dict[str, Any]] = {task: {"prompts": len(place)} for task, place in places.items()}
        for name, p in (("batch", batch), ("prompt", each), ("oracle", oracle)):
            score = (np.take_along_axis(scores, p.indices.astype(np.int64), 1) * p.probabilities).sum(1)
            gain = score - scores[:, single]
            row[name] = {
                "mean_score": float(score.mean()),
                "mean_cost": float(p.cost.mean()),
                "points_over_best_single": float(100 * gain.mean()),
                "standard_error_points": float(100 * gain.std(ddof=1) / np.sqrt(len(gain))) if len(gain) > 1 else 0.0,
            }
            for task, place in places.items():
                of_task[task][name] = {"mean_score": float(score[place].mean()), "mean_cost": float(p.cost[place].mean())}
        row["best_single"] = {
            "model": models[single],
            "mean_score": float(scores[:, single].mean()),
            "mean_cost": float(costs[single]),
        }
        if tasks is not None:
            for task, place in places.items():
                of_task[task]["best_single"] = {"mean_score": float(scores[place, single].mean())}
            row["tasks"] = of_task
        rows.append(row)
    return rows


def distribution(
    choice: npt.NDArray[np.int64], n_models: int, categories: Sequence[str], weights: npt.ArrayLike | None = None
) -> dict[str, list[float]]:
    """The share of each category's prompts that each model gets (the paper's Figure 7): category to [M], summing to 1.
    weights [N] >= 0: of the prompts."""
    weight = np.ones(len(choice)) if weights is None else np.asarray(weights, np.float64)
    return {
        name: (np.bincount(choice[rows], weight[rows], n_models) / weight[rows].sum()).tolist()
        for name, rows in rows_by_category(categories, len(choice), weights).items()
    }

"""Streams of prompts, stationary and adversarial, whose budget binds. Part of python -m bench.streams.

Each starts from random win rates over 3 to 12 models that are the better the more they cost, and is then changed:

- stationary: not changed. shift: halfway the expensive models get better or worse.
- blocks: of 50 to 1,000 prompts, in turn with all of the stakes (the differences of win rates) and with a fifth.
- Pareto: each prompt's costs times a Pareto variable of index 1.5, which has mean 1 and infinite variance.
- spikes of stakes, of costs: 20 bursts of 5 to 60 prompts with three times the others' stakes; with five times their costs.
- worthless half: in the first half all models win equally often.
- costs rise, fall: by 20 times from the first prompt to the last; the cheapest model always costs less than the budget.
- sorted up, down: by the stakes, the lowest first, last.
- faint half: the first half has a hundredth of the stakes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from p2l_engine import routing

Float64 = npt.NDArray[np.float64]
KINDS = (
    "stationary", "shift", "blocks", "Pareto", "spikes of stakes", "spikes of costs", "worthless half", "costs rise",
    "costs fall", "sorted up", "sorted down", "faint half",
)  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Stream:
    """Win rates and costs [n, M] of n prompts, win rates [3000, M] and costs [M] of past traffic, and the budget."""

    v: Float64
    costs: Float64
    past: Float64
    past_costs: Float64
    budget: float


def stream(seed: int, n: int, shift: bool = True) -> tuple[Float64, Float64, Float64]:
    """Win rates [n, M] of n prompts over models of costs that span two orders; halfway the expensive models get better or
    worse.

    Also win rates of 3,000 prompts of past traffic, and the costs [M].
    """
    rng = np.random.default_rng(seed)
    m = int(rng.integers(3, 30))
    costs = np.exp(rng.normal(size=m))
    strength = 0.4 * np.log(costs) + 0.3 * rng.normal(size=m)
    theta = rng.normal(size=(n, m)) + strength
    if shift:
        theta[n // 2 :] += strength * rng.uniform(-0.7, 1)
    past = rng.normal(size=(3000, m)) + strength
    return _rates(theta), _rates(past), costs


def streams(kind: str, count: int, n: int) -> list[Stream]:
    """The first ``count`` streams of a kind whose budget binds and is at least twice the cheapest models' mean cost."""
    found: list[Stream] = []
    seed = 0
    while len(found) < count:
        drawn = _draw(kind, np.random.default_rng([KINDS.index(kind), seed]), n)
        seed += 1
        if drawn is not None:
            found.append(drawn)
    return found


def _draw(kind: str, rng: np.random.Generator, n: int) -> Stream | None:
    m, t = int(rng.integers(3, 13)), np.arange(n)
    drifting = kind in ("costs rise", "costs fall")
    past_costs = np.geomspace(0.02, 3, m) if drifting else np.sort(np.exp(rng.normal(size=m)))
    strength = 0.4 * np.log(past_costs) + (0 if drifting else 0.3) * rng.normal(size=m)
    theta, past = rng.normal(size=(n, m)) + strength, _rates(rng.normal(size=(3000, m)) + strength)
    if kind == "shift":
        theta[n // 2 :] += strength * rng.uniform(-0.7, 1)
    v, costs = _rates(theta), np.tile(past_costs, (n, 1))
    bursts = np.zeros(n, bool)
    for start in rng.integers(0, n, 20):
        bursts[start : start + int(rng.integers(5, 60))] = True
    if kind == "blocks":
        low = t // int(np.exp(rng.uniform(np.log(50), np.log(1000)))) % 2 == 0
        v[low] = _flattened(v[low], 0.2)
    elif kind == "Pareto":
        costs *= (rng.pareto(1.5, size=(n, 1)) + 1) / 3
    elif kind == "spikes of stakes":
        v[~bursts] = _flattened(v[~bursts], 1 / 3)
    elif kind == "spikes of costs":
        costs[bursts] *= 5
    elif kind == "worthless half":
        v[: n // 2] = 0.5
    elif kind == "faint half":
        v[: n // 2] = _flattened(v[: n // 2], 0.01)
    elif drifting:
        costs *= 20 ** ((t if kind == "costs rise" else t[::-1]) / n)[:, None]
    elif kind in ("sorted up", "sorted down"):
        order = np.argsort(v.max(1) - v[:, 0], kind="stable")
        v = np.ascontiguousarray(v[order if kind == "sorted up" else order[::-1]])
    # The budget lies between the cheapest models and the best ones, in each part of the stream where that is possible.
    cheapest, best = costs.min(1), costs[t, v.argmax(1)]
    parts = np.array_split(t, {"shift": 2, "costs rise": 5, "costs fall": 5}.get(kind, 1))
    if kind == "worthless half":
        parts = [t[n // 2 :]]
    least, most = max(cheapest[part].mean() for part in parts), min(best[part].mean() for part in parts)
    budget = float(least + 0.4 * (most - least))
    if drifting:
        budget = max(budget, 1.05 * float(cheapest.max()))
    if most <= least or budget < (1 if drifting else 2) * least:
        return None
    return Stream(v, costs, past, past_costs if kind != "costs fall" else 20 * past_costs, budget)


def _flattened(v: Float64, stakes: float) -> Float64:
    """Win rates with this fraction of their differences."""
    middle = v.mean(1, keepdims=True)
    return np.asarray(middle + stakes * (v - middle))


def _rates(theta: Float64) -> Float64:
    m = theta.shape[1]
    return np.asarray(routing.win_rates(np.ascontiguousarray(theta), np.full(m, 1 / m)))

"""How far rounding may take a policy beyond a bound, and the corrections that keep it there.

The slack is one rounding: what a policy uses, or the mean over a batch, is at most the next float above its bound. So a bound
that is one rounding short of the least use counts as equal to it, and any other bound below the least use is infeasible.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from p2l_engine.routing.arrays import Float64
from p2l_engine.routing.problem import expected, of_models, of_prompts
from p2l_engine.routing.scratch import Scratch, parts

Int32 = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]

SLACK = 1  # roundings (units in the last place) by which a policy may exceed a bound
CORRECTIONS = 8  # each halves the excess at worst; one is usual


def highest(bound: Any) -> Any:
    """What counts as within ``bound`` (a number or an array): it, and ``SLACK`` roundings more."""
    for _ in range(SLACK):
        bound = np.nextafter(bound, np.inf)
    return bound


def mean(use: Float64) -> float:
    """The mean, by extended precision where the machine has it; numpy's where that is lower: callers compute bounds by it."""
    return min(float(use.sum(dtype=np.longdouble) / len(use)), float(use.mean()))


def excess(use: Float64, bound: float) -> float:
    """By how much the sum of ``use`` [N] exceeds N ``bound``: 0 where the mean is within a rounding, summed either way."""
    n, limit = len(use), highest(bound)
    total = use.sum(dtype=np.longdouble)
    if total / n <= limit and use.mean() <= limit:
        return 0.0
    return max(float(total - np.longdouble(n) * bound), n * float(use.mean() - bound), float(np.spacing(abs(bound))))


def within_each(indices: Int32, probabilities: Float64, amounts: Any, bound: Any, usable: Mask) -> None:
    """Moves probability, in place, until every prompt's use is within its bound (a number or [N]), which is at least the least
    amount of its usable models. usable [N, M] or [1, M]."""
    limits = np.broadcast_to(np.asarray(bound, np.float64), (len(indices),))
    for _ in range(CORRECTIONS):
        use = expected(amounts, indices, probabilities)
        over = np.flatnonzero(use > highest(limits))
        if not len(over):
            return
        _lower(indices, probabilities, amounts, usable, over, use[over] - limits[over])


def within_mean(
    indices: Int32, probabilities: Float64, amounts: Any, bound: float, usable: Mask, scratch: Scratch | None = None
) -> None:
    """The same for the mean over the prompts, at as few of them as possible. scratch: where what each uses is noted."""
    use = (scratch or Scratch()).empty(len(indices), np.float64)
    for _ in range(CORRECTIONS):
        for some in parts(len(indices)):
            use[some] = expected(of_prompts(amounts, some), indices[some], probabilities[some])
        over = excess(use, bound)
        if not over:
            return
        # What a mixed prompt can give up among its own models; if none is mixed, one becomes so.
        i, spare = -1, 0.0
        for among in ("own", "usable"):
            for some in parts(len(indices)):
                p, at = probabilities[some], of_models(of_prompts(amounts, some), indices[some])
                if among == "own":
                    least = np.where(p > 0, at, np.inf).min(axis=1)
                else:
                    mask = usable if len(usable) == 1 else usable[some]
                    least = np.broadcast_to(np.where(mask, of_prompts(amounts, some), np.inf).min(axis=1), len(p))
                most = ((at - least[:, None]) * p).max(axis=1)
                if most.max() > spare:
                    i, spare = some.start + int(most.argmax()), float(most.max())
            if spare > 0:
                break
        if i >= 0:
            _lower(indices, probabilities, amounts, usable, np.array([i]), np.array([min(over, spare)]))


def _lower(indices: Int32, probabilities: Float64, amounts: Any, usable: Mask, prompts: Any, by: Float64) -> None:
    """Lowers what these prompts use by ``by`` [n], or by a rounding more: from a prompt's most to its least expensive model, or
    to its cheapest usable one, where it uses one amount only."""
    n = np.arange(len(prompts))
    own = np.broadcast_to(amounts, (len(n), len(amounts))) if amounts.ndim == 1 else np.asarray(amounts[prompts], np.float64)
    models, p = indices[prompts], probabilities[prompts]
    at, used = np.take_along_axis(own, models, 1), p > 0
    high, low = np.where(used, at, -np.inf).argmax(axis=1), np.where(used, at, np.inf).argmin(axis=1)
    alone = (at[n, low] == at[n, high]) & ~used.all(axis=1)
    if alone.any():
        cheapest = np.where(usable if len(usable) == 1 else usable[prompts], own, np.inf).argmin(axis=1)
        low = np.where(alone, used.argmin(axis=1), low)  # an entry that is not used
        models[n[alone], low[alone]] = cheapest[alone]
        at = np.take_along_axis(own, models, 1)
    difference, before = at[n, high] - at[n, low], p[n, high]
    share = np.divide(by, difference, out=np.zeros(len(n)), where=difference > 0)
    after = np.where(difference > 0, np.clip(np.minimum(before - share, np.nextafter(before, 0.0)), 0.0, None), before)
    p[n, high] = after
    p[n, low] += before - after
    indices[prompts], probabilities[prompts] = ordered(models, p)


def ordered(indices: Int32, probabilities: Float64) -> tuple[Int32, Float64]:
    """Policies [n, W] with their models by falling probability; entries that are not used repeat the first model."""
    order = np.argsort(-probabilities, axis=1, kind="stable")
    indices, probabilities = np.take_along_axis(indices, order, 1), np.take_along_axis(probabilities, order, 1)
    return np.where(probabilities > 0, indices, indices[:, :1]), probabilities

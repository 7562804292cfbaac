"""Thompson sampling: coefficients drawn from their posterior, and how probable the model chosen from a draw was.

A prompt's randomisation: theta is drawn from N(theta, deviation^2), independently for each model, and a model from the best
policy under that draw. The propensity of the chosen model is its probability over both. Arrays in, arrays out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from p2l_engine.routing.arrays import Float64
from p2l_engine.routing.problem import Problem, Row
from p2l_engine.routing.solve import solve_chunk

DRAWS, FEWEST = 1_000, 200  # of a prompt's theta, for its propensity
COEFFICIENTS = 32_000  # drawn for a prompt at most, unless these are fewer draws than FEWEST
BEYOND = 8.5  # standard deviations: a probability of 1e-17
NEGLIGIBLE = 1e-9  # of theta: float32 knows theta to 6e-8

Chances = Callable[[Float64], npt.NDArray[Any]]  # theta [S, M] -> the model's probability under each draw [S]


class Propensity(NamedTuple):
    """The probability of the chosen model, in (0, 1], and an upper bound on its standard error: 0 where it is exact."""

    value: float
    error: float = 0.0


class Posterior:
    """What is believed of one prompt: theta [M], deviation [M], and the draws from it by a generator of the prompt's own."""

    def __init__(self, theta: Float64, deviation: Float64, generator: np.random.Generator) -> None:
        self.theta = theta
        self.deviation = np.where(deviation < NEGLIGIBLE * np.abs(theta), 0.0, deviation)
        self._uncertain = np.flatnonzero(self.deviation)
        self._generator = generator
        self.drawn = self._draw(1)[0]  # the coefficients to decide with

    def propensity(self, own: float, chances: Chances) -> Propensity:
        """Of the model that was chosen from ``drawn``, whose policy gives it the probability ``own``.

        chances: the probability [S] of that model under each of S draws of theta [S, M]. The result is their mean over S fresh
        draws and the prompt's own, so it is at least own / (S + 1), never 0. It is exact in this sense: each of the S + 1 draws
        was equally likely to be the prompt's own, and given them all this is the model's probability. Inverse propensity
        weights are therefore unbiased, whatever S is, but for models that none of the draws would have chosen. As an estimate
        of the probability over all theta, its standard error is at most sqrt(p (1 - p) / S), and its bias at most 1 / (S + 1).
        """
        if not len(self._uncertain):
            return Propensity(own)
        count = max(FEWEST, min(DRAWS, COEFFICIENTS // len(self.theta)))
        p = min((own + float(chances(self._draw(count)).sum())) / (count + 1), 1.0)
        return Propensity(p, max(math.sqrt(p * (1 - p) / count), 1 / (count + 1)))

    def _draw(self, count: int) -> Float64:
        """theta ~ N(theta, deviation^2), [count, M]."""
        noise = self._generator.standard_normal((count, len(self._uncertain)))
        if len(self._uncertain) == len(self.theta):
            noise *= self.deviation
            noise += self.theta
            return noise
        found = np.repeat(self.theta[None], count, 0)
        found[:, self._uncertain] += self.deviation[self._uncertain] * noise
        return found


def chances(problem: Problem, prices: Mapping[str, float], prompt: int, model: int, values: Float64) -> Float64:
    """The probability [S] of a model for one prompt of a problem, under each of S rows of its values [S, M].

    prices: the dual prices of the rows over the batch, which stand for them. The problem has one row for each prompt at most.
    """
    own = slice(prompt, prompt + 1)
    for row in problem.batch_rows:
        if prices[row.name]:
            values = values - prices[row.name] * np.reshape(row.of(own).amounts, -1)
    row = _row(problem, prompt)
    if problem.mask is None and row.amounts.max() <= row.bound:
        best = values == values.max(axis=1, keepdims=True)
        if int(np.count_nonzero(best)) == len(values):  # without a tie, which costs would decide
            return np.asarray(best[:, model], np.float64)
    mask = None if problem.mask is None else np.repeat(problem.mask[own], len(values), 0)
    indices, probabilities, _, _ = solve_chunk(row, np.ascontiguousarray(values), mask, prompt)
    return np.asarray((probabilities * (indices == model)).sum(axis=1))


def only_cost(problem: Problem, prices: Mapping[str, float], prompt: int) -> Float64 | None:
    """What each model costs [M] by the only row, or by the prices of all rows over the batch; None where both count."""
    if not problem.batch_rows:
        return np.asarray(_row(problem, prompt).amounts)
    if problem.prompt_rows:
        return None
    own = slice(prompt, prompt + 1)
    found = [prices[row.name] * np.reshape(row.of(own).amounts, -1) for row in problem.batch_rows]
    return np.asarray(np.sum(found, axis=0))


def _row(problem: Problem, prompt: int) -> Row:
    """The row of one prompt: amounts [M] and a bound."""
    row = (*problem.prompt_rows, Row("budget", problem.amounts, np.inf))[0].of(slice(prompt, prompt + 1))
    return Row(row.name, np.reshape(row.amounts, -1), float(np.reshape(row.bound, -1)[0]))


def order_decides(problem: Problem) -> bool:
    """Whether the order of the values decides every policy: there is no row over the batch, and there are two models, or the
    bound of each prompt leaves all of them."""
    rows = problem.prompt_rows
    free = all((row.amounts.max(axis=-1, initial=-np.inf) <= row.bound).all() for row in rows)
    return not problem.batch_rows and len(rows) <= 1 and (problem.values.shape[1] <= 2 or free)


def propensity_of_order(
    theta: Float64, deviation: Float64, problem: Problem, prompt: int, model: int, own: float
) -> Propensity | None:
    """The exact propensity where the order of theta [M] decides and at most two models are in question; None otherwise.

    own: the probability of the model under the policy that was drawn.
    """
    usable = np.arange(len(theta)) if problem.mask is None else np.flatnonzero(problem.mask[prompt])
    among = usable if len(theta) == 2 else usable[contenders(theta[usable], deviation[usable])]
    if model not in among or len(among) > 2:
        return None
    if len(among) == 1 or not deviation[among].any():
        return Propensity(own)
    values = np.zeros((2, len(theta)))
    values[0, among], values[1, among] = (2, 1), (1, 2)
    first, second = chances(problem, {}, prompt, model, values).tolist()
    p = higher(theta[among], deviation[among])
    return Propensity(p * first + (1 - p) * second)


def paced(v: Float64, costs: Float64, price: float, most: float = math.inf) -> npt.NDArray[np.intp]:
    """What a pacer chooses [S] for each of S rows of win rates v [S, M], at its price and the highest cost it can afford."""
    usable = costs <= most
    if price == math.inf or not usable.any():
        price, usable = 0.0, costs == costs.min()
    models = np.flatnonzero(usable)
    models = models[np.argsort(costs[models], kind="stable")]
    w = v[:, models]
    scores = w - price * costs[models]
    best = scores == scores.max(axis=1, keepdims=True)
    return np.asarray(models[np.where(best, w, -np.inf).argmax(axis=1)])


def contenders(theta: Float64, deviation: Float64) -> npt.NDArray[np.intp]:
    """The models of theta [K] that may have the highest drawn coefficient: no other one is higher beyond a probability of
    1e-17."""
    gap = theta[:, None] - theta[None, :]
    surely = gap > BEYOND * np.hypot(deviation[:, None], deviation[None, :])
    return np.flatnonzero(~surely.any(axis=0))


def higher(theta: Float64, deviation: Float64) -> float:
    """The probability that the first of two drawn coefficients is higher: a normal cdf."""
    scale = math.hypot(*deviation.tolist())
    return 0.5 * math.erfc(-(theta[0] - theta[1]) / scale / math.sqrt(2)) if scale else float(theta[0] > theta[1])

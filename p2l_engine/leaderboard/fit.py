"""The leaderboard that best explains expected (or counted) outcomes: maximum likelihood by Newton's method, in float64."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from p2l_engine.feedback import FeedbackModel
from p2l_engine.leaderboard.connected import components
from p2l_engine.leaderboard.losses import Loss, Quadratic
from p2l_engine.leaderboard.network import IndefiniteError
from p2l_engine.leaderboard.outcomes import pair_count, pairs

Float64 = npt.NDArray[np.float64]

TOLERANCE = 1e-11  # of a step, relative to 1 + the largest coefficient
STALLED = 1e-5  # the same, where rounding keeps steps from getting smaller
ITERATIONS = 300
SURE = 2.0  # step that is not looked beyond
LONGEST = 10.0  # step: far from the optimum the quadratic model is poor
LEAST_ETA = -50.0  # below it lambda - 1 = exp(eta) + 1e-6 is 1e-6 to the last bit
LOST = 1e-290  # of a pair's weight: what a model's outcomes weigh where its coefficient has left the range of float64
SATURATED = 1e-4  # outcomes rarer than that make Newton's steps short, so that a start is worth its time
START = 30  # iterations at most, with
HALVINGS = 12  # of a step of at most
FARTHEST = 100.0
TETHER = 1e-8  # the start's least ridge: what log-ratios hardly depend on does not run away
FLAT_ETA = -14.0  # where exp(eta) is below the 1e-6 that is added to it, and says little


class Fit(NamedTuple):
    """theta [M], of mean 0 where only differences count; eta, or None; loss: the mean negative log-likelihood, without ridge;
    iterations."""

    theta: Float64
    eta: float | None
    loss: float
    iterations: int


def fit(
    feedback: FeedbackModel,
    outcomes: npt.ArrayLike,
    n_models: int,
    ridge: float = 0.0,
) -> Fit:
    """The coefficients under which ``outcomes`` are likeliest: the paper's (3), for any feedback model of votes.

    outcomes [K, M (M - 1) / 2]: how often (or with what weight) each outcome came for each pair, in the order of
    ``leaderboard.pairs``. ridge: the penalty on theta^2 and eta^2, in units of the mean weight of a pair; it bounds models that
    always win. Where the optimum is a whole line, as for two models under rk-reparam, or as far as float64 holds the outcomes,
    the fit is one of its points. An eta of -50 means that lambda is as small as it gets. Raises ValueError for outcomes that
    are negative, not finite or all 0, and, without a ridge, where models are unconnected or unbounded; ArithmeticError, which
    names the coefficients, where there is no optimum within float64, or none is reached: weights may be too far apart.
    """
    counts = np.asarray(outcomes, np.float64)
    if counts.shape != (len(feedback.outcomes), pair_count(n_models)):
        raise ValueError(
            f"outcomes: expected [{len(feedback.outcomes)}, {pair_count(n_models)}] for {feedback.name} and {n_models} models, "
            f"got {list(counts.shape)}"
        )
    if not (np.isfinite(counts).all() and (counts >= 0).all() and counts.sum() > 0):
        raise ValueError("outcomes: expected finite numbers >= 0, not all of them 0")
    if not ridge and not feedback.grounded:
        _check_bounded(counts, n_models)
    return _Newton(feedback, counts, n_models, ridge).run()


def deviations(
    feedback: FeedbackModel, outcomes: npt.ArrayLike, samples: npt.ArrayLike, whole: Fit, ridge: float = 0.0
) -> Float64:
    """[M, B]: by how much theta moves, to first order, when ``samples`` [B, K, M (M - 1) / 2] are added to the ``outcomes``
    that ``whole`` was fitted to with this ridge: one linear system for all samples."""
    counts, n_models = np.asarray(outcomes, np.float64), len(whole.theta)
    newton = _Newton(feedback, counts, n_models, ridge)
    x = newton.point(whole)
    here = newton.at(x)
    gradients = newton.scale * newton.loss.gradients(x, np.asarray(samples, np.float64))[: len(here.gradient)]
    try:
        return here.response(gradients)[:n_models]
    except IndefiniteError:  # rounding, at an optimum
        return newton.loss.at(x, expected=True, free=here.slope is not None).response(gradients)[:n_models]


def _check_bounded(counts: Float64, n_models: int) -> None:
    """A finite optimum exists where every model has a chain of wins or ties to every other (Ford, 1957): where the graph of
    wins is strongly connected."""
    a, b = pairs(n_models)
    beats = np.zeros((n_models, n_models), dtype=bool)
    tied = counts[2:].sum(0) > 0
    beats[a, b], beats[b, a] = (counts[0] > 0) | tied, (counts[1] > 0) | tied
    if components(beats).any():
        raise ValueError("outcomes: expected weights that connect all models; some have no chain of pairs to the others")
    if components(beats, "strong").any():
        raise ValueError("outcomes: some models always win or always lose against others, so that their coefficients have no "
                         "bound; give a ridge, such as 1e-6")  # fmt: skip


class _Newton:
    """Newton's method with a line search on one loss, counts scaled to a mean weight of 1 a pair."""

    def __init__(self, feedback: FeedbackModel, counts: Float64, n_models: int, ridge: float) -> None:
        self.scale = pair_count(n_models) / float(counts.sum())
        self.counts = counts * self.scale
        self.loss = Loss(feedback, self.counts, n_models, ridge)
        self.least_eta = max(feedback.least_eta, LEAST_ETA)

    def point(self, of: Fit) -> Float64:
        """x [size] of a fit."""
        return self._onto(np.append(of.theta, [] if of.eta is None else [of.eta]))

    def at(self, x: Float64) -> Quadratic:
        """The loss near x; without eta if it is at its lower bound and would go further (where rk's loss has a kink)."""
        found = self.loss.at(x)
        if found.slope is not None and x[-1] <= self.least_eta and found.slope >= 0:
            return self.loss.at(x, free=False)
        return found

    def run(self) -> Fit:
        x = self._start()
        here, shortest, still, stuck, most = self.at(x), np.inf, 0, 0, self._farthest()
        for iteration in range(ITERATIONS + int(3 * self._range())):  # far from the optimum a step is as short as 1
            self._check_in_range(here)
            step = self._step(here, x)
            length = float(np.abs(step).max()) / (1 + float(np.abs(x).max()))
            promised = -float(here.gradient @ step[: len(here.gradient)])
            still = still + 1 if length >= shortest / 2 else 0
            nothing = still > 2 and abs(promised) <= here.noise
            if length <= TOLERANCE or (still and length <= STALLED):
                return self._fit(x, iteration)
            if nothing and float(np.abs(x).max()) > most:
                break
            shortest = min(shortest, length)
            to = self._along(x, step, here)
            stuck = stuck + 1 if float(np.abs(to - x).max()) <= TOLERANCE * (1 + float(np.abs(x).max())) else 0
            if stuck > 2:  # no part of such a step lowers the loss
                break
            x, here = to, self.at(to)
        else:
            nothing = False
        if nothing and not self._some_never_came():  # what would hold the rest is below the outcomes' rounding
            return self._fit(x, iteration)
        raise ArithmeticError(
            f"fit: no optimum after {iteration + 1} iterations: {self._moving(step)}; give a ridge, such as 1e-6"
        )

    def _fit(self, x: Float64, iterations: int) -> Fit:
        m, feedback = self.loss.n_models, self.loss.feedback
        theta = x[:m] - (0.0 if feedback.grounded else x[:m].mean())
        plain = Loss(feedback, self.counts, m).at(x).value
        return Fit(theta, float(x[m]) if feedback.has_eta else None, plain / float(self.counts.sum()), iterations)

    def _step(self, here: Quadratic, x: Float64) -> Float64:
        step = self._newton(here, x)
        if here.slope is not None and x[-1] <= self.least_eta and step[-1] < 0:
            step = self._newton(self.loss.at(x, free=False), x)
        return step

    def _newton(self, here: Quadratic, x: Float64) -> Float64:
        try:
            step = here.step(LONGEST)
        except IndefiniteError:  # far from the optimum: Fisher scoring
            step = self.loss.at(x, expected=True, free=here.slope is not None).step(LONGEST)
        return np.append(step, np.zeros(len(x) - len(step)))

    def _along(self, x: Float64, step: Float64, here: Quadratic) -> Float64:
        """The first of shorter and shorter steps that lowers the loss enough (Armijo), as far as rounding shows."""
        longest = float(np.abs(step).max())
        length = min(1.0, LONGEST / longest) if longest > 0 else 1.0
        for _ in range(60):
            to = self._onto(x + length * step)
            promised = float(here.gradient @ (to - x)[: len(here.gradient)])
            lower = self.loss.value(to) <= here.value + 1e-4 * min(promised, 0.0) + here.noise
            if lower and (length * longest <= SURE or not self._beyond(to, to - x, promised)):
                return to
            length /= 2
        return x

    def _beyond(self, to: Float64, way: Float64, promised: float) -> bool:
        """Whether the loss rises again at the end of a way on which it fell by less than ``promised`` at first: from there the
        next step would lead back."""
        there = self.at(to).gradient
        return float(there @ way[: len(there)]) > abs(promised) / 10

    def _some_never_came(self) -> bool:
        return bool(((self.counts == 0) & (self.counts.sum(0) > 0)).any())

    def _farthest(self) -> float:
        """Farther than any chain of models, each beaten as rarely as the rarest outcome that came, of any pair: what holds a
        model may come from one pair, and what moves it from another."""
        return 40.0 + self.loss.n_models * self._range()

    def _range(self) -> float:
        """The logarithm of the largest of the weights that came over the smallest."""
        came = self.counts[self.counts > 0]
        return math.log(float(came.max())) - math.log(float(came.min()))

    def _start(self) -> Float64:
        """0; for saturated outcomes where their log-ratios would have it, if the loss is lower there."""
        zero, share = self._onto(np.zeros(self.loss.size)), self.counts / np.maximum(self.counts.sum(0), np.finfo(float).tiny)
        if not ((share > 0) & (share < SATURATED)).any():
            return zero
        x = self._by_log_ratios(zero, max(self.loss.ridge, TETHER))
        x = self._by_log_ratios(x, self.loss.ridge)
        return x if self.loss.at(x).value <= self.loss.at(zero).value else zero

    def _by_log_ratios(self, x: Float64, ridge: float) -> Float64:
        loss = Loss(self.loss.feedback, self.counts, self.loss.n_models, ridge)
        here = loss.toward(x)
        for _ in range(START):
            step = here.step()
            length = min(1.0, FARTHEST / max(float(np.abs(step).max()), 1e-300))
            if length * float(np.abs(step).max()) <= TOLERANCE * (1 + float(np.abs(x).max())):
                break
            for _ in range(HALVINGS):
                to = self._onto(x + length * step, FLAT_ETA)
                if loss.distance(to) < here.value:
                    break
                length /= 2
            else:  # as near as it gets
                break
            x, here = to, loss.toward(to)
        return x

    def _onto(self, x: Float64, least: float = LEAST_ETA) -> Float64:
        x[self.loss.n_models :] = np.maximum(x[self.loss.n_models :], max(self.least_eta, least))
        return x

    def _check_in_range(self, here: Quadratic) -> None:
        m = self.loss.n_models
        held = np.abs(here.weights[:m]).sum(1) > LOST
        lost = np.append(~held, [here.slope is not None and abs(here.bend) <= LOST])
        if lost.any():
            raise ArithmeticError(f"fit: no optimum: {self._moving(lost)}; give a ridge, such as 1e-6")

    def _moving(self, step: npt.NDArray[np.generic]) -> str:
        m = self.loss.n_models
        size = np.abs(np.asarray(step, np.float64))
        at = np.flatnonzero(size >= 0.5 * size.max())
        names = [f"theta[{i}]" if i < m else "eta" for i in at.tolist()]
        return f"the outcomes give no bound to {', '.join(names[:5])}{' and others' if len(names) > 5 else ''}"

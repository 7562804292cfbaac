"""What routing maximises, by prompt and model, in chunks, so that millions of prompts need not fit in memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from p2l_engine.feedback import Outcome, feedback_model
from p2l_engine.native import routing as native
from p2l_engine.routing import arrays
from p2l_engine.routing.arrays import Array, Float64
from p2l_engine.routing.scratch import Scratch

Objective = Literal["bt", "half-ties", "not-bad"]

CHUNK = 16384  # prompts: their values stay in the CPU's caches or near them


class Values(ABC):
    """v [N, M], read by chunks. ``shape``: (N, M); N is None for an iterator, whose length is not known beforehand. scratch:
    where solvers keep what they note of each prompt, and the policies."""

    shape: tuple[int | None, int]
    scratch = Scratch()

    @abstractmethod
    def chunks(self) -> Iterator[Float64]:
        """v in consecutive chunks of prompts, each finite [n, M] float64."""

    @abstractmethod
    def take(self, prompts: Any) -> Float64:
        """v of some prompts (a slice or indices)."""


class ArrayValues(Values):
    """Values given as an array, a memmap or a tensor [N, M]."""

    def __init__(self, v: Array) -> None:
        self.v = arrays.to_numpy(v, "v")
        arrays.check_matrix("v", self.v)
        self.shape = (int(self.v.shape[0]), int(self.v.shape[1]))

    def chunks(self) -> Iterator[Float64]:
        for start in range(0, len(self.v), CHUNK):
            yield self._checked(slice(start, start + CHUNK), start)

    def take(self, prompts: Any) -> Float64:
        return self._checked(prompts, 0)

    def _checked(self, prompts: Any, start: int) -> Float64:
        return arrays.finite("v", arrays.to_float64("v", self.v[prompts]), start)


class SomeValues(Values):
    """Those of some prompts [n] among other values', read each time."""

    def __init__(self, values: Values, prompts: npt.NDArray[np.intp]) -> None:
        self.values, self.prompts, self.scratch = values, prompts, values.scratch
        self.shape = (len(prompts), values.shape[1])

    def chunks(self) -> Iterator[Float64]:
        for start in range(0, len(self.prompts), CHUNK):
            yield self.take(slice(start, start + CHUNK))

    def take(self, prompts: Any) -> Float64:
        return self.values.take(self.prompts[prompts])


class LazyWinRates(Values):
    """Win rates computed from coefficients on demand, chunk by chunk, and not kept.

    theta: an array or memmap [N, M], or an iterator over chunks [n, M] of it, read once (N is then not known beforehand, and
    the problem must be one that takes a single pass: bounds per prompt, or one row over the batch, with amounts [M]). q,
    objective, eta ([N], in memory) and feedback as in ``win_rates``.
    """

    def __init__(
        self,
        theta: Array | Iterable[Array],
        q: Array,
        objective: Objective = "bt",
        eta: Array | None = None,
        feedback: str = "bt",
    ) -> None:
        self.objective, self.feedback = objective, feedback
        self.theta: Any = None
        self._iterator: Iterator[Array] | None = None
        if isinstance(theta, np.ndarray) or arrays.is_tensor(theta):
            self.theta = arrays.to_numpy(theta, "theta")
            arrays.check_matrix("theta", self.theta)
            self.shape = (int(self.theta.shape[0]), int(self.theta.shape[1]))
        elif isinstance(theta, str | bytes | Mapping) or not isinstance(theta, Iterable):
            raise TypeError(f"theta: expected an array, a memmap or an iterator of chunks, got {type(theta).__name__}")
        else:
            self._iterator = iter(theta)
            if eta is not None:
                raise ValueError("eta: expected theta as an array or memmap where there is eta, got an iterator")
            self.shape = (None, len(arrays.to_numpy(q, "q")))
        n, m = self.shape
        self.q = arrays.opponents(q, (1 if n is None else n, m))
        self.eta = None if eta is None else tie_parameters(eta, n)
        check_objective(objective, self.eta, feedback)

    def chunks(self) -> Iterator[Float64]:
        if self.theta is not None:
            for start in range(0, len(self.theta), CHUNK):
                yield self._win_rates(self.theta[start : start + CHUNK], slice(start, start + CHUNK), start)
            return
        if self._iterator is None:
            raise ValueError("theta: its iterator has been read to the end; give an array or memmap, or a fresh iterator")
        iterator, self._iterator, start = self._iterator, None, 0
        for chunk in iterator:
            if self.q.ndim == 2:
                raise ValueError("q: expected shape [M] where theta is an iterator")
            if np.ndim(chunk) != 2 or chunk.shape[1] != self.shape[1]:
                raise ValueError(f"theta: expected chunks [n, {self.shape[1]}], got {list(np.shape(chunk))}")
            for first in range(0, len(chunk), CHUNK):
                part = chunk[first : first + CHUNK]
                yield self._win_rates(part, slice(None), start)
                start += len(part)

    def take(self, prompts: Any) -> Float64:
        if self.theta is None:
            raise ValueError(
                "theta: expected an array or memmap, since this problem takes several passes over the prompts; got an iterator"
            )
        return self._win_rates(self.theta[prompts], prompts, 0)

    def _win_rates(self, theta: Any, prompts: Any, start: int) -> Float64:
        t = arrays.finite("theta", arrays.to_float64("theta", theta), start)
        q = self.q if self.q.ndim == 1 else np.ascontiguousarray(self.q[prompts])
        return compute(t, q, self.objective, None if self.eta is None else self.eta[prompts], self.feedback)


def compute(theta: Float64, q: Float64, objective: str, eta: Float64 | None, feedback: str) -> Float64:
    """``routing.win_rates`` of checked arrays, [N, M]. The objective "half-ties" of models with ties loads torch."""
    if objective == "not-bad":
        return np.asarray(np.exp(-np.logaddexp(0.0, -theta)))
    model = feedback_model(feedback)
    if objective == "bt" or (model.rao_kupper and not model.has_eta):
        return native.win_rates(theta, q)
    import torch

    ties = None if eta is None else torch.from_numpy(np.ascontiguousarray(eta))
    if model.rao_kupper and ties is not None:
        return native.tie_win_rates(theta, model.log_lambda(ties).numpy(), model.grounded, q)
    # Any other model, pair by pair: O(N M^2).
    t = torch.from_numpy(theta)
    p = model.probabilities(t[:, :, None], t[:, None, :], None if ties is None else ties[:, None, None])
    not_lost = (p[..., Outcome.A] + (p[..., Outcome.TIE] + p[..., Outcome.BOTH_BAD]) / 2).numpy()
    return np.asarray(np.einsum("nba,na->nb", not_lost, np.broadcast_to(q, theta.shape)))


def contending(
    theta: Float64, q: Float64, objective: str, eta: Float64 | None, feedback: str, models: npt.NDArray[np.intp], costs: Float64
) -> Float64:
    """``compute`` for K ``models`` alone, [N, K], or 0 for those that no policy with one bound on these costs [K] would choose,
    since a cheaper one is clearly better. Bits are those of ``compute``. q [M]."""
    model = feedback_model(feedback)
    if objective == "not-bad" or not model.rao_kupper or not len(models):
        return np.ascontiguousarray(compute(theta, q, objective, eta, feedback)[:, models])
    log_lambda = None
    if objective != "bt" and model.has_eta and eta is not None:
        import torch

        log_lambda = model.log_lambda(torch.from_numpy(np.ascontiguousarray(eta))).numpy()
    order = np.argsort(costs, kind="stable")
    grounded = model.grounded and log_lambda is not None
    found = np.empty((len(theta), len(models)))
    found[:, order] = native.contending_win_rates(theta, log_lambda, grounded, q, models[order].astype(np.int64), costs[order])
    return found


def tie_parameters(eta: Array, n: int | None) -> Float64:
    """eta as finite [N]."""
    array = arrays.finite("eta", arrays.to_float64("eta", eta))
    if array.shape != (n,):
        raise ValueError(f"eta: expected shape [{n}], got {list(array.shape)}")
    return array


def check_objective(objective: str, eta: Float64 | None, feedback: str) -> None:
    """Raises ValueError where the objective is unknown or lacks its tie parameter."""
    if objective not in ("bt", "half-ties", "not-bad"):
        raise ValueError(f"objective: expected 'bt', 'half-ties' or 'not-bad', got {objective!r}")
    if feedback_model(feedback).of_values:
        raise ValueError(f"feedback: expected a model of votes, got {feedback!r}, whose coefficients give no win rates")
    if objective == "half-ties" and feedback_model(feedback).has_eta and eta is None:
        raise ValueError(f"eta: the objective 'half-ties' of the feedback model {feedback!r} needs it, got None")

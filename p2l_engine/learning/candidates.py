"""The maps of coefficients that a calibration chooses from, simplest first, each linear in a few parameters.

With theta and eta as the checkpoint gives them, the calibrated ones are

- none: the same;
- temperature: scale theta, about the ground (0); for values scale theta + shift;
- offsets: theta + shift + d_m, with d_m ~ N(0, spread^2) for each model m, independent of each other;
- both: scale theta + shift + d_m;
- isotonic: g(theta), g rising and linear between knots at quantiles of theta.

The shift is a parameter where it changes something: under feedback models with a ground, and of values. All but none and
offsets have scale and offset of eta where the feedback model has one. Scales, shift and eta have the prior N(identity, 10^2),
which only bounds what the votes leave unbounded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array, hstack, vstack

from p2l_engine.coefficients import Coefficients
from p2l_engine.learning.newton import LinearFit
from p2l_engine.votes import Votes

Float64 = npt.NDArray[np.float64]
Kind = Literal["none", "temperature", "offsets", "both", "isotonic"]

KINDS: tuple[Kind, ...] = get_args(Kind)  # simplest first
SPREADS = (0.1, 0.3, 1.0)  # of offsets: standard deviations of their prior
WIDE = 10.0  # standard deviation of the prior of everything else
SEGMENTS = 8  # of an isotonic map
LEAST_SLOPE = 1e-3  # of an isotonic map, which rises everywhere; and of a scale
RK_UNIT = 10.0  # rk's softplus(eta - 22.5, 0.1) changes by about 1 where eta changes by 10


@dataclass(frozen=True, slots=True)
class Candidate:
    """A kind of map. spread: the prior standard deviation of the models' offsets, where it has any."""

    kind: Kind
    spread: float | None = None

    def __str__(self) -> str:
        return self.kind if self.spread is None else f"{self.kind}, spread {self.spread:g}"


def candidates(kinds: tuple[Kind, ...] = KINDS) -> tuple[Candidate, ...]:
    """Those of these kinds, simplest first: fewer parameters, a narrower prior, and isotonic last, since published code cannot
    read it."""
    found: list[Candidate] = []
    for kind in KINDS:
        if kind in kinds:
            found += [Candidate(kind, spread) for spread in SPREADS] if kind in ("offsets", "both") else [Candidate(kind)]
    return tuple(found)


@dataclass(frozen=True, slots=True)
class CoefficientMap:
    """theta [N, M] -> scale theta + offset_m, or g(theta) by knots and values; eta -> eta_scale eta + eta_offset.

    offsets: of models by name, shift included; models without one have ``shift``.
    """

    candidate: Candidate
    scale: float = 1.0
    shift: float = 0.0
    offsets: dict[str, float] = field(default_factory=dict)
    knots: tuple[float, ...] | None = None
    values: tuple[float, ...] | None = None
    eta_scale: float = 1.0
    eta_offset: float = 0.0

    def __call__(self, c: Coefficients) -> tuple[Float64, Float64 | None]:
        """The calibrated theta [N, M] and eta [N]."""
        theta = c.theta.astype(np.float64)
        if self.knots is not None and self.values is not None:
            theta = piecewise(theta, np.array(self.knots), np.array(self.values))
        else:
            theta = self.scale * theta + np.array([self.offset(name) for name in c.models])
        return theta, None if c.eta is None else self.eta_scale * c.eta.astype(np.float64) + self.eta_offset

    def offset(self, model: str) -> float:
        """What is added to the model's theta."""
        return self.offsets.get(model, self.shift)


def shown(c: Coefficients, votes: Votes) -> Float64:
    """The thetas that the votes are on."""
    theta, paired = c.theta.astype(np.float64), votes.b >= 0
    return np.concatenate([theta[votes.prompt, votes.a], theta[votes.prompt[paired], votes.b[paired]]])


def knots_of(theta: Float64) -> Float64:
    """The knots of an isotonic map: different quantiles of theta. It bends where there are three at least."""
    found = np.unique(np.quantile(theta, np.linspace(0, 1, SEGMENTS + 1)))
    apart: Float64 = found[np.append(True, np.diff(found) > 1e-6 * max(1.0, float(np.ptp(found))))]
    return apart


def piecewise(x: Float64, knots: Float64, values: Float64) -> Float64:
    """The map that is linear between its knots, and beyond them as next to them."""
    at = np.clip(np.searchsorted(knots, x, "right") - 1, 0, len(knots) - 2)
    slope = np.diff(values) / np.diff(knots)
    found: Float64 = values[at] + slope[at] * (x - knots[at])
    return found


class Design:
    """A candidate's parameters, and how the linear predictors of some votes follow from them.

    votes: of the checkpoint's models, on the prompts of ``c``, in that order. Raises ValueError where the candidate is an
    isotonic map and theta has fewer than three different values.
    """

    def __init__(self, candidate: Candidate, c: Coefficients, votes: Votes) -> None:
        self.candidate, self.models, self.feedback = candidate, c.models, c.feedback
        self.knots: Float64 | None = None
        self.anchor = 0.0
        theta = c.theta.astype(np.float64)
        paired = (votes.b >= 0).astype(np.float64)
        self._a, self._b = theta[votes.prompt, votes.a], theta[votes.prompt, votes.b] * paired
        self._eta = np.zeros(len(votes)) if c.eta is None else c.eta.astype(np.float64)[votes.prompt]
        self._paired, self._votes = paired, votes
        self.names: list[str] = []
        self._parts: list[csr_array] = []
        self._centre: list[float] = []
        self._sd: list[float] = []
        self._least: list[float] = []
        fixed = np.stack([self._a, self._b, self._eta])
        if candidate.kind in ("temperature", "both"):
            fixed[:2] = 0
            self._add("scale", self._a, self._b, 1.0, WIDE, LEAST_SLOPE)
        if candidate.kind == "isotonic":
            fixed[:2] = self._add_segments()
        free_shift = c.feedback.grounded or c.feedback.of_values
        if free_shift and candidate.kind != "none" and (candidate.kind != "temperature" or c.feedback.of_values):
            self._add("shift", np.ones(len(votes)), paired, 0.0, WIDE)
        if candidate.spread is not None:
            self._add_offsets(candidate.spread)
        if c.feedback.has_eta and candidate.kind not in ("none", "offsets"):
            self._middle = float(np.average(self._eta, weights=votes.weight))
            self._unit = RK_UNIT if c.feedback.least_eta > -np.inf else 1.0
            fixed[2] = self._middle
            zero = np.zeros(len(votes))
            self._add("eta scale", zero, zero, 1.0, WIDE, LEAST_SLOPE, self._eta - self._middle)
            self._add("eta offset", zero, zero, 0.0, WIDE, -np.inf, np.full(len(votes), self._unit))
        columns = hstack(self._parts, "csr") if self._parts else csr_array((3 * len(votes), 0))
        self.start = np.array(self._centre)
        self.objective = LinearFit(
            c.feedback, columns, fixed, votes.outcome, votes.weight, self.start, 1 / np.array(self._sd) ** 2,
            np.array(self._least),
        )  # fmt: skip

    def map_of(self, x: Float64) -> CoefficientMap:
        """The map of parameters [k]."""
        of = dict(zip(self.names, x.tolist(), strict=True))
        scale, shift, eta_scale = of.get("scale", 1.0), of.get("shift", 0.0), of.get("eta scale", 1.0)
        eta_offset = 0.0
        if "eta scale" in of:
            eta_offset = self._middle * (1 - eta_scale) + self._unit * of["eta offset"]
        offsets = {name: shift + of[f"offset {name}"] for name in self.models if f"offset {name}" in of}
        knots = values = None
        if self.knots is not None:
            slopes = x[: len(self.knots) - 1]
            level = np.concatenate([[0.0], np.cumsum(slopes * np.diff(self.knots))])
            at_anchor = piecewise(np.array([self.anchor]), self.knots, level)[0]
            knots, values = tuple(self.knots.tolist()), tuple((self.anchor + shift + level - at_anchor).tolist())
            shift = 0.0
        return CoefficientMap(self.candidate, scale, shift, offsets, knots, values, eta_scale, eta_offset)

    def _add(
        self, name: str, a: Float64, b: Float64, centre: float, sd: float, least: float = -np.inf, eta: Float64 | None = None
    ) -> None:
        self._parts.append(csr_array(np.concatenate([a, b, np.zeros(len(a)) if eta is None else eta])[:, None]))
        self.names.append(name)
        self._centre.append(centre)
        self._sd.append(sd)
        self._least.append(least)

    def _add_segments(self) -> Float64:
        """Columns for the slope of each segment; returns what no parameter changes [2, V]."""
        theta = np.concatenate([self._a, self._b[self._paired > 0]])
        knots = knots_of(theta)
        if len(knots) < 3:
            raise ValueError("isotonic: expected theta of at least three different values on these votes")
        self.knots, self.anchor = knots, float(np.median(theta))
        low, high = np.append(-np.inf, knots[1:-1]), np.append(knots[1:-1], np.inf)
        for i, (lo, hi) in enumerate(zip(low, high, strict=True)):
            before = np.clip(self.anchor, lo, hi)
            a, b = (np.clip(x, lo, hi) - before for x in (self._a, self._b))
            self._add(f"slope {i}", a, b * self._paired, 1.0, WIDE, LEAST_SLOPE)
        return np.stack([np.full(len(self._a), self.anchor), self.anchor * self._paired])

    def _add_offsets(self, spread: float) -> None:
        """A column for each model that has votes."""
        votes, n, m = self._votes, len(self._votes), len(self.models)
        rows, one = np.arange(n), np.ones(n)
        a = csr_array((one, (rows, votes.a)), shape=(n, m))
        b = csr_array((self._paired, (rows, np.maximum(votes.b, 0))), shape=(n, m))
        some = np.flatnonzero(np.asarray(a.sum(0)).ravel() + np.asarray(b.sum(0)).ravel())
        self._parts.append(vstack([a[:, some], b[:, some], csr_array((n, len(some)))], "csr"))
        self.names += [f"offset {self.models[i]}" for i in some]
        self._centre += [0.0] * len(some)
        self._sd += [spread] * len(some)
        self._least += [-np.inf] * len(some)

"""Expected output tokens (or seconds) of each model for each prompt: log-linear in the prompt's hidden state.

The mean of model m for a prompt with hidden state h is exp(h . w_m + b_m). Means are fitted by quasi-likelihood with a log
link, so that sums of predictions are sums of what was observed; a regression of logarithms would predict medians, and bill too
little. The rows w_m have a prior N(mean, diag(variances)) in the principal components of the hidden states, shared by all
models and learned from them (empirical Bayes, by EM): a model with few observations gets the others' pattern at its own level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from p2l_engine.arguments import whole_number
from p2l_engine.backbone.lengths import LengthRows

Float64 = npt.NDArray[np.float64]
Family = Literal["poisson", "gamma"]  # variance in proportion to the mean, or to its square

COMPONENTS = 48  # principal components that rows may use
ROUNDS = 15  # of EM
STEPS = 50  # of Newton's method
LEVEL_SD = 10.0  # of the logarithm of a model's mean, about that of its observations: almost flat
PSEUDO = 1.0  # models' worth of belief that all components vary alike


@dataclass(frozen=True, slots=True)
class Lengths:
    """Rows weight [K, D] and bias [K] of K models; cap [K]: the largest observation, which no prediction exceeds; floor [K]:
    the least one. observations [K]: of each model. shared_weight [D], shared_bias: the row of a model of which nothing was
    observed: what the rows have in common, at the mean of the models' mean lengths."""

    models: tuple[str, ...]
    weight: Float64
    bias: Float64
    floor: Float64
    cap: Float64
    observations: tuple[int, ...]
    shared_weight: Float64
    shared_bias: float

    def expected(self, hidden: npt.ArrayLike) -> Float64:
        """[N, K]: the expected lengths for hidden states [N, D] after the final norm."""
        logs = np.asarray(hidden, np.float64) @ self.weight.T + self.bias
        found: Float64 = np.exp(np.clip(logs, np.log(self.floor), np.log(self.cap)))
        return found

    def rows(self) -> LengthRows:
        """The rows as a checkpoint keeps them, float32, the shared one last."""
        parts = (
            np.vstack([self.weight, self.shared_weight]), np.append(self.bias, self.shared_bias),
            np.append(self.floor, self.floor.min()), np.append(self.cap, self.cap.max()),
        )  # fmt: skip
        return LengthRows(self.models, *(torch.from_numpy(part.astype(np.float32)) for part in parts))


def fit_lengths(
    hidden: npt.ArrayLike,
    observed: npt.ArrayLike,
    models: Sequence[str],
    family: Family = "poisson",
    components: int = COMPONENTS,
) -> Lengths:
    """Lengths from hidden states [N, D] and observations [N, K] > 0, NaN where a model has none.

    Raises ValueError for shapes that do not fit, for a model without any observation, and for observations that are not finite
    numbers above 0 (what answered nothing is no observation).
    """
    h, y = np.asarray(hidden, np.float64), np.asarray(observed, np.float64)
    _check(h, y, models, family)
    components = min(whole_number("components", components, 1), *h.shape)
    centre = h.mean(0)
    _, _, axes = np.linalg.svd(h - centre, full_matrices=False)
    axes = axes[:components]
    x = (h - centre) @ axes.T
    scale = max(float(np.sqrt((x**2).sum(1).mean())), 1e-12)  # rows of about this length change the mean by a factor of e
    x = np.column_stack([x / scale, np.ones(len(x))])
    rows, shared = _shared(x, y, family)
    weight, shared_weight = rows[:, :-1] @ axes / scale, shared @ axes / scale
    level = np.log(np.nanmean(y, 0).mean()) - np.log(np.exp(x[:, :-1] @ shared).mean())
    seen = ~np.isnan(y)
    return Lengths(
        tuple(models),
        weight,
        rows[:, -1] - weight @ centre,
        np.nanmin(y, 0),
        np.nanmax(y, 0),
        tuple(int(n) for n in seen.sum(0)),
        shared_weight,
        float(level - shared_weight @ centre),
    )


def deviance(observed: Float64, expected: Float64, family: Family) -> float:
    """The mean deviance of observations at expected means, 0 at best: twice the quasi-likelihood that is missing."""
    ratio = observed / expected
    if family == "poisson":
        return float(2 * np.mean(observed * np.log(ratio) - (observed - expected)))
    return float(2 * np.mean(ratio - 1 - np.log(ratio)))


def _check(h: Float64, y: Float64, models: Sequence[str], family: Family) -> None:
    if h.ndim != 2 or y.ndim != 2 or len(h) != len(y) or not len(h) or y.shape[1] != len(models):
        raise ValueError(
            f"hidden, observed: expected [N, D] and [N, {len(models)}] with N > 0, got {list(h.shape)} and {list(y.shape)}"
        )
    if family not in ("poisson", "gamma"):
        raise ValueError(f"family: expected poisson or gamma, got {family!r}")
    if not np.isfinite(h).all():
        raise ValueError("hidden: expected finite numbers")
    some = ~np.isnan(y)
    if not (np.isfinite(y[some]) & (y[some] > 0)).all():
        raise ValueError(f"observed: expected finite numbers above 0, or NaN, got {y[some][~(y[some] > 0)][:1]}")
    lacking = [models[m] for m in np.flatnonzero(~some.any(axis=0)).tolist()]
    if lacking:
        raise ValueError(f"observed: expected at least one of every model, got none of {', '.join(lacking[:5])}")


def _shared(x: Float64, y: Float64, family: Family) -> tuple[Float64, Float64]:
    """Rows [K, r + 1] at the prior that makes them likeliest, and its mean [r], by EM: given the prior, each row's mode and
    (Laplace) covariance; given those, the prior's mean and variances."""
    r, k = x.shape[1] - 1, y.shape[1]
    some = [np.flatnonzero(~np.isnan(y[:, m])) for m in range(k)]
    level = np.array([np.log(y[rows, m].mean()) for m, rows in enumerate(some)])
    mean, variance = np.zeros(r), np.full(r, 1.0 / r)
    rows = np.column_stack([np.zeros((k, r)), level])
    spread = np.array([_dispersion(y[some[m], m], np.full(len(some[m]), np.exp(level[m])), 1.0, family) for m in range(k)])
    for _ in range(ROUNDS):
        variances = np.empty((k, r))
        for m in range(k):
            prior = np.append(mean, level[m]), 1 / np.append(variance, LEVEL_SD**2)
            rows[m], covariance = _mode(x[some[m]], y[some[m], m], rows[m], *prior, spread[m], family)
            variances[m] = np.diag(covariance)[:-1]
            freedom = r + 1 - float((np.diag(covariance) * prior[1]).sum())  # parameters that the data, not the prior, decide
            fitted = np.exp(x[some[m]] @ rows[m])
            spread[m] = _dispersion(y[some[m], m], fitted, min(freedom, len(fitted) / 2), family)
        mean = rows[:, :-1].sum(0) / (k + PSEUDO)  # about 0, as far as few models say
        second = (rows[:, :-1] - mean) ** 2 + variances
        variance = (second.sum(0) + PSEUDO * second.mean()) / (k + PSEUDO)
    return rows, mean


def _mode(
    x: Float64, y: Float64, start: Float64, mean: Float64, precision: Float64, spread: float, family: Family
) -> tuple[Float64, Float64]:
    """The row [r + 1] of the greatest quasi-likelihood over ``spread``, plus the prior's, and its Laplace covariance."""

    def loss(row: Float64) -> float:
        logs = np.clip(x @ row, -300, 300)
        fitted = np.exp(logs)
        own = fitted - y * logs if family == "poisson" else y / fitted + logs
        return float(own.sum() / spread + 0.5 * precision @ (row - mean) ** 2)

    row, value = start, loss(start)
    for _ in range(STEPS):
        fitted = np.exp(np.clip(x @ row, -300, 300))
        by, bend = (fitted - y, fitted) if family == "poisson" else (1 - y / fitted, y / fitted)
        slope = x.T @ by / spread + precision * (row - mean)
        curvature = (x.T * (bend / spread)) @ x + np.diag(precision)
        step = -np.linalg.solve(curvature, slope)
        promised = float(slope @ step)
        if promised > -1e-8:
            break
        length = 1.0
        while (new := loss(row + length * step)) > value + 1e-4 * length * promised + 1e-12 * abs(value) and length > 1e-10:
            length /= 2
        row, value = row + length * step, new
    return row, np.asarray(np.linalg.inv(curvature), np.float64)


def _dispersion(y: Float64, fitted: Float64, freedom: float, family: Family) -> float:
    """Pearson's estimate of the variance over that of the family."""
    squares = (y - fitted) ** 2 / (fitted if family == "poisson" else fitted**2)
    return max(float(squares.sum() / max(len(y) - freedom, 1.0)), 1e-6)

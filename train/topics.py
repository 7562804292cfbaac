"""Fits what a checkpoint's head reads beside hidden states: softmax regression of the training prompts' categories."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax

from p2l_engine.backbone.topics import Topics

logger = logging.getLogger(__name__)

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

MOST_STEPS = 500
TOLERANCE = 1e-6  # of the objective, relative: what a step gains at the end


def fit(hidden: Float32, category: Sequence[str], deviation: float, words: Float32 | None = None) -> Topics:
    """The topics of greatest posterior probability for hidden states [P, D] of these categories, and the prompts' words [P, E]
    where topics should read them.

    deviation: how far a prompt of ordinary length moves a topic's logit before any is seen: weights on standardised states and
    words are normal with variance deviation^2 / (D + E); biases are free. Raises ValueError for a single category, and
    ArithmeticError where the search ends before its tolerance.
    """
    names = sorted(set(category))
    if len(names) < 2:
        raise ValueError(f"topics: expected prompts of two categories at least, got {names[0]!r} alone")
    index = {name: i for i, name in enumerate(names)}
    label = np.array([index[name] for name in category])
    inputs = hidden if words is None else np.concatenate([hidden, words], 1)
    mean, spread = inputs.mean(0, dtype=np.float64), np.maximum(inputs.std(0, dtype=np.float64), 1e-9)
    z = (inputs - mean) / spread
    rows, (t, d) = np.arange(len(z)), (len(names), z.shape[1])
    scale = deviation / math.sqrt(d)

    def objective(x: Float64) -> tuple[float, Float64]:
        u = x.reshape(t, d + 1)
        log_p = log_softmax(z @ (scale * u[:, :-1]).T + u[:, -1], 1)
        slope = np.exp(log_p)
        slope[rows, label] -= 1
        by = np.concatenate([scale * (slope.T @ z) + u[:, :-1], slope.sum(0)[:, None]], 1)
        return float(-log_p[rows, label].sum() + (u[:, :-1] ** 2).sum() / 2), by.ravel()

    start = np.zeros((t, d + 1))
    start[:, -1] = np.log(np.bincount(label, minlength=t) / len(label))
    options = {"maxiter": MOST_STEPS, "maxcor": 20, "ftol": TOLERANCE, "gtol": 0.0}
    found = minimize(objective, start.ravel(), jac=True, method="L-BFGS-B", options=options)
    if not found.success and found.jac @ found.jac / 2 > TOLERANCE * max(1.0, abs(found.fun)):
        raise ArithmeticError(f"the topics' optimum was not reached in {found.nit} steps: {found.message}")
    u = found.x.reshape(t, d + 1)
    weight = scale * u[:, :-1] / spread
    logger.info("%d topics: the optimum in %d steps, %.2f nats a prompt", t, found.nit, found.fun / len(z))
    bias = u[:, -1] - weight @ mean
    of_hidden, of_words = (torch.from_numpy(part).float() for part in np.split(weight, [hidden.shape[1]], axis=1))
    return Topics(of_hidden, torch.from_numpy(bias).float(), tuple(names), None if words is None else of_words)

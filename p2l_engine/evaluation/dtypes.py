"""What dtypes cost in quality: coefficients in each, beside those in float32 on the same prompts."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch

from p2l_engine import routing
from p2l_engine.coefficients import Coefficients
from p2l_engine.engine import Engine
from p2l_engine.evaluation.features import Advance
from p2l_engine.evaluation.metrics import Prediction
from p2l_engine.reports import DtypeFigures
from p2l_engine.votes import Votes

Float64 = npt.NDArray[np.float64]


def figures(
    engine: Engine,
    c: Coefficients,
    others: Iterable[Engine],
    held_out: Votes,
    scores: Float64 | None,
    advance: Advance | None,
) -> tuple[DtypeFigures, ...] | None:
    """Of an engine, which gave c for the votes' prompts, and of others of the same checkpoint, float32 first; None without
    others. scores [N, M]: the models' true scores. Each engine may be made when it is asked for, and is not kept. Raises
    ValueError where none computes in float32, and for one of another checkpoint."""
    found = {engine.dtype: c}
    for other in others:
        if (other.folder, other.models) != (engine.folder, engine.models):
            raise ValueError(f"others: expected engines of {engine.folder}, got one of {other.folder}")
        if other.dtype not in found:
            found[other.dtype] = other.coefficients(held_out.prompts, advance)
    if len(found) == 1:
        return None
    exact = found.get(torch.float32)
    if exact is None:
        raise ValueError(
            f"others: expected one in float32, which the others are compared with, got {', '.join(map(str, found))}"
        )
    order = sorted(found, key=lambda dtype: dtype != torch.float32)
    return tuple(of(dtype, found[dtype], exact, held_out, scores) for dtype in order)


def of(
    dtype: torch.dtype, found: Coefficients, exact: Coefficients, votes: Votes | None, scores: Float64 | None = None
) -> DtypeFigures:
    """Of coefficients in a dtype. exact: of the same prompts, in float32; votes: on these prompts; scores [N, M]: true ones."""
    feedback, rows = exact.feedback, np.arange(len(exact))
    difference = found.theta.astype(np.float64) - exact.theta
    if not (feedback.grounded or feedback.of_values):
        difference -= difference.mean(1, keepdims=True)
    log_loss = mean_score = other_choice = win_rate_lost = most_lost = None
    if votes is not None:
        loss = Prediction.of(feedback, found.theta, found.eta, votes).loss
        log_loss = float(np.average(loss, weights=votes.weight))
    if not feedback.of_values:
        chosen, first = found.theta.argmax(1), exact.theta.argmax(1)
        mean_score = None if scores is None else float(scores[rows, chosen].mean())
        v = routing.win_rates(exact.theta.astype(np.float64), np.full(len(exact.models), 1 / len(exact.models)))
        lost = 100 * (v[rows, first] - v[rows, chosen])
        other_choice, win_rate_lost, most_lost = (float(value) for value in ((chosen != first).mean(), lost.mean(), lost.max()))
    return DtypeFigures(
        str(dtype).removeprefix("torch."),
        len(exact),
        float(np.sqrt(np.square(difference).mean())),
        float(np.abs(difference).max()),
        log_loss,
        mean_score,
        other_choice,
        win_rate_lost,
        most_lost,
    )

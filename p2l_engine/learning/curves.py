"""How fast a model is learned: each one left out of the head in turn, and added again with more and more of its votes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from p2l_engine.backbone.head import Head
from p2l_engine.feedback import FeedbackModel
from p2l_engine.learning.adapt import adapt
from p2l_engine.learning.rows import NewModel
from p2l_engine.votes import Votes

SIZES = (0, 10, 30, 100, 300, 1000, 3000)


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """What ``votes`` votes on a left-out model give: the mean log-loss of held-out votes on it over ``models`` models, that of
    the row that it had in the head, and how much higher the first is, with the standard error of this over prompts."""

    votes: int
    models: int
    loss: float
    own_row: float
    excess: float
    error: float


def leave_one_out(
    head: Head,
    models: Sequence[str],
    feedback: FeedbackModel,
    votes: Votes,
    hidden: npt.NDArray[np.float32],
    sizes: Sequence[int] = SIZES,
    seed: int = 0,
) -> list[CurvePoint]:
    """Learning curves over the models of the votes. hidden [P, D]: of the votes' prompts.

    Two thirds of the prompts, at random, are learned from, the others are measured on. A model takes part in a point if it has
    that many votes to learn from, and one to be measured on. Raises ValueError for fewer than two models or three prompts.
    """
    if len(models) < 2 or len(votes.prompts) < 3:
        raise ValueError(f"votes: expected two models and three prompts at least, got {len(models)} and {len(votes.prompts)}")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(votes.prompts))
    measured_on = np.zeros(len(order), bool)
    measured_on[order[: max(1, len(order) // 3)]] = True
    column = np.array([models.index(name) for name in votes.models] + [-1])
    a, b, test = column[votes.a], column[votes.b], measured_on[votes.prompt]
    used = votes.weight > 0
    found: dict[int, list[npt.NDArray[np.float64]]] = {n: [] for n in sizes}
    for k, name in enumerate(models):
        of = ((a == k) | (b == k)) & used
        learned_from, held = rng.permutation(np.flatnonzero(of & ~test)), np.flatnonzero(of & test)
        if not len(held):
            continue
        rows = [i for i in range(head.width) if i != k]
        others = Head(head.weight[rows], head.bias[rows], len(models) - 1)
        known = [model for model in models if model != name]
        kept = votes.of(np.flatnonzero(measured_on).tolist())
        own = losses_by_prompt(head, models, feedback, kept, hidden[measured_on], name)
        for n in sizes:
            if n > len(learned_from):
                continue
            some = np.zeros(len(votes), bool)
            some[learned_from[:n]] = True
            part, states = votes.where(some), hidden[np.unique(votes.prompt[some])]
            result = adapt(others, known, feedback, part, states, [NewModel(name)], reference=hidden[~measured_on])
            found[n].append(
                np.stack([losses_by_prompt(result.head, result.models, feedback, kept, hidden[measured_on], name), own])
            )
    return [_point(n, each) for n, each in found.items() if each]


def losses_by_prompt(
    head: Head,
    models: Sequence[str],
    feedback: FeedbackModel,
    votes: Votes,
    hidden: npt.NDArray[np.float32],
    name: str | None = None,
) -> npt.NDArray[np.float64]:
    """[P]: for each prompt the mean log-loss of its votes, or of those on the model ``name``; NaN where it has none. votes: on
    some of the head's models. hidden [P, D]: of their prompts."""
    out = torch.from_numpy(hidden).double() @ head.weight.double().T + head.bias.double()
    column = np.array([list(models).index(model) for model in votes.models] + [-1])
    a, b = column[votes.a], column[votes.b]
    of = votes.weight > 0
    if name is not None:
        k = list(models).index(name)
        of &= (a == k) | (b == k)
    prompt, weight = votes.prompt[of], votes.weight[of]
    theta = torch.cat([out[:, : len(models)], torch.zeros(len(out), 1, dtype=torch.float64)], 1)
    eta = out[prompt, len(models)] if feedback.has_eta else None
    outcome = torch.from_numpy(votes.outcome[of])
    losses = -feedback.log_likelihood(theta[prompt, a[of]], theta[prompt, b[of]], eta, outcome).numpy()
    total, count = np.bincount(prompt, losses * weight, len(hidden)), np.bincount(prompt, weight, len(hidden))
    mean: npt.NDArray[np.float64] = np.divide(total, count, out=np.full(len(hidden), np.nan), where=count > 0)
    return mean


def _point(n: int, each: list[npt.NDArray[np.float64]]) -> CurvePoint:
    """From the losses [2, P] of each model, learned and with its own row."""
    means = np.nanmean(each, axis=2).mean(0)
    apart = np.stack([losses[0] - losses[1] for losses in each])
    by_prompt = apart[:, np.isfinite(apart).any(0)]
    by_prompt = np.nanmean(by_prompt, axis=0)
    error = float(by_prompt.std(ddof=1) / np.sqrt(len(by_prompt))) if len(by_prompt) > 1 else float("nan")
    return CurvePoint(n, len(each), float(means[0]), float(means[1]), float(means[0] - means[1]), error)

"""Ways to add a model to a head, each from the same votes, and the figures of what they give: compared by bench.adapting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from bench.neighbours import residual_of
from p2l_engine.backbone.head import Head
from p2l_engine.feedback import FeedbackModel
from p2l_engine.leaderboard.losses import pair_derivatives, sums_of_derivatives
from p2l_engine.learning.adapt import adapt
from p2l_engine.learning.likelihood import outcome_shares
from p2l_engine.learning.objective import Objective, minimise
from p2l_engine.learning.rows import NewModel
from p2l_engine.votes import Votes, from_scores

Float64 = npt.NDArray[np.float64]

OLD_VOTES = 10  # on the other models, for each prompt
RIDGES = (100.0, 300.0, 1000.0, 3000.0)  # of the head's training, on standardised hidden states
DIRECTIONS = 200  # of ridge regression from scratch, at most
NEIGHBOURS = 40


@dataclass(frozen=True, slots=True)
class Task:
    """One model left out. states: hidden states of training [T, D] and test prompts [N, D]; old: votes on the other models,
    which come first in ``models``; new: all votes of the left-out model, the last, on training prompts; test: on test prompts;
    scores [N, M]: of the test prompts. head: of the other models, and eta. ridge: that its fit has."""

    feedback: FeedbackModel
    models: tuple[str, ...]
    train: Float64
    test_states: Float64
    old: Votes
    new: Votes
    test: Votes
    scores: Float64
    head: Head
    ridge: float


def best_ridge(feedback: FeedbackModel, states: Float64, votes: Votes) -> float:
    """Of ``RIDGES``, that whose head, fitted to the votes on three quarters of the prompts, predicts the others best."""
    held = np.arange(len(votes.prompts)) % 4 == 3
    fit, check = votes.of(np.flatnonzero(~held).tolist()), votes.of(np.flatnonzero(held).tolist())

    def loss(ridge: float) -> float:
        theta, eta = outputs(fitted(feedback, states[~held], fit, ridge), states[held])
        tie = None if eta is None else torch.from_numpy(eta[check.prompt])
        of_a, of_b = (torch.from_numpy(theta[check.prompt, of]) for of in (check.a, check.b))
        return -float(feedback.log_likelihood(of_a, of_b, tie, torch.from_numpy(check.outcome)).mean())

    return min(RIDGES, key=loss)


def fitted(feedback: FeedbackModel, states: Float64, votes: Votes, ridge: float, start: Head | None = None) -> Head:
    """The head of most posterior probability for these votes, its weights on standardised hidden states with a ridge."""
    centre, spread = states.mean(0), states.std()
    x = torch.from_numpy((states - centre) / spread)
    m = len(votes.models)
    w = torch.zeros(m + feedback.has_eta, x.shape[1] + 1, dtype=torch.float64)
    if start is not None:
        w[:, :-1] = start.weight.double() * spread
        w[:, -1] = start.bias.double() + start.weight.double() @ torch.from_numpy(centre)
    w.requires_grad_()
    prompt, a, b, outcome, weight = (
        torch.from_numpy(of) for of in (votes.prompt, votes.a, votes.b, votes.outcome, votes.weight)
    )
    optimiser = torch.optim.LBFGS([w], max_iter=80, history_size=20, line_search_fn="strong_wolfe", tolerance_change=1e-7)

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        out = x @ w[:, :-1].T + w[:, -1]
        eta = out[prompt, m] if feedback.has_eta else None
        found = -(weight * feedback.log_likelihood(out[prompt, a], out[prompt, b], eta, outcome)).sum()
        found = found + ridge / 2 * w[:, :-1].square().sum()
        found.backward()
        return found

    optimiser.step(loss)
    kept = w.detach()
    weights = kept[:, :-1] / spread
    return Head(weights.float(), (kept[:, -1] - weights @ torch.from_numpy(centre)).float(), m)


def outputs(head: Head, states: Float64) -> tuple[Float64, Float64 | None]:
    """theta [N, M] and eta [N]."""
    out = states @ head.weight.double().numpy().T + head.bias.double().numpy()
    return out[:, : head.n_models], out[:, head.n_models] if head.has_eta else None


def task_of(
    feedback: FeedbackModel,
    names: Sequence[str],
    states: Float64,
    scores: Float64,
    k: int,
    head: Head | None,
    ridge: float | None = None,
) -> Task:
    """Leaves model ``k`` out. head: with a row for each model; None: fitted to the votes on the others. ridge: of the fit;
    None: the best one."""
    order = [i for i in range(len(names)) if i != k] + [k]
    models, scores = tuple(names[i] for i in order), scores[:, order]
    m = len(models)
    test = np.arange(len(states)) % 3 == 2
    rng = np.random.default_rng(0)

    def votes(rows: npt.NDArray[np.intp]) -> Votes:
        return from_scores(tuple((str(i),) for i in range(len(rows))), models, scores[rows])

    train_rows, test_rows = np.flatnonzero(~test), np.flatnonzero(test)
    every = votes(train_rows)
    of_new = every.b == m - 1
    shuffled = rng.random(len(every)) + of_new
    rank = np.empty(len(every), np.int64)
    rank[np.lexsort((shuffled, every.prompt))] = np.tile(np.arange(len(every) // len(train_rows)), len(train_rows))
    old = every._rows(np.flatnonzero(~of_new & (rank < OLD_VOTES)))
    new = every._rows(np.flatnonzero(of_new))
    held = votes(test_rows)
    held = held._rows(np.flatnonzero(held.b == m - 1))
    if head is None:
        known = old.among(models[:-1]) if len(old.prompts) else old
        of_known = states[train_rows][[int(p[0]) for p in known.prompts]]
        ridge = best_ridge(feedback, of_known, known) if ridge is None else ridge
        head = fitted(feedback, of_known, known, ridge)
    else:
        ridge = RIDGES[0] if ridge is None else ridge
        rows = [*order[:-1], *([m] if head.has_eta else [])]
        head = Head(head.weight[rows], head.bias[rows], m - 1)
    return Task(feedback, models, states[train_rows], states[test_rows], old, new, held, scores[test_rows], head, ridge)


def figures(task: Task, theta: Float64, eta: Float64 | None) -> tuple[float, float, float]:
    """The log-loss of test votes, its standard error over prompts, and the mean true score of the models ranked first."""
    v = task.test
    tie = None if eta is None else torch.from_numpy(eta[v.prompt])
    ll = task.feedback.log_likelihood(
        torch.from_numpy(theta[v.prompt, v.a]), torch.from_numpy(theta[v.prompt, v.b]), tie, torch.from_numpy(v.outcome)
    ).numpy()
    by_prompt = -np.bincount(v.prompt, ll) / np.bincount(v.prompt)
    routed = task.scores[np.arange(len(theta)), theta.argmax(1)].mean()
    return float(by_prompt.mean()), float(by_prompt.std(ddof=1) / np.sqrt(len(by_prompt))), float(routed)


def compared(task: Task, n: int, seed: int, retrain: bool, residual: bool = False) -> dict[str, tuple[float, float, float]]:
    """The figures of each way to add the model, from n random votes on it."""
    chosen = np.sort(np.random.default_rng([seed, n]).permutation(len(task.new))[:n])
    votes = task.new._rows(chosen)
    theta, eta = outputs(task.head, task.test_states)
    found = {}
    new = [NewModel(task.models[-1])]
    once = replace(votes, weight=1 / np.bincount(votes.prompt)[votes.prompt])  # as the command has it for scores
    adapted = adapt(task.head, task.models[:-1], task.feedback, once, task.train.astype(np.float32), new)
    found["adapt"] = figures(task, *outputs(adapted.head, task.test_states))
    known, known_eta = outputs(task.head, task.train)
    middle = known.mean(1)
    base = np.concatenate([known, middle[:, None]], 1)
    level = float(known.mean(0).std(ddof=1))
    one = np.ones((len(base), 1))
    m = len(task.models) - 1
    shift = level * minimise(Objective(task.feedback, votes, known_eta, base, one, {m: np.eye(1) * level})).u[0, 0]
    found["offset"] = figures(task, np.concatenate([theta, theta.mean(1, keepdims=True) + shift], 1), eta)
    found["ridge"] = figures(task, np.concatenate([theta, _ridge(task, votes, known, known_eta)[:, None]], 1), eta)
    near = theta.mean(1) + shift + _nearest(task, votes, base, known_eta, shift, level)
    found["knn"] = figures(task, np.concatenate([theta, near[:, None]], 1), eta)
    if retrain:
        found["retrained"] = figures(task, *outputs(retrained(task, votes), task.test_states))
    if residual and n:
        moved, tie = outputs(adapted.head, task.test_states)
        given = (task.head, task.models, task.feedback, once, task.train, task.test_states)
        moved[:, -1] += residual_of(*given, *outputs(adapted.head, task.train), adapted)
        found["residual"] = figures(task, moved, tie)
    return found


def retrained(task: Task, votes: Votes) -> Head:
    """The whole head, fitted to the old votes and these."""
    both = Votes.make(
        task.old.prompts,
        task.models,
        *(np.concatenate([getattr(task.old, name), getattr(votes, name)]) for name in ("prompt", "a", "b", "outcome")),
    )
    start = task.head
    m = start.n_models
    weight = torch.cat([start.weight[:m], start.weight[:m].mean(0, keepdim=True), start.weight[m:]])
    bias = torch.cat([start.bias[:m], start.bias[:m].mean(0, keepdim=True), start.bias[m:]])
    return fitted(task.feedback, task.train, both, task.ridge, Head(weight, bias, m + 1))


def _ridge(task: Task, votes: Votes, known: Float64, eta: Float64 | None) -> Float64:
    """The new model's theta [N] by ridge regression from scratch; its ridge has the most evidence. In the span of the votes'
    prompts, where the optimum lies."""
    centre, spread = task.train.mean(0), task.train.std() * np.sqrt(task.train.shape[1])
    train, test = ((of - centre) / spread for of in (task.train, task.test_states))
    used = np.unique(votes.prompt)
    if len(used):
        _, s, right = np.linalg.svd(train[used], full_matrices=False)
        right = right[:DIRECTIONS][s[:DIRECTIONS] > 1e-6 * s[0]]
    else:
        right = np.zeros((0, train.shape[1]))
    x, y = (np.concatenate([np.ones((len(of), 1)), of @ right.T], 1) for of in (train, test))
    base = np.concatenate([known, np.zeros((len(known), 1))], 1)
    m, best = known.shape[1], (-np.inf, np.zeros(len(test)))
    for deviation in (0.25, 1.0, 4.0):
        factor = np.diag([2.0, *[deviation] * len(right)])
        objective = Objective(task.feedback, votes, eta, base, x, {m: factor})
        least = minimise(objective, tolerance=1e-4)
        evidence = -least.local.value - np.linalg.slogdet(objective.blocks(least.local.definite))[1].sum() / 2
        if evidence > best[0]:
            best = (float(evidence), y @ (factor @ least.u[0]))
    return best[1]


def _nearest(task: Task, votes: Votes, base: Float64, eta: Float64 | None, shift: float, level: float) -> Float64:
    """What the votes on the nearest prompts (cosine, standardised) add to the new model's offset on each test prompt, [N]."""
    if not len(votes):
        return np.zeros(len(task.test_states))
    centre, spread = task.train.mean(0), task.train.std(0)
    unit, other = ((x - centre) / spread for x in (task.train[votes.prompt], task.test_states))
    likeness = (other / np.linalg.norm(other, axis=1, keepdims=True)) @ (unit / np.linalg.norm(unit, axis=1, keepdims=True)).T
    near = np.argpartition(-likeness, min(NEIGHBOURS, len(votes)) - 1, 1)[:, :NEIGHBOURS]
    prompt, opponent = votes.prompt[near], votes.a[near]
    counts = outcome_shares(task.feedback, votes.outcome.astype(np.int64)[near.ravel()])
    moved = np.zeros(len(other))
    for _ in range(20):
        b = base[prompt, -1] + shift + moved[:, None]
        log_p, slope, bend = pair_derivatives(
            task.feedback, base[prompt, opponent].ravel(), b.ravel(), None if eta is None else eta[prompt].ravel()
        )
        first, fisher, _ = sums_of_derivatives(counts, log_p, slope, bend)
        gradient = first[:, 1].reshape(near.shape).sum(1) + moved / level**2
        step = gradient / (fisher[:, 1, 1].reshape(near.shape).sum(1) + 1 / level**2)
        moved = moved - step
        if np.abs(step).max() < 1e-5:
            break
    return moved

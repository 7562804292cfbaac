"""Prompts by kind with hidden states and scores, the votes' log-loss, and a head that is learned on fixed states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from p2l_engine import Engine
from p2l_engine.backbone.head import Head
from p2l_engine.feedback import FeedbackModel
from p2l_engine.learning.hidden import cache_folder, hidden_states
from p2l_engine.tables.turns import cell_turns
from p2l_engine.tables.whole import read_table
from p2l_engine.votes import Votes, split
from p2l_engine.votes.scores import from_scores, outcomes, score_matrix

Float64 = npt.NDArray[np.float64]
Prompt = tuple[str, ...]

LEAST = 20  # prompts of a source


@dataclass(frozen=True, slots=True)
class Kind:
    """Prompts of one kind: hidden states [N, D]; scores [N, M] in the checkpoint's order, NaN where there is none; task [N]."""

    name: str
    states: Float64
    scores: Float64
    task: npt.NDArray[np.str_]

    def of(self, rows: npt.NDArray[np.bool_]) -> Kind:
        """Only these prompts."""
        return Kind(self.name, self.states[rows], self.scores[rows], self.task[rows])


def read(
    pool: Path, table: Path, engine: Engine, most: Callable[[str], int], trained: int, held_out: float, seed: int
) -> tuple[Votes, Float64, list[Kind]]:
    """The training votes, the training prompts' scores, and kinds of prompts: those of training, of which at most ``trained``;
    held-out ones; and of a sample of each other source in the pool, at most ``most`` of its name, those on which two of the
    checkpoint's models have scores. A prompt of training or held out is none of another source."""
    prompts, models, scores = score_matrix(table)
    votes = from_scores(prompts, models, scores, engine.models)
    parts = split(votes, held_out, seed=seed)
    assert parts.held_out is not None
    columns = [models.index(name) for name in engine.models]
    row = {prompt: i for i, prompt in enumerate(prompts)}
    task = _tasks(table)
    groups = {"training": sample(list(parts.training.prompts), trained), "held out": list(parts.held_out.prompts)}
    wanted: dict[str, tuple[list[Prompt], Float64, list[str]]] = {}
    for name, some in groups.items():
        wanted[name] = some, scores[[row[p] for p in some]][:, columns], [task[p] for p in some]
    for name, (found, of) in _others(pool, engine.models, set(row), most).items():
        wanted[name] = found, of, [name] * len(found)
    every = [prompt for some, _, _ in wanted.values() for prompt in some]
    states = hidden_states(engine, [list(prompt) for prompt in every], cache_folder()).astype(np.float64)
    kinds, first = [], 0
    for name, (some, of, tasks) in wanted.items():
        kinds.append(Kind(name, states[first : first + len(some)], of, np.array(tasks)))
        first += len(some)
    return parts.training, scores[[row[p] for p in parts.training.prompts]][:, columns], kinds


def sample(prompts: list[Prompt], most: int) -> list[Prompt]:
    """At most so many, at random, the same each time; a smaller sample is part of a larger one."""
    return [prompts[i] for i in np.random.default_rng(7).permutation(len(prompts))[:most]]


def _tasks(table: Path) -> dict[Prompt, str]:
    columns = read_table(table, ("prompt", "task")).columns
    return dict(zip(map(cell_turns, columns["prompt"]), columns["task"], strict=True))


def _others(
    pool: Path, models: tuple[str, ...], known: set[Prompt], most: Callable[[str], int]
) -> dict[str, tuple[list[Prompt], Float64]]:
    """Of each group of the pool's sources whose scores compare: prompts, and scores [N, M]."""
    columns = read_table(pool, ("prompt", "model", "score", "source")).columns
    cells = {cell: cell_turns(cell) for cell in set(columns["prompt"])}
    rows: dict[str, dict[Prompt, Float64]] = {}
    by_source: dict[str, set[Prompt]] = {}
    for cell, model, score, group in zip(*(columns[name] for name in ("prompt", "model", "score", "source")), strict=True):
        prompt = cells[cell]
        by_source.setdefault(group.split("/")[0], set()).add(prompt)
        if model in models:
            of = rows.setdefault(group, {}).setdefault(prompt, np.full(len(models), np.nan))
            of[models.index(model)] = score
    found = {}
    for group, of_prompt in rows.items():
        source = group.split("/")[0]
        some = [
            prompt
            for prompt in sample(sorted(by_source[source]), most(source))
            if prompt not in known and prompt in of_prompt and np.isfinite(of_prompt[prompt]).sum() > 1
        ]
        if len(some) >= LEAST:
            found[group] = some, np.array([of_prompt[prompt] for prompt in some])
    return found


def outputs(head: Head, states: Float64) -> Float64:
    """[N, K]."""
    found: Float64 = states @ head.weight.double().numpy().T + head.bias.double().numpy()
    return found


def losses(kind: Kind, out: Float64, feedback: FeedbackModel) -> Float64:
    """[N]: the mean log-loss of the votes of each prompt at these outputs [N, K]."""
    with torch.inference_mode():
        return np.asarray(_losses(kind.scores, torch.from_numpy(out), feedback).numpy(), np.float64)


def _losses(scores: Float64, out: torch.Tensor, feedback: FeedbackModel) -> torch.Tensor:
    i, j = np.triu_indices(scores.shape[1], 1)
    a, b = scores[:, i], scores[:, j]
    there = torch.from_numpy(np.isfinite(a + b))
    came = torch.from_numpy(np.where(there, outcomes(a, b), 0))
    eta = out[:, -1:].expand(-1, len(i)) if feedback.has_eta else None
    likelihood = feedback.log_likelihood(out[:, i], out[:, j], eta, came)
    return -torch.where(there, likelihood, 0.0).sum(1) / there.sum(1)


def scored(kind: Kind, theta: Float64) -> Float64:
    """[N]: the true score of the model of highest theta [N, M] or [M] among those that have one."""
    chosen = np.where(np.isfinite(kind.scores), theta, -np.inf).argmax(1)
    found: Float64 = kind.scores[np.arange(len(chosen)), chosen]
    return found


def refit(kind: Kind, start: Float64, feedback: FeedbackModel, penalty: float, steps: int = 40) -> Head:
    """A head of maximum likelihood on these prompts' votes; penalty: of the squares of its weights, in standardised states.
    start [K]: outputs of one leaderboard, where the search begins."""
    mean, spread = kind.states.mean(0), np.maximum(kind.states.std(0), 1e-9)
    z = torch.from_numpy((kind.states - mean) / spread)
    weight = torch.zeros(len(start), z.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(start, requires_grad=True)
    search = torch.optim.LBFGS([weight, bias], max_iter=steps, history_size=20, line_search_fn="strong_wolfe")

    def step() -> torch.Tensor:
        search.zero_grad()
        loss = (
            _losses(kind.scores, torch.nn.functional.linear(z, weight, bias), feedback).mean() + penalty * weight.square().sum()
        )
        loss.backward()
        return loss

    search.step(step)
    rows = weight.detach() / torch.from_numpy(spread)
    return Head(rows.float(), (bias.detach() - rows @ torch.from_numpy(mean)).float(), len(start) - feedback.has_eta)

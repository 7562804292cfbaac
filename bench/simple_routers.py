"""Routers that predict each model's score from features of a prompt, or from its source or task alone: what a P2L checkpoint
has to beat. Scores may be missing: not every source asked every model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Float64 = npt.NDArray[np.float64]

RIDGES = tuple(10.0**k for k in range(1, 7))
NEIGHBOURS = (10, 20, 40, 80, 160)
SEARCHED = 4000  # prompts nearest to a new one, among which each model's neighbours are sought
PATIENCE = 5  # epochs without a better validation loss, after which networks stop


@dataclass(frozen=True, slots=True)
class Scored:
    """Prompts whose scores are known. features [N, D]; scores [N, M] in [0, 1], NaN where there is none; source, task [N]."""

    features: Float64
    scores: Float64
    source: npt.NDArray[np.str_]
    task: npt.NDArray[np.str_]

    def sources(self) -> npt.NDArray[np.str_]:
        """[N]: the source of each prompt, without the columns within which its scores compare."""
        return np.array([name.split("/")[0] for name in self.source.tolist()])

    def of(self, rows: npt.NDArray[np.bool_] | npt.NDArray[np.int64]) -> Scored:
        """Only these prompts."""
        return Scored(self.features[rows], self.scores[rows], self.source[rows], self.task[rows])

    def standardised(self, by: Scored) -> Scored:
        """With features of mean 0 and variance 1 over the prompts ``by``."""
        spread = by.features.std(0)
        return Scored(
            (self.features - by.features.mean(0)) / np.where(spread > 0, spread, 1), self.scores, self.source, self.task
        )


def predictions(training: Scored, validation: Scored, test: Scored, seed: int = 0) -> dict[str, Float64]:
    """The score [N, M] that each simple router predicts for the test prompts. Settings (the ridge, the number of neighbours,
    when a network stops) are those with the least loss on the validation prompts.

    source: each source's mean scores, so that the choice is the best single model of the source. task: the task's, which is
    known. ridge, knn (cosine), mlp: on features. mf: a bilinear model of votes, as RouteLLM's matrix factorisation
    (https://arxiv.org/abs/2406.18665).
    """
    known, chosen_on, new = (part.standardised(training) for part in (training, validation, test))
    by_source = _means(training.source, training.scores, test.source, None)
    return {
        "source": by_source,
        "task": _means(training.task, training.scores, test.task, by_source),
        "ridge": _ridge(known, chosen_on, new),
        "knn": _nearest(known, chosen_on, new),
        "mlp": _trained(_perceptron, known, chosen_on, new, seed),
        "mf": _trained(_factors, known, chosen_on, new, seed),
    }


def error(predicted: Float64, scores: Float64) -> float:
    """The mean squared error where there are scores."""
    return float(np.nanmean((predicted - scores) ** 2))


def _means(known: npt.NDArray[np.str_], scores: Float64, new: npt.NDArray[np.str_], otherwise: Float64 | None) -> Float64:
    """Each model's mean score over the prompts of the same kind; over all prompts, or ``otherwise``, where it has none."""
    overall = _mean(scores)
    found = np.tile(overall, (len(new), 1)) if otherwise is None else otherwise.copy()
    for kind in set(new.tolist()):
        of = scores[known == kind]
        if len(of):
            mean, rows = _mean(of), new == kind
            found[rows] = np.where(np.isfinite(mean), mean, found[rows])
    return found


def _mean(scores: Float64) -> Float64:
    """[M]: the mean of each model's scores, NaN where it has none."""
    count = np.isfinite(scores).sum(0)
    found = np.full(scores.shape[1], np.nan)
    np.divide(np.nansum(scores, 0), count, out=found, where=count > 0)
    return found


def _ridge(known: Scored, chosen_on: Scored, new: Scored) -> Float64:
    """Ridge regression for each model on the prompts that have its scores, all with the same penalty."""
    sums = [_sums(known, m) for m in range(known.scores.shape[1])]

    def predict(penalty: float, prompts: Scored) -> Float64:
        columns = []
        for gram, moment, centre, mean in sums:
            weight = np.linalg.solve(gram + penalty * np.eye(len(gram)), moment)
            columns.append((prompts.features - centre) @ weight + mean)
        return np.stack(columns, 1)

    best = min(RIDGES, key=lambda penalty: error(predict(penalty, chosen_on), chosen_on.scores))
    return predict(best, new)


def _sums(known: Scored, model: int) -> tuple[Float64, Float64, Float64, float]:
    """Of one model: the centred features' products, their products with its scores, the features' mean and the mean score."""
    rows = np.isfinite(known.scores[:, model])
    x, y = known.features[rows], known.scores[rows, model]
    centre, mean = x.mean(0), float(y.mean())
    return (x - centre).T @ (x - centre), (x - centre).T @ (y - mean), centre, mean


def _nearest(known: Scored, chosen_on: Scored, new: Scored) -> Float64:
    """Each model's mean score over its nearest prompts, by cosine; over all of its prompts where none is near."""
    overall = _mean(known.scores)
    unit = known.features / np.linalg.norm(known.features, axis=1, keepdims=True)
    there = np.ascontiguousarray(np.isfinite(known.scores).T)

    def means(prompts: Scored) -> dict[int, Float64]:
        found = {k: np.empty((len(prompts.features), len(overall))) for k in NEIGHBOURS}
        for start in range(0, len(prompts.features), 256):
            some = prompts.features[start : start + 256]
            similar = some @ unit.T  # the length of ``some`` does not change the order
            count = min(SEARCHED, len(unit))
            near = np.argpartition(-similar, count - 1, axis=1)[:, :count]
            near = np.take_along_axis(near, np.argsort(-np.take_along_axis(similar, near, 1), axis=1, kind="stable"), 1)
            asked = there[:, near]  # [M, n, count]
            rank = asked.cumsum(2, np.int16)  # SEARCHED fits
            model, row, place = np.nonzero(asked & (rank <= max(NEIGHBOURS)))
            score, rank, cell = known.scores[near[row, place], model], rank[model, row, place], row * len(there) + model
            for k in NEIGHBOURS:
                kept = rank <= k
                number = np.bincount(cell[kept], minlength=len(some) * len(there)).reshape(len(some), -1)
                total = np.bincount(cell[kept], score[kept], len(some) * len(there)).reshape(len(some), -1)
                mean = np.divide(total, number, out=np.tile(overall, (len(some), 1)), where=number > 0)
                found[k][start : start + len(some)] = mean
        return found

    on_validation = means(chosen_on)
    best = min(NEIGHBOURS, key=lambda k: error(on_validation[k], chosen_on.scores))
    return means(new)[best]


Network = Callable[[int, int], tuple[nn.Module, Callable[[Tensor, Tensor], Tensor], float]]


def _perceptron(width: int, models: int) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor], float]:
    """One hidden layer, squared error; and the noise on its features."""
    layers = nn.Sequential(nn.Linear(width, 256), nn.ReLU(), nn.Dropout(0.3), nn.Linear(256, models))

    def loss(predicted: Tensor, scores: Tensor) -> Tensor:
        there = scores.isfinite()
        return (predicted[there] - scores[there]).square().mean()

    return layers, loss, 0.0


class _Bilinear(nn.Module):
    """<w, unit(model) * project(prompt)>, with an embedding for each model."""

    def __init__(self, width: int, models: int, size: int = 128) -> None:
        super().__init__()
        self.models = nn.Embedding(models, size)
        self.project = nn.Linear(width, size, bias=False)
        self.weight = nn.Parameter(torch.randn(size) * size**-0.5)

    def forward(self, features: Tensor) -> Tensor:
        """[N, D] to [N, M]."""
        unit = nn.functional.normalize(self.models.weight, dim=1)
        found: Tensor = self.project(features) @ (unit * self.weight).T
        return found


def _factors(width: int, models: int) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor], float]:
    """Cross-entropy of the pairs of models of which one has the higher score on the prompt."""

    def loss(values: Tensor, scores: Tensor) -> Tensor:
        row, better, worse = (scores[:, :, None] > scores[:, None, :]).nonzero(as_tuple=True)
        return nn.functional.softplus(values[row, worse] - values[row, better]).mean()

    return _Bilinear(width, models), loss, 0.1


def _trained(network: Network, known: Scored, chosen_on: Scored, new: Scored, seed: int) -> Float64:
    """What a network predicts, trained until its loss on the validation prompts gets no better."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, loss, noise = network(known.features.shape[1], known.scores.shape[1])
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
        features, scores = torch.tensor(known.features, dtype=torch.float32), torch.tensor(known.scores)
        held = torch.tensor(chosen_on.features, dtype=torch.float32), torch.tensor(chosen_on.scores)
        best, kept, since = np.inf, {}, 0
        while since < PATIENCE:
            model.train()
            for rows in _batches(len(features)):
                x = features[rows]
                value = loss(model(x + noise * torch.randn_like(x)).double(), scores[rows])
                optimiser.zero_grad()
                value.backward()
                optimiser.step()
            model.eval()
            with torch.no_grad():
                now = float(loss(model(held[0]).double(), held[1]))
            since += 1
            if now < best - 1e-5:
                best, kept, since = now, {name: tensor.clone() for name, tensor in model.state_dict().items()}, 0
        model.load_state_dict(kept)
        with torch.no_grad():
            return np.asarray(model(torch.tensor(new.features, dtype=torch.float32)).double().numpy())


def _batches(count: int, size: int = 128) -> Iterator[Sequence[int]]:
    """All numbers below ``count`` in random order, by parts."""
    yield from torch.randperm(count).split(size)

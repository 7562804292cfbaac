"""What predicted lengths are worth on prompts that they were not fitted to, against each model's mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from p2l_engine.backbone.lengths import LengthHead
from p2l_engine.bootstrap import WeightSums, interval, with_replacement
from p2l_engine.learning.lengths import Lengths, fit_lengths
from p2l_engine.reports import Figure, Figures
from p2l_engine.votes import Votes, conversations, folds

Float64 = npt.NDArray[np.float64]
Float32 = npt.NDArray[np.float32]

FOLDS = 5
LEAST_ANSWERS, LEAST_CONVERSATIONS = 100, 20


@dataclass(frozen=True, slots=True)
class ModelLengths:
    """A model's number of answers, and their mean length."""

    answers: int
    mean: float


@dataclass(frozen=True, slots=True)
class LengthReport:
    """Of one quantity, tokens or seconds. models: those with answers. before, after: errors of each model's mean, and of the
    predicted mean, on held-out prompts: ``absolute_error``, ``root_mean_square``, ``deviance`` (Poisson's, in which large
    lengths count as their variance says) and ``ratio``, the sum that was predicted over the sum that was observed. gain: by how
    much the first three fell. Intervals over prompts, of which those with one first turn are drawn together."""

    quantity: str
    answers: int
    prompts: int
    conversations: int
    models: dict[str, ModelLengths]
    before: Figures
    after: Figures
    gain: Figures


def fitted(hidden: Float32, observed: Votes) -> Lengths:
    """Lengths of the models that were observed. hidden [P, D]: of the prompts; observed: values of single models, see
    ``LoggedAnswers.observed``. Raises ValueError where there is none."""
    seen = np.unique(observed.a)
    column = np.full(len(observed.models), -1)
    column[seen] = np.arange(len(seen))
    # A row for each prompt, and further ones where a model has answered it again.
    order = np.lexsort((observed.a, observed.prompt))
    prompt, model = observed.prompt[order], observed.a[order]
    starts = np.flatnonzero(np.append(True, (np.diff(prompt) != 0) | (np.diff(model) != 0)))
    repeat = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
    _, first, row = np.unique(prompt * (repeat.max(initial=0) + 1) + repeat, return_index=True, return_inverse=True)
    amounts = np.full((len(first), len(seen)), np.nan)
    amounts[row, column[model]] = observed.outcome[order]
    return fit_lengths(hidden[prompt[first]], amounts, [observed.models[k] for k in seen.tolist()])


def crossed(
    hidden: Float32, observed: Votes, seed: int = 0, progress: Callable[[int], object] | None = None
) -> tuple[Float64, Float64]:
    """Each model's mean, and the predicted mean, [P, M] each, for prompts that they were not learned from: in five parts, each
    from the others. hidden and observed as for ``fitted``; progress as for ``length_report``."""
    fold = folds(observed, FOLDS, seed)
    means, expected = np.empty((2, len(hidden), len(observed.models)))
    for part in range(FOLDS):
        out = fold == part
        known = observed.of(np.flatnonzero(~out).tolist())
        head = LengthHead(observed.models, fitted(hidden[~out], known).rows())
        expected[out] = head(torch.from_numpy(np.ascontiguousarray(hidden[out], np.float32))).double().numpy()
        means[out] = _means(known)
        if progress is not None:
            progress(1)
    return means, expected


def length_report(
    quantity: str,
    hidden: Float32,
    observed: Votes,
    bootstrap: int = 200,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> LengthReport:
    """By cross-validation over prompts, in five parts; hidden and observed as for ``fitted``. A model without an answer in the
    other parts is predicted as one that was never observed. progress: called with 1 after each part. Raises ValueError for
    fewer than 100 answers, or than 20 prompts that begin differently."""
    answered = np.unique(observed.prompt)
    hidden, observed = hidden[answered], observed.of(answered.tolist())
    conversation = conversations(observed)
    count = int(conversation.max(initial=-1)) + 1
    if len(observed) < LEAST_ANSWERS or count < LEAST_CONVERSATIONS:
        raise ValueError(
            f"{quantity}: expected at least {LEAST_ANSWERS} answers, to at least {LEAST_CONVERSATIONS} prompts that begin "
            f"differently, got {len(observed)} to {count}"
        )
    y, at = np.asarray(observed.outcome, np.float64), (observed.prompt, observed.a)
    before, after = (of[at] for of in crossed(hidden, observed, seed, progress))
    samples = with_replacement(count, bootstrap, seed)
    of = conversation[observed.prompt]

    def mean(column: Float64) -> Float64:
        """[1 + B]: over the answers of each sample of conversations."""
        total, number = (samples @ np.bincount(of, weights, count) for weights in (column, None))
        return np.asarray(total / number)

    errors = [_errors(y, expected, mean) for expected in (before, after)]
    gains = {name: errors[0][name] - errors[1][name] for name in errors[0] if name != "ratio"}
    figures = [{name: _figure(values, count) for name, values in each.items()} for each in (*errors, gains)]
    answers = np.bincount(observed.a, minlength=len(observed.models))
    level = _means(observed)
    models = {name: ModelLengths(int(answers[k]), float(level[k])) for k, name in enumerate(observed.models) if answers[k]}
    return LengthReport(quantity, len(y), len(answered), count, models, *figures)


def _means(observed: Votes) -> Float64:
    """The mean value of each model [M]; of one without any, the mean of the others'."""
    count, total = (np.bincount(observed.a, weights, len(observed.models)) for weights in (None, observed.outcome))
    means = total / np.maximum(count, 1)
    return np.where(count > 0, means, means[count > 0].mean())


def _errors(y: Float64, expected: Float64, mean: Callable[[Float64], Float64]) -> dict[str, Float64]:
    return {
        "absolute_error": mean(np.abs(y - expected)),
        "root_mean_square": np.sqrt(mean((y - expected) ** 2)),
        "deviance": mean(2 * (y * np.log(y / expected) - (y - expected))),
        "ratio": mean(expected) / mean(y),
    }


def _figure(values: Float64, count: int) -> Figure:
    low, high = interval(values[0], values[1:] - values[0], WeightSums.of(np.ones(count)))
    return Figure(float(values[0]), float(low), float(high))

"""Routers on sources or tasks that they never saw: each is left out in turn, and predicted from all others.

The choice is among models that the remaining prompts have scores of, on prompts where two of these have a score. The best
single model ("single") is the one with the highest effect in the scores of the remaining prompts: each score is the sum of an
effect of its prompt and one of its model, fitted by least squares, as not every source asked every model. For the same reason
routers learn scores less the effect of their prompt: otherwise a model that was asked easy questions alone would seem good.

Prompts that the left-out part shares with others (but for case, space and punctuation) are not learned from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from bench.router_rows import RouterRow, chosen, rows_of
from bench.simple_routers import Float64, Scored, predictions
from p2l_engine.votes.splits import folded

GROUPS = 10  # of tasks, which are left out together: each task is predicted by routers that never saw it


def sources_of(prompts: Scored) -> npt.NDArray[np.str_]:
    """[N]: the source of each prompt, without the columns within which its scores compare."""
    return np.array([name.split("/")[0] for name in prompts.source.tolist()])


def groups_of(part: npt.NDArray[np.str_], by: str, seed: int = 0) -> npt.NDArray[np.int64]:
    """[N]: which prompts are left out together: those of one source; of tasks, a tenth of them, at random."""
    names, of = np.unique(part, return_inverse=True)
    if by == "source":
        return np.asarray(of, np.int64)
    order = np.random.default_rng(seed).permutation(len(names))
    return np.asarray(order[of] % GROUPS, np.int64)


def model_effects(scores: Float64) -> Float64:
    """[M]: the models' effects in scores [N, M], NaN where there is none. Their mean is 0 among models that prompts connect; a
    model without scores beside another's has 0."""
    scores = scores[np.isfinite(scores).sum(1) > 1]
    there = np.isfinite(scores).astype(np.float64)
    laplacian = np.diag(there.sum(0)) - there.T @ (there / there.sum(1, keepdims=True))
    gains = np.nansum(scores - np.nanmean(scores, 1, keepdims=True), 0)
    return np.asarray(np.linalg.pinv(laplacian, hermitian=True) @ gains)


def without_prompts(prompts: Scored, effects: Float64) -> Scored:
    """With scores less the effect of their prompt. effects [M]: of the models."""
    of_prompt = np.nanmean(prompts.scores - effects, 1, keepdims=True)
    return Scored(prompts.features, prompts.scores - of_prompt, prompts.source, prompts.task)


def left_out(
    learned: Scored,
    chosen_on: Scored,
    tested: Scored,
    texts: Sequence[Sequence[str]],
    by: str,
    advance: Callable[[str], object],
) -> list[RouterRow]:
    """Each router's row for the tested prompts of every source or task, as learned from the others; gains are over the best
    single model.

    learned, chosen_on: prompts to train on, and to choose settings on; tested may be among them. texts: the first turns of the
    three. by: "source" or "task". advance: called with a line on each part that is done. Raises ValueError where no part can be
    left out.
    """
    every = (learned, chosen_on, tested)
    parts = [sources_of(prompts) if by == "source" else prompts.task for prompts in every]
    sizes = np.cumsum([len(part) for part in parts])[:-1]
    groups = np.split(groups_of(np.concatenate(parts), by), sizes)
    number: dict[str, int] = {}
    keys = [np.array([number.setdefault(folded(text), len(number)) for text in of]) for of in texts]
    got: dict[str, list[Float64]] = {}
    part: list[npt.NDArray[np.str_]] = []
    for group in np.unique(groups[2]):
        test = np.flatnonzero(groups[2] == group)
        seen = [(groups[i] != group) & ~np.isin(keys[i], keys[2][test]) for i in range(2)]
        training, validation = learned.of(seen[0]), chosen_on.of(seen[1])
        known = np.flatnonzero(np.isfinite(training.scores).any(0))
        rows = test[np.isfinite(tested.scores[test][:, known]).sum(1) > 1]
        if not len(rows) or not seen[1].any():
            advance(f"{', '.join(np.unique(parts[2][test]))}: no prompts with scores of two models that are known")
            continue
        training, validation, new = (among(of, known) for of in (training, validation, tested.of(rows)))
        validation = validation.of(np.flatnonzero(np.isfinite(validation.scores).any(1)))
        effects = model_effects(training.scores)
        training, validation = (without_prompts(of, effects) for of in (training, validation))
        predicted = {"single": np.tile(effects, (len(rows), 1))} | predictions(training, validation, new)
        for name in ("source", "task") if by == "source" else ("task",):
            predicted.pop(name)  # they are not known
        for name, values in predicted.items():
            got.setdefault(name, []).append(new.scores[np.arange(len(rows)), chosen(values, new.scores)])
        got.setdefault("oracle", []).append(np.nanmax(new.scores, 1))
        part.append(parts[2][rows])
        advance(", ".join(np.unique(parts[2][rows])))
    if not part:
        raise ValueError(f"--leave-out: expected two {by}s whose prompts have scores of two models in common, got none")
    return rows_of({name: np.concatenate(of) for name, of in got.items()}, np.concatenate(part), "single")


def among(prompts: Scored, models: npt.NDArray[np.int64]) -> Scored:
    """With the scores of these models alone."""
    return Scored(prompts.features, prompts.scores[:, models], prompts.source, prompts.task)

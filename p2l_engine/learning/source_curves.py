"""What votes of other sources tell of a new one: each left out in turn, and learned from with more and more of its votes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from p2l_engine.backbone.head import Head
from p2l_engine.backbone.uncertainty import Uncertainty
from p2l_engine.feedback import FeedbackModel
from p2l_engine.learning.adapt import adapt
from p2l_engine.learning.curves import SIZES, losses_by_prompt
from p2l_engine.learning.names import check_new
from p2l_engine.learning.rows import NewModel
from p2l_engine.votes import Votes

Float64 = npt.NDArray[np.float64]

DRAWS = 5


@dataclass(frozen=True, slots=True)
class SourcePoint:
    """What ``votes`` votes of a left-out source give, on top of the other sources' votes.

    new: models that no other source and not the checkpoint has. prompts: that were measured on. loss: mean log-loss of the
    source's held-out votes. gain: how much less that is than with 0 of its votes. help: how much less it is than where the rows
    are learned from the same votes without the other sources'. Each with its standard error, over prompts and draws.
    """

    source: str
    votes: int
    new: int
    prompts: int
    loss: float
    loss_error: float
    gain: float
    gain_error: float
    help: float
    help_error: float


@dataclass(frozen=True, slots=True)
class _Learned:
    head: Head
    models: tuple[str, ...]
    uncertainty: Uncertainty | None


def leave_one_source_out(
    head: Head,
    models: Sequence[str],
    feedback: FeedbackModel,
    votes: Votes,
    source: Sequence[str] | npt.NDArray[np.str_],
    hidden: npt.NDArray[np.float32],
    uncertainty: Uncertainty | None = None,
    sizes: Sequence[int] = SIZES,
    draws: int = DRAWS,
    seed: int = 0,
) -> Iterator[SourcePoint]:
    """Learning curves of the sources, in the order of their names.

    head, models, uncertainty: of the checkpoint. votes: on these and other models. source [V]: of each vote. hidden [P, D]: of
    the votes' prompts. For each source, a third of its prompts, at random, is measured on. The rows are learned from the other
    sources' votes, but those on these prompts; then from a draw of the source's votes on its other prompts, ``draws`` times
    for each size, of which larger ones hold the smaller ones. A size takes part where there are that many votes. Raises
    ValueError for fewer than two sources, a source with fewer than two prompts, and names that differ in case alone.
    """
    labels = np.asarray(source)
    if len(labels) != len(votes):
        raise ValueError(f"source: expected one for each of the {len(votes):,} votes, got {len(labels):,}")
    names = sorted({str(label) for label in labels})
    if len(names) < 2:
        raise ValueError(f"source: expected two at least, got {', '.join(names) or 'none'}")
    check_new([name for name in votes.models if name not in models], models, ())
    start, used = _Learned(head, tuple(models), uncertainty), votes.weight > 0
    for number, name in enumerate(names):
        rng = np.random.default_rng([seed, number])
        of = (labels == name) & used
        prompts = np.unique(votes.prompt[of])
        if len(prompts) < 2:
            raise ValueError(f"source: {name}: expected votes on two prompts at least, got {len(prompts)}")
        measured = np.zeros(len(votes.prompts), bool)
        measured[rng.permutation(prompts)[: max(1, len(prompts) // 3)]] = True
        test = measured[votes.prompt]
        learned_from, held = np.flatnonzero(of & ~test), _on(votes, of & test)
        reference = hidden[prompts[~measured[prompts]]]
        new = tuple(model for model in _on(votes, of).models if model not in models)
        others = _learned(start, feedback, votes, used & ~of & ~test, hidden, (), hidden[~measured])
        add = [model for model in new if model not in others.models]
        seen = hidden[measured]
        zero = losses = _losses(others, add, feedback, votes, np.zeros(0, int), hidden, reference, held, seen)
        for n in sorted(set(sizes)):
            if n > len(learned_from):
                continue
            both = []
            for draw in range(draws if 0 < n < len(learned_from) else 1):
                order = np.random.default_rng([seed, number, draw]).permutation(learned_from)[:n]
                losses = zero if n == 0 else _losses(others, add, feedback, votes, order, hidden, reference, held, seen)
                alone = _losses(start, new, feedback, votes, order, hidden, reference, held, seen)
                both.append(np.stack([losses, zero - losses, alone - losses]))
            found = [_mean(np.stack(each)) for each in zip(*both, strict=True)]
            yield SourcePoint(name, n, len(add), len(seen), *(figure for pair in found for figure in pair))


def _on(votes: Votes, kept: npt.NDArray[np.bool_]) -> Votes:
    """Some of the votes, with the models alone that they are on."""
    some = votes.where(kept)
    touched = np.unique(np.concatenate([some.a, some.b[some.b >= 0]]))
    return some.among([votes.models[i] for i in touched])


def _learned(
    rows: _Learned,
    feedback: FeedbackModel,
    votes: Votes,
    kept: npt.NDArray[np.bool_],
    hidden: npt.NDArray[np.float32],
    add: Sequence[str],
    reference: npt.NDArray[np.float32],
) -> _Learned:
    """The rows after the kept votes; with the models that are new in these, and ``add``."""
    part = _on(votes, kept)
    states = hidden[np.unique(votes.prompt[kept])]
    new = [name for name in dict.fromkeys([*add, *part.models]) if name not in rows.models]
    if not len(part) and not new:
        return rows
    known = [NewModel(name) for name in new]
    found = adapt(rows.head, rows.models, feedback, part, states, known, rows.uncertainty, reference)
    return _Learned(found.head, found.models, found.uncertainty)


def _losses(
    rows: _Learned,
    add: Sequence[str],
    feedback: FeedbackModel,
    votes: Votes,
    chosen: npt.NDArray[np.int64],
    hidden: npt.NDArray[np.float32],
    reference: npt.NDArray[np.float32],
    held: Votes,
    seen: npt.NDArray[np.float32],
) -> Float64:
    """[P]: for each held-out prompt the mean log-loss of its votes, after the chosen ones."""
    kept = np.zeros(len(votes), bool)
    kept[chosen] = True
    found = _learned(rows, feedback, votes, kept, hidden, add, reference)
    return losses_by_prompt(found.head, found.models, feedback, held, seen)


def _mean(by_draw: Float64) -> tuple[float, float]:
    """Of figures by draw and prompt [S, P]: the mean, and its standard error, over prompts and over draws."""
    s, p = by_draw.shape
    over_prompts = float(by_draw.mean(0).var(ddof=1)) / p if p > 1 else float("nan")
    over_draws = float(by_draw.mean(1).var(ddof=1)) / s if s > 1 else 0.0
    return float(by_draw.mean()), float(np.sqrt(over_prompts + over_draws))

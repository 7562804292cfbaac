"""The names of the models in new votes: which are known, which are new, and which must not be added."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np

from p2l_engine.feedback import FeedbackModel, Outcome
from p2l_engine.leaderboard.connected import components
from p2l_engine.votes import Votes


def check_new(new: Sequence[str], known: Sequence[str], retired: Sequence[str]) -> None:
    """Raises ValueError for new names that are blank, that are known, that belonged to a retired model, or that look like such
    a name or another new one: that differ in case, white space, or the code points of the same characters only."""
    folded = {_folded(name): name for name in retired} | {_folded(name): name for name in known}
    for name in new:
        alike = folded.get(_folded(name))
        if not _folded(name):
            raise ValueError(f"models: {name!r}: expected a name that can be read")
        if name in known:
            raise ValueError(f"models: {name!r} is in the checkpoint: expected a new model; its votes update its row")
        if alike is not None and alike in retired and alike not in known:
            same = "" if alike == name else f"like {alike!r}, "
            raise ValueError(f"models: {name!r} is {same}the name of a retired model: expected another name for a new one")
        if alike is not None:
            raise ValueError(
                f"models: {name!r} and {alike!r} differ in case or white space only, or in code points of the same characters: "
                "expected one spelling; if they are two models, give them names that people can tell apart"
            )
        folded[_folded(name)] = name


def check_connected(votes: Votes, known: Sequence[str], feedback: FeedbackModel) -> None:
    """Raises ValueError for new models that no chain of votes connects to a known one, directly or through other new ones.

    A vote of weight 0 connects nothing. A value of a single model needs no other. For grounded feedback models "both bad"
    compares with the fictitious bad model, which is known.
    """
    used = votes.where(votes.weight > 0) if (votes.weight == 0).any() else votes
    m = len(votes.models)
    edges = np.zeros((m + 1, m + 1), bool)  # the last node is all that is known
    edges[[i for i, name in enumerate(votes.models) if name in known], m] = True
    pair = used.b >= 0
    edges[used.a[pair], used.b[pair]] = True
    edges[used.a[~pair], m] = True
    if feedback.grounded and Outcome.BOTH_BAD in feedback.outcomes and not votes.are_values:
        bad = used.outcome == Outcome.BOTH_BAD
        edges[used.a[bad], m] = edges[used.b[bad], m] = True
    label = components(edges)
    with_votes = np.zeros(m, bool)
    with_votes[used.a] = True
    with_votes[used.b[pair]] = True
    lost = [votes.models[i] for i in range(m) if label[i] != label[m] and with_votes[i]]
    if lost:
        raise ValueError(
            f"votes: no chain of votes connects {', '.join(lost)} to a model of the checkpoint, so that nothing says how "
            f"strong {'it is' if len(lost) == 1 else 'they are'}: add votes against one of {_shown(known)}"
            + (", or votes that both answers are bad" if feedback.grounded and Outcome.BOTH_BAD in feedback.outcomes else "")
        )


def _folded(name: str) -> str:
    """What people see of a name: without case, outer and repeated white space, characters without width, and forms."""
    seen = (c for c in unicodedata.normalize("NFKC", name) if unicodedata.category(c) != "Cf")
    return " ".join("".join(seen).split()).casefold()


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")

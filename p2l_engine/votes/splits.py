"""Votes split into training, validation and held-out parts that share no conversation."""

from __future__ import annotations

import hashlib
import json
import logging
import unicodedata
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from p2l_engine.votes.votes import Floats, Integers, Votes

logger = logging.getLogger(__name__)


class Splits(NamedTuple):
    """Disjoint prompts: to train on, to choose settings on (or None), and held out until the end (or None)."""

    training: Votes
    validation: Votes | None
    held_out: Votes | None

    def among(self, models: Sequence[str]) -> Splits:
        """Each part among these models, see ``Votes.among``."""
        validation, held_out = (None if part is None else part.among(models) for part in (self.validation, self.held_out))
        return Splits(self.training.among(models), validation, held_out)


def split(
    votes: Votes,
    held_out: float,
    validation: float = 0.0,
    by: Literal["prompt", "hash", "time"] = "prompt",
    seed: int = 0,
    train_share: float = 1.0,
) -> Splits:
    """held_out: a share of the prompts; validation: a share of the rest. by: at random, reproducible by seed ("prompt"); by a
    hash of the seed and the first turn ("hash"), so that a prompt stays in its part when others are added or left out; or the
    conversations whose first votes are the latest ("time"). train_share: the share of the remaining prompts to train on, at
    random; a smaller share is a subset of a larger one.

    Prompts with the same first turn (but for case and white space; with "hash" also for punctuation) stay together: as
    prefixes and continuations of one conversation they share most of their text. So a part may have a few prompts less than
    its share; with "hash" its size is as chance has it.

    Raises ValueError for a split by time of votes without timestamps, and for a share that no whole conversation fits into.
    """
    if by == "hash":
        training, chosen_on, last = hashed(votes.prompts, held_out, validation, seed)
        rest = votes
    else:
        kept, last = _cut(votes, held_out, by, seed, "held_out")
        rest = votes.of(kept)
        training, chosen_on = _cut(rest, validation, by, seed, "validation")
    if train_share < 1:
        order = np.random.default_rng([seed, 1]).permutation(len(training))
        training = sorted(training[i] for i in order[: max(1, round(train_share * len(training)))])
    return Splits(rest.of(training), rest.of(chosen_on) if chosen_on else None, votes.of(last) if last else None)


def conversations(votes: Votes) -> Integers:
    """[P]: which conversation each prompt is of, numbered in order: prompts with the same first turn, see ``split``."""
    number: dict[str, int] = {}
    return np.array([number.setdefault(_opening(prompt), len(number)) for prompt in votes.prompts], np.int64)


def folds(votes: Votes, count: int, seed: int = 0) -> Integers:
    """[P]: which of ``count`` parts, from 0, each prompt is in, at random; prompts whose first turns are equal when ``folded``
    stay together, and the parts have about as many prompts each. Raises ValueError where there are fewer different first turns
    than parts."""
    number: dict[str, int] = {}
    of = np.array([number.setdefault(folded(_opening(prompt)), len(number)) for prompt in votes.prompts], np.int64)
    sizes = np.bincount(of)
    if not 1 <= count <= len(sizes):
        raise ValueError(
            f"count: expected 1 to {len(sizes)} parts, as there are {len(sizes)} different first turns, got {count}"
        )
    order = np.random.default_rng([seed, 2]).permutation(len(sizes))
    part, filled = np.zeros(len(sizes), np.int64), np.zeros(count, np.int64)
    for conversation in order[np.argsort(-sizes[order], kind="stable")]:
        part[conversation] = filled.argmin()
        filled[part[conversation]] += sizes[conversation]
    found: Integers = part[of]
    return found


def prompts_hash(votes: Votes) -> str:
    """SHA-256 of the set of prompts, by which a checkpoint recognises its held-out prompts."""
    return hashlib.sha256(json.dumps(sorted(votes.prompts)).encode()).hexdigest()


def check_apart(path: str, votes: Votes, training: Votes) -> None:
    """Raises ValueError where a prompt of ``votes``, read from ``path``, is a training prompt too. Warns where one only begins
    like a training prompt: it may continue the same conversation."""
    shared = set(votes.prompts) & set(training.prompts)
    if shared:
        raise ValueError(
            f"{path}: {len(shared):,} of its prompts are training prompts too, such as {min(shared)[0][:60]!r}: expected none; "
            "leave them out of one of the two"
        )
    openings = {_opening(prompt) for prompt in training.prompts}
    related = [prompt for prompt in votes.prompts if _opening(prompt) in openings]
    if related:
        logger.warning(
            "%s: %s of its %s prompts have the first turn of a training prompt, such as %r: figures on them are too good where "
            "they continue the same conversation",
            path, f"{len(related):,}", f"{len(votes.prompts):,}", min(related)[0][:60],
        )  # fmt: skip


def _opening(prompt: tuple[str, ...]) -> str:
    """A prompt's first turn without differences in case and white space."""
    return " ".join(prompt[0].split()).casefold()


def folded(text: str) -> str:
    """Letters and digits alone, in one case and one form of Unicode (NFKC); the text itself where it has none."""
    plain = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return "".join(c for c in plain if unicodedata.category(c)[0] in "LN") or text


def hashed(
    prompts: Sequence[tuple[str, ...]], held_out: float, validation: float, seed: int = 0
) -> tuple[list[int], list[int], list[int]]:
    """The indices of the prompts to train on, to choose settings on, and held out, by hash: see ``split``, which raises the
    same errors."""
    parts: tuple[list[int], list[int], list[int]] = [], [], []
    for i, prompt in enumerate(prompts):
        digest = hashlib.sha256(f"{seed}:{folded(prompt[0])}".encode("utf-8", "surrogatepass")).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64  # uniform in [0, 1]
        parts[2 if place < held_out else 1 if place < held_out + validation * (1 - held_out) else 0].append(i)
    for name, share, part in (("held_out", held_out, parts[2]), ("validation", validation, parts[1])):
        if share and not part:
            raise ValueError(
                f"{name}: no hash of the {len(prompts):,} prompts falls into a share of {share:g}: expected a larger one"
            )
    if not parts[0]:
        raise ValueError(
            "held_out, validation: expected shares that leave prompts to train on; the hashes of all fall into the two"
        )
    return parts


def _cut(votes: Votes, share: float, by: str, seed: int, name: str) -> tuple[list[int], list[int]]:
    """The prompts that stay and those that are cut off, at most ``share`` of them, in whole conversations."""
    n = len(votes.prompts)
    count = int(n * share)
    if not count:
        return list(range(n)), []
    of = conversations(votes)
    by_conversation = np.argsort(of, kind="stable")
    groups: list[list[int]] = [g.tolist() for g in np.split(by_conversation, np.cumsum(np.bincount(of))[:-1])]
    if by == "prompt":
        order: Integers = np.random.default_rng(seed).permutation(len(groups))
    elif votes.timestamp is None:
        raise ValueError("timestamp: a split by time needs this column, and the votes have none; split by prompt instead")
    else:
        first: Floats = np.minimum.reduceat(votes.timestamp, votes.bounds[:-1])
        order = np.argsort([first[group].min() for group in groups], kind="stable")[::-1]
    chosen: list[int] = []
    for g in order:
        if len(chosen) + len(groups[g]) <= count:
            chosen += groups[g]
        elif by == "time":
            break  # a conversation before this one must not be held out instead
    if not chosen:
        raise ValueError(
            f"{name}: a share of {share:g} is {count} of {n} prompts, and no whole conversation (prompts with the same first "
            "turn) fits into it: expected a larger share, or more conversations"
        )
    cut = set(chosen)
    return [i for i in range(n) if i not in cut], sorted(chosen)

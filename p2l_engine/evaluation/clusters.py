"""Categories for prompts without any: density clusters of their hidden states, named by their most typical words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.cluster import HDBSCAN
from sklearn.decomposition import PCA
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer
from sklearn.preprocessing import normalize

SMALLEST = 8  # prompts in a cluster (paper, E.1)
DIMENSIONS = 15
OTHER = "other"


def cluster(hidden: npt.NDArray[np.floating[Any]], texts: Sequence[str], smallest: int = SMALLEST, seed: int = 0) -> list[str]:
    """A category for each prompt from its hidden state [N, D] and its text [N]; "other" for prompts in no cluster. smallest:
    the fewest prompts in a cluster.

    Raises ValueError for fewer than two clusters' prompts, and for another number of texts than hidden states.
    """
    if len(hidden) < 2 * smallest:
        raise ValueError(f"prompts: expected at least {2 * smallest} to find clusters in, got {len(hidden)}")
    if len(hidden) != len(texts):
        raise ValueError(f"texts: expected one for each of the {len(hidden)} hidden states, got {len(texts)}")
    centred = normalize(hidden - hidden.mean(0))
    dimensions = min(DIMENSIONS, *centred.shape)
    flat = normalize(PCA(dimensions, random_state=seed).fit_transform(centred))
    label = HDBSCAN(min_cluster_size=smallest, min_samples=min(5, smallest), copy=True).fit_predict(flat)
    return _named(label, texts)


def _named(label: npt.NDArray[np.int64], texts: Sequence[str]) -> list[str]:
    groups = [group for group in np.unique(label) if group >= 0]
    if not groups:
        return [OTHER] * len(texts)
    joined = [" ".join(text for text, of in zip(texts, label, strict=True) if of == group) for group in groups]
    try:
        words = TfidfVectorizer(sublinear_tf=True, stop_words=list(ENGLISH_STOP_WORDS), token_pattern=r"(?u)\b[^\W\d_]{3,}\b")
        weight = words.fit_transform(joined).toarray()
        vocabulary = words.get_feature_names_out()
    except ValueError:  # no words at all, as in prompts of digits
        weight, vocabulary = np.zeros((len(groups), 0)), np.array([], str)
    names = {-1: OTHER}
    for row, group in enumerate(groups):
        typical = [str(vocabulary[i]) for i in np.argsort(-weight[row], kind="stable")[:4] if weight[row, i] > 0]
        name = ", ".join(typical) or f"cluster {group + 1}"
        names[int(group)] = name if name not in names.values() else f"{name} ({group + 1})"
    return [names[int(of)] for of in label]

"""Scores of models on prompts whose features say how likely each is right."""

from __future__ import annotations

import numpy as np

from bench import simple_routers


def scored_world(rng, n=240):
    """Six models whose scores depend on features; each of two sources lacks one of them."""
    features = rng.normal(size=(n, 8))
    chance = 1 / (1 + np.exp(-features @ rng.normal(size=(8, 6)) - rng.normal(size=6)))
    scores = (rng.random((n, 6)) < chance).astype(float)
    source = np.where(np.arange(n) % 2 == 0, "one", "two")
    scores[source == "one", 0] = scores[source == "two", 5] = np.nan
    task = np.where(features[:, 0] > 0, "high", "low")
    return simple_routers.Scored(features, scores, source, task), chance
